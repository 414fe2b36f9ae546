import time
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.balance import balance
from planner.columns import configuration_bound, price_bound
from planner.patterns import PatternTable

SHAPES = [(4, 4, 2), (4, 6, 2), (4, 6, 3), (5, 6, 3), (5, 9, 3), (4, 8, 4), (6, 8, 4)]


def soon(seconds=10.0):
    return time.monotonic() + seconds


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_pattern_table_equals_enumeration(seed):
    """Integer loads on a grid of unit 1: the dynamic program is exact at every capacity."""
    rng = np.random.default_rng(seed)
    loads = rng.integers(0, 12, 5) * 12.0  # whole for 1 to 4 replicas
    least, most = np.ones(5, int), rng.integers(1, 5, 5)
    prices = rng.normal(size=5)
    table = PatternTable(loads, least, most, 2, 300.0, 300, "nearest")
    values, total = table.best_values(prices, keep=True)
    scale = 2.0e8 / np.abs(prices).sum()
    best = np.full(301, -np.inf)
    for a, b in combinations(range(5), 2):
        for r, s in product(range(1, most[a] + 1), range(1, most[b] + 1)):
            weight = int(loads[a] / r + loads[b] / s)
            best[weight:] = np.maximum(best[weight:], prices[a] / r + prices[b] / s)
    reachable = np.isfinite(best)
    assert (values[~reachable] < -(2**28)).all()
    assert np.allclose(values[reachable] / scale, best[reachable], atol=1e-6)
    assert total == pytest.approx(prices.sum() * scale, abs=6)
    for capacity in (0, 60, 300):
        pattern = table.pattern(capacity)
        assert bool(pattern) == bool(reachable[capacity])
        if pattern:
            assert sum(loads[e] / r for e, r in pattern) <= capacity
            worth = sum(prices[e] / r for e, r in pattern)
            assert worth == pytest.approx(best[capacity], abs=1e-6)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(SHAPES))
def test_any_prices_give_a_valid_bound(brute, seed, shape):
    experts, slots, ranks = shape
    rng = np.random.default_rng(seed)
    loads = np.floor(rng.pareto(0.9, experts) * 50) + 1
    optimum = brute.best_even(loads, slots, ranks)
    for prices in (loads, rng.normal(size=experts), np.eye(experts)[0], rng.random(experts)):
        for upper in (optimum, 1.3 * optimum):
            bound = price_bound(loads, slots, ranks, upper=upper, prices=prices, units=500)
            assert bound <= optimum


def test_prices_equal_to_loads_give_the_mean():
    loads = np.random.default_rng(0).pareto(1.5, 24) + 0.1
    bound = price_bound(loads, 32, 8, upper=loads.sum() / 8 * 1.2, prices=loads, units=20_000)
    assert bound == pytest.approx(loads.sum() / 8, rel=1e-3)
    assert bound <= loads.sum() / 8


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(SHAPES))
def test_configuration_bound_holds_against_brute_force(brute, seed, shape):
    experts, slots, ranks = shape
    loads = np.floor(np.random.default_rng(seed).pareto(0.9, experts) * 50) + 1
    optimum = brute.best_even(loads, slots, ranks)
    start = balance(loads[None], slots, ranks, time_limit=5.0, gap=0.5, workers=1)
    upper = float(start.objective[0])
    lower = float(start.bound[0])
    found = configuration_bound(
        loads, start.slots[0], ranks, lower=lower, upper=upper, gap=1e-3, deadline=soon()
    )
    assert lower <= found.bound <= optimum * (1 + 1e-12)
    if found.counts is not None:
        assert found.counts.sum() == slots
        assert (found.counts >= 1).all()
        assert (found.counts <= ranks).all()


def test_configuration_bound_beats_the_mean_where_big_experts_do_not_pack():
    # 600 and 560 over 8 ranks of two slots each: the mean is 181.25, even splits reach 196.67.
    loads = np.array([600.0, 560.0, 120.0, 120.0, 20.0, 10.0, 10.0, 10.0])
    slots = np.array([0, 3, 0, 4, 0, 2, 0, 2, 0, 3, 1, 6, 1, 5, 1, 7])
    found = configuration_bound(
        loads, slots, 8, lower=181.25, upper=590 / 3, gap=1e-3, deadline=soon()
    )
    assert found.prices is not None
    assert 181.25 * 1.02 < found.bound <= 590 / 3


def test_prices_of_one_layer_are_a_hint_for_the_next():
    rng = np.random.default_rng(3)
    shares = 1.0 / np.arange(1, 33)
    first, second = (rng.permutation(rng.poisson(shares * 20_000)).astype(float) for _ in "ab")
    hint, bounds = None, []
    for loads in (first, second):
        start = balance(loads[None], 32, 16, time_limit=5.0, gap=0.3, workers=1)
        upper = float(start.objective[0])
        found = configuration_bound(
            loads, start.slots[0], 16, lower=float(start.mean[0]), upper=upper,
            gap=1e-2, deadline=soon(), hint=hint,
        )  # fmt: skip
        assert found.prices is not None
        hint = found.prices
        bounds.append(found.bound / upper)
    assert min(bounds) > 0.98


def test_no_time_gives_the_bound_that_was_there():
    loads = np.array([10.0, 10.0, 10.0, 1.0, 1.0, 1.0])
    found = configuration_bound(
        loads, np.array([0, 1, 3, 2, 4, 5]), 2, lower=16.5, upper=21.0, gap=1e-3, deadline=0.0
    )
    assert (found.bound, found.prices) == (16.5, None)
