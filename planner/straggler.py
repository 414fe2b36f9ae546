"""How far the busiest rank of a step is above the mean rank, and exchanges that lower it.

Balanced averages do not make balanced steps: experts whose loads rise together make a rank the
straggler even if its mean is right, and experts that exclude each other (those of one token)
calm it. So the mean over observed steps of the busiest rank's work is lowered directly, by
steepest descent over exchanges inside nodes and, on a single node, over giving a redundant slot to
another expert, repeated from random disturbances of the best placement so far. Work is what
`planner.slot_cost` makes of a slot's tokens (seconds, with whole tiles) or the tokens themselves;
a straggler is busiest over mean tokens.
"""

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.layer import (
    LayerSlots,
    Limits,
    Topology,
    distinct_after_swap,
    hosts,
    keeps_ranks,
    peak_after_swap,
    rank_loads,
    repaired,
)
from planner.slot_cost import SlotCost, tokens_as_cost
from simulator.metrics import straggler

Singles = NDArray[np.float32]

_HOT_RANKS = 16  # ranks, most often busiest, whose slots are tried against all others
_LEAST_GAIN = 1e-6  # relative
_KICKS = 5  # disturbances, each followed by a descent
_KICK_CHANGES = 6


@dataclass(frozen=True, kw_only=True, order=True)
class _Move:
    peak: float
    s: int
    t: int
    """Slot exchanged with s, or -1: then s is given to ``expert``."""
    expert: int


def step_straggler(layer: LayerSlots, topology: Topology, steps: Singles) -> float:
    """Mean over steps [S, E] of busiest over mean rank load."""
    return float(straggler(rank_loads(layer, topology, steps)).mean())


def busiest_work(layer: LayerSlots, topology: Topology, steps: Singles, cost: SlotCost) -> float:
    """Mean over steps [S, E] of the busiest rank's work, in the unit of ``cost``."""
    work = _rank_steps(layer, topology, np.ascontiguousarray(steps.T), cost)
    return float(work.max(axis=0).mean())


def relieve(
    start: LayerSlots,
    topology: Topology,
    limits: Limits,
    steps: Singles,
    *,
    deadline: float,
    seed: int | tuple[int, ...] = 0,
    cost: SlotCost = tokens_as_cost,
) -> LayerSlots:
    """Lower the mean over steps of the busiest rank's work.

    Exchanges stay inside nodes, so cross-node sends do not change.

    Parameters
    ----------
    start : LayerSlots
        Keeps the rank limit.
    steps : float32 array [S, E]
        Tokens of each expert in each observed step.
    deadline : float
        `time.monotonic` value at which to stop.
    seed : int or tuple of int
        Of the disturbances.
    cost : SlotCost
        Work of a slot by its tokens; a rank's is the sum over its slots.
    """
    best = _descend(start, topology, limits, steps, deadline, cost)
    least = busiest_work(best, topology, steps, cost)
    rng = np.random.default_rng(seed)
    for _ in range(_KICKS):
        if time.monotonic() >= deadline:
            break
        kicked = _kick(best, topology, limits, rng)
        found = _descend(kicked, topology, limits, steps, deadline, cost)
        work = busiest_work(found, topology, steps, cost)
        if work < least:
            best, least = found, work
    return best


def _kick(
    layer: LayerSlots, topology: Topology, limits: Limits, rng: np.random.Generator
) -> LayerSlots:
    """Make a few random changes that keep the limits."""
    experts = len(limits.loads)
    for _ in range(_KICK_CHANGES):
        replicas = np.bincount(layer.experts, minlength=experts)
        spare = np.flatnonzero(replicas[layer.experts] > 1)
        if _may_replace(topology) and len(spare) and rng.random() < 0.5:
            s = int(rng.choice(spare))
            new = np.flatnonzero(~hosts(layer, topology, experts)[topology.rank_of[s]])
            if len(new) == 0:
                continue
            after = layer.replaced(s, int(rng.choice(new)), topology)
        else:
            allowed = distinct_after_swap(layer, topology, experts)
            allowed &= topology.node_of[:, None] == topology.node_of[None, :]
            pairs = np.argwhere(allowed)
            if len(pairs) == 0:
                continue
            s, t = (int(slot) for slot in rng.choice(pairs))
            after = layer.swapped(s, t, topology)
        layer = repaired(after, topology, limits) or layer
    return layer


def _may_replace(topology: Topology) -> bool:
    """Whether redundant slots may change hands: sends and given shares do not depend on it."""
    return topology.dispatch != "shares" and topology.num_nodes == 1


def _descend(
    layer: LayerSlots,
    topology: Topology,
    limits: Limits,
    steps: Singles,
    deadline: float,
    cost: SlotCost,
) -> LayerSlots:
    """Make the best change again and again until none helps."""
    by_expert = np.ascontiguousarray(steps.T)
    while time.monotonic() < deadline:
        load = _rank_steps(layer, topology, by_expert, cost)
        goal = float(load.max(axis=0).mean()) * (1 - _LEAST_GAIN)
        moves = sorted(
            _swaps(layer, topology, limits, by_expert, load, cost)
            + _replacements(layer, topology, limits, by_expert, load, cost)
        )
        for move in moves:
            after = _carried_out(move, layer, topology)
            if move.peak < goal and keeps_ranks(after, topology, limits):
                layer = after
                break
        else:
            break
    return layer


