"""Balancing when the split of an expert's tokens over its replicas is free (dispatch `shares`).

For given slots the best split is a linear program (a flow from experts to the ranks that host
them); choosing the slots as well is an ILP, solved exactly for small layers. The quantity is
the busiest rank's expected load, in the unit of the loads (token counts of any scale).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pulp
from numpy.typing import NDArray
from scipy import optimize
from scipy.sparse import coo_array

from basis.errors import SolverError
from planner.solver import Backend, SolverResult, solve

Floats = NDArray[np.float64]

_linprog: Any = optimize.linprog  # its type stubs know no sparse matrices


def best_split(loads: Floats, slots: NDArray[np.integer], num_ranks: int) -> tuple[Floats, float]:
    """Split each expert's load over its slots so that the busiest rank is relieved (one layer).

    Parameters
    ----------
    loads : float array [E]
    slots : int array [P]

    Returns
    -------
    share : float array [P]
        Share of its expert's tokens that each slot gets; sums to 1 per expert.
    busiest : float
        Load of the busiest rank under exactly these shares.

    Raises
    ------
    SolverError
        If the linear program fails, which no valid input causes.
    """
    num_slots, experts = len(slots), len(loads)
    rank = np.arange(num_slots) // (num_slots // num_ranks)
    scale = float(loads.sum()) / num_ranks or 1.0
    weight = loads[slots] / scale
    slot = np.arange(num_slots)
    # Variables: the share of each slot, then the peak. Rows: shares sum to 1; rank loads <= peak.
    sums = coo_array((np.ones(num_slots), (slots, slot)), shape=(experts, num_slots + 1))
    columns = np.concatenate([slot, np.full(num_ranks, num_slots)])
    rows = np.concatenate([rank, np.arange(num_ranks)])
    values = np.concatenate([weight, -np.ones(num_ranks)])
    peaks = coo_array((values, (rows, columns)), shape=(num_ranks, num_slots + 1))
    answer = _linprog(
        np.eye(1, num_slots + 1, num_slots)[0],
        A_ub=peaks.tocsr(),
        b_ub=np.zeros(num_ranks),
        A_eq=sums.tocsr(),
        b_eq=np.ones(experts),
        method="highs",
    )
    if answer.x is None:
        raise SolverError(f"splitting shares failed -- {answer.message}")
    share = normalised(answer.x[:num_slots], slots, experts)
    return share, float(np.bincount(rank, share * loads[slots], num_ranks).max())


def normalised(share: Floats, slots: NDArray[np.integer], num_experts: int) -> Floats:
    """Clip solver noise and make the shares of each expert sum to 1 (even if all are 0)."""
    share = np.clip(share, 0.0, None)
    total = np.bincount(slots, share, num_experts)
    replicas = np.bincount(slots, minlength=num_experts)
    empty = total[slots] <= 0
    return np.asarray(
        np.where(empty, 1.0 / replicas[slots], share / np.where(empty, 1, total[slots]))
    )


@dataclass(frozen=True, kw_only=True)
class SharesModel:
    """The ILP of one layer under free shares, and its variables."""

    problem: Any
    """`pulp.LpProblem`; its objective is `peak`."""
    host: dict[tuple[int, int], Any]
    """Binary (e, g): rank g has a slot with expert e."""
    flow: dict[tuple[int, int], Any]
    """Load of expert e that goes to rank g, unit of the loads."""
    peak: Any
    """Busiest rank's load."""
    loads: tuple[float, ...]
    """Load of each expert."""
    num_slots: int
    """Slots of the layer."""
    num_ranks: int
    """Ranks."""


def shares_model(loads: Floats, num_slots: int, num_ranks: int, *, lower: float) -> SharesModel:
    """Build the ILP of one layer; `lower` is a proved bound on the busiest rank's load."""
    model = shares_variables(loads, num_slots, num_ranks, lower=lower)
    add_served_constraints(model)
    add_hosted_flow_constraints(model)
    add_host_slot_constraints(model)
    add_flow_peak_constraints(model)
    add_rank_order_constraints(model)
    return model


