"""Replay of an expert cache: which experts are in the fast memory when each layer runs.

An access sequence is ``active [S, L, E]``: the experts that step s uses in layer l, visited in
order (s, l). Everything counts *experts*, one per (step, layer, expert) however many tokens use
it; bytes are loads times the bytes of an expert. docs/background/expert-caches.md defines the
terms.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from traces.caches_play import Loaded, Rules, play_layers, play_pool
from traces.caches_scores import Bools, Floats, check_score, score_keys

Scope = Literal["layer", "global"]
Admission = Literal["always", "score"]
_CHUNK_CELLS = 2**22  # comparisons of stack distances made at a time


@dataclass(frozen=True, kw_only=True, eq=False)
class Replay:
    """What an expert cache did over S steps, L layers and E experts; pinned experts left out.

    ``loads - evictions`` equals the residents at the end minus those at the start. A load that does
    not stay (an access larger than the cache, or admission by score) counts as an eviction too.
    """

    active: Bools
    """``[S, L, E]`` accesses: used, and not pinned."""
    resident: Bools
    """``[S, L, E]`` in the cache when layer l of step s runs, after its prefetch."""
    prefetched: Bools
    """``[S, L, E]`` loaded ahead of the access."""
    fetched: Bools
    """``[S, L, E]`` loaded on demand: the misses, but for those that were computed elsewhere."""
    evictions: int
    start: Bools
    """``[L, E]`` residents before the first access."""
    final: Bools
    """``[L, E]`` residents after the last access."""

    @cached_property
    def hit(self) -> Bools:
        """``[S, L, E]`` used, and in the cache by then."""
        return self.active & self.resident

    @cached_property
    def miss(self) -> Bools:
        """``[S, L, E]`` used, and not in the cache by then."""
        return self.active & ~self.resident

    @property
    def hits(self) -> int:
        """Accesses that found their expert, prefetched in time or kept."""
        return int(np.count_nonzero(self.hit))

    @property
    def misses(self) -> int:
        """Demand misses."""
        return int(np.count_nonzero(self.miss))

    @property
    def prefetch_loads(self) -> int:
        """Experts loaded ahead."""
        return int(np.count_nonzero(self.prefetched))

    @property
    def loads(self) -> int:
        """Experts brought in, ahead or on demand; times an expert's bytes = bytes moved."""
        return int(np.count_nonzero(self.fetched)) + self.prefetch_loads

    @property
    def hit_rate(self) -> float:
        """Hits over accesses; 1 where nothing was accessed."""
        accesses = self.hits + self.misses
        return self.hits / accesses if accesses else 1.0

    @cached_property
    def useless_prefetches(self) -> int:
        """Prefetch loads that no access hit before they were evicted, or the sequence ended."""
        loaded = _events(self.prefetched)
        used = _events(self.active)
        cell = np.concatenate([loaded[0], used[0]])
        step = np.concatenate([loaded[1], used[1]])
        is_use = np.arange(len(cell)) >= len(loaded[0])
        order = np.lexsort((is_use, step, cell))  # a prefetch comes before the use of its step
        is_hit = np.concatenate([np.zeros(len(loaded[0]), np.bool_), self._hit_of(used)])[order]
        useful = np.zeros(len(cell), np.bool_)
        useful[:-1] = is_hit[1:] & (np.diff(cell[order]) == 0)
        return int(np.count_nonzero(~is_use[order] & ~useful))

    def _hit_of(self, used: tuple[NDArray[np.int64], NDArray[np.int64]]) -> Bools:
        cell, step = used
        steps = len(self.active)
        return self.resident.reshape(steps, -1)[step, cell]


