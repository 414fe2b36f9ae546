"""Where the experts of one step and layer are computed: rules that send each to a processor.

A layer's active experts run on the fast processor (those that are resident at once, others after
a copy) or on a side processor at the memory where they live. Three timelines run at the same
time: fast processor, copies, side processor. Times in seconds from the moment the layer is routed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from simulator.offload import SiteName

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
_COLUMNS = ("tokens", "resident", "fast_s", "fetch_s", "side_s")


class Where(IntEnum):
    """Site of one expert."""

    IDLE = 0
    """No token wants it."""
    FAST = 1
    """On the fast processor, resident."""
    FETCH = 2
    """On the fast processor, after a copy."""
    SIDE = 3
    """On the side processor."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteProblem:
    """Experts of many layers and steps: ``...`` any leading axes, n experts each.

    Columns are broadcast to the shape of ``tokens``.
    """

    tokens: NDArray[np.integer]
    """Tokens of each expert, [..., n]."""
    resident: Bools
    """Experts in the fast memory, [..., n]."""
    fast_s: Floats
    """What an expert adds to a call on the fast processor, [..., n]."""
    fetch_s: Floats
    """Copy of an expert into the fast memory, [..., n]."""
    side_s: Floats
    """What an expert adds on the side processor, its activations' way included, [..., n]."""
    fast_fixed: float = 0.0
    """Of every call on the fast processor: one for all resident experts, one for each fetched."""
    side_fixed: float = 0.0
    """Once, where any expert runs aside (a cold first expert, an activation copy's startup)."""
    threshold: int = 1
    """ops_per_byte: tokens from which an expert runs on the fast processor."""
    aside: Bools | None = None
    """planned: experts that run aside when they are not resident, [..., n]."""

    def __post_init__(self) -> None:
        for name in ("resident", "fast_s", "fetch_s", "side_s"):
            full = np.broadcast_to(getattr(self, name), self.tokens.shape)
            object.__setattr__(self, name, full)

    def part(self, index: tuple[Any, ...], resident: Bools) -> Self:
        """Return some of the leading axes' entries, with other residents ``[..., n]``."""
        columns: dict[str, Any] = {name: getattr(self, name)[index] for name in _COLUMNS}
        aside = None if self.aside is None else np.broadcast_to(self.aside, self.tokens.shape)
        columns["aside"] = None if aside is None else aside[index]
        return replace(self, **columns | {"resident": resident})

    @property
    def active(self) -> Bools:
        """Experts with tokens, [..., n]."""
        return np.asarray(self.tokens > 0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Assignment:
    """Answer to a `SiteProblem`."""

    where: NDArray[np.int8]
    """`Where` of each expert, [..., n]."""
    order: NDArray[np.int64]
    """Place of each expert on its timeline, from 0, [..., n]: resident and fetched experts by
    falling tokens, those aside by rising ones. Fetched experts run in the order of their copies."""
    makespan: Floats
    """Seconds until both processors have ended, [...]."""


def assign(name: SiteName, problem: SiteProblem) -> Assignment:
    """Apply the rule of that name.

    Raises
    ------
    InputError
        If no rule has the name.
    """
    where = sites_of(name, problem)
    return Assignment(where=where, order=_order(problem, where), makespan=makespan(problem, where))


def sites_of(name: SiteName, problem: SiteProblem) -> NDArray[np.int8]:
    """Return `Where` each expert runs, [..., n]; errors as `assign`."""
    if name not in SITES:
        raise InputError(f"unknown site policy {name!r} -- known are {', '.join(SITES)}")
    return np.where(problem.active, SITES[name](problem), Where.IDLE).astype(np.int8)


def makespan(problem: SiteProblem, where: NDArray[np.integer]) -> Floats:
    """Seconds until both processors have ended, [...].

    Copies follow one another by falling tokens (Johnson's rule for a two-machine flow shop where
    all copies take the same); the fast processor runs the resident experts, then each fetched one
    when its copy is there: ``max(R + F, max_k(C_k + F_k))`` with R the resident experts' time, C_k
    the copies up to the k-th, F_k the fetched experts from the k-th on, F all of them.
    """
    p = _sorted(problem, _falling(problem.tokens))
    where = np.take_along_axis(where, _falling(problem.tokens), axis=-1)
    fast, fetched, side = (where == w for w in (Where.FAST, Where.FETCH, Where.SIDE))
    resident_end = (fast * p.fast_s).sum(axis=-1) + p.fast_fixed * fast.any(axis=-1)
    calls = np.cumsum(fetched * (p.fast_fixed + p.fast_s), axis=-1)
    copies = np.cumsum(fetched * p.fetch_s, axis=-1)
    before = calls - fetched * (p.fast_fixed + p.fast_s)
    late = np.where(fetched, copies - before, -np.inf).max(axis=-1)
    side_end = (side * p.side_s).sum(axis=-1) + p.side_fixed * side.any(axis=-1)
    return np.asarray(np.maximum(np.maximum(resident_end, late) + calls[..., -1], side_end))


def _home(p: SiteProblem) -> NDArray[np.integer]:
    """Where it lives: resident experts fast, all others aside."""
    return np.where(p.resident, Where.FAST, Where.SIDE)


def _fetch(p: SiteProblem) -> NDArray[np.integer]:
    """Everything on the fast processor; what is not resident is copied first."""
    return np.where(p.resident, Where.FAST, Where.FETCH)


def _ops_per_byte(p: SiteProblem) -> NDArray[np.integer]:
    """Experts whose weights are used often enough run fast: more tokens, more FLOP per byte."""
    return np.where(p.tokens >= p.threshold, _fetch(p), Where.SIDE)


def _one_unit(p: SiteProblem) -> NDArray[np.integer]:
    """All experts of a layer on one processor, the one that ends earlier; at a tie the fast one.

    Duplex without co-processing.
    """
    fast = np.where(p.active, _fetch(p), Where.IDLE)
    side = np.where(p.active, Where.SIDE, Where.IDLE)
    faster = makespan(p, side) < makespan(p, fast)
    return np.where(faster[..., None], side, fast)


def _planned(p: SiteProblem) -> NDArray[np.integer]:
    """Resident experts fast, the others as a table says."""
    if p.aside is None:
        raise InputError("site planned: no table -- give a choice per layer and expert")
    return np.where(p.aside & ~p.resident, Where.SIDE, _fetch(p))


def _split(p: SiteProblem) -> NDArray[np.integer]:
    """Best cut of one list: its tail goes aside, its head runs fast.

    The list is resident experts, then the others, each by falling tokens; all n + 1 cuts are
    priced by `makespan`'s formula in one scan, and of equally good ones the fewest go aside. With
    everything resident it is Duplex's rule, with nothing resident MoNDE's.
    """
    order = _list_order(p)
    q = _sorted(p, order)
    active, resident = q.active, q.active & q.resident
    fetched = active & ~q.resident
    zero = np.zeros((*q.tokens.shape[:-1], 1))
    calls = np.concatenate([zero, np.cumsum(fetched * (q.fast_fixed + q.fast_s), -1)], -1)
    copies = np.cumsum(fetched * q.fetch_s, -1)
    late = np.where(fetched, copies - calls[..., :-1], -np.inf)
    late = np.concatenate([zero, np.maximum.accumulate(late, -1)], -1)
    held = np.concatenate([zero, np.cumsum(resident * q.fast_s, -1)], -1)
    held = held + q.fast_fixed * (held > 0)
    aside = active * q.side_s
    tail = np.concatenate([zero, np.cumsum(aside[..., ::-1], -1)], -1)[..., ::-1]
    tail = tail + q.side_fixed * (tail > 0)
    total = np.maximum(np.maximum(held, late) + calls, tail)
    head = total.shape[-1] - 1 - total[..., ::-1].argmin(axis=-1)
    runs_fast = np.arange(q.tokens.shape[-1]) < head[..., None]
    return np.where(_unsorted(runs_fast, order), _fetch(p), Where.SIDE)


def _list_code(p: SiteProblem) -> NDArray[np.integer]:
    """HybriMoE's released rule: one list, the fast processor takes its head, the side its tail.

    The list is that of `_split`; at each turn the one that would end its expert earlier takes it,
    the fast processor at a tie. An expert at the head that is not resident is waited for.
    """
    order = _list_order(p)
    q = _flat(_sorted(p, order))
    rows = np.arange(len(q.tokens))
    head, tail = np.zeros(len(rows), np.int64), q.active.sum(axis=-1) - 1
    gpu, cpu, link = (np.zeros(len(rows)) for _ in range(3))
    fast = np.zeros(q.tokens.shape, dtype=np.bool_)
    for _ in range(int(tail.max(initial=-1)) + 1):
        going = head <= tail
        first, last = np.minimum(head, q.tokens.shape[-1] - 1), np.maximum(tail, 0)
        held = q.resident[rows, first]
        landed = np.where(held, 0.0, link + q.fetch_s[rows, first])
        call = q.fast_s[rows, first] + q.fast_fixed * (~held | (gpu == 0))
        by_gpu = np.maximum(gpu, landed) + call
        by_cpu = cpu + q.side_s[rows, last] + q.side_fixed * (cpu == 0)
        takes = going & (by_gpu <= by_cpu)
        fast[rows[takes], first[takes]] = True
        gpu = np.where(takes, by_gpu, gpu)
        link = np.where(takes & ~held, landed, link)
        cpu = np.where(going & ~takes, by_cpu, cpu)
        head, tail = head + takes, tail - (going & ~takes)
    return np.where(_unsorted(fast.reshape(p.tokens.shape), order), _fetch(p), Where.SIDE)


def _list(p: SiteProblem) -> NDArray[np.integer]:
    """HybriMoE's published rule: three timelines, the one that would end its next item first goes.

    Fast processor: the largest expert that is there, else the first to land. Side: the smallest
    that is neither resident nor on its way, and when none is left the smallest resident one. Copy
    engine: the largest that is not resident, which then joins the fast processor's queue. At a
    tie the fast processor goes before the side, the side before the copy engine.
    """
    order = _falling(p.tokens)
    q = _flat(_sorted(p, order))
    rows, width = np.arange(len(q.tokens)), q.tokens.shape[-1]
    ready = np.where(q.resident & q.active, 0.0, np.inf)  # inf: not there and not on its way
    open_, away = q.active.copy(), np.zeros(q.tokens.shape, dtype=np.bool_)
    gpu, cpu, link = (np.zeros(len(rows)) for _ in range(3))
    while open_.any():
        queue, absent = open_ & np.isfinite(ready), open_ & np.isinf(ready)
        there = queue & (ready <= gpu.reshape(-1, 1))
        soonest = np.where(queue, ready, np.inf).argmin(axis=1)
        g = np.where(there.any(axis=1), there.argmax(axis=1), soonest)
        none_absent = ~absent.any(axis=1, keepdims=True)
        pool: Bools = np.asarray(absent | (open_ & q.resident & none_absent))
        c = width - 1 - pool[:, ::-1].argmax(axis=1)
        m = absent.argmax(axis=1)
        call = q.fast_s[rows, g] + q.fast_fixed * (~q.resident[rows, g] | (gpu == 0))
        ends = np.stack(
            [
                np.maximum(gpu, ready[rows, g]) + call,
                np.where(pool.any(axis=1), cpu + q.side_s[rows, c], np.inf)
                + q.side_fixed * (cpu == 0),
                np.where(absent.any(axis=1), link + q.fetch_s[rows, m], np.inf),
            ]
        )
        ends[0][~queue.any(axis=1)] = np.inf
        choice = np.where(open_.any(axis=1), ends.argmin(axis=0), -1)
        by_gpu, by_cpu, by_link = (rows[choice == k] for k in range(3))
        gpu[by_gpu], open_[by_gpu, g[by_gpu]] = ends[0][by_gpu], False
        cpu[by_cpu], open_[by_cpu, c[by_cpu]] = ends[1][by_cpu], False
        away[by_cpu, c[by_cpu]] = True
        link[by_link] = ready[by_link, m[by_link]] = ends[2][by_link]
    return np.where(_unsorted(away.reshape(p.tokens.shape), order), Where.SIDE, _fetch(p))


SITES: dict[SiteName, Callable[[SiteProblem], NDArray[np.integer]]] = {
    "home": _home,
    "fetch": _fetch,
    "list": _list,
    "list_code": _list_code,
    "split": _split,
    "ops_per_byte": _ops_per_byte,
    "one_unit": _one_unit,
    "planned": _planned,
}
"""Rules by name; each says where an active expert runs, [..., n]."""


def _falling(tokens: NDArray[np.integer]) -> NDArray[np.intp]:
    return np.argsort(-tokens, axis=-1, kind="stable")


def _list_order(p: SiteProblem) -> NDArray[np.intp]:
    """Active resident experts, then the other active ones, each by falling tokens."""
    return np.lexsort((-p.tokens, ~p.resident, ~p.active), axis=-1)


def _sorted(p: SiteProblem, order: NDArray[np.intp]) -> SiteProblem:
    """Return the problem with its experts in another order."""
    return _with_columns(p, lambda column: np.take_along_axis(column, order, axis=-1))


def _flat(p: SiteProblem) -> SiteProblem:
    """Return the problem with one leading axis."""
    return _with_columns(p, lambda column: column.reshape(-1, column.shape[-1]))


def _with_columns(p: SiteProblem, change: Callable[[NDArray[Any]], NDArray[Any]]) -> SiteProblem:
    """Change every column that the rules with times read."""
    columns: dict[str, Any] = {name: change(getattr(p, name)) for name in _COLUMNS}
    return replace(p, aside=None, **columns)


def _unsorted(flags: Bools, order: NDArray[np.intp]) -> Bools:
    """Put flags of sorted experts back in the experts' own order."""
    result = np.empty_like(flags)
    np.put_along_axis(result, order, flags, axis=-1)
    return result


def _order(p: SiteProblem, where: NDArray[np.integer]) -> NDArray[np.int64]:
    """Place of each expert among those of its site."""
    order = _falling(p.tokens)
    sites = np.take_along_axis(where, order, axis=-1)
    place = np.zeros(sites.shape, dtype=np.int64)
    for site in (Where.FAST, Where.FETCH, Where.SIDE):
        mine = sites == site
        count = np.cumsum(mine, axis=-1)
        rank = count[..., -1:] - count if site == Where.SIDE else count - 1
        place = np.where(mine, rank, place)
    result = np.empty_like(place)
    np.put_along_axis(result, order, place, axis=-1)
    return result
