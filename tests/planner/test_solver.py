import random

import pulp
import pytest

import planner.solver
from basis.errors import InputError, SolverError
from planner.solver import SolverResult, cbc_path, solve

BACKENDS = [
    "highs",
    pytest.param("cbc", marks=pytest.mark.skipif(cbc_path() is None, reason="no CBC here")),
]


def scheduling(jobs, machines, seed=0):
    """Minimise the makespan of random jobs: easy to build, hard to prove."""
    rng = random.Random(seed)
    work = [rng.uniform(1, 10) for _ in range(jobs)]
    problem = pulp.LpProblem("makespan", pulp.LpMinimize)
    x = {
        (i, m): problem.add_variable(f"x_{i}_{m}", cat="Binary")
        for i in range(jobs)
        for m in range(machines)
    }
    span = problem.add_variable("span", 0)
    problem += span
    for i in range(jobs):
        problem += pulp.lpSum(x[i, m] for m in range(machines)) == 1
    for m in range(machines):
        problem += pulp.lpSum(work[i] * x[i, m] for i in range(jobs)) <= span
    return problem


def small(cat, least):
    """Minimise x + y + 5 with x + 2 y >= least and x, y in [0, 1]."""
    problem = pulp.LpProblem("small", pulp.LpMinimize)
    x, y = (problem.add_variable(n, 0, 1, cat) for n in "xy")
    problem += x + y + 5
    problem += x + 2 * y >= least
    return problem


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("cat", "optimum"), [("Continuous", 5.75), ("Integer", 6.0)])
def test_optimum_of_a_tiny_problem(backend, cat, optimum):
    result = solve(small(cat, 1.5), backend)
    assert result.status == "optimal"
    assert result.objective == pytest.approx(optimum)
    assert result.bound == pytest.approx(optimum)
    assert result.values["x"] + result.values["y"] + 5 == pytest.approx(optimum)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cat", ["Continuous", "Integer"])
def test_infeasible(backend, cat):
    result = solve(small(cat, 3.5), backend)
    assert result.status == "infeasible"
    assert not result.values


@pytest.mark.skipif(cbc_path() is None, reason="no CBC here")
@pytest.mark.parametrize("seed", range(4))
def test_backends_agree(seed):
    highs, cbc = (solve(scheduling(8, 3, seed), backend) for backend in ("highs", "cbc"))
    assert highs.status == cbc.status == "optimal"
    assert highs.objective == pytest.approx(cbc.objective, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_of_time_is_never_optimal(backend):
    problem = scheduling(40, 7)
    result = solve(problem, backend, time_limit=1.0)
    # PuLP itself reports "Optimal" here, which is why this module exists.
    assert problem.status == pulp.LpStatusOptimal
    assert result.status == "time_limit"
    assert result.bound < result.objective
    assert result.gap > 1e-5
    rng = random.Random(0)
    even = sum(rng.uniform(1, 10) for _ in range(40)) / 7  # the LP bound
    assert result.bound >= even * (1 - 1e-4)
    assert result.objective < 1.2 * even


@pytest.mark.parametrize("backend", BACKENDS)
def test_stopping_at_a_gap_is_not_optimal(backend):
    result = solve(scheduling(40, 7), backend, time_limit=20.0, gap=0.2)
    assert result.status == "gap"
    assert 1e-6 < result.gap <= 0.2


@pytest.mark.parametrize("backend", BACKENDS)
def test_prints_nothing(backend, capfd):
    solve(scheduling(6, 2), backend)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_maximising_is_refused():
    problem = pulp.LpProblem("up", pulp.LpMaximize)
    problem += problem.add_variable("x", 0, 1)
    with pytest.raises(SolverError, match="maximises"):
        solve(problem)


def test_unknown_backend():
    with pytest.raises(InputError, match="highs or cbc"):
        solve(small("Continuous", 1), "gurobi")


def test_missing_cbc_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(planner.solver, "cbc_path", lambda: None)
    with pytest.raises(InputError, match=r"pip install pulp\[cbc\]"):
        solve(small("Continuous", 1), "cbc")


def test_a_point_that_breaks_a_constraint_is_refused(monkeypatch):
    def wrong(problem, *_):
        for variable in problem.variables():
            variable.varValue = 0.0
        values = {v.name: 0.0 for v in problem.variables()}
        return SolverResult(status="optimal", objective=5.0, bound=5.0, values=values)

    monkeypatch.setattr(planner.solver, "_solve_highs", wrong)
    with pytest.raises(SolverError, match="violates"):
        solve(small("Continuous", 1.5))


def test_gap_without_a_solution_is_infinite():
    result = SolverResult(status="time_limit", objective=float("inf"), bound=1.0, values={})
    assert result.gap == float("inf")
