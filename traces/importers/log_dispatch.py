"""JSON lines with a header, a row per token, and a footer (``dispatch-jsonl``).

``{"row_type":"header", "provenance":{"model_id":..., "expert_count":32, "top_k":8,
"moe_layer_indices":[...]}}``, then per request maybe ``{"row_type":"request",
"input_token_ids":[...]}`` and for each token ``{"row_type":"observed-dispatch", "request_id":"p0",
"phase":"prefill", "token_index":0, "routing":[{"layer_index":0, "expert_ids":[13,14]}, ...]}``
(also ``forward-token``, with ``gate_weights``), at last ``{"row_type":"footer", ...}`` with counts.
``token_index`` restarts for decode: positions go on after the prompt. The header says all of the
geometry, so no model is needed; one that is named must agree.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from basis.errors import InputError
from traces.importers.base import Asked, Format, Tokens
from traces.importers.log_rows import Ints, Layout, Rows, as_tokens, fill
from traces.json_lines import first_object, rows_of_lists, tables

_TOKEN_ROWS = ("observed-dispatch", "forward-token", "token")
_MOST_HELD_BYTES = 2**30
_ROUTING = pa.list_(
    pa.struct(
        {
            "layer_index": pa.int32(),
            "expert_ids": pa.list_(pa.int32()),
            "gate_weights": pa.list_(pa.float32()),
        }
    )
)
_SCHEMA = pa.schema(
    {
        "row_type": pa.string(),
        "request_id": pa.string(),
        "phase": pa.string(),
        "token_index": pa.int32(),
        "routing": _ROUTING,
        "input_token_ids": pa.list_(pa.int64()),
        "request_count": pa.int64(),
        "prefill_forward_token_count": pa.int64(),
        "decode_forward_token_count": pa.int64(),
    }
)


@dataclass(kw_only=True)
class _Footer:
    """What the last line says and what was there."""

    seen: bool = False
    tokens: int | None = None
    requests: int | None = None
    found_tokens: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """T tokens of one or several requests, as they come."""

    request: Ints
    decode: NDArray[np.bool_]
    token: Ints
    experts: NDArray[np.int32]
    weights: NDArray[np.float32]

    def select(self, rows: Any) -> "_Part":
        return _Part(**{name: value[rows] for name, value in vars(self).items()})

    @classmethod
    def join(cls, parts: list["_Part"]) -> "_Part":
        names = cls.__dataclass_fields__
        return cls(**{n: np.concatenate([getattr(p, n) for p in parts]) for n in names})


@dataclass(kw_only=True)
class _Reader:
    source: Path
    layout: Layout
    footer: _Footer = field(default_factory=_Footer)
    requests: dict[str, int] = field(default_factory=dict)
    prompts: dict[int, int] = field(default_factory=dict)
    """Prompt tokens of a request, where a row of the request says so."""
    done: set[int] = field(default_factory=set)

    def rows(self) -> Iterator[Rows]:
        """Read whole requests, positions in order."""
        held: list[_Part] = []
        for record, table in tables(self.source, _SCHEMA):
            part = self._part(record, table)
            if part is None:
                continue
            whole = _Part.join([*held, part])
            end = int(np.flatnonzero(np.diff(whole.request, prepend=-1))[-1])
            if whole.experts[end:].nbytes > _MOST_HELD_BYTES:
                raise InputError(
                    f"{self.source}: a request of more than {_MOST_HELD_BYTES // 2**20} MiB -- "
                    "requests must differ in request_id"
                )
            if end:
                yield from self._ordered(whole.select(slice(0, end)))
            held = [whole.select(slice(end, None))]
        if held:
            yield from self._ordered(held[0])
        self._check_footer()

    def _part(self, record: int, table: Any) -> _Part | None:
        kind = pc.fill_null(table["row_type"], "")
        footer = np.flatnonzero(np.asarray(pc.equal(kind, "footer")))
        if self.footer.seen or (len(footer) and footer[0] < table.num_rows - 1):
            raise InputError(
                f"{self.source}: record {record} stands after the footer -- cut it off"
            )
        self._note_prompts(table.filter(pc.equal(kind, "request")))
        self._note_footer(table.filter(pc.equal(kind, "footer")))
        tokens = table.filter(pc.is_in(kind, value_set=pa.array(_TOKEN_ROWS)))
        if not tokens.num_rows:
            return None
        for key in ("request_id", "phase", "token_index", "routing"):
            if tokens[key].null_count:
                raise InputError(
                    f"{self.source}: a token row after record {record} has no {key!r} -- every "
                    "token needs one"
                )
        self._check_phases(tokens["phase"])
        experts, weights = self._cells(tokens["routing"].combine_chunks(), record)
        names = tokens["request_id"].to_pylist()
        request = [self.requests.setdefault(name, len(self.requests)) for name in names]
        self.footer.found_tokens += tokens.num_rows
        return _Part(
            request=np.array(request, np.int64),
            decode=np.asarray(pc.equal(tokens["phase"], "decode")),
            token=np.asarray(tokens["token_index"]).astype(np.int64),
            experts=experts,
            weights=weights,
        )

    def _check_phases(self, phases: Any) -> None:
        strange = set(pc.unique(phases).to_pylist()) - {"prefill", "decode"}
        if strange:
            raise InputError(
                f"{self.source}: phase {', '.join(sorted(strange))!r} -- prefill or decode"
            )

    def _cells(self, routing: Any, record: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return experts and weights ``[T, L, K]``, -1 and NaN where a token lacks a layer."""
        where = f"{self.source}: routing after record {record}"
        row = np.repeat(np.arange(len(routing)), np.asarray(pc.list_value_length(routing)))
        cells = routing.flatten()
        layers, ids, weights = (cells.field(i) for i in range(3))
        if cells.null_count or layers.null_count:
            raise InputError(f"{where}: a layer has no layer_index -- every entry needs one")
        place = self.layout.place(np.asarray(layers).astype(np.int64), where)
        shape = (len(routing), len(self.layout.numbered), self.layout.top_k)
        key = row * shape[1] + place
        if len(np.unique(key)) < len(key):
            raise InputError(f"{where}: a token has a layer twice -- one entry per layer")
        chosen = rows_of_lists(pa.chunked_array([ids]), shape[2], f"{where}: expert_ids")
        experts = fill(row, place, chosen, shape)
        if weights.null_count:
            return experts, np.full(shape, np.nan, np.float32)
        gates = rows_of_lists(pa.chunked_array([weights]), shape[2], f"{where}: gate_weights")
        return experts, fill(row, place, gates, shape, np.nan)

    def _note_prompts(self, table: Any) -> None:
        lengths = pc.list_value_length(table["input_token_ids"]).to_pylist()
        for name, length in zip(table["request_id"].to_pylist(), lengths, strict=True):
            if name is not None and length is not None:
                self.prompts[self.requests.setdefault(name, len(self.requests))] = length

    def _note_footer(self, table: Any) -> None:
        if not table.num_rows:
            return
        last = table.slice(table.num_rows - 1).to_pylist()[0]
        self.footer.seen, self.footer.requests = True, last["request_count"]
        counts = [last["prefill_forward_token_count"], last["decode_forward_token_count"]]
        if None not in counts:
            self.footer.tokens = sum(counts)

    def _ordered(self, part: _Part) -> Iterator[Rows]:
        requests = set(np.unique(part.request).tolist())
        again = requests & self.done
        if again:
            name = list(self.requests)[min(again)]
            raise InputError(
                f"{self.source}: request {name!r} comes again after another one -- the rows of a "
                "request must stand together"
            )
        self.done |= requests
        part = part.select(np.lexsort((part.token, part.decode, part.request)))
        prompt = self._prompt_lengths(part)
        position = part.token + np.where(part.decode, prompt, 0)
        same = np.diff(part.request) == 0
        if ((np.diff(position) <= 0) & same).any():
            raise InputError(
                f"{self.source}: two tokens of a request have one position -- token_index restarts "
                "only where decode begins"
            )
        yield Rows(
            request=part.request,
            position=position,
            decode=part.decode,
            step=np.where(part.decode, position - prompt + 1, 0),
            domain=np.zeros(len(position), np.int64),
            experts=part.experts,
            weights=part.weights,
        )

    def _prompt_lengths(self, part: _Part) -> Ints:
        """Return ``[T]`` prompt tokens of each token's request."""
        ids, of_row = np.unique(part.request, return_inverse=True)
        seen = np.zeros(len(ids), np.int64)
        prefill = ~part.decode
        np.maximum.at(seen, of_row[prefill], part.token[prefill] + 1)
        said = [self.prompts.get(id_, int(n)) for id_, n in zip(ids.tolist(), seen, strict=True)]
        return np.array(said, np.int64)[of_row]

    def _check_footer(self) -> None:
        found = {"requests": len(self.requests), "tokens": self.footer.found_tokens}
        if not self.footer.seen:
            raise InputError(f"{self.source}: no footer after {found} -- the file was cut off")
        for name, said in (("requests", self.footer.requests), ("tokens", self.footer.tokens)):
            if said is not None and said != found[name]:
                raise InputError(
                    f"{self.source}: {found[name]} {name}, the footer says {said} -- lines are "
                    "missing; fetch it again"
                )


