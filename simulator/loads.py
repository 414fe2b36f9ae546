"""What each step asks of each rank: tokens, visible context, tokens per slot, bytes between ranks.

These are exact integer counts of the trace's own routing under one placement and dispatch rule,
not expectations; seconds come later. S steps, L MoE layers, G ranks, P slots per layer.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from basis.dtypes import bytes_of
from simulator.batches import Composition, StepBatch
from simulator.dispatch import Dispatcher, remote_sends, tokens_per_slot, touched_ranks, traffic
from traces.model_spec import ModelSpec
from traces.routing_trace import RoutingTrace


@dataclass(frozen=True, kw_only=True, eq=False)
class StepLoads:
    """Counts of S steps."""

    decode: bool
    """One new token per sequence (decode), or whole prompts (prefill)."""
    tokens: NDArray[np.int64]
    """Tokens whose attention runs on the rank, [S, G]."""
    sequences: NDArray[np.int64]
    """Sequences of the rank that end a step with a new token, [S, G]."""
    context: NDArray[np.int64]
    """Keys that the rank's tokens attend to, summed over tokens, [S, layers of the model, G]."""
    per_slot: NDArray[np.int64]
    """Tokens of each slot, [S, L, P]."""
    sent: NDArray[np.float64]
    """Bytes that rank g sends to rank h in the dispatch, [S, L, G, G]."""
    cross_node: NDArray[np.int64]
    """Sum over tokens of distinct remote nodes, [S, L]."""
    cross_rank: NDArray[np.int64]
    """Sum over tokens of distinct ranks other than the token's own, [S, L]."""

    @property
    def num_steps(self) -> int:
        """Steps."""
        return int(self.tokens.shape[0])

    @property
    def num_ranks(self) -> int:
        """Ranks."""
        return int(self.tokens.shape[1])

    @property
    def rank_load(self) -> NDArray[np.int64]:
        """(token, expert) pairs of each rank, [S, L, G]."""
        steps, layers, _ = self.per_slot.shape
        return self.per_slot.reshape(steps, layers, self.num_ranks, -1).sum(axis=-1)


def count_loads(
    model: ModelSpec,
    trace: RoutingTrace,
    composition: Composition,
    dispatcher: Dispatcher,
    *,
    seed: int = 0,
) -> StepLoads:
    """Assign the tokens of every step to slots and count.

    Parameters
    ----------
    model : ModelSpec
    trace : RoutingTrace
        Where the rows of the batches point.
    composition : Composition
        The steps.
    dispatcher : Dispatcher
        Placement and dispatch rule.
    seed : int
        Of the replica rotation; each step continues it.
    """
    place, batches = dispatcher.placement, composition.batches
    ranks, node_of = place.num_ranks, dispatcher.node_of
    token_bytes = bytes_of(model.activation_dtype, model.comm_size)
    slots, sent, across, away = [], [], [], []
    for number, batch in enumerate(batches):
        slot = dispatcher.assign(trace.experts[batch.rows], batch.home, seed + number)
        touched = touched_ranks(slot, place)
        slots.append(tokens_per_slot(slot, place.num_slots))
        sent.append(traffic(touched, batch.home, node_of, token_bytes))
        nodes, others = remote_sends(touched, batch.home, node_of)
        across.append(nodes)
        away.append(others)
    return StepLoads(
        decode=composition.decode,
        tokens=np.stack([_by_rank(b.home, np.ones(len(b.home)), ranks) for b in batches]),
        sequences=np.stack([_by_rank(b.home, b.last, ranks) for b in batches]),
        context=np.stack([_visible(model, b, ranks) for b in batches]),
        per_slot=np.stack(slots),
        sent=np.stack(sent),
        cross_node=np.stack(across),
        cross_rank=np.stack(away),
    )


def _by_rank(home: NDArray[np.int64], weight: NDArray[np.generic], ranks: int) -> NDArray[np.int64]:
    return np.bincount(home, weights=weight, minlength=ranks).astype(np.int64)


def _visible(model: ModelSpec, batch: StepBatch, ranks: int) -> NDArray[np.int64]:
    """Sum of min(context, window) over the rank's tokens, [layers, ranks]."""
    windows = model.attention.windows
    sums = {
        w: _by_rank(batch.home, np.minimum(batch.context, w or np.inf), ranks) for w in set(windows)
    }
    return np.stack([sums[w] for w in windows])
