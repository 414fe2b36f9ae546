"""Per-request JSON of a Hugging Face hook (``router-json``): a file, or a folder of files.

``{"router_data":[{"token_387":{"layer_0":{"selected_experts":[31,4], "selected_probs":[0.6,0.4]},
"layer_1":{...}}}, ...]}``; a file is a request, an entry of the list a forward step. The number of
a token is its position where the numbers ascend, else the order is. Entries of several tokens are
prefill. A file is read whole and must be smaller than 256 MiB.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from basis.errors import InputError
from traces.importers.base import Asked, Format, Tokens
from traces.importers.files import check_file
from traces.importers.layers import asked_routing
from traces.importers.log_rows import Layout, Rows, as_tokens, fill, head_of, layout_of

_MOST_BYTES = 2**28
_TOKEN = re.compile(r"token_(\d{1,9})")
_LAYER = re.compile(r"layer_(\d{1,6})")
_KEY = re.compile(rb'"router_data"\s*:\s*\[')


class RouterJson:
    """The layout; see the module."""

    name = "router-json"
    title = "JSON with router_data of a Hugging Face hook, one file per request"

    def matches(self, source: Path, head: bytes) -> bool:
        """Whether the file, or the first JSON file of the folder, has router_data."""
        head = head_of(source, head, _files(source))
        return head.lstrip().startswith(b"{") and bool(_KEY.search(head))

    def read(self, source: Path, asked: Asked) -> Tokens:
        """Read it; see `traces.importers.base.Format`."""
        asked_routing(asked, source)
        files = _files(source) if source.is_dir() else [source]
        if not files:
            raise InputError(f"{source}: no .json files -- give the folder of the requests")
        first = _Request(files[0])
        notes: list[str] = []
        layout = layout_of(first.layers, first.width, asked, str(source), notes)
        notes.append("an entry of several tokens is prefill, an entry of one token is decode")
        return as_tokens(
            _rows(files, layout, first.weighted),
            layout,
            where=str(source),
            source=f"{self.title}; {source.name}",
            asked=asked,
            weights=first.weighted,
            dropped=Counter(),
            notes=notes,
        )


FORMATS_ROUTER_JSON: tuple[Format, ...] = (RouterJson(),)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.json") if path.is_file())


def _rows(files: list[Path], layout: Layout, weighted: bool) -> Iterator[Rows]:
    for number, path in enumerate(files):
        request = _Request(path)
        if weighted and not request.weighted:
            raise InputError(
                f"{path}: has no selected_probs in some layers, {files[0].name} has all -- record "
                "them in all requests, or in none"
            )
        yield request.rows(number, layout)


class _Request:
    """One file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._steps: list[int] = []
        self._numbers: list[int] = []
        self._cells: list[tuple[int, int]] = []
        """Token and layer of each cell."""
        self._ids: list[list[int]] = []
        self._probs: list[list[float]] = []
        for step, entry in enumerate(_entries(path)):
            for name, layers in self._mapping(entry, f"entry {step}").items():
                self._add(step, name, layers)
        if not self._ids:
            raise InputError(f"{path}: router_data has no tokens -- record again")
        self.width = len(self._ids[0])
        self.layers = {layer for _, layer in self._cells}
        self.weighted = len(self._probs) == len(self._ids)

    def _add(self, step: int, name: str, layers: Any) -> None:
        self._numbers.append(self._number(_TOKEN, name))
        self._steps.append(step)
        for layer, cell in self._mapping(layers, name).items():
            found = self._mapping(cell, f"{name}, {layer}")
            ids, probs = found.get("selected_experts"), found.get("selected_probs")
            where = f"{self._path}: {name}, {layer}"
            if not isinstance(ids, list) or not all(
                type(i) is int and -1 <= i < 2**16 for i in ids
            ):
                raise InputError(f"{where}: selected_experts {ids!r} -- a list of expert ids")
            if self._ids and len(ids) != len(self._ids[0]):
                raise InputError(
                    f"{where}: {len(ids)} experts, {len(self._ids[0])} in the first layer -- every "
                    "token and layer takes the same number"
                )
            self._cells.append((len(self._numbers) - 1, self._number(_LAYER, layer)))
            self._ids.append(ids)
            if _are_numbers(probs) and len(probs) == len(ids):
                self._probs.append(probs)

    def rows(self, number: int, layout: Layout) -> Rows:
        """Return the tokens of the request with this number."""
        where = str(self._path)
        if self.width != layout.top_k:
            raise InputError(f"{where}: {self.width} experts, {layout.top_k} in the other files")
        token, layer = np.array(self._cells, np.int64).T
        place = layout.place(layer, where)
        shape = (len(self._numbers), len(layout.numbered), layout.top_k)
        position = np.array(self._numbers, np.int64)
        step = np.array(self._steps, np.int64)
        if (np.diff(position) <= 0).any():
            position = np.arange(len(position))
        weights = None
        if self.weighted:
            weights = fill(token, place, np.array(self._probs, np.float32), shape, np.nan)
        return Rows(
            request=np.full(shape[0], number, np.int64),
            position=position,
            decode=np.bincount(step)[step] == 1,
            step=step,
            domain=np.zeros(shape[0], np.int64),
            experts=fill(token, place, np.array(self._ids, np.int32), shape),
            weights=weights,
        )

    def _mapping(self, value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise InputError(f"{self._path}: {where} is a {type(value).__name__} -- a mapping")
        return value

    def _number(self, pattern: re.Pattern[str], name: str) -> int:
        found = pattern.fullmatch(name)
        if not found:
            raise InputError(f"{self._path}: key {name!r} -- {pattern.pattern}, with a number")
        return int(found[1])


def _are_numbers(values: Any) -> TypeGuard[list[float]]:
    return isinstance(values, list) and all(type(v) in (int, float) for v in values)


def _entries(path: Path) -> list[Any]:
    size = check_file(path)
    if size > _MOST_BYTES:
        raise InputError(
            f"{path}: {size} bytes -- at most {_MOST_BYTES} in one file; save a file per request"
        )
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}) -- was it cut off?") from None
    entries = found.get("router_data") if isinstance(found, dict) else None
    if not isinstance(entries, list):
        raise InputError(f"{path}: no list router_data -- is it another format?")
    return entries
