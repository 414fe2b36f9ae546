"""Closing the gap of layers that the quick search leaves open: more search, better bounds, ILP.

Works on a chunk of layers (loads [B, E] in token counts of any scale, even dispatch) within a
deadline; always returns a feasible placement and a proved bound for each, improved or not.
"""

import time
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from planner.columns import configuration_bound
from planner.exact import model_size, solve_even
from planner.layer_batch import LayerBatch
from planner.local_search import iterated_search, swap_search
from planner.packing import cyclic_packing, first_starts, rank_loads
from planner.solver import OPTIMALITY, Backend

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_TRIAL_PATIENCE = 15  # rounds for a packing with new replica counts
_ILP_VARIABLES = 800  # binaries; beyond, the ILP proves nothing in useful time
_ILP_SECONDS = (0.1, 20.0)  # least and most for a layer: it succeeds soon or not at all


def close_quickly(layers: LayerBatch, gap: float, seconds: float, seed: int) -> LayerBatch:
    """Search a little, then raise the bounds: enough for most layers."""
    start = time.monotonic()
    rng = np.random.default_rng(seed)
    layers = _search(layers, gap, start + 0.3 * seconds, 30, rng)
    layers = _restart(layers, gap, start + 0.6 * seconds, rng)
    return _raise_bounds(layers, gap, start + seconds)


def close_gaps(
    layers: LayerBatch, gap: float, seconds: float, seed: int, backend: Backend
) -> LayerBatch:
    """Bring every layer to within `gap` of its bound, or as near as `seconds` allow.

    The bounds come first: they tell where searching on is pointless. They come again after the
    search, since a better placement makes them cheaper, and at last the ILP for small layers.
    """
    start = time.monotonic()
    rng = np.random.default_rng(seed)
    layers = _raise_bounds(layers, gap, start + 0.3 * seconds)
    layers = _restart(layers, gap, start + 0.45 * seconds, rng)
    layers = replace(layers, cut=False)  # the bounds get their second chance below
    layers = _search(layers, gap, start + 0.7 * seconds, 300, rng)
    layers = _raise_bounds(layers, gap, start + 0.9 * seconds)
    return _solve_small(layers, gap, start + seconds, backend)


def _search(
    layers: LayerBatch, gap: float, deadline: float, patience: int, rng: np.random.Generator
) -> LayerBatch:
    slots, busiest = iterated_search(
        layers.loads,
        layers.slots,
        layers.num_ranks,
        target=layers.goal(gap),
        deadline=deadline,
        rng=rng,
        patience=patience,
    )
    cut = layers.cut or time.monotonic() >= deadline
    return replace(layers, slots=slots, busiest=busiest, cut=cut)


def _restart(
    layers: LayerBatch, gap: float, deadline: float, rng: np.random.Generator
) -> LayerBatch:
    """Search the open layers a little from other replica counts, which kicks hardly reach."""
    todo = layers.open(gap)
    if len(todo) == 0:
        return layers
    best = layers.pick(todo)
    for start in first_starts(best.loads, best.slots.shape[1], best.num_ranks):
        slots, busiest = swap_search(best.loads, start, best.num_ranks, deadline)
        other = replace(best, slots=slots, busiest=busiest)
        best = best.better(_search(other, gap, deadline, _TRIAL_PATIENCE, rng))
    return layers.update(todo, best)


def _raise_bounds(layers: LayerBatch, gap: float, deadline: float) -> LayerBatch:
    """Raise the bounds of the open layers; one layer's prices are the next one's hint."""
    todo, hint = layers.open(gap), None
    for done, i in enumerate(todo):
        left = deadline - time.monotonic()
        if left <= 0:
            break
        # Without a hint a layer may take long; with one it mostly costs a single proof.
        share = 1 / 4 if hint is None else 2 / (len(todo) - done + 1)
        index = np.array([i])
        layer, prices = _squeeze(layers.pick(index), gap, time.monotonic() + share * left, hint)
        layers = layers.update(index, layer)
        hint = hint if prices is None else prices
    return replace(layers, cut=layers.cut or time.monotonic() >= deadline)


def _squeeze(
    layer: LayerBatch, gap: float, deadline: float, hint: Floats | None
) -> tuple[LayerBatch, Floats | None]:
    """Column generation and rounding, again as long as rounding improves the placement much."""
    if layer.busiest[0] > layer.rival[0]:  # rounding must reach below the baseline
        gap = min(gap, max(0.0, 1 - float(layer.bound[0] / layer.rival[0])) / 2)
    while True:
        found = configuration_bound(
            layer.loads[0],
            layer.slots[0],
            layer.num_ranks,
            lower=float(layer.bound[0]),
            upper=float(layer.busiest[0]),
            gap=gap,
            deadline=deadline,
            hint=hint,
        )
        before = float(layer.busiest[0])
        layer = replace(layer, bound=np.array([found.bound]))
        if found.counts is not None:
            layer = _try_counts(layer, found.counts[None], gap, deadline)
        cut = time.monotonic() >= deadline
        if cut or layer.busiest[0] > 0.99 * before:
            return replace(layer, cut=cut), found.prices


def _try_counts(layer: LayerBatch, counts: Ints, gap: float, deadline: float) -> LayerBatch:
    """Pack and search again with other replica counts; keep what is better."""
    start = cyclic_packing(layer.loads, counts, layer.num_ranks)
    slots, busiest = swap_search(layer.loads, start, layer.num_ranks)
    other = replace(layer, slots=slots, busiest=busiest)
    # A new basin looks bad until it has been searched a little.
    other = _search(other, gap, deadline, _TRIAL_PATIENCE, np.random.default_rng(0))
    return layer.better(other)


def _solve_small(layers: LayerBatch, gap: float, deadline: float, backend: Backend) -> LayerBatch:
    """ILPs for the open layers that are small enough for one."""
    slots, busiest, bound = layers.slots.copy(), layers.busiest.copy(), layers.bound.copy()
    cut = layers.cut
    todo = layers.open(gap)
    for done, i in enumerate(todo):
        left = deadline - time.monotonic()
        size = model_size(layers.loads[i], slots.shape[1], layers.num_ranks, float(busiest[i]))
        if size > _ILP_VARIABLES:
            continue
        if left <= _ILP_SECONDS[0]:
            cut = True
            break
        result, found = solve_even(
            layers.loads[i],
            slots.shape[1],
            layers.num_ranks,
            lower=float(bound[i]),
            upper=float(busiest[i]),
            backend=backend,
            time_limit=min(_ILP_SECONDS[1], left / (len(todo) - done)),
            gap=gap,
        )
        bound[i] = max(bound[i], min(result.bound * (1 - OPTIMALITY), busiest[i]))
        if found is not None and result.objective < busiest[i]:
            slots[i] = found
        cut = cut or result.status == "time_limit"
    busiest = rank_loads(layers.loads, slots, layers.num_ranks).max(1)
    return replace(layers, slots=slots, busiest=busiest, bound=bound, cut=cut)
