"""Loads of SGLang's expert recorder: modes stat and stat_approx, and per_pass.

``sglang-stat``
    The .pt file that rank 0 writes: ``logical_count`` ``[steps, all layers, E]``. Steps that were
    never filled are zeros and are dropped; where the buffer is circular, the order may be rotated.
``sglang-per-pass``
    The .pt file of a rank, or a folder with those of all ranks, which are added up by forward pass:
    counts of slots ``[all layers, slots]``, which the (last) map of slots turns into experts.

Counts are (token, choice) pairs. Without attention data parallelism every rank counts the same
tokens, and the files do not say so: only shares mean anything. Without a model, the layers that
counted anything are the MoE layers.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from traces.counts_trace import CountsTrace
from traces.importers.base import MOST_BYTES, Asked, Format, Loads
from traces.importers.layers import UNKNOWN_MODEL, count_layers
from traces.importers.sglang_recorder import load_records
from traces.importers.torch_files import integers, load_torch, peek_pickle

EMPTY = "steps without any count"
SHARES = "ranks may have counted the same tokens: shares mean something, totals do not"


class SglangStat:
    """Counts of logical experts by step."""

    name = "sglang-stat"
    title = "SGLang expert recorder, modes stat and stat_approx: the .pt file"

    def matches(self, source: Path, head: bytes) -> bool:
        """Whether it has the counts of logical experts."""
        return b"logical_count" in peek_pickle(source, head)

    def read(self, source: Path, asked: Asked) -> Loads:
        """Read the counts."""
        data = load_torch(source)
        if not isinstance(data, dict) or "logical_count" not in data:
            raise InputError(f"{source}: no logical_count -- a stat file of SGLang has it")
        counts = integers(data["logical_count"], 3, f"{source}: logical_count")
        found = loads(counts, asked, source, self.name)
        found.notes.append("the buffer may be circular: the order of steps may be rotated")
        return found


class SglangPerPass:
    """Counts of slots by forward pass."""

    name = "sglang-per-pass"
    title = "SGLang expert recorder, mode per_pass: a .pt file, or a folder of all ranks' files"

    def matches(self, source: Path, head: bytes) -> bool:
        """Whether records have counts, but no ids of tokens."""
        if source.is_dir():
            files = _files(source)
            return bool(files) and _is_per_pass(_peek(files[0]))
        return _is_per_pass(peek_pickle(source, head))

    def read(self, source: Path, asked: Asked) -> Loads:
        """Read the passes and add up the ranks."""
        files = _files(source) if source.is_dir() else [source]
        if not files:
            raise InputError(f"{source}: no .pt file in it -- give the folder of the recorder")
        passes: dict[int, NDArray[np.int64]] = {}
        for file in files:
            _add_passes(file, passes)
        shapes = {count.shape for count in passes.values()}
        if len(shapes) > 1:
            raise InputError(f"{source}: files of different models ({sorted(shapes)}) -- of one")
        found = loads(np.stack([passes[key] for key in sorted(passes)]), asked, source, self.name)
        found.notes.append(f"{len(files)} ranks added up; give the folder to have all of them")
        return found


FORMATS_SGLANG_COUNTS: tuple[Format, ...] = (SglangStat(), SglangPerPass())


def loads(counts: NDArray[Any], asked: Asked, source: Path, recorder: str) -> Loads:
    """Return counts ``[S, all layers, E]`` as loads of the MoE layers, steps of zeros dropped.

    Raises
    ------
    InputError
        If a count is negative, or they do not fit the model.
    """
    if counts.size and counts.min() < 0:
        raise InputError(f"{source}: a count of {counts.min()} -- at least 0; record it again")
    filled = np.asarray(counts.any(axis=(1, 2)))
    kept, layers = count_layers(counts[filled], asked, "all", source)
    model = asked.model
    found = Loads(
        counts=CountsTrace(
            model=model.name if model else UNKNOWN_MODEL,
            moe_layer_ids=layers,
            counts=kept,
            top_k=model.top_k if model else None,
            source=f"{recorder}, file {source.name}",
            licence=asked.licence,
            note=SHARES,
            relative=True,
        ),
        notes=[SHARES],
    )
    if not filled.all():
        found.dropped[EMPTY] = len(filled) - int(filled.sum())
    if model and (kept.sum(axis=2) % model.top_k).any():
        found.notes.append(
            f"counts are no multiples of top-{model.top_k}: approximate, or of another model"
        )
    return found


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.pt") if not path.name.startswith("."))


def _peek(path: Path) -> bytes:
    with path.open("rb") as file:
        return peek_pickle(path, file.read(4))


def _is_per_pass(names: bytes) -> bool:
    wanted = b"records" in names and b"global_physical_count" in names
    return wanted and b"topk_ids_of_layer" not in names


def _add_passes(path: Path, passes: dict[int, NDArray[np.int64]]) -> None:
    """Add a rank's counts of each pass, as counts of logical experts ``[all layers, E]``."""
    records, slots = load_records(path)
    if slots.size == 0 or slots.min() < 0:
        raise InputError(f"{path}: a map of {list(slots.shape)} slots -- experts from 0 on")
    experts, layers = int(slots.max()) + 1, len(slots)
    if experts > slots.shape[1] or len(records) * layers * experts * 8 > MOST_BYTES:
        raise InputError(
            f"{path}: {len(records)} passes of {layers} layers, experts up to {experts - 1} in "
            f"{slots.shape[1]} slots -- every expert has a slot; {MOST_BYTES} bytes at most"
        )
    place = (np.arange(layers)[:, None] * experts + slots).reshape(-1)
    for number, record in enumerate(records):
        where = f"{path}: pass {number}"
        counts = integers(record.get("global_physical_count"), 2, where)
        if counts.shape != slots.shape:
            raise InputError(
                f"{where}: counts {list(counts.shape)}, the map of slots {list(slots.shape)} -- as "
                "many layers and slots; record it again"
            )
        key = record.get("forward_pass_id")
        if type(key) is not int:
            raise InputError(f"{where}: forward_pass_id {key!r} -- a whole number")
        flat = np.zeros(layers * experts, np.int64)
        np.add.at(flat, place, counts.reshape(-1))
        logical = flat.reshape(layers, experts)
        if key in passes and passes[key].shape != logical.shape:
            raise InputError(
                f"{where}: {list(logical.shape)} layers and experts, another file has "
                f"{list(passes[key].shape)} -- files of one model belong together"
            )
        passes[key] = passes[key] + logical if key in passes else logical
