"""Statistics of TensorRT-LLM (``EXPERT_STATISTIC_ITER_RANGE``), two layouts.

A source is the folder: meta_info.json (num_experts, num_experts_per_token) and one safetensors file
per rank with a tensor for each ``{iteration}_{layer}``. Layers are layers of the model; iterations
must follow each other and have the same layers.

``trtllm-counts``
    rank{r}.safetensors: counts ``[E]`` of logical experts, added up over the ranks. Iterations
    without tokens are dropped.
``trtllm-raw``
    rank{r}_raw.safetensors: ids ``[T, K]`` of every token. Ranks that recorded exactly what an
    earlier rank did (no attention data parallelism) are dropped, and rows of -1. Requests are not
    recorded.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from traces.counts_trace import CountsTrace
from traces.importers.base import Asked, Format, Loads, Tokens
from traces.importers.files import check_file, open_safetensors
from traces.importers.layers import UNKNOWN_MODEL, Routing, named_layers, token_cells
from traces.importers.rows import LONE_TOKENS, UNRECORDED, chunks, count_dropped, lone_tokens
from traces.parquet_columns import Columns

EMPTY = "iterations without tokens"
SAME_RANK = "rows of ranks that recorded the same tokens as another"
Rank = dict[tuple[int, int], NDArray[Any]]
"""Tensor of each (iteration, layer)."""


class TrtllmCounts:
    """Counts by iteration and layer."""

    name = "trtllm-counts"
    title = "TensorRT-LLM expert statistics: a folder of meta_info.json and rank*.safetensors"

    def matches(self, source: Path, head: bytes) -> bool:
        """Whether the folder has the description and files of counts."""
        return (source / "meta_info.json").is_file() and bool(_files(source, ""))

    def read(self, source: Path, asked: Asked) -> Loads:
        """Read the counts and add up the ranks."""
        found = _folder(source, "", asked)
        shape = (found.experts,)
        counts = np.zeros((len(found.steps), len(found.layers), found.experts), np.int64)
        for rank in found.ranks:
            for (step, layer), tensor in rank.items():
                if tensor.shape != shape or tensor.min() < 0:
                    raise InputError(
                        f"{source}: counts {list(tensor.shape)} at {step}_{layer} -- "
                        f"{found.experts}, one for each expert, at least 0 -- record it again"
                    )
                place = step - found.steps[0], found.layers.index(layer)
                counts[place] += tensor.astype(np.int64)
        if (counts.sum(axis=2) % found.top_k).any():
            raise InputError(
                f"{source}: counts of a layer are no multiple of num_experts_per_token "
                f"{found.top_k} -- every token counts {found.top_k} times -- record it again"
            )
        filled = np.asarray(counts.any(axis=(1, 2)))
        if not filled.any():
            raise InputError(f"{source}: all counts are 0 -- record iterations that serve tokens")
        same = len(found.ranks) > 1 and all(_same(rank, found.ranks[0]) for rank in found.ranks)
        notes = [*found.notes, f"{len(found.ranks)} ranks added up"]
        if same:
            notes.append("all ranks counted the same: shares mean something, totals do not")
        trace = CountsTrace(
            model=found.model,
            moe_layer_ids=found.moe_layer_ids,
            counts=counts[filled],
            top_k=found.top_k,
            source=f"{self.name}, folder {source.name}",
            licence=asked.licence,
            relative=same,
        )
        dropped = Counter({EMPTY: len(filled) - int(filled.sum())} if not filled.all() else {})
        return Loads(counts=trace, dropped=dropped, notes=notes)


class TrtllmRaw:
    """Ids of every token by iteration and layer."""

    name = "trtllm-raw"
    title = "TensorRT-LLM raw statistics: a folder of meta_info.json and rank*_raw.safetensors"

    def matches(self, source: Path, head: bytes) -> bool:
        """Whether the folder has the description and files of ids."""
        return (source / "meta_info.json").is_file() and bool(_files(source, "_raw"))

    def read(self, source: Path, asked: Asked) -> Tokens:
        """Read the ids, iteration by iteration and rank by rank."""
        found = _folder(source, "_raw", asked)
        routing = Routing(
            name=found.model,
            num_layers=len(found.layers),
            moe_layer_ids=found.moe_layer_ids,
            num_experts=found.experts,
            top_k=found.top_k,
        )
        meta = routing.meta(source, self.name, asked)
        dropped: Counter[str] = Counter()
        pieces = _pieces(found, routing, source, dropped)
        return Tokens(
            meta=meta,
            domains=(asked.domain,),
            weights=False,
            chunks=chunks(pieces, meta, asked.domain),
            dropped=dropped,
            notes=[*found.notes, LONE_TOKENS],
        )


FORMATS_TENSORRT: tuple[Format, ...] = (TrtllmCounts(), TrtllmRaw())


@dataclass(frozen=True, kw_only=True)
class _Folder:
    model: str
    experts: int
    top_k: int
    steps: list[int]
    layers: list[int]
    """As the files name them."""
    moe_layer_ids: tuple[int, ...]
    ranks: list[Rank]
    notes: list[str]


def _folder(source: Path, suffix: str, asked: Asked) -> _Folder:
    experts, top_k = _geometry(source, asked)
    files = _files(source, suffix)
    if not files:
        raise InputError(f"{source}: no rank*{suffix}.safetensors in it -- give the folder of them")
    ranks = [_rank(file) for file in files]
    keys = {key for rank in ranks for key in rank}
    steps, layers = (sorted(set(names)) for names in zip(*keys, strict=True))
    missing = len(steps) * len(layers) - len(keys)
    if missing or steps[-1] - steps[0] + 1 != len(steps):
        raise InputError(
            f"{source}: {len(keys)} tensors for iterations {steps[0]} to {steps[-1]} of "
            f"{len(layers)} layers -- one for each iteration and layer -- were all files copied?"
        )
    ids, notes = named_layers(layers, asked, source)
    model = asked.model.name if asked.model else UNKNOWN_MODEL
    return _Folder(
        model=model, experts=experts, top_k=top_k, steps=steps, layers=layers,
        moe_layer_ids=ids, ranks=ranks, notes=notes,
    )  # fmt: skip


def _files(source: Path, suffix: str) -> list[Path]:
    if not source.is_dir():
        return []
    named = re.compile(rf"rank(\d+){suffix}\.safetensors")
    found = [
        (int(name[1]), path) for path in source.iterdir() if (name := named.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def _geometry(source: Path, asked: Asked) -> tuple[int, int]:
    path = source / "meta_info.json"
    check_file(path)
    try:
        about: Any = json.loads(path.read_bytes())
        experts, top_k = about["num_experts"], about["num_experts_per_token"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(
            f"{path}: num_experts and num_experts_per_token are not there ({error}) -- both are "
            "needed"
        ) from None
    if type(experts) is not int or type(top_k) is not int or not 1 <= top_k <= experts < 2**16:
        raise InputError(
            f"{path}: num_experts {experts!r}, num_experts_per_token {top_k!r} -- whole numbers, "
            "at least 1, the second not above the first"
        )
    model = asked.model
    if model and (experts, top_k) != (model.num_experts, model.top_k):
        raise InputError(
            f"{path}: {experts} experts, top-{top_k} -- {model.name} has {model.num_experts}, "
            f"top-{model.top_k} -- give the config.json of the model that was recorded"
        )
    return experts, top_k


def _rank(path: Path) -> Rank:
    rank: Rank = {}
    for name, tensor in open_safetensors(path).items():
        parts = re.fullmatch(r"(\d{1,9})_(\d{1,9})", name)
        if not parts:
            raise InputError(f"{path}: tensor {name!r} -- names are ITERATION_LAYER, as in 100_3")
        rank[int(parts[1]), int(parts[2])] = tensor
    if not rank:
        raise InputError(f"{path}: no tensors -- record iterations that serve tokens")
    return rank


def _same(rank: Rank, other: Rank) -> bool:
    return rank.keys() == other.keys() and all(
        np.array_equal(tensor, other[key]) for key, tensor in rank.items()
    )


def _pieces(
    found: _Folder, routing: Routing, source: Path, dropped: Counter[str]
) -> Iterator[Columns]:
    ranks: list[Rank] = []
    for rank in found.ranks:
        if any(_same(rank, other) for other in ranks):
            dropped[SAME_RANK] += sum(len(rank[key]) for key in rank if key[1] == found.layers[0])
        else:
            ranks.append(rank)
    tokens = 0
    for step in found.steps:
        for number, rank in enumerate(ranks):
            where = f"{source}: iteration {step}, rank {number}"
            layers = [rank.get((step, layer)) for layer in found.layers]
            if all(layer is None for layer in layers):
                continue
            cells, recorded = token_cells(stacked(layers, where), routing, "moe", where, blank=-1)
            count_dropped(dropped, UNRECORDED, recorded)
            yield lone_tokens(tokens, step - found.steps[0], cells)
            tokens += len(cells)


def stacked(layers: list[NDArray[Any] | None], where: str) -> NDArray[Any]:
    """Return ids ``[T, K]`` of each layer as ``[T, layers, K]``.

    Raises
    ------
    InputError
        If a layer is missing, or they differ in shape.
    """
    arrays = [layer for layer in layers if layer is not None]
    shapes = {array.shape for array in arrays}
    if len(arrays) < len(layers) or len(shapes) > 1 or arrays[0].ndim != 2:
        raise InputError(
            f"{where}: {len(arrays)} of {len(layers)} layers, of shapes "
            f"{', '.join(str(list(shape)) for shape in sorted(shapes))} -- [tokens, top_k], the "
            "same in every layer -- cut off? record it again"
        )
    return np.stack(arrays, axis=1)
