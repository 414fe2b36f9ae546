"""Logs with one JSON line per (token, layer): vLLM loggers and profiling hooks.

Layouts that many people wrote again in their own patch of an engine:

``vllm-logger``
    A line ``{"type":"meta", "model_id":..., ...}``, then ``{"type":"route", "req_id":"r1",
    "token_idx":9, "layer":0, "topk_ids":[56,13], "topk_weights":[0.7,0.3]}``. ``token_idx``
    restarts in every forward step; ``req_id`` is often the same for all. The first thousands of
    rows are the engine's dummy tokens.
``hook-jsonl``
    ``{"dataset":"humaneval", "problem_id":0, "layer":0, "experts":[6,5], "gating_probs":[0.7,0.3],
    "token_idx":0}``, layer after layer within a step; rows can be missing.
``hook-jsonl-steps``
    The same with ``token_pos``, which restarts in every forward step.

All need the model: none says how many experts there are.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from basis.errors import InputError
from traces.importers.base import Asked, Format, Tokens
from traces.importers.layers import asked_routing
from traces.importers.log_cells import Cells, StepFinder
from traces.importers.log_requests import phase_note, rows_of
from traces.importers.log_rows import Ints, as_tokens, layout_of
from traces.importers.log_survey import survey
from traces.json_lines import blocks, first_object, rows_of_lists, tables


@dataclass(frozen=True, kw_only=True)
class CellLines:
    """A layout of one line per cell; the fields are its keys."""

    name: str
    title: str
    kind: str | None
    """Key and value ``type`` of the lines that are cells; None where all are."""
    token: str
    layer: str
    ids: str
    weights: str
    request: str
    own_counters: bool
    """Whether the token number counts within a request; else within a step, over all requests."""
    domain: str | None

    def matches(self, source: Path, head: bytes) -> bool:
        """Whether the first line has the layout's keys."""
        first = first_object(head)
        if self.kind and first.get("type") == "meta":
            return "layers_logged" in first or "top_k" in first
        return {self.token, self.layer, self.ids} <= first.keys()

    def read(self, source: Path, asked: Asked) -> Tokens:
        """Read it; see `traces.importers.base.Format`."""
        asked_routing(asked, source)
        reader = _Reader(self, source, asked)
        found = survey(reader.cells(), str(source))
        if not found.layers:
            raise InputError(
                f"{source}: no line is a {self.kind or 'cell'} -- was anything logged?"
            )
        notes: list[str] = []
        layout = layout_of(found.layers, reader.width, asked, str(source), notes)
        notes.append(phase_note(found))
        if not found.weighted and reader.any_weights:
            notes.append("router weights are not in all rows, so they are left out")
        dropped: Counter[str] = Counter()
        again = _Reader(self, source, asked)
        return as_tokens(
            rows_of(again.cells, found, layout, str(source), dropped),
            layout,
            where=str(source),
            source="; ".join(filter(None, (self.title, source.name, reader.said_model))),
            asked=asked,
            domains=tuple(reader.domains),
            weights=found.weighted,
            dropped=dropped,
            notes=notes,
        )