class DispatchJsonl:
    """The layout; see the module."""

    name = "dispatch-jsonl"
    title = "JSON lines of observed dispatch, with header and footer"

    def matches(self, source: Path, head: bytes) -> bool:
        """Whether the first line is the header."""
        first = first_object(head)
        return first.get("row_type") == "header" and isinstance(first.get("provenance"), dict)

    def read(self, source: Path, asked: Asked) -> Tokens:
        """Read it; see `traces.importers.base.Format`."""
        with source.open("rb") as file:
            header = first_object(file.read(2**16))
        layout = _layout(header, source, asked)
        reader = _Reader(source=source, layout=layout)
        return as_tokens(
            reader.rows(),
            layout,
            where=str(source),
            source=f"{self.title}; {source.name}",
            asked=asked,
            weights=_has_weights(source),
            dropped=Counter(),
            notes=["step is counted within each request: the prompt is step 0"],
        )


def _has_weights(source: Path) -> bool:
    """Whether the first block with tokens has weights in all of them."""
    for _, table in tables(source, _SCHEMA):
        cells = table["routing"].combine_chunks().flatten()
        if len(cells):
            return not cells.field(2).null_count
    return False


def _layout(header: dict[str, Any], source: Path, asked: Asked) -> Layout:
    said = header.get("provenance")
    said = said if isinstance(said, dict) else {}
    layers, experts, top_k = (
        said.get(key) for key in ("moe_layer_indices", "expert_count", "top_k")
    )
    good = isinstance(layers, list) and layers and all(type(v) is int and v >= 0 for v in layers)
    if not good or type(experts) is not int or type(top_k) is not int:
        raise InputError(
            f"{source}: the header gives expert_count {experts!r}, top_k {top_k!r}, "
            f"moe_layer_indices {layers!r} -- two numbers and a list; was the first line cut off?"
        )
    ids = tuple(sorted(set(layers or [])))
    model = asked.model
    if model and (model.num_experts, model.top_k) != (experts, top_k):
        raise InputError(
            f"{source}: {experts} experts, top-{top_k}; {model.name} has {model.num_experts}, "
            f"top-{model.top_k} -- give the config.json of the model that was recorded"
        )
    if model and not set(ids) <= set(model.moe_layer_ids):
        raise InputError(
            f"{source}: layers {list(ids)} are not all MoE layers of {model.name} -- give the "
            "config.json of the model that was recorded"
        )
    return Layout(
        model=model.name if model else str(said.get("model_id", "not stated")),
        num_experts=experts,
        top_k=top_k,
        numbered=ids,
        moe_layer_ids=ids,
    )


FORMATS_DISPATCH: tuple[Format, ...] = (DispatchJsonl(),)