def _carried_out(move: _Move, layer: LayerSlots, topology: Topology) -> LayerSlots:
    if move.t < 0:
        return layer.replaced(move.s, move.expert, topology)
    return layer.swapped(move.s, move.t, topology)


def _slot_steps(layer: LayerSlots, by_expert: Singles, cost: SlotCost) -> Singles:
    """Work of each slot in each step, [P, S]."""
    return cost(by_expert[layer.experts] * layer.share.astype(np.float32)[:, None])


def _rank_steps(
    layer: LayerSlots, topology: Topology, by_expert: Singles, cost: SlotCost
) -> Singles:
    """Work of each rank in each step, [G, S]."""
    on_rank = (topology.rank_of == np.arange(topology.num_ranks)[:, None]).astype(np.float32)
    return on_rank @ _slot_steps(layer, by_expert, cost)


def _swaps(
    layer: LayerSlots,
    topology: Topology,
    limits: Limits,
    by_expert: Singles,
    load: Singles,
    cost: SlotCost,
) -> list[_Move]:
    """Best exchanges of a slot on each hot rank with one on another rank of its node."""
    weight = _slot_steps(layer, by_expert, cost)
    allowed = distinct_after_swap(layer, topology, len(by_expert))
    allowed &= peak_after_swap(layer, topology, limits.loads) <= limits.rank_limit
    allowed &= topology.node_of[:, None] == topology.node_of[None, :]
    moves = []
    for rank, rest in _hot_ranks(load):
        mine = np.flatnonzero(topology.rank_of == rank)
        a, t = np.nonzero(allowed[mine])
        if len(t) == 0:
            continue
        s, other = mine[a], topology.rank_of[t]
        shift = weight[t] - weight[s]
        peak = np.maximum(load[rank] + shift, load[other] - shift)
        peak = np.maximum(peak, rest[other]).mean(axis=1)
        best = int(peak.argmin())
        expert = int(layer.experts[t[best]])
        moves.append(_Move(peak=float(peak[best]), s=int(s[best]), t=int(t[best]), expert=expert))
    return moves


def _hot_ranks(load: Singles) -> list[tuple[int, Singles]]:
    """Ranks that are busiest most often, each with the peak [G, S] of all but it and rank h."""
    ranks = len(load)
    busiest = np.bincount(load.argmax(axis=0), minlength=ranks)
    third = max(ranks - 3, 0)
    order = np.argpartition(load, range(third, ranks), axis=0)[third:][::-1]  # top three, [3, S]
    top = np.take_along_axis(load, order, axis=0)
    every = np.arange(ranks)[:, None]
    hot = []
    for rank in np.argsort(-busiest, kind="stable")[:_HOT_RANKS]:
        rest = np.zeros_like(load)
        for place, value in zip(order[::-1], top[::-1], strict=True):
            rest = np.where((place != rank) & (place != every), value, rest)
        hot.append((int(rank), rest))
    return hot


def _replacements(
    layer: LayerSlots,
    topology: Topology,
    limits: Limits,
    by_expert: Singles,
    load: Singles,
    cost: SlotCost,
) -> list[_Move]:
    """Best expert for each slot whose present expert has another replica; one node only."""
    if not _may_replace(topology):
        return []
    experts = len(by_expert)
    replicas = np.bincount(layer.experts, minlength=experts)
    held = hosts(layer, topology, experts)
    expected = rank_loads(layer, topology, limits.loads)
    now, more, fewer = (
        cost(by_expert / np.maximum(replicas + change, 1).astype(np.float32)[:, None])
        for change in (0, 1, -1)
    )  # work of one replica of each expert, [E, S] each
    moves = []
    for s in np.flatnonzero(replicas[layer.experts] > 1):
        old, rank = layer.experts[s], topology.rank_of[s]
        new = np.flatnonzero(~held[rank])
        after = expected + _shift(limits.loads, old, new, rank, held, replicas)
        new = new[after.max(axis=1) <= limits.rank_limit]
        if len(new) == 0:
            continue
        others = held[:, old].copy()
        others[rank] = False
        base = load + others[:, None] * (fewer[old] - now[old])
        base[rank] -= now[old]
        up = held[:, new].T[:, :, None] * (more[new] - now[new])[:, None, :]
        up[:, rank] += more[new]
        peak = (base + up).max(axis=1).mean(axis=1)
        best = int(peak.argmin())
        moves.append(_Move(peak=float(peak[best]), s=int(s), t=-1, expert=int(new[best])))
    return moves


def _shift(
    loads: NDArray[np.float64],
    old: int,
    new: NDArray[np.int64],
    rank: int,
    held: NDArray[np.bool_],
    replicas: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Change of expected rank loads if a slot of ``old`` goes to each of ``new``, [new, G]."""
    without = held[:, old] / (replicas[old] - 1.0)
    without[rank] = 0
    down = without - held[:, old] / replicas[old]
    up = held[:, new].T * (1 / (replicas[new] + 1.0) - 1 / replicas[new])[:, None]
    up[:, rank] += 1 / (replicas[new] + 1.0)
    return np.asarray(loads[old] * down + loads[new][:, None] * up)
