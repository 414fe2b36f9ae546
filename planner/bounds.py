"""Proved lower bounds on the busiest rank's load, per layer, in the unit of the loads.

Every bound holds for any placement with exactly P / G slots per rank and no expert twice on
a rank; `scarcity_bound` and the configuration bound hold under even dispatch.
Bounds are rounded down by `ROUNDING` (relative) so that floating point cannot overstate them.
"""

import numpy as np
from numpy.typing import NDArray

from planner.packing import divisor_counts

Floats = NDArray[np.float64]

ROUNDING = 1e-9
"""Relative amount by which a bound is lowered: far above the rounding of sums of floats."""


def mean_bound(loads: Floats, num_ranks: int) -> Floats:
    """Mean load of a rank, [B]: the busiest is at least as loaded. Any dispatch."""
    return np.asarray(loads.sum(1) / num_ranks * (1 - ROUNDING))


def scarcity_bound(loads: Floats, num_slots: int, num_ranks: int) -> Floats:
    """Heaviest replica when the replicas are given out as well as possible, [B]. Any dispatch.

    Some rank carries a replica of at least ``w / r``, for every expert. Giving each extra slot
    to the expert with the largest ``w / r`` minimises ``max w / r`` (exchange argument), so no
    placement has less.
    """
    counts = divisor_counts(loads, num_slots, num_ranks, offset=0.0)
    return np.asarray((loads / counts).max(1) * (1 - ROUNDING))


def company_bound(loads: Floats, num_slots: int, num_ranks: int) -> Floats:
    """`scarcity_bound` plus the lightest possible company of that replica, [B]. Even dispatch.

    The rank of the heaviest replica fills its other slots with distinct experts, each at least
    as heavy as its load over the most replicas that it can have.
    """
    most = min(num_ranks, num_slots - loads.shape[1] + 1)
    others = num_slots // num_ranks - 1
    lightest = np.sort(loads, axis=1)[:, :others].sum(1) / most
    return scarcity_bound(loads, num_slots, num_ranks) + lightest * (1 - ROUNDING)


def replica_range(
    loads: Floats, num_slots: int, num_ranks: int, upper: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Fewest and most replicas of each expert in any placement of load at most `upper`, [E].

    An expert needs ``ceil(w / upper)`` replicas for its replica to fit; what these least
    counts leave of the slots is all that one expert can have on top. Even dispatch, one layer.
    """
    ratio = loads / upper if upper > 0 else np.zeros_like(loads)
    least = np.maximum(1, np.ceil(ratio * (1 - ROUNDING))).astype(np.int64)
    spare = num_slots - int(least.sum())
    return least, np.minimum(num_ranks, least + spare)
