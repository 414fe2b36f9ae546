"""Memory of each rank in bytes: weights, expert slots, KV cache, buffers; and whether it fits.

Under attention data parallelism every rank holds everything but the routed experts. The rules of
buffers and reserve are stated here and are assumptions; weights and KV cache are counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from basis.dtypes import bytes_of
from basis.errors import InfeasibleError
from basis.units import format_quantity
from hwmodels.cluster import Cluster
from simulator.batches import StepBatch
from simulator.placement import Placement
from traces.model_spec import ModelSpec

USABLE = 0.9
"""Share of a device's memory that weights, cache and buffers may take; assumed. The rest is left
to the runtime, graphs and fragmentation, as the serving engines' default of 0.9 does."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MemoryNeed:
    """Bytes that each rank needs at its fullest simulated step."""

    weights: float
    """Everything that is not a routed expert; the same on every rank."""
    experts: float
    """Expert slots of all layers; the same on every rank."""
    kv_cache: NDArray[np.float64]
    """Cache of the sequences that run on the rank, windows respected, [ranks]."""
    buffers: NDArray[np.float64]
    """Activations and communication buffers, [ranks]."""
    mean_context: float
    """Mean tokens in the cache per running sequence and step."""
    max_context: int
    """Most tokens in the cache of one sequence."""

    @property
    def total(self) -> NDArray[np.float64]:
        """Bytes of each rank, [ranks]."""
        return self.weights + self.experts + self.kv_cache + self.buffers


def memory_need(model: ModelSpec, placement: Placement, batches: Sequence[StepBatch]) -> MemoryNeed:
    """Count the bytes that each rank needs.

    Buffers are an upper bound for one layer at a time: room to receive and to send every token of
    the step once, the rows of the rank's experts in, between and out if every token came to it
    (at most min(top_k, slots) rows each), and residual, attention input and output, and fp32
    logits of the rank's own tokens.

    Parameters
    ----------
    model : ModelSpec
    placement : Placement
    batches : sequence of StepBatch
        The steps; the fullest one counts, for each rank by itself.
    """
    ranks, slots = placement.num_ranks, placement.slots_per_rank
    cache = np.stack([_kv(model, batch, ranks) for batch in batches])
    own = np.stack([np.bincount(batch.home, minlength=ranks) for batch in batches]).max(axis=0)
    ends = np.stack([np.bincount(b.home[b.last], minlength=ranks) for b in batches]).max(axis=0)
    most = max(len(batch.rows) for batch in batches)
    context = np.concatenate([batch.context[batch.last] for batch in batches])
    return MemoryNeed(
        weights=model.bytes_outside_experts,
        experts=slots * model.num_moe_layers * model.bytes_per_expert,
        kv_cache=cache.max(axis=0),
        buffers=_per_step_token(model, slots) * most
        + _per_own_token(model) * own
        + 4.0 * model.vocab_size * ends,
        mean_context=float(context.mean()),
        max_context=int(context.max()),
    )


def check_fits(
    need: MemoryNeed, model: ModelSpec, placement: Placement, cluster: Cluster, tokens: int
) -> None:
    """Check that every rank holds what it must.

    Raises
    ------
    InfeasibleError
        Names the terms on the fullest rank, the limit, and what would make it fit.
    """
    memory = cluster.device.memory
    limit = USABLE * memory.capacity.value
    fullest = int(need.total.argmax())
    if need.total[fullest] <= limit:
        return
    terms = {
        "weights outside experts": need.weights,
        f"{placement.slots_per_rank} expert slots x {model.num_moe_layers} layers": need.experts,
        f"KV cache at a mean context of {need.mean_context:.0f}": need.kv_cache[fullest],
        "buffers": need.buffers[fullest],
    }
    listed = " + ".join(f"{name} {_gb(value)}" for name, value in terms.items())
    raise InfeasibleError(
        f"{model.name} does not fit on {cluster.name}: memory of rank {fullest} "
        f"{_gb(need.total[fullest])} ({listed}) -- at most {_gb(limit)} ({USABLE:.0%} of the "
        f"{_gb(memory.capacity.value)} of {cluster.device.name})",
        levers=_levers(need, model, placement, limit, tokens),
    )


def _kv(model: ModelSpec, batch: StepBatch, ranks: int) -> NDArray[np.float64]:
    """Cache bytes of the sequences of one step, [ranks]."""
    context, home = batch.context[batch.last], batch.home[batch.last]
    kept = sum(np.minimum(context, window or np.inf) for window in model.attention.windows)
    per_token = bytes_of(model.kv_dtype, model.attention.kv_elements_per_token)
    return np.bincount(home, weights=kept * per_token, minlength=ranks).astype(np.float64)


def _per_step_token(model: ModelSpec, slots: int) -> float:
    """Bytes per token of the step: received, sent, and its rows in the rank's experts."""
    rows = min(model.top_k, slots)
    inner = (2 if model.gated else 1) * model.expert_width
    elements = 2 * model.comm_size + rows * (2 * model.comm_size + inner)
    return bytes_of(model.activation_dtype, elements)


def _per_own_token(model: ModelSpec) -> float:
    a = model.attention
    width = a.num_heads * (a.head_dim + a.v_head_dim) + a.kv_elements_per_token
    inner = max(model.dense_width, model.shared_expert_width) * 2
    return bytes_of(model.activation_dtype, 3 * model.hidden_size + width + inner)


def _levers(
    need: MemoryNeed, model: ModelSpec, placement: Placement, limit: float, tokens: int
) -> tuple[str, ...]:
    """Say, each by itself, what would make the fullest rank fit."""
    per_slot = model.num_moe_layers * model.bytes_per_expert
    worst = need.total.max()
    moving = (need.kv_cache + need.buffers).max()
    levers = []
    slots = int((limit - need.weights - moving) // per_slot)
    spare = slots * placement.num_ranks - placement.num_experts
    if 0 <= spare < placement.num_slots - placement.num_experts:
        levers.append(f"at most {spare} redundant experts on {placement.num_ranks} ranks")
    ranks = _ranks_that_fit(need, model, placement, limit)
    if ranks is not None:
        levers.append(f"at least {ranks} ranks of this device, without redundant experts")
    batch = int(tokens * (limit - need.weights - need.experts) / moving)
    if batch >= 1:
        levers.append(f"a batch of at most about {batch} tokens per step (now {tokens})")
    levers.append(f"a device with at least {_gb(worst / USABLE)} of memory")
    return tuple(levers)


def _ranks_that_fit(
    need: MemoryNeed, model: ModelSpec, placement: Placement, limit: float
) -> int | None:
    """Return the next number of ranks that fits, each expert once, cache spread evenly."""
    ranks = np.arange(placement.num_ranks + 1, placement.num_experts + 1)
    ranks = ranks[placement.num_experts % ranks == 0]
    slots = placement.num_experts // ranks
    cache = need.kv_cache.sum() / ranks
    total = need.weights + slots * model.num_moe_layers * model.bytes_per_expert + cache
    fits = ranks[total + need.buffers.max() <= limit]
    return int(fits[0]) if len(fits) else None


def _gb(value: float) -> str:
    return format_quantity(float(value), "B")
