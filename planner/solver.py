"""One interface over the ILP solvers (HiGHS and CBC through PuLP) that tells the true status.

A solver stopped by its time limit with some solution in hand may be reported as "Optimal" by
PuLP. Here the status and the best bound are read from the solver itself: from HiGHS's info,
and from CBC's log. Objectives and bounds are in the unit of the problem's objective.
"""

import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import highspy
import numpy as np
import pulp
from numpy.typing import NDArray

from basis.errors import InputError, SolverError

Backend = Literal["highs", "cbc"]
Status = Literal["optimal", "gap", "time_limit", "infeasible"]

OPTIMALITY = 1e-6
"""Relative difference of objective and bound below which a solution is called optimal."""
_FEASIBILITY = 1e-5  # violation of a constraint, relative to its constant, still accepted
_CBC_DIGITS = 1e-7  # relative rounding of the numbers in CBC's solution file
_INF = float("inf")


@dataclass(frozen=True, kw_only=True)
class SolverResult:
    """What a solver found and what it proved, for a minimisation."""

    status: Status
    """optimal: objective equals bound; gap: stopped at the asked relative gap; time_limit:
    stopped before either (with or without a solution); infeasible: proved to have none."""
    objective: float
    """Value of the best solution, inf without one."""
    bound: float
    """Proved lower bound, -inf if the solver gave none."""
    values: Mapping[str, float]
    """Value of each variable by name; empty without a solution."""

    @property
    def gap(self) -> float:
        """(objective - bound) / objective; inf without a solution or bound."""
        if self.objective == _INF or self.bound == -_INF:
            return _INF
        difference = self.objective - self.bound
        return difference / abs(self.objective) if difference else 0.0


_INFEASIBLE = SolverResult(status="infeasible", objective=_INF, bound=_INF, values={})


def solve(
    problem: Any,
    backend: Backend = "highs",
    time_limit: float = 60.0,
    gap: float = 0.0,
    threads: int = 1,
) -> SolverResult:
    """Minimise a `pulp.LpProblem`; prints nothing.

    Parameters
    ----------
    time_limit : float
        Wall time, s.
    gap : float
        Relative gap at which the solver may stop.
    threads : int
        Threads of HiGHS; the CBC that comes with PuLP is single-threaded.

    Raises
    ------
    InputError
        For an unknown backend, or CBC without its executable.
    SolverError
        If the problem maximises, the solver fails, or its point violates a constraint.
    """
    if problem.sense != pulp.LpMinimize:
        raise SolverError(f"problem {problem.name!r} maximises -- negate its objective")
    if backend == "highs":
        result = _solve_highs(problem, time_limit, gap, threads)
    elif backend == "cbc":
        result = _solve_cbc(problem, time_limit, gap)
    else:
        raise InputError(f"unknown solver {backend!r} -- highs or cbc")
    if result.values:
        _check_point(problem, backend)
    return result


def cbc_path() -> str | None:
    """Path of a CBC executable: the one inside PuLP, else `cbc` on the PATH, else None."""
    for path in (pulp.PULP_CBC_CMD.pulp_cbc_path, "cbc"):
        found = shutil.which(path)
        if found:
            return found
    return None


def _solve_highs(problem: Any, time_limit: float, gap: float, threads: int) -> SolverResult:
    problem.solve(
        pulp.HiGHS(msg=False, timeLimit=time_limit, gapRel=gap, gapAbs=0.0, threads=threads)
    )
    model = problem.solverModel
    status, info = model.getModelStatus(), model.getInfo()
    statuses = highspy.HighsModelStatus
    if status in (statuses.kInfeasible, statuses.kUnboundedOrInfeasible):
        return _INFEASIBLE
    if status not in (statuses.kOptimal, statuses.kTimeLimit):
        raise SolverError(f"HiGHS stopped with {model.modelStatusToString(status)!r}")
    finished = status == statuses.kOptimal
    found = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    objective = info.objective_function_value if found else _INF
    bound = objective if finished else -_INF
    if problem.isMIP():
        bound = info.mip_dual_bound
    constant = float(problem.objective.constant)
    return _result(problem, finished, objective + constant, bound + constant)


def _solve_cbc(problem: Any, time_limit: float, gap: float) -> SolverResult:
    path = cbc_path()
    if path is None:
        raise InputError(
            "solver cbc has no executable here -- install it with `pip install pulp[cbc]` or "
            "your system's coinor-cbc package, or use highs"
        )
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "cbc.log"
        solver = pulp.COIN_CMD(
            path=path, msg=False, timeLimit=time_limit, gapRel=gap, gapAbs=0.0, logPath=str(log)
        )
        solver.tmpDir = folder
        try:
            problem.solve(solver)
        except pulp.PulpSolverError as error:
            raise SolverError(f"CBC failed -- {error}") from error
        text = log.read_text(encoding="utf-8", errors="replace")
    return _read_cbc(problem, text, gap)


