"""First stage of the planner: place and replicate experts so that the busiest rank is relieved.

Per layer, minimise the busiest rank's expected load (token counts of any scale, averaged or
summed over the steps planned on); layers are independent, so the total is the sum over
layers. Every answer carries a proved lower bound for exactly this objective.
"""

import time
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from planner.bounds import company_bound, mean_bound, scarcity_bound
from planner.closing import close_gaps, close_quickly
from planner.eplb import eplb
from planner.layer_batch import LayerBatch
from planner.local_search import swap_search
from planner.packing import (
    checked_loads,
    first_starts,
    has_duplicates,
    rank_loads,
    without_duplicates,
)
from planner.parallel import run_parallel
from planner.shares_search import close_shares
from planner.solver import OPTIMALITY, Backend

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Status = Literal["optimal", "gap", "time_limit"]

_USABLE = 0.95  # of the time limit; the rest is for starting processes and returning
_QUICK_SECONDS = 2.0  # search in this process before others are started


@dataclass(frozen=True, kw_only=True, eq=False)
class BalanceResult:
    """A balanced placement with its certificate."""

    slots: NDArray[np.int32]
    """Logical expert of each slot, [layers, slots]; no expert twice on a rank."""
    objective: Floats
    """Busiest rank's expected load, unit of the loads, [layers]."""
    bound: Floats
    """Proved lower bound on `objective` over all placements, [layers]."""
    mean: Floats
    """Mean rank load (the plain bound), [layers]."""
    status: Status
    """optimal: every layer meets its bound; gap: finished, with `gap` left (within what was
    asked, or the search found no more); time_limit: out of time with more than that left."""
    seconds: float
    """Wall time spent, s."""
    slot_share: Floats | None = None
    """Share of its expert's tokens that each slot gets, [layers, slots]; dispatch shares only."""

    @property
    def gap(self) -> float:
        """Relative gap of the sums over layers, (objective - bound) / objective."""
        total = float(self.objective.sum())
        return 0.0 if total == 0 else (total - float(self.bound.sum())) / total


def balance(
    loads: Floats,
    num_slots: int,
    num_ranks: int,
    *,
    dispatch: Literal["even", "shares"] = "even",
    time_limit: float = 60.0,
    gap: float = 0.001,
    workers: int = 2,
    seed: int = 0,
    backend: Backend = "highs",
) -> BalanceResult:
    """Choose replicas and places of the experts of every layer.

    Parameters
    ----------
    loads : float array [layers, experts]
        Load of each logical expert on the part planned on.
    num_slots, num_ranks : int
        Slots per layer and EP ranks; each rank has ``num_slots / num_ranks`` slots.
    dispatch : {"even", "shares"}
        Replicas share their expert's load evenly, or by `BalanceResult.slot_share`.
    time_limit : float
        Wall time at which to stop with the best so far, s.
    gap : float
        A layer is done when its objective is proved to be within this relative gap.
    workers : int
        Processes for layers that the quick search leaves open.
    seed : int
        Of the random search. Equal seeds give equal results unless time runs out.
    backend : {"highs", "cbc"}
        ILP solver for small layers.

    Raises
    ------
    InputError
        For loads, slots, ranks or options that do not make sense.
    InfeasibleError
        If there are more slots than distinct experts can fill.
    """
    start = time.monotonic()
    deadline = start + _USABLE * time_limit
    weights = checked_loads(loads, num_slots, num_ranks)
    _check_options(dispatch, time_limit, gap, workers)
    # With one replica of each expert there is nothing to share: the problems are the same.
    even = dispatch == "even" or num_slots == weights.shape[1]
    layers = _first_layers(weights, num_slots, num_ranks, even)
    share = np.ones((len(weights), num_slots)) if dispatch == "shares" else None
    if even:
        layers = _close_even(layers, gap, deadline, workers, seed, backend)
    else:
        layers, share = _close_shares(layers, gap, deadline, seed, backend)
    bound = np.minimum(layers.bound, layers.busiest)
    return BalanceResult(
        slots=layers.slots.astype(np.int32),
        objective=layers.busiest,
        bound=bound,
        mean=weights.sum(1) / num_ranks,
        status=_status(layers.busiest, bound, gap, cut=layers.cut),
        seconds=time.monotonic() - start,
        slot_share=share,
    )


