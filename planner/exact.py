"""The first stage as one ILP per layer, for small layers (PuLP; HiGHS or CBC).

Even dispatch: choose for every expert e its number of replicas r and their ranks g, so that
the busiest rank's load (token counts of any scale) is least. The plain model dies of
symmetry beyond a few hundred variables; `planner.balance` calls it only where the bounds
and the local search leave a gap and the model is small.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pulp
from numpy.typing import NDArray

from basis.errors import SolverError
from planner.bounds import replica_range
from planner.solver import Backend, SolverResult, solve

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class EvenModel:
    """The ILP of one layer and its variables."""

    problem: Any
    """`pulp.LpProblem`; its objective is `peak`."""
    count: dict[tuple[int, int], Any]
    """Binary (e, r): expert e has exactly r replicas."""
    host: dict[tuple[int, int, int], Any]
    """Binary (e, r, g): expert e has r replicas, one of them on rank g."""
    peak: Any
    """Busiest rank's load."""
    loads: tuple[float, ...]
    """Load of each expert."""
    num_slots: int
    """Slots of the layer."""
    num_ranks: int
    """Ranks."""


def even_model(
    loads: Floats, num_slots: int, num_ranks: int, *, lower: float, upper: float
) -> EvenModel:
    """Build the ILP of one layer; see `even_variables` for the parameters."""
    model = even_variables(loads, num_slots, num_ranks, lower=lower, upper=upper)
    add_count_constraints(model)
    add_replica_constraints(model)
    add_slot_constraints(model)
    add_peak_constraints(model)
    add_symmetry_constraints(model)
    return model


def even_variables(
    loads: Floats, num_slots: int, num_ranks: int, *, lower: float, upper: float
) -> EvenModel:
    """Build the variables and the objective, without any constraint.

    Parameters
    ----------
    loads : float array [E]
    lower, upper : float
        A proved bound and the load of a known placement: replica counts that only placements
        worse than `upper` can have are left out.
    """
    problem = pulp.LpProblem("even_dispatch", pulp.LpMinimize)
    least, most = replica_range(loads, num_slots, num_ranks, upper)
    peak = problem.add_variable("peak", lowBound=lower)
    count, host = {}, {}
    for e in range(len(loads)):
        for r in range(int(least[e]), int(most[e]) + 1):
            count[e, r] = problem.add_variable(f"count_e{e}_r{r}", cat="Binary")
            for g in range(num_ranks):
                host[e, r, g] = problem.add_variable(f"host_e{e}_r{r}_g{g}", cat="Binary")
    problem += peak, "busiest_load"
    return EvenModel(
        problem=problem,
        count=count,
        host=host,
        peak=peak,
        loads=tuple(float(w) for w in loads),
        num_slots=num_slots,
        num_ranks=num_ranks,
    )


def model_size(loads: Floats, num_slots: int, num_ranks: int, upper: float) -> int:
    """Binary `host` variables that `even_model` would have."""
    least, most = replica_range(loads, num_slots, num_ranks, upper)
    return int((most - least + 1).sum()) * num_ranks


def add_count_constraints(model: EvenModel) -> None:
    """``sum_r count[e,r] = 1``: every expert has exactly one number of replicas, at least one."""
    for e in range(len(model.loads)):
        terms = [v for (f, _), v in model.count.items() if f == e]
        model.problem.addConstraint(pulp.lpSum(terms) == 1, f"one_count_e{e}")


def add_replica_constraints(model: EvenModel) -> None:
    """``sum_g host[e,r,g] = r count[e,r]`` and ``host[e,r,g] <= count[e,r]``.

    The r replicas of an expert sit on r different ranks: `host` is binary per rank, so no rank
    holds an expert twice. The second family is implied but tightens the LP.
    """
    ranks = range(model.num_ranks)
    for (e, r), chosen in model.count.items():
        hosts = [model.host[e, r, g] for g in ranks]
        model.problem.addConstraint(pulp.lpSum(hosts) == r * chosen, f"replicas_e{e}_r{r}")
        for g in ranks:
            model.problem.addConstraint(model.host[e, r, g] <= chosen, f"counted_e{e}_r{r}_g{g}")


def add_slot_constraints(model: EvenModel) -> None:
    """``sum_{e,r} host[e,r,g] = P / G``: every rank fills exactly its slots."""
    for g in range(model.num_ranks):
        terms = [v for (_, _, h), v in model.host.items() if h == g]
        per_rank = model.num_slots // model.num_ranks
        model.problem.addConstraint(pulp.lpSum(terms) == per_rank, f"slots_g{g}")


def add_peak_constraints(model: EvenModel) -> None:
    """``sum_{e,r} w_e / r host[e,r,g] <= peak``: even dispatch gives each replica ``w_e / r``."""
    for g in range(model.num_ranks):
        load = [model.loads[e] / r * v for (e, r, h), v in model.host.items() if h == g]
        model.problem.addConstraint(pulp.lpSum(load) <= model.peak, f"load_g{g}")


def add_symmetry_constraints(model: EvenModel) -> None:
    """``host[e*,r,g] = 0`` for g >= r: the heaviest expert e* sits on the first r ranks.

    Ranks are interchangeable in this stage, so some optimum has this form.
    """
    heaviest = int(np.argmax(model.loads))
    for (e, r, g), v in model.host.items():
        if e == heaviest and g >= r:
            model.problem.addConstraint(v == 0, f"first_ranks_e{e}_r{r}_g{g}")


def solve_even(
    loads: Floats,
    num_slots: int,
    num_ranks: int,
    *,
    lower: float,
    upper: float,
    backend: Backend,
    time_limit: float,
    gap: float,
) -> tuple[SolverResult, NDArray[np.int64] | None]:
    """Solve one layer; see `even_model` for the parameters.

    Loads are scaled to a mean rank load of 1 for the solver's tolerances; the result's
    objective and bound are in the unit of `loads`.

    Returns
    -------
    result : SolverResult
    slots : int64 array [P] or None
        The placement, if the solver found one.

    Raises
    ------
    SolverError
        If the solver fails or contradicts the known placement.
    """
    scale = float(loads.sum()) / num_ranks or 1.0
    model = even_model(
        loads / scale, num_slots, num_ranks, lower=lower / scale, upper=upper / scale
    )
    result = solve(model.problem, backend, time_limit, gap)
    if result.status == "infeasible":
        raise SolverError(f"{backend} calls a layer infeasible that has a known placement")
    scaled = SolverResult(
        status=result.status,
        objective=result.objective * scale,
        bound=result.bound * scale,
        values=result.values,
    )
    if not result.values:
        return scaled, None
    hosted = [(g, e) for (e, _, g), v in model.host.items() if v.varValue > 0.5]
    return scaled, np.array([e for _, e in sorted(hosted)], dtype=np.int64)
