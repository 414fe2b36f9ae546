"""Which experts stay in the fast memory: mean expert time over the steps planned on, at a budget.

Layers meet only in the budget of slots, so the programme decomposes: at a price per slot every
layer is solved by itself, the sum of their bounds less the price of the budget bounds the whole
(Lagrange), and of the residencies found on the way a dynamic programme picks one per layer.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planner.offload_layer import Bools, Layer, Rule
from planner.offload_program import Column, LayerProgram
from planner.offload_search import Search, pick, pool_price, start
from planner.parallel import run_parallel
from planner.solver import Backend

_PASSES = 4  # prices at which every layer's programme is solved, at most
_PROGRAMS = 0.75  # share of the time for the programmes, the rest for the local search
_PASS = 0.6  # share of the programmes' remaining time that one price may take
_SETTLED = 0.01  # relative change of the price that is not worth another pass
_LEAST = 1.5  # s, that a programme gets however late it is: its relaxation takes about one
_HALVINGS = 4  # of the range of prices in the search of a bound alone


@dataclass(frozen=True, kw_only=True, eq=False)
class Residency:
    """Chosen experts with the proof."""

    keep: Bools
    """[L, E]."""
    fetch: Bools
    """Under ``planned``: what is fetched at each use, [L, E]."""
    landing: int
    """Most experts that a step fetches in a layer; slots are left for them."""
    objective: float
    """Mean over the steps of the layers' expert times, summed, s."""
    bound: float
    """No residency within the budget is below, s."""
    timed_out: bool
    """Whether a layer's programme was stopped by the clock."""
    seconds: float
    """Wall time."""
    search: Search
    """For the same question with fewer slots."""


def solve_residency(
    layers: Sequence[Layer],
    slots: int,
    rule: Rule,
    *,
    gap: float = 0.002,
    time_limit: float = 60.0,
    backend: Backend = "highs",
    workers: int = 2,
) -> Residency:
    """Choose at most ``slots`` experts over all layers to keep in the fast memory.

    Parameters
    ----------
    layers : sequence of Layer
    slots : int
        Experts that fit, fetched ones included; the bound gives these slots to residents.
    rule : {"home", "planned"}
        Where experts that are not kept may run.
    gap : float
        Relative gap at which a layer's programme stops, and at which the whole search does.
    time_limit : float
        Wall time, s; asked of the solver, so kept within a few seconds.
    """
    begin = time.monotonic()
    slots = min(slots, sum(layer.num_experts for layer in layers))
    pools = [start(layer, rule) for layer in layers]
    bound, late = _prove(layers, pools, slots, rule, gap, time_limit, backend, workers)
    search = Search(layers=tuple(layers), pools=pools, rule=rule)
    chosen = search.at(slots, begin + time_limit)
    objective = sum(c.mean for c in chosen)
    return Residency(
        keep=np.array([c.keep for c in chosen]),
        fetch=np.array([c.fetch for c in chosen]),
        landing=max(c.landing for c in chosen),
        objective=objective,
        bound=min(bound, objective),
        timed_out=late,
        seconds=time.monotonic() - begin,
        search=search,
    )


def _prove(
    layers: Sequence[Layer],
    pools: list[list[Column]],
    slots: int,
    rule: Rule,
    gap: float,
    time_limit: float,
    backend: Backend,
    workers: int,
) -> tuple[float, bool]:
    """Solve the layers' programmes at a few prices; adds their columns to the pools.

    Returns
    -------
    (best bound in seconds, whether the clock stopped a programme of the pass that gave it)
    """
    deadline = time.monotonic() + time_limit * _PROGRAMS
    bound, late, last = 0.0, True, -1.0
    for number in range(_PASSES):
        price = pool_price(pools, slots)
        left = deadline - time.monotonic()
        if number and (left < time_limit / 10 or abs(price - last) <= _SETTLED * price):
            break
        last = price
        share = max(left, 1.0) * _PASS
        solved = _solve_all(layers, rule, price, backend, share, gap, workers)
        for pool, (column, _, _) in zip(pools, solved, strict=True):
            pool += [] if column is None else [column]
        proved = sum(b for _, b, _ in solved) - price * slots
        if proved > bound:
            bound, late = proved, any(stopped for _, _, stopped in solved)
        if sum(c.mean for c in pick(pools, slots)) <= bound * (1 + gap):
            break
    return bound, late


def bound_any(
    layers: Sequence[Layer],
    slots: int,
    price: float,
    *,
    gap: float = 0.002,
    time_limit: float = 20.0,
    backend: Backend = "highs",
    workers: int = 2,
) -> float:
    """Bound the mean expert time from below for every residency and every rule of sites.

    Parameters
    ----------
    price : float
        Where to begin the search, s per slot: `pool_price` of a solved problem.

    Returns
    -------
    float
        Seconds; each step may compute every expert wherever that is best.
    """
    deadline = time.monotonic() + time_limit
    low, high, bound = 0.0, 2 * price, 0.0
    for _ in range(_HALVINGS):
        share = max((deadline - time.monotonic()) / 2, 1.0)
        solved = _solve_all(layers, "any", price, backend, share, gap, workers)
        bound = max(bound, sum(b for _, b, _ in solved) - price * slots)
        used = sum(c.slots for c, _, _ in solved if c is not None)
        low, high = (price, high) if used > slots else (low, price)
        price = (low + high) / 2
        if time.monotonic() > deadline:
            break
    return bound


def _solve_all(
    layers: Sequence[Layer],
    rule: Rule,
    price: float,
    backend: Backend,
    time_limit: float,
    gap: float,
    workers: int,
) -> list[tuple[Column | None, float, bool]]:
    """Solve every layer's programme at one price, over several processes; see `solve_layers`."""
    parts = [range(w, len(layers), workers) for w in range(min(workers, len(layers)))]
    tasks = [([layers[i] for i in p], rule, price, backend, time_limit, gap) for p in parts]
    solved: dict[int, tuple[Column | None, float, bool]] = {}
    for part, answers in zip(parts, run_parallel(solve_layers, tasks), strict=True):
        solved |= dict(zip(part, answers, strict=True))
    return [solved[i] for i in range(len(layers))]


def solve_layers(
    layers: Sequence[Layer],
    rule: Rule,
    price: float,
    backend: Backend,
    time_limit: float,
    gap: float,
) -> list[tuple[Column | None, float, bool]]:
    """Solve layers one after another: (residency, bound in seconds, stopped by the clock)."""
    deadline = time.monotonic() + time_limit
    answers = []
    for done, layer in enumerate(layers):
        share = max((deadline - time.monotonic()) / (len(layers) - done), _LEAST)
        program = LayerProgram(layer, rule)
        answers.append(program.solve(price, backend=backend, time_limit=share, gap=gap / 2))
    return answers
