"""Recording of whatever runs through a Hugging Face model, into a trace file that grows as it runs.

Whose tokens a forward pass holds is read from the model's own inputs (`traces.record_requests`),
what they chose from its experts (`traces.record_experts`). Torch is not imported here; the tensors
come from the model.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from basis.errors import InputError
from traces.meta import TraceMeta
from traces.parquet_columns import Columns
from traces.record_experts import ExpertsHooks
from traces.record_file import TraceSink, open_sink
from traces.record_generate import watch_generate
from traces.record_requests import Batch, Bools, Requests

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class TraceOrigin:
    """What a trace says of where it comes from."""

    model: str = ""
    """Name of the model; without, the one in its configuration."""
    source: str = ""
    """Which text was run; the versions of transformers and torch are added."""
    licence: str = "not stated"
    note: str = ""


class Recording:
    """A recording that is going on; see `record`."""

    def __init__(self, requests: Requests, sink: TraceSink) -> None:
        self._requests, self._sink = requests, sink
        self._batch: Batch | None = None

    @property
    def next_domains(self) -> Sequence[str]:
        """Domain of each row of the batches that begin from now on."""
        return self._requests.next_domains

    @next_domains.setter
    def next_domains(self, names: Sequence[str]) -> None:
        self._requests.next_domains = tuple(names)

    @property
    def num_tokens(self) -> int:
        """Rows recorded so far: one per real token."""
        return self._sink.rows

    @property
    def num_requests(self) -> int:
        """Requests begun so far."""
        return self._requests.begun

    def _pass_begins(self, inputs: Mapping[str, Any]) -> None:
        before = self._requests.begun
        self._batch = self._requests.begins(inputs)
        if self._requests.begun > before:
            self._sink.batch_over()

    def _pass_ends(self, output: Any, tokens: int) -> tuple[Columns, Bools]:
        assert self._batch is not None  # a pass that ends has begun
        self._requests.ends(output)
        return self._batch.flat(tokens)


@contextmanager
def record(
    model: "nn.Module",
    path: Path | str,
    *,
    domain: str | Sequence[str] = "text",
    candidates: int = 0,
    num_experts: int | None = None,
    origin: TraceOrigin | None = None,
) -> Iterator[Recording]:
    """Record the routing of everything that runs through a model while the block lasts.

    Requests are numbered over all calls. A generated token has a row once it is fed to the model:
    the last one of a text never is. The file appears when the block ends without an error.

    Parameters
    ----------
    model
        A Hugging Face MoE model of transformers 5 or later, or one whose experts are called alike.
    path
        Parquet file to write.
    domain
        Kind of text: one for all rows, or all that there will be; then say which by
        `Recording.next_domains` before each batch.
    candidates
        Best candidates M to record of each token and layer, with the router's scores; 0 for none.
    num_experts
        Experts per layer, if the model's modules do not say.
    origin
        What the file says of itself.

    Yields
    ------
    Recording
        Takes domains and tells how far it is.

    Raises
    ------
    InputError
        When the model, or the way in which it is run, cannot be recorded; or nothing was run.

    Examples
    --------
    >>> with record(model, "out.parquet", domain="code"):  # doctest: +SKIP
    ...     model.generate(**inputs, max_new_tokens=64)
    """
    domains = (domain,) if isinstance(domain, str) else tuple(dict.fromkeys(domain))
    if not domains:
        raise InputError("no domain (0 names) -- each row needs one -- name at least one domain")
    requests = Requests(domains)

    def meta(top_k: int) -> TraceMeta:
        return _describe(model, hooks, top_k, candidates, origin or TraceOrigin())

    with ExitStack() as opened:
        sink = opened.enter_context(open_sink(Path(path), meta, domains))
        recording = Recording(requests, sink)
        hooks = ExpertsHooks(
            model,
            num_experts=num_experts,
            num_candidates=candidates,
            begins=recording._pass_begins,
            ends=recording._pass_ends,
            took=sink.add,
        )
        opened.enter_context(hooks.installed())
        opened.enter_context(watch_generate(model, requests.generates))
        yield recording


def _describe(
    model: "nn.Module", hooks: ExpertsHooks, top_k: int, candidates: int, origin: TraceOrigin
) -> TraceMeta:
    named = getattr(getattr(model, "config", None), "_name_or_path", "")
    used = [f"{name} {found}" for name in ("transformers", "torch") if (found := _installed(name))]
    return TraceMeta(
        model=origin.model or named or type(model).__name__,
        num_experts=hooks.num_experts,
        top_k=top_k,
        moe_layer_ids=hooks.moe_layer_ids,
        source="; ".join(filter(None, (origin.source, f"recorded with {', '.join(used)}"))),
        licence=origin.licence,
        note=origin.note,
        num_candidates=candidates,
    )


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
