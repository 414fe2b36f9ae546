"""Local search on packings: swaps that relieve the busiest rank, and kicks out of local optima.

A batch of layers [B] is searched at once, each layer on its own busiest rank; loads are token
counts of any scale. The search never breaks feasibility: exact slots per rank, no expert
twice on a rank, every expert at least once.
"""

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.packing import host_mask, rank_loads, replica_counts

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_CHUNK_ELEMENTS = 400_000  # swaps looked at per numpy operation: stays in the caches
_LEAST_GAIN = 1e-12  # relative; below is rounding
_PROGRESS = 1e-5  # relative gain that renews a layer's patience


@dataclass(kw_only=True)
class _State:
    """Mutable packings of a chunk of layers; arrays shrink as layers finish."""

    experts: Ints  # [B, G, c]
    weight: Floats  # [B, G, c] load of each replica
    load: Floats  # [B, G]
    hosts: NDArray[np.bool_]  # [B, E, G]


def swap_search(
    loads: Floats, slots: Ints, num_ranks: int, deadline: float = np.inf
) -> tuple[Ints, Floats]:
    """Exchange replicas between the busiest rank and any other while that lowers its load.

    Each step takes, in every layer, the exchange that leaves the lower of maxima on the two
    ranks involved (steepest descent); a layer stops at its local optimum.

    Returns
    -------
    slots : int64 array [B, P]
    busiest : float array [B]
        Load of the busiest rank.
    """
    slots = slots.copy()
    per_rank = slots.shape[1] // num_ranks
    size = max(1, _CHUNK_ELEMENTS // (slots.shape[1] * per_rank))
    for start in range(0, len(slots), size):
        part = slice(start, start + size)
        slots[part] = _search_chunk(loads[part], slots[part], num_ranks, deadline)
    return slots, rank_loads(loads, slots, num_ranks).max(1)


def _search_chunk(loads: Floats, slots: Ints, num_ranks: int, deadline: float) -> Ints:
    batch = len(slots)
    experts = slots.reshape(batch, num_ranks, -1)
    per_replica = loads / replica_counts(slots, loads.shape[1])
    weight = np.take_along_axis(per_replica, slots, axis=1).reshape(experts.shape)
    state = _State(
        experts=experts,
        weight=weight,
        load=weight.sum(2),
        hosts=host_mask(slots, loads.shape[1], num_ranks),
    )
    result = experts.copy()
    alive = np.arange(batch)
    while len(alive) and time.monotonic() < deadline:
        improved = _best_swap(state)
        result[alive[~improved]] = state.experts[~improved]
        if not improved.all():
            alive = alive[improved]
            state = _State(
                experts=state.experts[improved],
                weight=state.weight[improved],
                load=state.load[improved],
                hosts=state.hosts[improved],
            )
    result[alive] = state.experts
    return result.reshape(batch, -1)


def _best_swap(state: _State) -> NDArray[np.bool_]:
    """Carry out the best swap of each layer in place; tell which layers improved."""
    batch, num_ranks, per_rank = state.experts.shape
    row = np.arange(batch)
    busiest = state.load.argmax(1)
    peak = state.load[row, busiest]
    mine = state.experts[row, busiest]  # [B, c]
    delta = state.weight[row, busiest][:, :, None, None] - state.weight[:, None]  # [B, c, G, c]
    after = np.maximum(peak[:, None, None, None] - delta, state.load[:, None, :, None] + delta)
    there = state.hosts[row[:, None], mine]  # [B, c, G]: my expert already sits on rank h
    here = state.hosts[row[:, None, None], state.experts, busiest[:, None, None]]  # [B, G, c]
    after[there[:, :, :, None] | here[:, None]] = np.inf
    flat = after.reshape(batch, -1)
    choice = flat.argmin(1)
    improved = flat[row, choice] < peak * (1 - _LEAST_GAIN)

    rows = row[improved]
    i, h, j = np.unravel_index(choice[improved], (per_rank, num_ranks, per_rank))
    g = busiest[improved]
    _swap(state, rows, (g, i), (h, j))
    return np.asarray(improved)


def _swap(state: _State, rows: Ints, a: tuple[Ints, Ints], b: tuple[Ints, Ints]) -> None:
    (g, i), (h, j) = a, b
    first, second = state.experts[rows, g, i], state.experts[rows, h, j]
    delta = state.weight[rows, g, i] - state.weight[rows, h, j]
    state.experts[rows, g, i], state.experts[rows, h, j] = second, first
    state.weight[rows, g, i] -= delta
    state.weight[rows, h, j] += delta
    state.load[rows, g] -= delta
    state.load[rows, h] += delta
    state.hosts[rows, first, g] = state.hosts[rows, second, h] = False
    state.hosts[rows, first, h] = state.hosts[rows, second, g] = True


def iterated_search(
    loads: Floats,
    slots: Ints,
    num_ranks: int,
    *,
    target: Floats,
    deadline: float,
    rng: np.random.Generator,
    patience: int,
    copies: int = 16,
) -> tuple[Ints, Floats]:
    """Kick copies of every layer's best packing at random, search each, keep the best.

    Parameters
    ----------
    target : float array [B]
        A layer whose busiest load is at most this is finished.
    deadline : float
        `time.monotonic` value at which to stop.
    patience : int
        Rounds without an improvement after which the search gives a layer up.
    copies : int
        Kicked copies per layer and round.

    Returns
    -------
    slots : int64 array [B, P]
    busiest : float array [B]
    """
    slots = slots.copy()
    busiest = rank_loads(loads, slots, num_ranks).max(1)
    idle = np.zeros(len(slots), dtype=np.int64)
    while time.monotonic() < deadline:
        todo = np.flatnonzero((busiest > target) & (idle < patience))
        if len(todo) == 0:
            break
        many = np.repeat(loads[todo], copies, axis=0)
        kicked = kick(np.repeat(slots[todo], copies, axis=0), loads.shape[1], num_ranks, rng)
        found, peak = swap_search(many, kicked, num_ranks, deadline)
        peak = peak.reshape(len(todo), copies)
        best = peak.argmin(1)
        lowest = peak[np.arange(len(todo)), best]
        idle[todo] = np.where(lowest < busiest[todo] * (1 - _PROGRESS), 0, idle[todo] + 1)
        # Equal packings are taken too: walking along plateaus is how the search moves on.
        take = lowest <= busiest[todo]
        slots[todo[take]] = found.reshape(len(todo), copies, -1)[np.arange(len(todo)), best][take]
        busiest[todo[take]] = lowest[take]
    return slots, busiest


def kick(slots: Ints, num_experts: int, num_ranks: int, rng: np.random.Generator) -> Ints:
    """Disturb each packing: half of them pass a replica on, all get a few random swaps."""
    batch, num_slots = slots.shape
    per_rank = num_slots // num_ranks
    counts = replica_counts(slots, num_experts)
    hosts = host_mask(slots, num_experts, num_ranks)
    if num_slots > num_experts:
        for b in np.flatnonzero(rng.random(batch) < 0.5):
            _pass_replica(slots[b], counts[b], hosts[b], per_rank, rng)
    row = np.arange(batch)
    for _ in range(4):
        s, t = rng.integers(num_slots, size=(2, batch))
        g, h = s // per_rank, t // per_rank
        a, b = slots[row, s], slots[row, t]
        ok = (g != h) & ~hosts[row, a, h] & ~hosts[row, b, g] & (rng.random(batch) < 0.6)
        r, s, t, g, h, a, b = (v[ok] for v in (row, s, t, g, h, a, b))
        slots[r, s], slots[r, t] = b, a
        hosts[r, a, g] = hosts[r, b, h] = False
        hosts[r, a, h] = hosts[r, b, g] = True
    return slots


def _pass_replica(
    slots: Ints,
    counts: Ints,
    hosts: NDArray[np.bool_],
    per_rank: int,
    rng: np.random.Generator,
) -> None:
    """Hand one slot of a replicated expert to another expert, in place (one layer)."""
    spare = np.flatnonzero(counts[slots] > 1)
    slot = rng.choice(spare)
    rank = slot // per_rank
    takers = np.flatnonzero(~hosts[:, rank])
    if len(takers) == 0:
        return
    taker = rng.choice(takers)
    giver = slots[slot]
    slots[slot] = taker
    hosts[giver, rank], hosts[taker, rank] = False, True
    counts[giver] -= 1
    counts[taker] += 1