def _read_cbc(problem: Any, log: str, gap: float) -> SolverResult:
    """Read the true outcome from CBC's log; PuLP's own status is good for infeasibility only."""
    if problem.status == pulp.LpStatusInfeasible:
        return _INFEASIBLE
    found = problem.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible)
    objective = float(pulp.value(problem.objective)) if found else _INF
    finished = found and "Stopped on" not in log
    bound = _cbc_bound(log) + float(problem.objective.constant)
    if finished and "within gap tolerance" not in log:
        bound = max(bound, objective - (gap + _CBC_DIGITS) * abs(objective))
    return _result(problem, finished, objective, bound)


def _cbc_bound(log: str) -> float:
    """Best bound that the log states, lowered by the rounding of its print-out."""
    numbers = r"([-+]?\d+\.?\d*(?:e[-+]?\d+)?)"
    bounds = [-_INF]
    bounds += [float(x) - 5e-4 for x in re.findall(r"Lower bound:\s+" + numbers, log)]
    for text in re.findall(r"best possible " + numbers, log):
        value = float(text)
        if abs(value) < 1e40:  # CBC writes 1e50 where it has none
            bounds.append(value - 1e-6 * abs(value))
    return max(bounds)


def _result(problem: Any, finished: bool, objective: float, bound: float) -> SolverResult:
    bound = min(bound, objective)
    tight = objective - bound <= OPTIMALITY * max(1e-9, abs(objective))
    status: Status = "time_limit"
    if finished:
        status = "optimal" if tight else "gap"
    values = {v.name: float(v.varValue) for v in problem.variables()} if objective < _INF else {}
    return SolverResult(status=status, objective=objective, bound=bound, values=values)


def _check_point(problem: Any, backend: str) -> None:
    """Refuse a point that breaks a constraint or an integrality."""
    for constraint in problem.constraints():
        scale = max(1.0, abs(constraint.constant))
        if not constraint.valid(_FEASIBILITY * scale):
            raise SolverError(f"{backend} returned a point that violates {constraint.name}")
    for variable in problem.variables():
        value = variable.varValue
        if variable.cat == pulp.LpInteger and abs(value - round(value)) > _FEASIBILITY:
            raise SolverError(f"{backend} returned {variable.name} = {value}, not an integer")


class ColumnMaster:
    """Master problem of a column generation: cover every row once with a given number of columns.

    Minimises ``sum_e cost[e] |1 - cover[e]|`` over fractions of columns that sum to
    `num_columns`; a column (e, r) pair covers 1 / r of row e. The duals are the rows' prices.
    Kept as a HiGHS model, so that adding a column resumes from the last basis.
    """

    def __init__(self, cost: NDArray[np.float64], num_columns: int) -> None:
        self._rows = len(cost)
        self._model: Any = highspy.Highs()
        self._model.setOptionValue("output_flag", False)
        self._model.setOptionValue("threads", 1)
        for _ in range(self._rows):
            self._model.addRow(1.0, 1.0, 0, np.zeros(0, np.int32), np.zeros(0))
        self._model.addRow(num_columns, num_columns, 0, np.zeros(0, np.int32), np.zeros(0))
        for row in range(self._rows):
            for sign in (1.0, -1.0):
                self._add(float(cost[row]), np.array([row]), np.array([sign]))

    def add(self, column: Sequence[tuple[int, int]]) -> None:
        """Add a column of (row, r) pairs."""
        rows, counts = np.array(sorted(column)).T
        self._add(0.0, np.append(rows, self._rows), np.append(1.0 / counts, 1.0))

    def solve(self) -> tuple[float, NDArray[np.float64]]:
        """Least violation and the price of each row.

        Raises
        ------
        SolverError
            If HiGHS does not report an optimum.
        """
        self._model.run()
        status = self._model.getModelStatus()
        if status != highspy.HighsModelStatus.kOptimal:
            raise SolverError(f"master problem: {self._model.modelStatusToString(status)}")
        prices = np.array(self._model.getSolution().row_dual)[: self._rows]
        return float(self._model.getObjectiveValue()), prices

    def fractions(self) -> NDArray[np.float64]:
        """Fraction of each added column in the last solution, in the order of adding."""
        return np.array(self._model.getSolution().col_value)[2 * self._rows :]

    def _add(self, cost: float, rows: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        self._model.addCol(cost, 0.0, _INF, len(rows), rows.astype(np.int32), values)
