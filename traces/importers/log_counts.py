"""Totals per layer and expert, without tokens: CSV (``counts-csv``) and JSON (``counts-json``).

CSV: columns ``layer`` (or ``layer_id``), ``expert`` (``expert_id``) and ``count`` (``counts``), in
any order, one row per expert; what is not listed was not used. JSON: ``{"0": {"3": 17}}``, keys
maybe ``layer_0`` and ``expert_3``. Pickled counters are refused: loading one runs whatever is
in it. Counts are (token, choice) pairs.
"""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from basis.errors import InputError
from traces.counts_trace import CountsTrace
from traces.importers.base import Asked, Format, Loads
from traces.importers.files import check_file
from traces.importers.layers import UNKNOWN_MODEL, routing_of
from traces.importers.log_rows import model_layers

_NAMES = {
    "layer": ("layer", "layer_id"),
    "expert": ("expert", "expert_id"),
    "count": ("count", "counts"),
}
_MOST_BYTES = 2**28
_MOST_EXPERTS = 65534
_MOST_LAYERS = 4096
_JSON = re.compile(rb'\s*\{\s*"(layer_)?\d+"\s*:\s*\{\s*"(expert_)?\d+"\s*:\s*[\d.]+\s*[,}]')
_MOST_COUNT = 2**53
_KEY = re.compile(r"(?:layer_|expert_)?(\d{1,6})")
Triple = tuple[int, int, int]


class CountsCsv:
    """CSV of totals; see the module."""

    name = "counts-csv"
    title = "CSV of layer, expert, count"

    def matches(self, source: Path, head: bytes) -> bool:
        """Whether the header names a layer, an expert and a count, and nothing else."""
        return _columns(head) is not None

    def read(self, source: Path, asked: Asked) -> Loads:
        """Read it; see `traces.importers.base.Format`."""
        _check_size(source)
        return _loads(_csv_triples(source), source, self.title, asked)


class CountsJson:
    """JSON of totals; see the module."""

    name = "counts-json"
    title = "JSON of counts by layer and expert"

    def matches(self, source: Path, head: bytes) -> bool:
        """Whether it begins with numbered layers of numbered experts."""
        return bool(_JSON.match(head))

    def read(self, source: Path, asked: Asked) -> Loads:
        """Read it; see `traces.importers.base.Format`."""
        _check_size(source)
        return _loads(_json_triples(source), source, self.title, asked)


class CountsPickle:
    """Recognised to be refused."""

    name = "counts-pickle"
    title = "pickled counters (refused: loading one runs what is in it)"

    def matches(self, source: Path, head: bytes) -> bool:
        """Whether it is a pickle by name and first byte."""
        return source.suffix in (".pkl", ".pickle") and head.startswith(b"\x80")

    def read(self, source: Path, asked: Asked) -> Loads:
        """Refuse it."""
        raise InputError(
            f"{source}: a pickle -- nothing is unpickled, since that runs what is in it -- write "
            "the counts as CSV (layer, expert, count) or as JSON {layer: {expert: count}}"
        )


FORMATS_COUNTS: tuple[Format, ...] = (CountsCsv(), CountsJson(), CountsPickle())


def _check_size(source: Path) -> None:
    size = check_file(source)
    if size > _MOST_BYTES:
        raise InputError(f"{source}: {size} bytes -- at most {_MOST_BYTES}; are these totals?")


def _columns(head: bytes) -> dict[str, int] | None:
    """Return the place of each column, or None."""
    first = head.removeprefix(b"\xef\xbb\xbf").split(b"\n", 1)[0].decode("utf-8", "replace")
    names = [name.strip().strip('"').lower() for name in first.split(",")]
    found = {
        key: names.index(alias)
        for key, aliases in _NAMES.items()
        for alias in aliases
        if alias in names
    }
    return found if len(found) == len(names) == len(_NAMES) else None