def _check_options(dispatch: str, time_limit: float, gap: float, workers: int) -> None:
    if dispatch not in ("even", "shares"):
        raise InputError(f"cannot balance for dispatch {dispatch!r} -- even or shares")
    if not time_limit > 0:
        raise InputError(f"time limit is {time_limit} s -- give a positive number of seconds")
    if not 0 <= gap < 1:
        raise InputError(f"gap is {gap} -- a relative gap lies in [0, 1)")
    if workers < 1:
        raise InputError(f"{workers} workers -- at least one is needed")


def _status(objective: Floats, bound: Floats, gap: float, *, cut: bool) -> Status:
    difference = objective - bound
    if (difference <= 3 * OPTIMALITY * objective).all():
        return "optimal"
    within = difference.sum() <= gap * objective.sum() * (1 + OPTIMALITY)
    return "time_limit" if cut and not within else "gap"


def _first_layers(weights: Floats, num_slots: int, num_ranks: int, even: bool) -> LayerBatch:
    """Quick packings of all layers, with the bounds that need no search."""
    scarce = company_bound if even else scarcity_bound
    rival = eplb(weights, num_slots, 1, 1, num_ranks)
    slots, busiest = _first_packings(weights, rival, num_ranks)
    return LayerBatch(
        loads=weights,
        slots=slots,
        busiest=busiest,
        bound=np.maximum(mean_bound(weights, num_ranks), scarce(weights, num_slots, num_ranks)),
        rival=rank_loads(weights, rival, num_ranks).max(1),
        num_ranks=num_ranks,
    )


def _first_packings(
    weights: Floats, rival: NDArray[np.int32], num_ranks: int
) -> tuple[Ints, Floats]:
    """Best of the starts and EPLB's placement, each after swaps."""
    starts = first_starts(weights, rival.shape[1], num_ranks)
    starts.append(without_duplicates(rival, weights.shape[1], num_ranks))
    best = np.full(len(weights), np.inf)
    slots = starts[0]
    for start in starts:
        found, peak = swap_search(weights, start, num_ranks)
        take = (peak < best) & ~has_duplicates(found, num_ranks)
        best = np.where(take, peak, best)
        slots = np.where(take[:, None], found, slots)
    return slots, best


def _close_even(
    layers: LayerBatch, gap: float, deadline: float, workers: int, seed: int, backend: Backend
) -> LayerBatch:
    """Close the open layers: shortly in this process, then what is left in parallel ones."""
    todo = layers.open(gap)
    if len(todo):
        seconds = min(_QUICK_SECONDS, deadline - time.monotonic())
        layers = layers.update(todo, close_quickly(layers.pick(todo), gap, seconds, seed))
    todo, seconds = layers.open(gap), deadline - time.monotonic()
    if len(todo) == 0 or seconds <= 0:
        return replace(layers, cut=len(todo) > 0)
    layers = replace(layers, cut=False)
    chunks = [todo[i::workers] for i in range(min(workers, len(todo)))]
    tasks = [(layers.pick(c), gap, seconds, seed + i + 1, backend) for i, c in enumerate(chunks)]
    for chunk, closed in zip(chunks, run_parallel(close_gaps, tasks), strict=True):
        layers = layers.update(chunk, closed)
    return layers


def _close_shares(
    layers: LayerBatch, gap: float, deadline: float, seed: int, backend: Backend
) -> tuple[LayerBatch, Floats]:
    """Split shares layer by layer, searching on where that leaves a gap."""
    share = np.zeros(layers.slots.shape)
    for i in range(len(layers.loads)):
        now = time.monotonic()
        index = np.array([i])
        closed, share[i] = close_shares(
            layers.pick(index),
            gap=gap,
            deadline=now + 2 * (deadline - now) / (len(layers.loads) - i + 1),
            seed=seed + i,
            backend=backend,
        )
        layers = layers.update(index, closed)
    return layers, share