def shares_variables(loads: Floats, num_slots: int, num_ranks: int, *, lower: float) -> SharesModel:
    """Build the variables and the objective, without any constraint."""
    problem = pulp.LpProblem("shares_dispatch", pulp.LpMinimize)
    pairs = [(e, g) for e in range(len(loads)) for g in range(num_ranks)]
    model = SharesModel(
        problem=problem,
        host={(e, g): problem.add_variable(f"host_e{e}_g{g}", cat="Binary") for e, g in pairs},
        flow={(e, g): problem.add_variable(f"flow_e{e}_g{g}", lowBound=0) for e, g in pairs},
        peak=problem.add_variable("peak", lowBound=lower),
        loads=tuple(float(w) for w in loads),
        num_slots=num_slots,
        num_ranks=num_ranks,
    )
    problem += model.peak, "busiest_load"
    return model


def add_served_constraints(model: SharesModel) -> None:
    """``sum_g flow[e,g] = w_e`` and ``sum_g host[e,g] >= 1``: every expert is served somewhere."""
    for e, load in enumerate(model.loads):
        ranks = range(model.num_ranks)
        flow = pulp.lpSum(model.flow[e, g] for g in ranks)
        host = pulp.lpSum(model.host[e, g] for g in ranks)
        model.problem.addConstraint(flow == load, f"served_e{e}")
        model.problem.addConstraint(host >= 1, f"hosted_e{e}")


def add_hosted_flow_constraints(model: SharesModel) -> None:
    """``flow[e,g] <= w_e host[e,g]``: tokens go only to ranks that hold their expert."""
    for (e, g), flow in model.flow.items():
        limit = model.loads[e] * model.host[e, g]
        model.problem.addConstraint(flow <= limit, f"hosted_flow_e{e}_g{g}")


def add_host_slot_constraints(model: SharesModel) -> None:
    """``sum_e host[e,g] = P / G``: every rank fills exactly its slots, with distinct experts."""
    for g in range(model.num_ranks):
        hosts = pulp.lpSum(model.host[e, g] for e in range(len(model.loads)))
        per_rank = model.num_slots // model.num_ranks
        model.problem.addConstraint(hosts == per_rank, f"host_slots_g{g}")


def add_flow_peak_constraints(model: SharesModel) -> None:
    """``sum_e flow[e,g] <= peak``: the busiest rank's load is the objective."""
    for g in range(model.num_ranks):
        load = pulp.lpSum(model.flow[e, g] for e in range(len(model.loads)))
        model.problem.addConstraint(load <= model.peak, f"flow_load_g{g}")


def add_rank_order_constraints(model: SharesModel) -> None:
    """``host[e*,g] >= host[e*,g+1]``: the heaviest expert e* sits on the first ranks.

    Ranks are interchangeable in this stage, so some optimum has this form.
    """
    heaviest = int(np.argmax(model.loads))
    for g in range(model.num_ranks - 1):
        ordered = model.host[heaviest, g] >= model.host[heaviest, g + 1]
        model.problem.addConstraint(ordered, f"rank_order_g{g}")


def solve_shares(
    loads: Floats,
    num_slots: int,
    num_ranks: int,
    *,
    lower: float,
    backend: Backend,
    time_limit: float,
    gap: float,
) -> tuple[SolverResult, NDArray[np.int64] | None]:
    """Solve one layer exactly; see `planner.exact.solve_even` for the shape of the answer."""
    scale = float(loads.sum()) / num_ranks or 1.0
    model = shares_model(loads / scale, num_slots, num_ranks, lower=lower / scale)
    result = solve(model.problem, backend, time_limit, gap)
    if result.status == "infeasible":
        raise SolverError(f"{backend} calls a layer infeasible that has a placement")
    scaled = SolverResult(
        status=result.status,
        objective=result.objective * scale,
        bound=result.bound * scale,
        values=result.values,
    )
    if not result.values:
        return scaled, None
    hosted = [(g, e) for (e, g), v in model.host.items() if v.varValue > 0.5]
    return scaled, np.array([e for _, e in sorted(hosted)], dtype=np.int64)
