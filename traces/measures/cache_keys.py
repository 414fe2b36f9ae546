"""What cached experts are worth, worked out chunk by chunk: LRU, LFU and Belady.

The keys of `traces.caches_scores`, as whole numbers and for a sequence that is larger than memory:
each token is a step, its K experts of a layer one access. Belady needs the next use, which a first
pass writes into a temporary file (4 bytes for each token, layer and choice).
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traces.measures.base import Ints

Read = Callable[[], Iterable[NDArray[Any]]]
"""Starts to read the experts ``[t, L, K]`` of consecutive steps, the same each time."""


@contextmanager
def keyed(policy: str, read: Read, steps: int, cells: int) -> Iterator[Iterator[tuple[Ints, Ints]]]:
    """Give the cells that each step uses and their keys after it, chunk by chunk.

    Parameters
    ----------
    policy : {"lru", "lfu", "belady"}
    read : Read
    steps : int
        At least the length of the whole sequence.
    cells : int
        L times E; a cell is ``layer * E + expert``.

    Yields
    ------
    iterator of (int64 array ``[t, L, K]`` cells, int64 array ``[t, L, K]`` keys)
        At least 0, below `largest`; the cell with the smallest goes first. Within a layer the order
        is that of `traces.caches_scores`; between layers ties have to be broken by the layer.
    """
    if policy == "belady":
        with tempfile.TemporaryDirectory() as folder:
            following = _next_uses(read, steps, cells, Path(folder) / "next-use")
            yield _belady(read, following, steps, cells)
            del following
    else:
        yield _recent(read, cells) if policy == "lru" else _frequent(read, steps, cells)


def largest(policy: str, steps: int) -> int:
    """Return a number that no key of a sequence of ``steps`` exceeds."""
    return (steps + 1) * (steps + 1) if policy == "lfu" else steps + 1


def _numbered(read: Read, cells: int) -> Iterator[tuple[Ints, Ints]]:
    """Give the cells ``[t, L, K]`` and the steps ``[t]`` of each chunk."""
    first = 0
    for experts in read():
        steps, layers, _ = experts.shape
        offset = (np.arange(layers) * (cells // layers))[:, None]
        yield experts + offset, np.arange(first, first + steps)
        first += steps


def _recent(read: Read, cells: int) -> Iterator[tuple[Ints, Ints]]:
    for used, step in _numbered(read, cells):
        yield used, np.broadcast_to(step[:, None, None], used.shape)


def _frequent(read: Read, steps: int, cells: int) -> Iterator[tuple[Ints, Ints]]:
    """Give the number of uses so far; of equals the one used longer ago is worth less."""
    before = np.zeros(cells, np.int64)
    for used, step in _numbered(read, cells):
        order, first = _by_cell(used)
        place = np.arange(len(order))
        count = np.empty(len(order), np.int64)
        count[order] = place - np.maximum.accumulate(np.where(first, place, 0)) + 1
        count += before[used.reshape(-1)]
        before += np.bincount(used.reshape(-1), minlength=cells)
        yield used, count.reshape(used.shape) * (steps + 1) + step[:, None, None]


def _belady(read: Read, following: Any, steps: int, cells: int) -> Iterator[tuple[Ints, Ints]]:
    for used, step in _numbered(read, cells):
        later = following[step[0] : step[-1] + 1].astype(np.int64)
        yield used, np.where(later > 0, steps + 1 - later, 0)


def _by_cell(used: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """Return the order that puts the uses of a cell side by side, and where a cell begins."""
    flat = used.reshape(-1)
    order = np.argsort(flat, kind="stable")
    return order, np.diff(flat[order], prepend=-1) > 0


def _next_uses(read: Read, steps: int, cells: int, path: Path) -> Any:
    """Write, for each use, 1 + the step of the next use of the same cell; 0 where there is none."""
    following, last = None, np.full(cells, -1)
    for used, step in _numbered(read, cells):
        layers, top_k = used.shape[1:]
        if following is None:
            shape = (steps, layers, top_k)
            following = np.memmap(path, np.int32, mode="w+", shape=shape)
            flat = following.reshape(-1)
        order, first = _by_cell(used)
        cell = used.reshape(-1)[order]
        now = step[order // (layers * top_k)] + 1
        place = order + step[0] * layers * top_k
        flat[place[:-1][~first[1:]]] = now[1:][~first[1:]]
        earlier = last[cell[first]]
        flat[earlier[earlier >= 0]] = now[first][earlier >= 0]
        ends = np.append(first[1:], True)
        last[cell[ends]] = place[ends]
    return following
