"""Which node holds which replica, so that a token's experts sit on few nodes.

A tabu search over exchanges of two slots on different nodes (and over giving a redundant slot to
another expert): each step makes the best allowed change, even if it costs sends, and an expert that
has just moved stays for a while, so that the search leaves local optima. Sends are copies per
token and layer; the limits on ranks and nodes hold at every step.
"""

import heapq
import time
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from planner.layer import (
    LayerSlots,
    Limits,
    Topology,
    busiest_node,
    distinct_after_swap,
    hosts,
    node_loads,
    peak_after_swap,
    repaired,
)
from planner.sends import Derivatives, SendCost

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

_TENURE = 6  # steps that a moved expert stays, at least
_PATIENCE = 120  # steps without a new best after which the search gives up
_SHORTLIST = 24  # best changes that are checked exactly where the table is an estimate
_LEAST_GAIN = 1e-9


@dataclass(frozen=True, kw_only=True, order=True)
class _Move:
    """Exchange slots s and t, or give slot s to an expert (then t is -1)."""

    change: float
    s: int
    t: int
    expert: int

    def of(self, layer: LayerSlots, topology: Topology) -> LayerSlots:
        if self.t < 0:
            return layer.replaced(self.s, self.expert, topology)
        return layer.swapped(self.s, self.t, topology)


def partition(
    start: LayerSlots,
    cost: SendCost,
    limits: Limits,
    *,
    steps: int,
    deadline: float,
    rng: np.random.Generator,
) -> LayerSlots:
    """Search for a placement with fewer cross-node sends.

    Parameters
    ----------
    start : LayerSlots
        Keeps the rank limit. If it breaks the node limit, the search first repairs that.
    cost : SendCost
    limits : Limits
    steps : int
        Changes made at most.
    deadline : float
        `time.monotonic` value at which to stop.
    rng : numpy.random.Generator
        Varies how long moved experts stay.

    Returns
    -------
    LayerSlots
        Keeps the rank limit. The excess over the node limit comes first: it never grows, and
        at equal excess (none, as a rule) there are at most the sends of ``start``.
    """
    topology = cost.topology
    layer, best = start, start
    best_key = (node_excess(start, topology, limits), cost.value(start))
    free = np.zeros(cost.num_experts, dtype=np.int64)  # step from which an expert may move
    idle = 0
    for step in range(steps):
        if idle >= _PATIENCE or time.monotonic() >= deadline:
            break
        at = cost.derivatives(layer)
        key = (node_excess(layer, topology, limits), at.value)
        idle += 1
        if key < (best_key[0], best_key[1] - _LEAST_GAIN):
            best, best_key, idle = layer, key, 0
        moves = _Moves(layer=layer, cost=cost, at=at, limits=limits)
        found = moves.best(free <= step, enough=best_key[1] - at.value)
        if found is None:
            if (free <= step).all():
                break
            continue
        move, after = found
        stays = step + _TENURE + int(rng.integers(_TENURE))
        free[[layer.experts[move.s], move.expert]] = stays
        layer = after
    return best


def node_excess(layer: LayerSlots, topology: Topology, limits: Limits) -> float:
    """By how much the busiest node's share is above the limit; 0 where it keeps it."""
    return max(0.0, busiest_node(layer, topology, limits) - limits.node_limit)


