import inspect

import numpy as np
import pytest

import planner.exact
import planner.shares
from planner.exact import even_model, even_variables, model_size, solve_even
from planner.packing import has_duplicates, rank_loads
from planner.shares import shares_variables, solve_shares
from planner.solver import cbc_path

BACKENDS = [
    "highs",
    pytest.param("cbc", marks=pytest.mark.skipif(cbc_path() is None, reason="no CBC here")),
]
SHAPES = [(4, 4, 2), (4, 6, 3), (5, 6, 3), (4, 8, 4), (5, 9, 3)]
SCARCE = np.array([600.0, 560, 120, 120, 20, 10, 10, 10])


def families():
    """Every constraint family with a fresh model of three experts, four slots, two ranks."""
    loads = np.array([6.0, 2.0, 1.0])
    for module, variables in ((planner.exact, even_variables), (planner.shares, shares_variables)):
        extra = {"upper": 9.0} if module is planner.exact else {}
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if name.startswith("add_") and function.__module__ == module.__name__:
                yield name, function, variables(loads, 4, 2, lower=4.5, **extra)


@pytest.mark.parametrize(
    ("name", "function", "model"), [pytest.param(*f, id=f[0]) for f in families()]
)
def test_constraint_family_equals_its_golden_file(name, function, model, request, tmp_path):
    function(model)
    written = tmp_path / "model.lp"
    model.problem.writeLP(str(written))
    family = name.removeprefix("add_").removesuffix("_constraints")
    golden = request.path.parent / "lp" / f"{family}.lp"
    assert golden.is_file(), f"family {family} has no golden file"
    assert written.read_text() == golden.read_text()


def test_every_golden_file_has_a_family(request):
    names = {n.removeprefix("add_").removesuffix("_constraints") for n, _, _ in families()}
    assert {p.stem for p in (request.path.parent / "lp").glob("*.lp")} == names
    assert len(names) == 10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_even_ilp_equals_brute_force(brute, backend, shape, seed):
    experts, slots, ranks = shape
    loads = np.floor(np.random.default_rng(seed).pareto(0.9, experts) * 50) + 1
    optimum = brute.best_even(loads, slots, ranks)
    result, found = solve_even(
        loads, slots, ranks, lower=0.0, upper=1.2 * optimum, backend=backend, time_limit=20, gap=0.0
    )
    assert result.status == "optimal"
    assert result.objective == pytest.approx(optimum, rel=1e-6)
    assert found is not None
    assert not has_duplicates(found[None], ranks).any()
    assert rank_loads(loads[None], found[None], ranks).max() == pytest.approx(optimum, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shares_ilp_equals_brute_force(brute, backend, shape):
    experts, slots, ranks = shape
    loads = np.floor(np.random.default_rng(7).pareto(0.9, experts) * 50) + 1
    optimum = brute.best_shares(loads, slots, ranks)
    result, found = solve_shares(
        loads, slots, ranks, lower=0.0, backend=backend, time_limit=20, gap=0.0
    )
    assert result.status == "optimal"
    assert result.objective == pytest.approx(optimum, rel=1e-5)
    assert found is not None
    assert brute.split_value(loads, found, ranks) == pytest.approx(optimum, rel=1e-5)


def test_scarce_layer_is_proved_optimal():
    result, _ = solve_even(
        SCARCE, 16, 8, lower=181.25, upper=200.0, backend="highs", time_limit=60, gap=0.0
    )
    assert result.status == "optimal"
    assert result.objective == pytest.approx(590 / 3)


def test_model_size_counts_the_host_variables():
    loads = np.array([6.0, 2.0, 1.0])
    model = even_model(loads, 4, 2, lower=4.5, upper=9.0)
    assert model_size(loads, 4, 2, 9.0) == len(model.host)