class _Reader:
    """Reads a file of cells once; remembers the requests and domains that it met."""

    def __init__(self, layout: CellLines, source: Path, asked: Asked) -> None:
        self._keys, self._source, self._asked = layout, source, asked
        self._requests: dict[str, int] = {}
        self.domains: dict[str, int] = {}
        self.width = 0
        self.any_weights = False
        self.said_model = ""

    def cells(self) -> Iterator[Cells]:
        """Read the cells of block after block."""
        steps, run = StepFinder(own_counters=self._keys.own_counters), 0
        for record, table in tables(self._source, self._schema()):
            is_meta = self._equals(table, "meta")
            if is_meta.any():
                said = table["model_id"].drop_null()
                self.said_model = self.said_model or (said[0].as_py() if len(said) else "")
            runs = run + np.cumsum(is_meta)
            run = int(runs[-1])
            rows = np.flatnonzero(self._equals(table, self._keys.kind))
            if len(rows):
                yield self._cells(table.take(rows), record + rows, runs[rows], steps)

    def _equals(self, table: Any, kind: str | None) -> NDArray[np.bool_]:
        if self._keys.kind is None:
            return np.full(table.num_rows, kind is None)
        return np.asarray(pc.fill_null(pc.equal(table["type"], kind), False))

    def _cells(self, table: Any, record: Ints, run: Ints, steps: StepFinder) -> Cells:
        keys = self._keys
        self._check_whole(table, record)
        token, layer = (np.asarray(table[k]).astype(np.int64) for k in (keys.token, keys.layer))
        if (token < 0).any() or (layer < 0).any():
            raise InputError(
                f"{self._source}: {keys.token} {int(token.min())}, {keys.layer} "
                f"{int(layer.min())} -- at least 0"
            )
        ids, request = self._ids(table[keys.ids], record), self._numbers(table)
        return Cells(
            record=record.astype(np.int64),
            run=run.astype(np.int64),
            request=request,
            domain=self._domains(table),
            token=token,
            layer=layer,
            step=steps.number(run, request, layer, token),
            ids=ids,
            weights=self._weights(table[keys.weights], ids.shape),
        )

    def _check_whole(self, table: Any, record: Ints) -> None:
        for key in (self._keys.token, self._keys.layer, self._keys.ids):
            if table[key].null_count:
                at = int(np.flatnonzero(np.asarray(table[key].is_null()))[0])
                raise InputError(
                    f"{self._source}: record {int(record[at])} has no {key!r} -- every row needs "
                    "one; was it written by another logger?"
                )

    def _ids(self, column: Any, record: Ints) -> NDArray[np.int32]:
        first = len(column[0])
        self.width = self.width or first
        what = f"{self._source}: {self._keys.ids!r} of a record in {record[0]} to {record[-1]}"
        return rows_of_lists(column, self.width, what)

    def _weights(self, column: Any, shape: tuple[int, ...]) -> NDArray[np.float32]:
        self.any_weights |= column.null_count < len(column)
        if column.null_count:
            return np.full(shape, np.nan, np.float32)
        return rows_of_lists(column, shape[1], f"{self._source}: {self._keys.weights!r}")

    def _numbers(self, table: Any) -> Ints:
        texts = table[self._keys.request].cast(pa.string())
        if self._keys.domain:  # problem 0 of one data set is not problem 0 of another
            texts = pc.binary_join_element_wise(
                table[self._keys.domain], texts, "\t", null_handling="replace"
            )
        return _codes(texts, self._requests)

    def _domains(self, table: Any) -> Ints:
        if self._keys.domain is None:
            return np.zeros(table.num_rows, np.int64)
        return _codes(pc.fill_null(table[self._keys.domain], self._asked.domain), self.domains)

    def _schema(self) -> Any:
        keys = self._keys
        types = {
            "type": pa.string(),
            "model_id": pa.string(),
            keys.request: _type_of(self._source, keys.request),
            keys.token: pa.int32(),
            keys.layer: pa.int32(),
            keys.ids: pa.list_(pa.int32()),
            keys.weights: pa.list_(pa.float32()),
        }
        if keys.domain:
            types[keys.domain] = pa.string()
        return pa.schema(types)


def _type_of(source: Path, key: str) -> Any:
    """Return the Arrow type of a key that is a number with some loggers, a text with others."""
    for _, block in blocks(source):
        for line in block.split(b"\n"):
            value = first_object(line).get(key)
            if value is not None:
                return pa.int64() if type(value) is int else pa.string()
        break
    return pa.string()


def _codes(texts: Any, known: dict[str, int]) -> Ints:
    """Return a number for each text, 0, 1, ... in order of first appearance."""
    encoded = pc.fill_null(texts, "").combine_chunks().dictionary_encode()
    names = [known.setdefault(name, len(known)) for name in encoded.dictionary.to_pylist()]
    return np.array(names, np.int64)[np.asarray(encoded.indices)]


VLLM_LOGGER = CellLines(
    name="vllm-logger",
    title="JSON lines of a vLLM routing logger",
    kind="route",
    token="token_idx",
    layer="layer",
    ids="topk_ids",
    weights="topk_weights",
    request="req_id",
    own_counters=False,
    domain=None,
)
HOOK_JSONL = CellLines(
    name="hook-jsonl",
    title="JSON lines of a routing hook",
    kind=None,
    token="token_idx",
    layer="layer",
    ids="experts",
    weights="gating_probs",
    request="problem_id",
    own_counters=True,
    domain="dataset",
)
HOOK_STEPS = replace(
    HOOK_JSONL,
    name="hook-jsonl-steps",
    title="JSON lines of a routing hook, positions in the step",
    token="token_pos",
    own_counters=False,
)
FORMATS_LINES: tuple[Format, ...] = (VLLM_LOGGER, HOOK_JSONL, HOOK_STEPS)
