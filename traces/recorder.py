"""Recording of routing from a torch model whose caller says whose tokens each forward pass holds.

For loops of one's own; whatever runs through a Hugging Face model is recorded without a word by
`traces.record_model.record`. Both read the same hooks (`traces.record_experts`). Torch is not
imported here; the tensors come from the model.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from basis import InputError
from traces.parquet_columns import Columns, row_shapes
from traces.record_experts import ExpertsHooks
from traces.record_requests import Batch, Bools
from traces.routing_trace import RoutingTrace, TraceMeta

if TYPE_CHECKING:
    from torch import nn


class RoutingRecorder:
    """Records the routing of a model's forward passes; use as a context manager.

    Before each forward pass `begin` says whose tokens these are; `trace` gives everything recorded.

    Parameters
    ----------
    model
        A torch module whose MoE layers have a submodule named ``experts`` below a numbered layer.
    num_experts
        Experts per layer; an id outside ``0..num_experts - 1`` is an error.

    Raises
    ------
    InputError
        When the model has no such module, or two of one layer.

    Examples
    --------
    >>> with RoutingRecorder(model, num_experts=32) as recorder:  # doctest: +SKIP
    ...     recorder.begin(request_ids=[0, 1], phase="prefill", step=0, domains=["code", "prose"])
    ...     model(input_ids)
    """

    def __init__(self, model: "nn.Module", *, num_experts: int) -> None:
        self._recorded: list[Columns] = []
        self._hooks = ExpertsHooks(
            model,
            num_experts=num_experts,
            begins=self._pass_begins,
            ends=self._pass_ends,
            took=self._recorded.append,
        )
        self._installed = ExitStack()
        self._batch: Batch | None = None
        self._domains: dict[str, int] = {}

    @property
    def moe_layer_ids(self) -> tuple[int, ...]:
        """Index of each MoE layer in the model, ascending."""
        return self._hooks.moe_layer_ids

    def __enter__(self) -> Self:
        self._installed.enter_context(self._hooks.installed())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._installed.close()
        self._batch = None

    def begin(
        self,
        *,
        request_ids: Sequence[int],
        phase: str | npt.ArrayLike,
        step: npt.ArrayLike,
        domains: Sequence[str],
        positions: npt.ArrayLike | None = None,
        mask: npt.ArrayLike = True,
    ) -> None:
        """Describe the next forward pass, of B requests with S tokens each, padding included.

        Parameters
        ----------
        request_ids
            Request of each row of the batch, length B.
        phase
            ``"prefill"`` or ``"decode"``, for all tokens or an array of these words, ``[B, S]``.
        step
            Step of the engine, a number or ``[B, S]``; 0 for the prefill of a request.
        domains
            Kind of text of each request, length B.
        positions
            Position of each token in its request, ``[B, S]``; if absent, the real tokens of a row
            are counted from 0.
        mask
            True for real tokens, ``[B, S]``; what is False (padding) is not recorded.

        Raises
        ------
        InputError
            When a phase is unknown or a domain missing; other shapes are checked in the pass.
        """
        if not request_ids or len(domains) != len(request_ids):
            raise InputError(
                f"begin() got {len(request_ids)} requests and {len(domains)} domains -- each "
                "request needs one -- name the domain of every row"
            )
        codes = [self._domains.setdefault(domain, len(self._domains)) for domain in domains]
        columns: dict[str, npt.ArrayLike] = {
            "request_id": np.asarray(request_ids)[:, None],
            "decode": _is_decode(phase),
            "step": step,
            "domain": np.asarray(codes)[:, None],
        }
        if positions is not None:
            columns["position"] = positions
        self._batch = Batch(
            rows=len(request_ids),
            columns={name: np.asarray(values) for name, values in columns.items()},
            mask=np.asarray(mask, dtype=bool),
        )

    def trace(self, *, model: str, source: str, licence: str, note: str = "") -> RoutingTrace:
        """Everything recorded so far, sorted by request and position.

        Parameters
        ----------
        model, source, licence, note
            Go into the trace's metadata as they are.

        Returns
        -------
        RoutingTrace
            One row per real token, with weights.

        Raises
        ------
        InputError
            When nothing was recorded.
        """
        if not self._recorded:
            raise InputError(
                "no forward pass was recorded (0 tokens) -- at least one is needed -- call the "
                "model inside the recorder's with block, after begin()"
            )
        meta = TraceMeta(
            model=model,
            num_experts=self._hooks.num_experts,
            top_k=self._recorded[0]["experts"].shape[2],
            moe_layer_ids=self.moe_layer_ids,
            source=source,
            licence=licence,
            note=note,
        )
        columns: Columns = {
            name: np.concatenate([part[name] for part in self._recorded]).astype(dtype, copy=False)
            for name, (dtype, _) in row_shapes(meta, weights=True, candidates=False).items()
        }
        trace = RoutingTrace(meta=meta, domains=tuple(self._domains), **columns)
        return trace.select(np.lexsort((trace.position, trace.request_id)))

    def _pass_begins(self, _: Mapping[str, Any]) -> None:
        if self._batch is None:
            raise InputError(
                "a forward pass without begin() -- each needs its requests -- call begin() before"
            )

    def _pass_ends(self, _: Any, tokens: int) -> tuple[Columns, Bools]:
        batch, self._batch = self._batch, None
        assert batch is not None  # _pass_begins refused otherwise
        return batch.flat(tokens)


def _is_decode(phase: str | npt.ArrayLike) -> Bools:
    words = np.asarray(phase)
    unknown = sorted(set(words.ravel().tolist()) - {"prefill", "decode"})
    if unknown:
        raise InputError(
            f"phase {unknown[0]!r} -- allowed are 'prefill' and 'decode' -- name one of these"
        )
    decode: Bools = words == "decode"
    return decode
