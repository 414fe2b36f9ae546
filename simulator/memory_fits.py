"""Whether every rank's memory holds what it must, and what would make it fit."""

from collections.abc import Iterator

import numpy as np

from basis.errors import InfeasibleError, InputError
from basis.units import format_quantity
from hwmodels.cluster import Cluster
from simulator.layout import Layout
from simulator.memory import USABLE, MemoryNeed, expert_slot_bytes, memory_of
from simulator.parallelism import AttentionLayout, ExpertLayout, Parallelism
from simulator.placement import Placement
from traces.model_spec import ModelSpec


def check_fits(
    need: MemoryNeed,
    model: ModelSpec,
    placement: Placement,
    cluster: Cluster,
    tokens: int,
    layout: Layout | None = None,
) -> None:
    """Check that every rank holds what it must.

    Raises
    ------
    InfeasibleError
        Names the terms on the fullest rank, the limit, and what would make it fit.
    """
    on = layout or Layout.data_parallel(placement.num_ranks)
    memory = cluster.device.memory
    limit = USABLE * memory.capacity.value
    fullest = int(need.total.argmax())
    if need.total[fullest] <= limit:
        return
    moe = set(on.stage_layers(model.num_layers)[on.stage[fullest]]) & set(model.moe_layer_ids)
    terms = {
        "weights outside experts": need.weights,
        f"{placement.slots_per_rank} expert slots x {len(moe)} layers": need.experts,
        f"KV cache at a mean context of {need.mean_context:.0f}": need.kv_cache,
        "buffers": need.buffers,
    }
    listed = " + ".join(f"{name} {_gb(value[fullest])}" for name, value in terms.items())
    raise InfeasibleError(
        f"{model.name} does not fit on {cluster.name}: memory of rank {fullest} "
        f"{_gb(need.total[fullest])} ({listed}) -- at most {_gb(limit)} ({USABLE:.0%} of the "
        f"{_gb(memory.capacity.value)} of {cluster.device.name})",
        levers=(
            *_fewer(need, model, placement, on, limit),
            *_other_layouts(need, model, placement, on, limit, tokens),
            *_smaller(need, limit, tokens),
        ),
    )


def _fewer(
    need: MemoryNeed, model: ModelSpec, placement: Placement, on: Layout, limit: float
) -> Iterator[str]:
    """Yield fewer redundant experts, and more ranks."""
    moe = len(model.moe_layer_ids) if on.pp == 1 else -(-len(model.moe_layer_ids) // on.pp)
    per_slot = moe * expert_slot_bytes(model, on)
    moving = (need.kv_cache + need.buffers).max()
    slots = int((limit - need.weights.max() - moving) // per_slot)
    spare = slots * placement.num_ranks - placement.num_experts
    if 0 <= spare < placement.num_slots - placement.num_experts:
        yield f"at most {spare} redundant experts on {placement.num_ranks} ranks"
    ranks = _ranks_that_fit(need, placement, on, limit, per_slot)
    if ranks is not None:
        yield f"at least {ranks} ranks of this device, without redundant experts"


def _ranks_that_fit(
    need: MemoryNeed, placement: Placement, on: Layout, limit: float, per_slot: float
) -> int | None:
    """Return the next number of ranks that fits, each expert once per block, cache spread evenly.

    Only data and expert parallelism grow.
    """
    parts = np.arange(placement.num_ranks + 1, placement.num_experts + 1)
    parts = parts[placement.num_experts % parts == 0]
    ranks = parts * (on.num_ranks // placement.num_ranks)
    slots = placement.num_experts // parts
    cache = need.kv_cache.sum() / ranks
    total = need.weights.max() + slots * per_slot + cache
    fits = ranks[total + need.buffers.max() <= limit]
    return int(fits[0]) if len(fits) else None


def _other_layouts(
    need: MemoryNeed,
    model: ModelSpec,
    placement: Placement,
    on: Layout,
    limit: float,
    tokens: int,
) -> Iterator[str]:
    """Yield the smallest tp, pp and ep above the present ones that fit on the same ranks."""

    def fits(other: Parallelism) -> bool:
        try:
            there = memory_of(
                model,
                other,
                placement.num_slots,
                tokens=tokens,
                mean_context=need.mean_context,
                sequences=need.sequences,
            )
        except InputError:
            return False
        return bool(there.total.max() <= limit)

    said = set()
    for name, value, other in _candidates(on):
        if name not in said and fits(other):
            said.add(name)
            yield f"{name} {value} on the same {on.num_ranks} ranks"


def _candidates(on: Layout) -> Iterator[tuple[str, int, Parallelism]]:
    """Yield layouts of the same ranks with one more factor in tp, pp or ep, smallest first."""
    now, how = on.parallelism, on.exchange
    factors = [n for n in range(2, on.num_ranks + 1) if on.num_ranks % n == 0]
    for n in (n for n in factors if on.dp % n == 0):
        attention = AttentionLayout(dp=on.dp // n, tp=on.tp * n, pp=on.pp)
        yield "attention tp", on.tp * n, Parallelism(attention=attention, experts=now.experts)
    for n in (n for n in factors if on.dp % n == 0):
        attention = AttentionLayout(dp=on.dp // n, tp=on.tp, pp=on.pp * n)
        ep = on.ep if on.edp % n == 0 else max(1, on.ep // n)
        experts = ExpertLayout(ep=ep, tp=on.etp, exchange=how)
        yield "attention pp", on.pp * n, Parallelism(attention=attention, experts=experts)
    for n in (n for n in factors if on.edp % n == 0):
        experts = ExpertLayout(ep=on.ep * n, tp=on.etp, exchange=how)
        yield "experts ep", on.ep * n, Parallelism(attention=now.attention, experts=experts)


def _smaller(need: MemoryNeed, limit: float, tokens: int) -> Iterator[str]:
    """Yield a smaller batch, and a larger device."""
    fixed = need.weights + need.experts
    moving = (need.kv_cache + need.buffers).max()
    batch = int(tokens * (limit - fixed.max()) / moving)
    if batch >= 1:
        yield f"a batch of at most about {batch} tokens per step (now {tokens})"
    yield f"a device with at least {_gb(need.total.max() / USABLE)} of memory"


def _gb(value: float) -> str:
    return format_quantity(float(value), "B")
