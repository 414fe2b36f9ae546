"""Searching slots for free shares: start from balanced even placements, kick, split by LP.

With free shares almost any connected placement reaches the mean load, so that a short search
around the even solution is enough; the ILP settles small layers. Loads are token counts of
any scale; deadlines are `time.monotonic` values in seconds.
"""

import time
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from planner.layer_batch import LayerBatch
from planner.local_search import kick
from planner.shares import best_split, solve_shares
from planner.solver import OPTIMALITY, Backend

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_ILP_VARIABLES = 600  # expert-rank pairs; beyond, the ILP rarely finds anything better
_ILP_SECONDS = (0.1, 10.0)  # least and most: it succeeds soon or not at all
_PATIENCE = 60  # kicks without an improvement


def close_shares(
    layer: LayerBatch, *, gap: float, deadline: float, seed: int, backend: Backend
) -> tuple[LayerBatch, Floats]:
    """Place one layer (a batch of one) under free shares, starting from its slots.

    Returns
    -------
    layer : LayerBatch
        With the best slots, their busiest load under the best split, and the proved bound.
    share : float array [P]
        Share of its expert's tokens that each slot gets.
    """
    loads, num_ranks = layer.loads[0], layer.num_ranks
    bound = float(layer.bound[0])
    slots, share, busiest = _search(layer, bound / (1 - gap), deadline, seed)
    left = deadline - time.monotonic()
    small = len(loads) * num_ranks <= _ILP_VARIABLES
    cut = left <= 0
    if busiest * (1 - gap) > bound and small and left > _ILP_SECONDS[0]:
        result, found = solve_shares(
            loads,
            len(slots),
            num_ranks,
            lower=bound,
            backend=backend,
            time_limit=min(_ILP_SECONDS[1], left),
            gap=gap,
        )
        cut = result.status == "time_limit"
        bound = max(bound, min(result.bound * (1 - OPTIMALITY), busiest))
        if found is not None:
            other, peak = best_split(loads, found, num_ranks)
            if peak < busiest:
                slots, share, busiest = found, other, peak
    best = replace(
        layer, slots=slots[None], busiest=np.array([busiest]), bound=np.array([bound]), cut=cut
    )
    return best, share


def _search(
    layer: LayerBatch, goal: float, deadline: float, seed: int
) -> tuple[Ints, Floats, float]:
    """Kick the slots again and again; keep what is no worse after the best split."""
    rng = np.random.default_rng(seed)
    loads, slots, num_ranks = layer.loads[0], layer.slots[0], layer.num_ranks
    share, busiest = best_split(loads, slots, num_ranks)
    idle = 0
    while busiest > goal and idle < _PATIENCE and time.monotonic() < deadline:
        kicked = kick(slots[None].copy(), len(loads), num_ranks, rng)[0]
        other, peak = best_split(loads, kicked, num_ranks)
        idle = 0 if peak < busiest * (1 - 1e-5) else idle + 1
        if peak <= busiest:
            slots, share, busiest = kicked, other, peak
    return slots, share, busiest
