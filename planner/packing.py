"""First packings of replicas into ranks: how many replicas an expert gets, and where they go.

Everything works on a batch of layers at once: loads [B, E], slots [B, P] with P = ranks x
slots per rank, slot s on rank s // (P / ranks). Loads are token counts of any scale. Under
even dispatch each of the r replicas of an expert with load w carries w / r.
"""

import numpy as np
from numpy.typing import NDArray

from basis.errors import InfeasibleError, InputError
from simulator.placement import check_slots

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_OFFSETS = (-0.5, -0.8, -0.65, -0.35, -0.2, 0.0, 0.3)  # of `divisor_counts`
_LIMITS = (1.3, 1.1, 1.0, 0.95, 0.9, 0.8)  # of `threshold_counts`, in mean rank loads


def checked_loads(loads: Floats, num_slots: int, num_ranks: int) -> Floats:
    """Return the loads as float64 [layers, experts] after the named checks.

    Raises
    ------
    InputError
        If loads are not a finite, non-negative [layers, experts] array, or the slots do not
        divide over the ranks or are fewer than the experts.
    InfeasibleError
        If there are more slots than (expert, rank) pairs: a rank never holds an expert twice.
    """
    weights = np.asarray(loads, dtype=np.float64)
    if weights.ndim != 2 or weights.size == 0:
        raise InputError(f"loads has shape {weights.shape} -- expected [layers, experts]")
    bad = np.argwhere(~np.isfinite(weights) | (weights < 0))
    if len(bad):
        layer, expert = (int(i) for i in bad[0])
        raise InputError(
            f"load of expert {expert} in layer row {layer} is {weights[layer, expert]} -- "
            "loads are finite and not negative; check the trace"
        )
    if num_ranks < 1:
        raise InputError(f"{num_ranks} ranks -- at least one is needed")
    experts = weights.shape[1]
    check_slots(num_slots, experts, num_ranks)
    if num_slots > experts * num_ranks:
        raise InfeasibleError(
            f"{num_slots} slots, but {experts} experts on {num_ranks} ranks fill at most "
            f"{experts * num_ranks}: a rank never holds two replicas of one expert",
            (f"use at most {experts * (num_ranks - 1)} redundant experts",),
        )
    return weights


def divisor_counts(loads: Floats, num_slots: int, num_ranks: int, offset: float) -> Ints:
    """Give out the extra slots one by one to the expert with the largest ``load / (r + offset)``.

    The divisor methods of proportional representation: offset 0 minimises the heaviest
    replica (EPLB's rule), negative offsets (-1/2 is Webster's) rather split medium experts.
    No expert gets more replicas than there are ranks.

    Returns
    -------
    int64 array [B, E]
        Replicas of each expert, at least 1, summing to `num_slots`.
    """
    counts = np.ones(loads.shape, dtype=np.int64)
    row = np.arange(len(loads))
    for _ in range(num_slots - loads.shape[1]):
        priority = np.where(counts < num_ranks, loads / (counts + offset), -1.0)
        counts[row, priority.argmax(1)] += 1
    return counts


def threshold_counts(loads: Floats, num_slots: int, num_ranks: int, limit: Floats) -> Ints:
    """Split every expert until its replicas are at most `limit` ([B]); then split only light ones.

    A rank holds at most one heavy replica (above half the limit), so that splitting a heavy
    expert further than needed costs a rank. Where the slots do not suffice for the limit, the
    heaviest replicas are split first, as `divisor_counts` with offset 0 does.
    """
    counts = np.ones(loads.shape, dtype=np.int64)
    row = np.arange(len(loads))
    for _ in range(num_slots - loads.shape[1]):
        replica = loads / counts
        open_to = counts < num_ranks
        priority = np.where(open_to, replica, -1.0)
        over = priority.max(1) > limit
        light = np.where(open_to & (replica <= limit[:, None] / 2), replica, -0.5)
        light = np.where(open_to, light, -1.0)
        counts[row, np.where(over[:, None], priority, light).argmax(1)] += 1
    return counts


