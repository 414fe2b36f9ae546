"""npz per request (``request-npz``): a file, or a folder of files.

Arrays request_id, prompt_token_ids, output_token_ids and routed_experts ``[tokens, layers, K]``, of
all layers (dense ones hold zeros) or of the MoE layers. Only shapes of the token ids are used: they
say where the prompt ends. A file whose routed_experts is a pickled object (a request that returned
nothing) is left out of a folder and counted; nothing is unpickled.
"""

import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from traces.importers.base import Asked, Format, Tokens
from traces.importers.files import ZIP_ERRORS, npz_names, read_npz
from traces.importers.layers import Routing, asked_routing, token_cells
from traces.importers.log_rows import Layout, Rows, as_tokens
from traces.importers.rows import CHUNK_ROWS, UNRECORDED, count_dropped

_PICKLED = "files whose routed_experts is a pickled object (no routing returned)"
_MOST_BYTES = 2**30
_NAMES = {"routed_experts", "prompt_token_ids", "output_token_ids"}


class RequestNpz:
    """The layout; see the module."""

    name = "request-npz"
    title = "npz per request with request_id and routed_experts"

    def matches(self, source: Path, head: bytes) -> bool:
        """Whether the file, or the first npz of the folder, has these arrays."""
        if source.is_dir():
            files = _files(source)
            return bool(files) and _is_ours(files[0])
        return head.startswith(b"PK") and _is_ours(source)

    def read(self, source: Path, asked: Asked) -> Tokens:
        """Read it; see `traces.importers.base.Format`."""
        routing = asked_routing(asked, source)
        files = _files(source) if source.is_dir() else [source]
        if not files:
            raise InputError(f"{source}: no .npz files -- give the folder of the requests")
        layout = Layout(
            model=routing.name,
            num_experts=routing.num_experts,
            top_k=routing.top_k,
            numbered=routing.moe_layer_ids,
            moe_layer_ids=routing.moe_layer_ids,
        )
        dropped: Counter[str] = Counter()
        notes = ["step is counted within each request: the prompt is step 0"]
        return as_tokens(
            _rows(files, routing, dropped, notes),
            layout,
            where=str(source),
            source=f"{self.title}; {source.name}",
            asked=asked,
            weights=False,
            dropped=dropped,
            notes=notes,
        )


FORMATS_NPZ: tuple[Format, ...] = (RequestNpz(),)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.npz") if path.is_file())


def _is_ours(path: Path) -> bool:
    return {"request_id", "routed_experts"} <= npz_names(path)


def _rows(
    files: list[Path], routing: Routing, dropped: Counter[str], notes: list[str]
) -> Iterator[Rows]:
    unknown = 0
    for number, path in enumerate(files):
        if len(files) > 1 and _is_pickled(path):
            dropped[_PICKLED] += 1
            continue
        arrays = read_npz(path, _NAMES, _MOST_BYTES)
        if "routed_experts" not in arrays:
            raise InputError(f"{path}: no array routed_experts -- save it under that name")
        ids, prompt = arrays["routed_experts"], _prompt_length(arrays, path)
        unknown += "prompt_token_ids" not in arrays
        for first in range(0, max(len(ids), 1) if ids.ndim else 1, CHUNK_ROWS):
            part = ids[first : first + CHUNK_ROWS] if ids.ndim else ids
            yield _part(part, first, prompt, number, routing, str(path), dropped)
    if unknown:
        notes.append(f"{unknown} requests have no prompt_token_ids: all their rows are prefill")


def _prompt_length(arrays: dict[str, NDArray[Any]], path: Path) -> int:
    """Return the tokens of the prompt, all where none are given."""
    rows = len(arrays["routed_experts"]) if arrays["routed_experts"].ndim else 0
    prompt, output = arrays.get("prompt_token_ids"), arrays.get("output_token_ids")
    if prompt is None:
        return rows
    most = prompt.size + (rows if output is None else output.size)
    if rows > most:
        raise InputError(
            f"{path}: {rows} rows for {most} prompt and output tokens -- one each at most; are "
            "these the arrays of one request?"
        )
    return int(prompt.size)


def _part(
    ids: NDArray[Any],
    first: int,
    prompt: int,
    number: int,
    routing: Routing,
    where: str,
    dropped: Counter[str],
) -> Rows:
    cells, recorded = token_cells(ids, routing, "either", where)
    count_dropped(dropped, UNRECORDED, recorded)
    position = first + np.flatnonzero(recorded)
    return Rows(
        request=np.full(len(position), number, np.int64),
        position=position,
        decode=position >= prompt,
        step=np.maximum(position - prompt + 1, 0),
        domain=np.zeros(len(position), np.int64),
        experts=cells.astype(np.int32),
    )


def _is_pickled(path: Path) -> bool:
    """Whether routed_experts holds objects, by its header."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("routed_experts.npy") as member:
            version = np.lib.format.read_magic(member)
            reader = np.lib.format.read_array_header_1_0
            if version == (2, 0):
                reader = np.lib.format.read_array_header_2_0
            return bool(reader(member)[2].hasobject)
    except (*ZIP_ERRORS, KeyError):
        return False  # the reader says what is wrong