@dataclass(frozen=True, kw_only=True)
class _Moves:
    """The allowed changes of one placement and what they cost."""

    layer: LayerSlots
    cost: SendCost
    at: Derivatives
    limits: Limits

    def best(self, free: Mask, enough: float) -> tuple[_Move, LayerSlots] | None:
        """Return the allowed change with the fewest sends after it and its result, or None.

        Parameters
        ----------
        free : bool array [E]
            Experts that may move; others only for a change below ``enough``.
        """
        topology, limits = self.cost.topology, self.limits
        lists = [*self._swaps(free, enough), self._replacements(free, enough)]
        for move in heapq.merge(*lists):
            after = repaired(move.of(self.layer, topology), topology, limits)
            if after is not None and busiest_node(after, topology, limits) <= self._node_bar:
                return move, after
        return None

    @cached_property
    def _node_bar(self) -> float:
        """The node limit; above it, only changes that come nearer to it are allowed."""
        now = busiest_node(self.layer, self.cost.topology, self.limits)
        bar = self.limits.node_limit
        return bar if now <= bar else now * (1 - _LEAST_GAIN)

    def _swaps(self, free: Mask, enough: float) -> list[list[_Move]]:
        """Best exchanges that keep the ranks as they are, and best that may need a repair."""
        layer, topology, loads = self.layer, self.cost.topology, self.limits.loads
        change = self.cost.swap_changes(layer, self.at)
        mobile = free[layer.experts]
        allowed = distinct_after_swap(layer, topology, len(loads)) & self._keeps_nodes()
        allowed &= (mobile[:, None] & mobile[None, :]) | (change < enough - _LEAST_GAIN)
        change = np.where(np.triu(allowed), change, np.inf)
        fits = peak_after_swap(layer, topology, loads) <= self.limits.rank_limit
        return [
            [
                _Move(change=c, s=s, t=t, expert=int(layer.experts[t]))
                for c, s, t in _smallest(np.where(chosen, change, np.inf))
            ]
            for chosen in (fits, ~fits)
        ]

    def _keeps_nodes(self) -> Mask:
        """Pairs of slots on different nodes whose exchange keeps the nodes below the bar."""
        layer, topology, loads = self.layer, self.cost.topology, self.limits.block_loads
        node = topology.node_of
        load = node_loads(layer, topology, loads)  # [blocks, N]
        weight = loads[:, layer.experts] * layer.share  # [blocks, P]
        gain = weight[:, None, :] - weight[:, :, None]  # [blocks, s, t]: more on the node of s
        mine = load[:, node, None] + gain
        rest = _busiest_but_two(load)[:, node[:, None], node[None, :]]
        busiest = np.maximum(np.maximum(mine, mine.transpose(0, 2, 1)), rest).mean(axis=0)
        return np.asarray((node[:, None] != node) & (busiest <= self._node_bar))

    def _replacements(self, free: Mask, enough: float) -> list[_Move]:
        layer, topology, experts = self.layer, self.cost.topology, self.cost.num_experts
        replicas = np.bincount(layer.experts, minlength=experts)
        spare = np.flatnonzero(replicas[layer.experts] > 1)
        if topology.dispatch == "shares" or len(spare) == 0:
            return []
        change = self.cost.replacement_changes(layer, self.at, spare)
        mobile = free[layer.experts[spare]][:, None] & free[None, :]
        allowed = ~hosts(layer, topology, experts)[topology.rank_of[spare]]
        allowed &= mobile | (change < enough - _LEAST_GAIN)
        change = np.where(allowed, change, np.inf)
        return [_Move(change=c, s=int(spare[s]), t=-1, expert=e) for c, s, e in _smallest(change)]


def _smallest(table: Floats) -> list[tuple[float, int, int]]:
    """Return the smallest finite entries of a table in ascending order with their places."""
    flat = table.ravel()
    count = min(_SHORTLIST, len(flat))
    places = np.argpartition(flat, count - 1)[:count]
    places = places[np.isfinite(flat[places])]
    places = places[np.lexsort((places, flat[places]))]
    width = table.shape[1]
    return [(float(flat[p]), int(p // width), int(p % width)) for p in places]


def _busiest_but_two(load: Floats) -> Floats:
    """Largest load among all nodes but a and b, [blocks, a, b], from [blocks, N]; 0 of none."""
    nodes = load.shape[1]
    keep = np.ones((nodes, nodes, nodes), dtype=np.bool_)
    every = np.arange(nodes)
    keep[every, :, every] = keep[:, every, every] = False
    return np.where(keep, load[:, None, None, :], 0.0).max(axis=-1)