def cyclic_packing(loads: Floats, counts: Ints, num_ranks: int) -> Ints:
    """Deal the replicas, heaviest first, to ranks 0, 1, ..., G-1, 0, 1, ...

    The replicas of one expert are dealt one after the other, at most G of them, hence never
    twice to the same rank: the packing is always feasible.
    """
    batch = len(loads)
    order = np.argsort(-loads / counts, axis=1, kind="stable")
    repeats = np.take_along_axis(counts, order, axis=1)
    dealt = np.repeat(order.ravel(), repeats.ravel()).reshape(batch, -1, num_ranks)
    return dealt.transpose(0, 2, 1).reshape(batch, -1)


def first_starts(loads: Floats, num_slots: int, num_ranks: int) -> list[Ints]:
    """Pack with different replica counts: feasible starts [B, P] for a search, diverse ones."""
    mean = loads.sum(1) / num_ranks
    counts = [divisor_counts(loads, num_slots, num_ranks, offset) for offset in _OFFSETS]
    counts += [threshold_counts(loads, num_slots, num_ranks, x * mean) for x in _LIMITS]
    return [cyclic_packing(loads, c, num_ranks) for c in counts]


def replica_counts(slots: NDArray[np.integer], num_experts: int) -> Ints:
    """Count the slots of each expert, [B, E]."""
    batch = len(slots)
    keys = np.arange(batch)[:, None] * num_experts + slots
    counts = np.bincount(keys.ravel(), minlength=batch * num_experts)
    return counts.reshape(batch, num_experts)


def rank_loads(loads: Floats, slots: NDArray[np.integer], num_ranks: int) -> Floats:
    """Load of each rank under even dispatch, [B, G]."""
    per_replica = loads / replica_counts(slots, loads.shape[1])
    per_slot = np.take_along_axis(per_replica, slots.astype(np.int64), axis=1)
    return per_slot.reshape(len(slots), num_ranks, -1).sum(2)


def host_mask(slots: NDArray[np.integer], num_experts: int, num_ranks: int) -> NDArray[np.bool_]:
    """Whether each rank holds each expert, [B, E, G]."""
    batch, num_slots = slots.shape
    mask = np.zeros((batch, num_experts, num_ranks), dtype=np.bool_)
    rank = np.arange(num_slots) // (num_slots // num_ranks)
    mask[np.arange(batch)[:, None], slots, rank[None, :]] = True
    return mask


def without_duplicates(slots: NDArray[np.integer], num_experts: int, num_ranks: int) -> Ints:
    """Remove double hosting (EPLB produces some) by swaps that keep the replica counts.

    Each second copy on a rank is exchanged with a slot of a rank that lacks the expert. Where
    there is no such exchange (EPLB may give an expert more replicas than there are ranks) the
    layer keeps duplicates.
    """
    fixed = slots.astype(np.int64).reshape(len(slots), num_ranks, -1).copy()
    for layer in fixed:
        _separate(layer)
    return fixed.reshape(len(slots), -1)


def _separate(layer: Ints) -> None:
    """Separate the replicas of one layer [G, c] in place, one exchange per duplicate."""
    for g, j in _duplicates(layer):
        expert = layer[g, j]
        for h in np.flatnonzero(~(layer == expert).any(1)):
            free = np.flatnonzero(~np.isin(layer[h], layer[g]))
            if len(free):
                layer[g, j], layer[h, free[0]] = layer[h, free[0]], expert
                break


def _duplicates(layer: Ints) -> list[tuple[int, int]]:
    """Slots (rank, position) of one layer [G, c] whose expert sits earlier on the same rank."""
    order = np.argsort(layer, axis=1, kind="stable")
    ordered = np.take_along_axis(layer, order, axis=1)
    g, j = np.nonzero(ordered[:, 1:] == ordered[:, :-1])
    return [(int(a), int(order[a, b + 1])) for a, b in zip(g, j, strict=True)]


def has_duplicates(slots: NDArray[np.integer], num_ranks: int) -> NDArray[np.bool_]:
    """Whether some rank of the layer holds an expert twice, [B]."""
    ordered = np.sort(slots.reshape(len(slots), num_ranks, -1), axis=2)
    return np.asarray((ordered[:, :, 1:] == ordered[:, :, :-1]).any((1, 2)))
