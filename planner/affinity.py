"""Second stage of the planner: fewer sends and smaller stragglers at (nearly) the same balance.

Starting from the first stage's placement, no layer's expected busiest rank may rise above
``1 + tolerance`` times what it was. Within that:

- several nodes: first fewer cross-node sends (which replica on which node), then smaller
  stragglers (which rank inside its node). A copy to another node passes a network port with about
  a tenth of the bandwidth inside a node, so it costs more seconds than anything an exchange
  of ranks can gain, and the second step cannot undo the first;
- one node: smaller stragglers. Cross-rank sends are reported but not pursued: they go over
  fast links, and bringing experts of one token together makes a rank's load rise and fall
  more, which is the straggler's cause.

Everything is learnt on the part planned on. Sends are copies per token and layer, stragglers
busiest over mean rank load of a step.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from planner.balance import BalanceResult
from planner.layer import (
    LayerSlots,
    Limits,
    Topology,
    busiest_node,
    hosts,
    keeps_ranks,
    rank_loads,
    spread,
)
from planner.node_partition import node_excess, partition
from planner.observed import block_loads, observed_steps, request_blocks, token_sets
from planner.sends import SendCost
from planner.slot_cost import SlotCost, tokens_as_cost
from planner.straggler import busiest_work, relieve, step_straggler
from simulator.dispatch import Dispatch
from simulator.metrics import sampling_floor
from traces.counts import expert_counts
from traces.routing_trace import RoutingTrace

Floats = NDArray[np.float64]

NODE_LIMIT = 1.12
"""Busiest over mean node load that the send search may go up to (assumed). Chosen on the early half
of gpt-oss-20b-mmlu alone (benchmarks/node_limit.py): of 1.02 to 1.2 the largest that keeps held-out
node loads 3 % below EPLB's on two and on four nodes; the 3 % are for drift."""
_BLOCKS = 4
_RANK_SETS = 1024  # token sets for the cross-rank figure, which has many more columns
_SEARCH_STEPS = 400
_PARTITION_TIME = 0.7  # share of a layer's time, on several nodes