def _csv_triples(source: Path) -> Iterator[Triple]:
    with source.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        columns = _columns(file.readline(2**12).encode())
        if columns is None:
            raise InputError(f"{source}: no columns layer, expert and count -- write such a header")
        line = 2
        try:
            for line, row in enumerate(csv.reader(file), 2):
                if row:
                    yield _triple([row[columns[key]] for key in _NAMES], f"{source}: line {line}")
        except (csv.Error, IndexError) as error:
            raise InputError(f"{source}: line {line}: {error} -- was it cut off?") from None


def _json_triples(source: Path) -> Iterator[Triple]:
    try:
        layers = json.loads(source.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: not JSON ({error}) -- was it cut off?") from None
    for layer, experts in layers.items() if isinstance(layers, dict) else ():
        if not isinstance(experts, dict):
            raise InputError(f"{source}: layer {layer!r} is no mapping -- {{expert: count}}")
        for expert, count in experts.items():
            yield _triple([layer, expert, count], f"{source}: layer {layer!r}")


def _triple(values: list[Any], where: str) -> Triple:
    keys = [_KEY.fullmatch(str(value).strip()) for value in values[:2]]
    try:
        count = float(values[2])
    except (TypeError, ValueError):
        count = -1
    layer, expert = (int(key[1]) if key else -1 for key in keys)
    whole = 0 <= layer < _MOST_LAYERS and 0 <= expert <= _MOST_EXPERTS and 0 <= count <= _MOST_COUNT
    if not whole or count != int(count):
        raise InputError(
            f"{where}: layer {values[0]!r}, expert {values[1]!r}, count {values[2]!r} -- whole "
            f"numbers from 0, layers up to {_MOST_LAYERS - 1} and experts up to {_MOST_EXPERTS} "
            "(no model has as many), counts up to 2^53"
        )
    return layer, expert, int(count)


def _loads(triples: Iterator[Triple], source: Path, title: str, asked: Asked) -> Loads:
    found: dict[tuple[int, int], int] = {}
    for layer, expert, count in triples:
        if (layer, expert) in found:
            raise InputError(
                f"{source}: layer {layer}, expert {expert} comes twice -- totals, once"
            )
        found[layer, expert] = count
    if not any(found.values()):
        raise InputError(f"{source}: no count above 0 -- record again")
    numbered = tuple(sorted({layer for layer, _ in found}))
    notes: list[str] = []
    experts = 1 + max(expert for _, expert in found)
    name, top_k, ids = UNKNOWN_MODEL, None, numbered
    if asked.model is None:
        notes.append(f"no model was named: {experts} experts, since no higher id is listed")
    else:
        model = routing_of(asked.model)
        if experts > model.num_experts:
            raise InputError(
                f"{source}: expert {experts - 1}; {model.name} has {model.num_experts} experts -- "
                "give the config.json of the model that was recorded"
            )
        name, top_k, experts = model.name, model.top_k, model.num_experts
        ids = model_layers(numbered, model, str(source), notes)
    counts = np.zeros((1, len(numbered), experts), np.int64)
    for (layer, expert), count in found.items():
        counts[0, numbered.index(layer), expert] = count
    notes += sum_notes(counts, top_k)
    trace = CountsTrace(
        model=name,
        moe_layer_ids=ids,
        counts=counts,
        top_k=top_k,
        source=f"{title}; {source.name}",
        licence=asked.licence,
    )
    return Loads(counts=trace, notes=notes)


def sum_notes(counts: Any, top_k: int | None) -> Iterator[str]:
    """Say where sums are not what tokens give: the same in all layers, a multiple of top-k.

    Parameters
    ----------
    counts
        ``[1, L, E]``.
    """
    sums = counts[0].sum(axis=1)
    if len(set(sums.tolist())) > 1:
        yield f"layers counted {sums.min()} to {sums.max()} choices: not the same tokens in all"
    if top_k and (sums % top_k).any():
        yield f"sums of layers are no multiple of top-{top_k}: lost choices, or another model"
