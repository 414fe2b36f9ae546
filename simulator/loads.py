"""What each step asks of each rank: tokens, visible context, tokens per slot, bytes between ranks.

These are exact integer counts of the trace's own routing under one layout, placement and dispatch
rule, not expectations; seconds come later. S steps, L MoE layers, R ranks of a pipeline stage (all
ranks where there is one stage), P slots per layer. Stages differ only in their layers.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from basis.dtypes import bytes_of
from simulator.batches import Composition, StepBatch
from simulator.dispatch import (
    Dispatcher,
    occurrence,
    remote_sends,
    tokens_per_slot,
    touched_ranks,
    traffic,
)
from simulator.layout import Layout
from traces.model_spec import ModelSpec
from traces.routing_trace import RoutingTrace

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class StepLoads:
    """Counts of S steps."""

    decode: bool
    """One new token per sequence (decode), or whole prompts (prefill)."""
    tokens: Ints
    """Tokens whose attention runs on the rank, [S, R]; ranks of a tp group share theirs."""
    sequences: Ints
    """Sequences of the rank that end a step with a new token, [S, R]."""
    context: Ints
    """Keys that the rank's tokens attend to, summed over tokens, [S, layers of the model, R]."""
    per_slot: Ints
    """Tokens of each slot, [S, L, edp * P]: one block of ranks after another."""
    sent: NDArray[np.float64]
    """Bytes that rank g sends to rank h in the all-to-all of the dispatch, [S, L, R, R]."""
    cross_node: Ints
    """Sum over tokens of distinct remote nodes that the all-to-all reaches, [S, L]."""
    cross_rank: Ints
    """The same of distinct ranks other than the token's own, [S, L]."""
    arrived: Ints | None = None
    """Tokens on the rank after the all-to-all, [S, L, R]; None where no ranks gather them."""
    of_layout: Layout | None = None
    """Layout of the ranks; None = attention DP = EP."""

    @cached_property
    def layout(self) -> Layout:
        """Layout of the ranks."""
        return self.of_layout or Layout.data_parallel(self.num_ranks)

    @property
    def num_steps(self) -> int:
        """Steps."""
        return int(self.tokens.shape[0])

    @property
    def num_ranks(self) -> int:
        """Ranks of one pipeline stage."""
        return int(self.tokens.shape[1])

    @property
    def step_tokens(self) -> Ints:
        """Tokens of each step, [S]."""
        return np.asarray(self.tokens.sum(axis=1) // self.layout.tp)

    @cached_property
    def slices(self) -> Ints:
        """Tokens that the rank routes: its share of its tp group's, [S, R]."""
        tp = self.layout.tp
        index = self.layout.tp_index[: self.num_ranks]
        return -(-(index + 1) * self.tokens // tp) - -(-index * self.tokens // tp)

    @cached_property
    def rows(self) -> Ints:
        """Tokens of each slot of the rank, [S, L, R, P / ep]; ranks of an etp group share them."""
        on = self.layout
        steps, layers, _ = self.per_slot.shape
        held = self.per_slot.reshape(steps, layers, on.edp * on.ep, 1, -1)
        shared = np.broadcast_to(held, (*held.shape[:3], on.etp, held.shape[-1]))
        return shared.reshape(steps, layers, self.num_ranks, -1)

    @property
    def rank_load(self) -> Ints:
        """(token, expert) pairs of each rank, [S, L, R]."""
        return np.asarray(self.rows.sum(axis=-1))


def count_loads(
    model: ModelSpec,
    trace: RoutingTrace,
    composition: Composition,
    dispatcher: Dispatcher,
    *,
    seed: int = 0,
    layout: Layout | None = None,
    node_of: Ints | None = None,
) -> StepLoads:
    """Assign the tokens of every step to slots and count.

    Parameters
    ----------
    model : ModelSpec
    trace : RoutingTrace
        Where the rows of the batches point.
    composition : Composition
        The steps; the home of a token is its dp group.
    dispatcher : Dispatcher
        Placement and dispatch rule, as the first block of ranks has them.
    seed : int
        Of the replica rotation; each step continues it.
    layout : Layout, optional
        Of the ranks; without it attention DP = EP.
    node_of : int array [G], optional
        Node of each rank; needed with a layout.
    """
    on = layout or Layout.data_parallel(dispatcher.placement.num_ranks)
    counter = _Counter(model, on, dispatcher, dispatcher.node_of if node_of is None else node_of)
    batches = composition.batches
    routed = [
        counter.routed(trace.experts[batch.rows], batch.home, seed + number)
        for number, batch in enumerate(batches)
    ]
    arrived = np.stack([r.arrived for r in routed]) if on.gathered > 1 and not on.fused else None
    return StepLoads(
        decode=composition.decode,
        tokens=np.stack([counter.by_rank(b.home, np.ones(len(b.home))) for b in batches]),
        sequences=np.stack([counter.by_rank(b.home, b.last) for b in batches]),
        context=np.stack([counter.visible(b) for b in batches]),
        per_slot=np.stack([r.per_slot for r in routed]),
        sent=np.stack([r.sent for r in routed]),
        cross_node=np.stack([r.cross_node for r in routed]),
        cross_rank=np.stack([r.cross_rank for r in routed]),
        arrived=arrived,
        of_layout=on,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Routed:
    """What one step's routing asks for; as in `StepLoads`, without the axis of steps."""

    per_slot: Ints
    sent: NDArray[np.float64]
    arrived: Ints
    cross_node: Ints
    cross_rank: Ints


class _Counter:
    """Counts one step after another on one layout."""

    def __init__(
        self, model: ModelSpec, layout: Layout, dispatcher: Dispatcher, node_of: Ints
    ) -> None:
        self.model, self.layout, self.place = model, layout, dispatcher.placement
        self.node_of = node_of.reshape(layout.pp, layout.lanes)
        self.token_bytes = bytes_of(model.activation_dtype, model.comm_size)
        firsts = layout.groups(layout.block)[:, :: layout.etp]
        self.dispatchers = [replace(dispatcher, node_of=self.node_of[0, lanes]) for lanes in firsts]
        stages = layout.stage_layers(model.num_layers)
        self.stage_rows = [np.flatnonzero(np.isin(model.moe_layer_ids, own)) for own in stages]

    def by_rank(self, home: Ints, weight: NDArray[np.generic]) -> Ints:
        """Sum a weight of the tokens over each rank's, [R]."""
        sums = np.bincount(home, weights=weight, minlength=self.layout.dp).astype(np.int64)
        return np.repeat(sums, self.layout.tp)

    def visible(self, batch: StepBatch) -> Ints:
        """Sum of min(context, window) over the rank's tokens, [layers, R]."""
        windows = self.model.attention.windows
        sums = {
            w: self.by_rank(batch.home, np.minimum(batch.context, w or np.inf))
            for w in set(windows)
        }
        return np.stack([sums[w] for w in windows])

    def routed(self, experts: NDArray[np.integer], home: Ints, seed: int) -> _Routed:
        """Assign one step's choices [B, L, K] to slots; ``home`` is the dp group, [B]."""
        on = self.layout
        tokens = np.bincount(home, minlength=on.dp)
        lane = home * on.tp + occurrence(home) * on.tp // np.maximum(tokens[home], 1)
        ep_index, block = on.ep_index[lane], on.edp_index[lane]
        slot = np.empty(experts.shape, dtype=np.int32)
        per_slot = []
        for number, dispatcher in enumerate(self.dispatchers):
            mine = block == number
            slot[mine] = dispatcher.assign(experts[mine], ep_index[mine], seed)
            per_slot.append(tokens_per_slot(slot[mine], self.place.num_slots))
        return self._moved(slot, lane, np.concatenate(per_slot, axis=-1))

    def _moved(self, slot: NDArray[np.int32], lane: Ints, per_slot: Ints) -> _Routed:
        """Count what the all-to-all moves; tokens stay among equal etp indices."""
        on, layers = self.layout, slot.shape[1]
        sent = np.zeros((layers, on.lanes, on.lanes))
        arrived = np.zeros((layers, on.lanes), dtype=np.int64)
        nodes, others = (np.zeros(layers, dtype=np.int64) for _ in range(2))
        if on.exchanged == 1:
            arrived[:] = np.bincount(lane, minlength=on.lanes)
        else:
            touched = touched_ranks(slot, self.place)
            for lanes in on.exchange_groups:
                mine = np.isin(lane, lanes)
                here, home = touched[mine], on.ep_index[lane[mine]]
                arrived[:, lanes] = here.sum(axis=0)
                for stage, rows in enumerate(self.stage_rows):
                    node_of = self.node_of[stage, lanes]
                    at = np.ix_(rows, lanes, lanes)
                    sent[at] = traffic(here[:, rows], home, node_of, self.token_bytes)
                    across, away = remote_sends(here[:, rows], home, node_of)
                    nodes[rows] += across
                    others[rows] += away
        return _Routed(
            per_slot=per_slot, sent=sent, arrived=arrived, cross_node=nodes, cross_rank=others
        )
