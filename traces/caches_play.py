"""The two players of an expert cache: one cache per layer, or one cache for all layers.

Both play accesses in order (step, layer) by one rule: the experts that are wanted come in (of the
misses only those that are copied), and while more are held than there are slots the one with the
smallest key (`traces.caches_scores`) goes, of equal ones the smaller id; the wanted ones themselves
go last, or, where misses are admitted by score only, like all others. Unit: experts.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from traces.caches_scores import Keys

Bools = NDArray[np.bool_]
_CHUNK_STEPS = 2048  # steps whose accesses lie in memory as Python lists at a time
_HEAP_FACTOR = 8  # entries per expert before outdated ones are swept out
Loaded = Callable[[int, slice, Bools], Bools]
"""From a step, some layers and what is resident of these ``[l, E]`` (when they run, after their
prefetch) to the experts that are copied on demand ``[l, E]``, as far as used and missing."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What of that which is wanted comes in, and stays."""

    by_score: bool = False
    """Whether a miss stays only where its key says so."""
    ahead: int | None = None
    """Most loads ahead of an access, those used most so far first; None = no limit."""
    loaded: Loaded | None = None
    """Which misses are copied; None = all."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Played:
    """What a player saw."""

    resident: Bools
    """``[S, L, E]`` in the cache when the layer runs, after its prefetch."""
    prefetched: Bools | None
    """``[S, L, E]`` loaded ahead of the access; None where nothing was asked for."""
    fetched: Bools | None
    """``[S, L, E]`` loaded on demand; None where every miss is."""
    evictions: int
    final: Bools
    """``[L, E]`` in the cache after the last access."""


def play_layers(
    active: Bools, prefetched: Bools | None, keys: Keys, slots: NDArray[np.int64], start: Bools,
    rules: Rules,
) -> Played:  # fmt: skip
    """Play L independent caches at once, step by step.

    Parameters
    ----------
    active, prefetched : bool array ``[S, L, E]``
        Used by the access; wanted ahead of it.
    keys : Keys
    slots : int array ``[L]``
    start : bool array ``[L, E]``
        Residents before the first access.
    rules : Rules
    """
    steps, layers, _ = active.shape
    resident, seen = start.copy(), np.empty_like(active)
    loads = None if prefetched is None else np.empty_like(active)
    fetched = None if rules.loaded is None else np.empty_like(active)
    uses, every = np.zeros(start.shape), slice(0, layers)
    key = keys.initial.reshape(start.shape).copy()
    flat, bounds, evictions = key.reshape(-1), keys.bounds[::layers].tolist(), 0
    for step in range(steps):
        if prefetched is not None and loads is not None:
            wanted = prefetched[step]
            if rules.ahead is not None:
                most = np.full(layers, rules.ahead)
                wanted = wanted & (resident | _smallest(-uses, wanted & ~resident, most))
                uses += active[step]
            held, new = resident | wanted, wanted & ~resident
            after = _shrink(held, held & ~wanted, new, key, slots)
            loads[step] = after & ~resident
            evictions += int(np.count_nonzero(resident & ~after))
            resident = after
        seen[step] = resident
        touched = slice(bounds[step], bounds[step + 1])
        flat[keys.cells[touched]] = keys.values[touched]
        used = active[step]
        came = used
        if rules.loaded is not None and fetched is not None:
            came = fetched[step] = used & ~resident & rules.loaded(step, every, resident)
        held = resident | came
        resident = _shrink(held, held if rules.by_score else held & ~used, used, key, slots)
        evictions += int(np.count_nonzero(held)) - int(np.count_nonzero(resident))
    return Played(
        resident=seen, prefetched=loads, fetched=fetched, evictions=evictions, final=resident
    )


def _shrink(
    held: Bools, first: Bools, then: Bools, key: NDArray[np.float64], slots: NDArray[np.int64]
) -> Bools:
    """Return ``[L, E]`` who stays of ``held``: ``first`` give way first, ``then`` after them."""
    excess = np.count_nonzero(held, axis=1) - slots
    full = np.flatnonzero(excess > 0)
    if not len(full):
        return held
    kept, worth = held[full], key[full]
    kept &= ~_smallest(worth, first[full], excess[full])
    more = np.count_nonzero(kept, axis=1) - slots[full]
    if (more > 0).any():
        kept &= ~_smallest(worth, kept & then[full], more)
    stays = held.copy()
    stays[full] = kept
    return stays


def _smallest(key: NDArray[np.float64], among: Bools, count: NDArray[np.int64]) -> Bools:
    """Mark the ``count [n]`` smallest keys of each row, of equal ones the smaller ids."""
    order = np.argsort(np.where(among, key, np.inf), axis=1, kind="stable")
    marked = np.zeros_like(among)
    np.put_along_axis(marked, order, np.arange(key.shape[1]) < count[:, None], axis=1)
    return marked & among


def play_pool(
    active: Bools, prefetched: Bools | None, keys: Keys, slots: int, start: Bools, rules: Rules,
) -> Played:  # fmt: skip
    """Play one cache for all layers, access by access; parameters as `play_layers`."""
    steps, layers, experts = active.shape
    pool = Pool(slots, keys.initial, np.flatnonzero(start))
    seen, loads, fetched = (bytearray(active.size) for _ in range(3))
    for first in range(0, steps, _CHUNK_STEPS):
        part = slice(first, first + _CHUNK_STEPS)
        used = _cells(active[part])
        ahead = None if prefetched is None else _cells(prefetched[part])
        place = first * layers
        bounds = keys.bounds[place : place + len(used) + 1]
        cells = keys.cells[bounds[0] : bounds[-1]].tolist()
        values = keys.values[bounds[0] : bounds[-1]].tolist()
        edges = (bounds - bounds[0]).tolist()
        for access, wanted in enumerate(used):
            layer = access % layers * experts
            at = (place + access) * experts
            if ahead is not None:
                for cell in pool.prefetch(ahead[access], rules.ahead):
                    loads[at + cell - layer] = 1
            seen[at : at + experts] = pool.resident[layer : layer + experts]
            touched = slice(edges[access], edges[access + 1])
            pool.touch(cells[touched], values[touched])
            came = wanted
            if rules.loaded is not None:
                held = np.frombuffer(pool.resident, np.bool_, experts, layer)[None].copy()
                one = slice(access % layers, access % layers + 1)
                copied = rules.loaded(first + access // layers, one, held)[0] & ~held[0]
                came = [cell for cell in wanted if copied[cell - layer]]
                for cell in came:
                    fetched[at + cell - layer] = 1
            pool.admit(came, spared=() if rules.by_score else wanted)
            if rules.ahead is not None:
                pool.count(wanted)
    return Played(
        resident=np.frombuffer(seen, np.bool_).reshape(active.shape),
        prefetched=None if prefetched is None
        else np.frombuffer(loads, np.bool_).reshape(active.shape),
        fetched=None if rules.loaded is None
        else np.frombuffer(fetched, np.bool_).reshape(active.shape),
        evictions=pool.evictions,
        final=np.frombuffer(pool.resident, np.bool_).reshape(start.shape),
    )  # fmt: skip


def _cells(chosen: Bools) -> list[list[int]]:
    """List the cells ``layer * E + expert`` of each access of ``[s, L, E]``."""
    steps, layers, experts = chosen.shape
    access, expert = np.nonzero(chosen.reshape(steps * layers, experts))
    cells = (access % layers * experts + expert).tolist()
    edges = np.searchsorted(access, np.arange(steps * layers + 1)).tolist()
    return [cells[a:b] for a, b in pairwise(edges)]


class Pool:
    """One cache over all cells; a heap whose outdated entries are skipped finds the smallest key.

    A sequence may be played in pieces: `touch` with the new keys of an access, then `admit` it.

    Cells that are wanted may come up in the heap; they are set aside, and go only when nothing
    else is left.
    """

    def __init__(self, slots: int, initial: NDArray[np.float64], start: NDArray[np.int64]) -> None:
        self.slots, self.key = slots, initial.tolist()
        self.resident = bytearray(len(self.key))
        self.uses = [0] * len(self.key)
        self.held, self.evictions = 0, 0
        self.heap: list[tuple[float, int]] = []
        self._add(start.tolist())

    def touch(self, cells: list[int], values: list[float]) -> None:
        """Give cells new keys."""
        for cell, value in zip(cells, values, strict=True):
            self.key[cell] = value
            if self.resident[cell]:
                heapq.heappush(self.heap, (value, cell))
        if len(self.heap) > _HEAP_FACTOR * len(self.key):
            self.heap = [(key, c) for c, key in enumerate(self.key) if self.resident[c]]
            heapq.heapify(self.heap)

    def admit(self, wanted: list[int], spared: Sequence[int]) -> None:
        """Bring in what an access uses; what exceeds the slots passes through."""
        self._add([cell for cell in wanted if not self.resident[cell]])
        self._shrink(spared)

    def count(self, used: list[int]) -> None:
        """Remember that cells were used."""
        for cell in used:
            self.uses[cell] += 1

    def prefetch(self, wanted: list[int], most: int | None) -> list[int]:
        """Bring in what is expected, as far as limit and slots go, and return what was loaded."""
        new = [cell for cell in wanted if not self.resident[cell]]
        if most is not None and len(new) > most:
            new = sorted(new, key=lambda cell: (-self.uses[cell], cell))[:most]
            wanted = [cell for cell in wanted if self.resident[cell]] + new
        room = self.slots - (len(wanted) - len(new))
        if len(new) > room:
            new = sorted(new, key=lambda cell: (self.key[cell], cell))[len(new) - room :]
        self._add(new)
        self._shrink(wanted)
        return new

    def _add(self, cells: list[int]) -> None:
        for cell in cells:
            self.resident[cell] = 1
            heapq.heappush(self.heap, (self.key[cell], cell))
        self.held += len(cells)

    def _shrink(self, spared: Sequence[int]) -> None:
        if self.held <= self.slots:
            return
        last = set(spared)
        aside: list[tuple[float, int]] = []
        while self.held > self.slots and self.heap:
            key, cell = heapq.heappop(self.heap)
            if not self.resident[cell] or key != self.key[cell]:
                continue
            if cell in last:
                aside.append((key, cell))
            else:
                self._evict(cell)
        for entry in aside:
            if self.held > self.slots and self.resident[entry[1]]:
                self._evict(entry[1])
            else:
                heapq.heappush(self.heap, entry)

    def _evict(self, cell: int) -> None:
        self.resident[cell] = 0
        self.held -= 1
        self.evictions += 1