@dataclass(frozen=True, kw_only=True, eq=False)
class Figures:
    """What the second stage works on, by layer, on the part planned on."""

    cross_node: Floats
    """Expected copies of a token to other nodes, [layers]."""
    cross_rank: Floats
    """Expected copies of a token to other ranks, [layers]."""
    straggler: Floats
    """Mean over observed steps of busiest over mean rank load, [layers]."""
    busiest_rank: Floats
    """Busiest rank's expected load over the first stage's, [layers]."""
    busiest_node: Floats
    """Busiest node's over the mean node's load, averaged over blocks of requests, [layers]."""

    def summary(self) -> dict[str, float]:
        """Means over layers; the worst layer of the busiest rank."""
        return {
            "cross_node_sends_per_token_layer": float(self.cross_node.mean()),
            "cross_rank_sends_per_token_layer": float(self.cross_rank.mean()),
            "rank_load_imbalance": float(self.straggler.mean()),
            "busiest_rank_over_first_stage": float(self.busiest_rank.max()),
            "node_load_imbalance": float(self.busiest_node.mean()),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Refined:
    """The second stage's placement, and its figures beside the first stage's."""

    slots: NDArray[np.int32]
    """Logical expert of each slot, [layers, slots]."""
    slot_share: Floats | None
    """Share of its expert's tokens that each slot gets, [layers, slots]; only for ``shares``."""
    before: Figures
    after: Figures
    sampling_floor: float
    """Straggler of exactly even shares at this batch size (see `simulator.metrics`)."""
    tolerance: float
    seconds: float
    """Wall time, s."""
    timed_out: bool
    """Whether the search of any layer was ended by its part of the time limit."""

    def summary(self) -> dict[str, object]:
        """JSON scalars: what the first stage had, what this has, on the part planned on."""
        return {
            "order": (
                "On several nodes first fewer sends to other nodes, then less work on the busiest "
                "rank of a step; on one node the latter alone."
            ),
            "tolerance": self.tolerance,
            "before": self.before.summary(),
            "after": self.after.summary(),
            "sampling_floor": self.sampling_floor,
            "seconds": self.seconds,
            "timed_out": self.timed_out,
        }


def refine(
    balanced: BalanceResult,
    trace: RoutingTrace,
    node_of: NDArray[np.integer],
    *,
    batch: int,
    tolerance: float = 0.01,
    dispatch: Dispatch = "even",
    node_limit: float = NODE_LIMIT,
    seed: int = 0,
    time_limit: float = 60.0,
    cost: SlotCost = tokens_as_cost,
    also: Sequence[NDArray[np.integer]] = (),
) -> Refined:
    """Exchange replicas for fewer cross-node sends and smaller stragglers.

    Parameters
    ----------
    balanced : BalanceResult
        First stage, planned on the same requests.
    trace : RoutingTrace
        The part planned on, with L layers.
    node_of : int array [ranks]
        Node of each rank.
    batch : int
        Tokens of a step over all ranks; the placement is for this batch size.
    tolerance : float
        How much of the first stage's busiest-rank load may be given up, as a fraction, in every
        layer. Under ``nearest`` that load is the first stage's placement's under ``nearest``.
    dispatch : {"even", "nearest", "shares"}
    node_limit : float
        Busiest over mean node load that the search may go up to, averaged over blocks of
        requests. A start above it (one expert per rank has no say in it) must only not get worse.
    seed : int
    time_limit : float
        Seconds; the search then ends with the best so far, at worst the first stage's placement.
    cost : SlotCost
        Work of a slot by its tokens, for the stragglers; `planner.slot_cost.slot_seconds` knows
        tiles and weights.
    also : sequence of int array [layers, slots]
        Other placements to start from, in layers where they keep the tolerance: exchanges alone
        do not reach every choice of replicas.

    Raises
    ------
    InputError
        If the placement and the trace have different layers, or slots do not divide over ranks.
    """
    start = time.monotonic()
    _check(balanced, trace, node_of, tolerance)
    topology = Topology.of(balanced.slots.shape[1], node_of, dispatch)
    layers = _Layers.learn(balanced, trace, topology, tolerance, node_limit, batch, seed)
    first = [layers.start(layer) for layer in range(len(balanced.slots))]
    ends = start + time_limit
    refined, cut = [], False
    for layer, begin in enumerate(first):
        now = time.monotonic()
        until = now + max(ends - now, 0.0) / (len(first) - layer)
        starts = [begin, *layers.usable(layer, begin, also)]
        refined.append(layers.best(layer, starts, until, cost))
        cut |= time.monotonic() >= until
    share = np.stack([layer.share for layer in refined])
    return Refined(
        slots=np.stack([layer.experts for layer in refined]).astype(np.int32),
        slot_share=share if dispatch == "shares" else None,
        before=layers.figures(first, first),
        after=layers.figures(refined, first),
        sampling_floor=sampling_floor(batch, trace.meta.top_k, len(node_of), seed=seed),
        tolerance=tolerance,
        seconds=time.monotonic() - start,
        timed_out=cut,
    )


def _check(
    balanced: BalanceResult, trace: RoutingTrace, node_of: NDArray[np.integer], tolerance: float
) -> None:
    layers, slots = balanced.slots.shape
    if layers != trace.num_layers:
        raise InputError(
            f"placement of {layers} layers, trace of {trace.num_layers} -- plan and refine on the "
            "same trace"
        )
    if slots % len(node_of):
        raise InputError(
            f"{slots} slots on {len(node_of)} ranks -- slots must divide over the ranks"
        )
    if tolerance < 0:
        raise InputError(f"tolerance {tolerance} -- must be 0 or more, such as 0.01")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Layers:
    """What has been learnt about every layer, and the search in one of them."""

    balanced: BalanceResult
    topology: Topology
    by_rank: Topology
    """The same slots with every rank taken as a node: cross-rank sends."""
    costs: tuple[SendCost, ...]
    loads: Floats
    """Share of each expert in the layer's tokens, [L, E]."""
    blocks: Floats
    """The same in each block of requests, [blocks, L, E]."""
    steps: NDArray[np.float32]
    """Tokens of each expert in observed steps, [S, L, E]."""
    tolerance: float
    node_limit: float
    seed: int

    @classmethod
    def learn(
        cls,
        balanced: BalanceResult,
        trace: RoutingTrace,
        topology: Topology,
        tolerance: float,
        node_limit: float,
        batch: int,
        seed: int,
    ) -> "_Layers":
        experts = trace.meta.num_experts
        rng = np.random.default_rng(seed)
        blocks = request_blocks(trace, _BLOCKS)
        counts = expert_counts(trace.experts, experts)
        sets = (token_sets(trace.experts[:, layer], rng) for layer in range(trace.num_layers))
        return cls(
            balanced=balanced,
            topology=topology,
            by_rank=Topology.of(
                len(topology.rank_of), np.arange(topology.num_ranks), topology.dispatch
            ),
            costs=tuple(
                SendCost(sets=each, topology=topology, num_experts=experts) for each in sets
            ),
            loads=counts / counts.sum(axis=-1, keepdims=True),
            blocks=block_loads(blocks),
            steps=observed_steps(trace, blocks, batch=batch, seed=seed),
            tolerance=tolerance,
            node_limit=node_limit,
            seed=seed,
        )

    def start(self, layer: int) -> LayerSlots:
        """Return the first stage's placement of a layer."""
        experts = self.balanced.slots[layer].astype(np.int64)
        if self.topology.dispatch == "shares":
            assert self.balanced.slot_share is not None
            return LayerSlots(experts=experts, share=self.balanced.slot_share[layer])
        return spread(experts, self.topology)

    def limits(self, layer: int, start: LayerSlots) -> Limits:
        busiest = float(rank_loads(start, self.topology, self.loads[layer]).max())
        return Limits(
            loads=self.loads[layer],
            rank_limit=(1 + self.tolerance) * busiest,
            block_loads=self.blocks[:, layer],
            node_limit=self.node_limit / self.topology.num_nodes,
        )

    def usable(
        self, layer: int, first: LayerSlots, also: Sequence[NDArray[np.integer]]
    ) -> list[LayerSlots]:
        """Return the other starts of a layer that keep the first one's limits."""
        if self.topology.dispatch == "shares":
            return []
        limits = self.limits(layer, first)
        starts = [spread(slots[layer].astype(np.int64), self.topology) for slots in also]
        return [
            start
            for start in starts
            if keeps_ranks(start, self.topology, limits)
            and hosts(start, self.topology, len(limits.loads)).sum() == len(start.experts)
        ]

    def best(
        self, layer: int, starts: list[LayerSlots], until: float, cost: SlotCost
    ) -> LayerSlots:
        """Search a layer from every start; then by node limit, sends to other nodes, and work."""
        limits = self.limits(layer, starts[0])
        found = []
        for number, start in enumerate(starts):
            now = time.monotonic()
            share = max(until - now, 0.0) / (len(starts) - number)
            found.append(self.search(layer, start, limits, now + share, cost))
        steps = self.steps[:, layer]

        def order(placed: LayerSlots) -> tuple[float, float, float]:
            work = busiest_work(placed, self.topology, steps, cost)
            if self.topology.num_nodes == 1:
                return 0.0, 0.0, work
            excess = node_excess(placed, self.topology, limits)
            return excess, self.costs[layer].value(placed), work

        return min(found, key=order)

    def search(
        self, layer: int, start: LayerSlots, limits: Limits, until: float, cost: SlotCost
    ) -> LayerSlots:
        """Improve one layer until a `time.monotonic` value."""
        best = start
        if self.topology.num_nodes > 1:
            now = time.monotonic()
            best = partition(
                start,
                self.costs[layer],
                limits,
                steps=_SEARCH_STEPS,
                deadline=now + _PARTITION_TIME * (until - now),
                rng=np.random.default_rng([self.seed, layer]),
            )
        steps = self.steps[:, layer]
        seed = (self.seed, layer)
        return relieve(best, self.topology, limits, steps, deadline=until, seed=seed, cost=cost)

    def figures(self, placed: list[LayerSlots], first: list[LayerSlots]) -> Figures:
        numbers = [self._figures(*pair) for pair in enumerate(zip(placed, first, strict=True))]
        node, rank, step, busiest, nodes = np.array(numbers).T
        return Figures(
            cross_node=node,
            cross_rank=rank,
            straggler=step,
            busiest_rank=busiest,
            busiest_node=nodes,
        )

    def _figures(self, layer: int, pair: tuple[LayerSlots, LayerSlots]) -> tuple[float, ...]:
        placed, first = pair
        cost, limits = self.costs[layer], self.limits(layer, first)
        topology = self.topology
        ranks = SendCost(
            sets=cost.sets.sample(_RANK_SETS, np.random.default_rng(self.seed)),
            topology=self.by_rank,
            num_experts=cost.num_experts,
        )
        load, before = (rank_loads(x, topology, limits.loads).max() for x in (placed, first))
        return (
            cost.value(placed),
            ranks.value(placed),
            step_straggler(placed, topology, self.steps[:, layer]),
            float(load / before),
            busiest_node(placed, topology, limits) * topology.num_nodes,
        )