def _events(chosen: Bools) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return cell (layer, expert) and step of each chosen entry of ``[S, L, E]``."""
    step, cell = np.nonzero(chosen.reshape(len(chosen), -1))
    return cell, step


def replay(
    active: Bools,
    *,
    slots: int | NDArray[np.integer],
    score: str,
    scope: Scope = "layer",
    admission: Admission = "always",
    scores: Floats | None = None,
    decay: float = 0.5,
    prefetched: Bools | None = None,
    pinned: Bools | None = None,
    start: Bools | None = None,
    most_ahead: int | None = None,
    loaded: Loaded | None = None,
) -> Replay:
    """Replay a sequence of accesses through an expert cache.

    Before layer l of step s runs, its ``prefetched`` experts come in as far as there are slots;
    then what it uses comes in on demand. Whoever is not wanted and has the smallest score goes
    first, of equal ones the smaller id. The experts of an access do not evict each other unless
    they alone exceed the slots; then those with the smallest scores pass through (with admission
    by score they are not protected at all).

    Parameters
    ----------
    active : bool array ``[S, L, E]``
        `active_experts`.
    slots : int, or int array ``[L]``
        Experts that fit, besides the pinned ones: in each layer (scope layer), or in all layers
        together (scope global).
    score : str
        One of `SCORES`: ``lru``, ``lfu``, ``belady``, ``weight_ema``, ``mrs``.
    scope : {"layer", "global"}
    admission : {"always", "score"}
        Whether a missed expert always takes a slot (it is fetched to be computed), or stays only
        if its score is not the smallest (it was computed elsewhere, or in a buffer of its own).
    scores : float array ``[S, L, E]``, optional
        Input of ``weight_ema`` and ``mrs``: `expert_scores`.
    decay : float
        Of the averages of these two, per step: the share of the old value that stays.
    prefetched : bool array ``[S, L, E]``, optional
        Expected for (s, l), right or wrong: `predict`. They enter right before (s, l): what an
        earlier arrival would push out in between is not modelled.
    pinned : bool array ``[L, E]``, optional
        Always in the fast memory; in no count and no slot.
    start : bool array ``[L, E]``, optional
        Residents before the first access; none by default.
    most_ahead : int, optional
        Most loads ahead of an access, those first that its layer used most so far (of equals the
        smaller id); no limit by default.
    loaded : callable, optional
        Which misses are copied, where another processor may compute them: called as
        ``loaded(step, layers, resident)`` with the layers that are due (a slice) and their
        residents ``[l, E]`` after the prefetch, returns bool ``[l, E]``. What it leaves out does
        not come in. Called for each step (scope layer) or access (scope global); by default every
        miss is copied.

    Raises
    ------
    InputError
        If a name is unknown, shapes disagree, slots are negative or fewer than ``start`` takes,
        ``most_ahead`` is below 1, or the score's input is missing.
    """
    check_score(score)
    _, layers, experts = _check_shape(active)
    free = np.ones((layers, experts), np.bool_)
    if pinned is not None:
        free = ~_shaped("pinned", pinned, (layers, experts))
    if start is None:
        start = np.zeros((layers, experts), np.bool_)
    start = _shaped("start", start, (layers, experts)) & free
    room = _room(slots, scope, layers, start)
    if pinned is not None:
        active = active & free
        scores = None if scores is None else np.where(free, scores, 0)
    if prefetched is not None:
        prefetched = _shaped("prefetched", prefetched, active.shape) & free
    if admission not in get_args(Admission):
        raise InputError(
            f"unknown admission {admission!r} -- one of {', '.join(get_args(Admission))}"
        )
    if most_ahead is not None and most_ahead < 1:
        raise InputError(f"most_ahead {most_ahead} -- must be at least 1, or none for no limit")
    rules = Rules(by_score=admission == "score", ahead=most_ahead, loaded=loaded)
    keys = score_keys(score, active, scores=scores, decay=decay)
    if scope == "layer":
        played = play_layers(active, prefetched, keys, room, start, rules)
    else:
        played = play_pool(active, prefetched, keys, int(room[0]), start, rules)
    loads, fetched = played.prefetched, played.fetched
    return Replay(
        active=active,
        resident=played.resident,
        prefetched=np.broadcast_to(np.False_, active.shape) if loads is None else loads,
        fetched=active & ~played.resident if fetched is None else fetched,
        evictions=int(played.evictions),
        start=start,
        final=played.final,
    )


def hit_rate_curve(
    active: Bools,
    score: str,
    sizes: Sequence[int],
    *,
    scope: Scope = "layer",
    scores: Floats | None = None,
    decay: float = 0.5,
) -> NDArray[np.float64]:
    """Compute the hit rate ``[C]`` of a cache that starts empty, for each of C sizes (slots).

    LRU with slots per layer takes one pass for all sizes (`lru_hits_by_size`); every other case
    one replay per size. Parameters and errors as `replay`.
    """
    if score == "lru" and scope == "layer":
        hits = lru_hits_by_size(active)
        for size in sizes:
            _room(size, scope, active.shape[1], np.zeros(active.shape[1:], np.bool_))
        return hits[np.minimum(sizes, len(hits) - 1)] / max(int(np.count_nonzero(active)), 1)
    return np.array(
        [
            replay(active, slots=c, score=score, scope=scope, scores=scores, decay=decay).hit_rate
            for c in sizes
        ]
    )


def lru_hits_by_size(active: Bools) -> NDArray[np.int64]:
    """Count the hits of an LRU cache of 0 to E slots per layer, in one pass.

    LRU is a stack algorithm (Mattson et al., "Evaluation techniques for storage hierarchies",
    1970): a cache holds the experts used last, so an access hits in every size above its stack
    distance, the number of experts of the layer used since.

    Parameters
    ----------
    active : bool array ``[S, L, E]``

    Returns
    -------
    int64 array ``[E + 1]``, hits by number of slots, over all layers.
    """
    _, layers, experts = _check_shape(active)
    stacks = LruStacks(layers, experts)
    stacks.play(active)
    return stacks.hits.sum(axis=0)


class LruStacks:
    """L LRU caches of 0 to E slots that start empty; see `lru_hits_by_size`.

    A sequence may be played in pieces.
    """

    def __init__(self, layers: int, experts: int) -> None:
        self._distances = np.zeros((layers, experts), np.int64)
        self._last = np.full((layers, experts), -1, np.int64)
        self._steps = 0

    @property
    def hits(self) -> NDArray[np.int64]:
        """``[L, E + 1]`` by number of slots."""
        return np.pad(np.cumsum(self._distances, axis=1), ((0, 0), (1, 0)))

    def play(self, active: Bools) -> None:
        """Play the next steps ``[S, L, E]``."""
        steps, layers, experts = active.shape
        many = int(np.count_nonzero(active) / max(steps, 1))
        rows = max(_CHUNK_CELLS // max(many * experts, layers * experts, 1), 1)
        for first in range(0, steps, rows):
            self._play(active[first : first + rows])

    def _play(self, used: Bools) -> None:
        layers, experts = self._last.shape
        time = np.arange(self._steps, self._steps + len(used))[:, None, None] * experts
        before = np.where(used, time + np.arange(experts), -1)
        before = np.maximum.accumulate(np.concatenate([self._last[None], before]), axis=0)
        self._last, self._steps = before[-1], self._steps + len(used)
        step, layer, expert = np.nonzero(used)
        stack = before[step, layer]  # [n, E], last use of each expert of the layer
        own = stack[np.arange(len(step)), expert]
        newer = np.count_nonzero(stack > own[:, None], axis=1)
        cell = (layer * experts + newer)[own >= 0]
        counts = np.bincount(cell, minlength=layers * experts)
        self._distances += counts.reshape(layers, experts)


def _check_shape(active: Bools) -> tuple[int, int, int]:
    if active.ndim != 3 or active.dtype != np.bool_:
        raise InputError(
            f"active is {active.dtype}{list(active.shape)} -- must be bool [steps, layers, "
            "experts] -- build it with active_experts"
        )
    steps, layers, experts = active.shape
    return steps, layers, experts


def _shaped(name: str, array: Bools, shape: tuple[int, ...]) -> Bools:
    if array.shape != shape or array.dtype != np.bool_:
        raise InputError(
            f"{name} is {array.dtype}{list(array.shape)} -- must be bool{list(shape)}, as the "
            "accesses are"
        )
    return array


def _room(
    slots: int | NDArray[np.integer], scope: Scope, layers: int, start: Bools
) -> NDArray[np.int64]:
    """Return the slots ``[L]`` (or ``[1]``, scope global), checked."""
    if scope not in get_args(Scope):
        raise InputError(f"unknown cache scope {scope!r} -- one of {', '.join(get_args(Scope))}")
    given, groups = np.asarray(slots), layers if scope == "layer" else 1
    whole = given.dtype.kind in "iu" and given.shape in ((), (layers,) if groups > 1 else (1,))
    if not whole or (given < 0).any():
        allowed = f"a count, or one for each of {layers} layers" if scope == "layer" else "a count"
        raise InputError(f"cache slots {slots} (scope {scope}) -- must be {allowed}, from 0")
    room = np.broadcast_to(given, (groups,)).astype(np.int64)
    taken = start.sum(axis=1) if scope == "layer" else start.sum(keepdims=True)[0]
    if (taken > room).any():
        raise InputError(
            f"start holds {int(taken.max())} experts, slots {slots} (scope {scope}) -- start with "
            "at most the slots"
        )
    return room
