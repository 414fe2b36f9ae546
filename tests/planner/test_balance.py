import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from basis.errors import InfeasibleError, InputError
from planner.balance import balance
from planner.eplb import eplb
from planner.packing import has_duplicates, rank_loads, replica_counts
from planner.solver import cbc_path
from traces.synth import shares_from_loadstats, synthetic_step_counts, zipf_shares

SCARCE = np.array([[600.0, 560, 120, 120, 20, 10, 10, 10]])


def check(result, loads, num_slots, ranks):
    """A result is a feasible placement, its objective is its load, its bound is no higher."""
    assert result.slots.shape == (len(loads), num_slots)
    assert (replica_counts(result.slots, loads.shape[1]) >= 1).all()
    assert not has_duplicates(result.slots, ranks).any()
    load = np.take_along_axis(loads, result.slots.astype(int), 1)
    if result.slot_share is None:
        load = load / np.take_along_axis(
            replica_counts(result.slots, loads.shape[1]), result.slots.astype(int), 1
        )
    else:
        for slots, share in zip(result.slots, result.slot_share, strict=True):
            assert np.allclose(np.bincount(slots, share), 1.0)
        load = load * result.slot_share
    busiest = load.reshape(len(loads), ranks, -1).sum(2).max(1)
    assert np.allclose(busiest, result.objective)
    assert (result.bound <= result.objective).all()
    assert (result.bound >= result.mean * (1 - 1e-8)).all()


@pytest.mark.parametrize(
    "backend",
    ["highs", pytest.param("cbc", marks=pytest.mark.skipif(cbc_path() is None, reason="no CBC"))],
)
def test_scarce_slots_even(backend):
    result = balance(SCARCE, 16, 8, backend=backend, gap=0.0, time_limit=60.0)
    check(result, SCARCE, 16, 8)
    assert result.objective[0] == pytest.approx(590 / 3)  # 196.67
    assert result.status == "optimal"
    assert result.gap < 1e-5


def test_scarce_slots_shares():
    result = balance(SCARCE, 16, 8, dispatch="shares", gap=0.0)
    check(result, SCARCE, 16, 8)
    assert result.objective[0] == pytest.approx(181.25)  # the mean
    assert result.status == "optimal"


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([(4, 4, 2), (4, 6, 3), (5, 6, 3), (4, 8, 4), (5, 9, 3), (4, 6, 2)]),
    st.sampled_from(["even", "shares"]),
)
def test_optimum_and_bound_on_tiny_layers(brute, seed, shape, dispatch):
    experts, slots, ranks = shape
    loads = np.floor(np.random.default_rng(seed).pareto(0.9, experts) * 50) + 1
    result = balance(loads[None], slots, ranks, dispatch=dispatch, gap=0.0, workers=1, time_limit=9)
    check(result, loads[None], slots, ranks)
    solve = brute.best_even if dispatch == "even" else brute.best_shares
    optimum = solve(loads, slots, ranks)
    assert result.objective[0] == pytest.approx(optimum, rel=1e-5)
    assert result.bound[0] <= optimum * (1 + 1e-9)
    assert result.status == "optimal"


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(0, 10**6),
    st.sampled_from([(64, 80, 8), (128, 144, 16), (60, 64, 4), (256, 288, 32)]),
    st.sampled_from([0.9, 1.2, 2.0]),
)
@example(1147, (60, 64, 4), 1.2)  # good replica counts are far from the first ones
def test_never_worse_than_eplb(seed, shape, tail):
    """Even where EPLB wastes no slot, and although it may host an expert twice on a rank."""
    experts, slots, ranks = shape
    loads = np.random.default_rng(seed).pareto(tail, (4, experts))
    result = balance(loads, slots, ranks, gap=0.01, workers=1, time_limit=3.0)
    check(result, loads, slots, ranks)
    rival = rank_loads(loads, eplb(loads, slots, 1, 1, ranks), ranks).max(1)
    assert (result.objective <= rival * (1 + 1e-9)).all()


def test_real_size_zipf_is_proved_within_two_percent():
    counts = synthetic_step_counts(
        zipf_shares(256, 1.3, 6, 0), steps=200, tokens=8192, top_k=8, seed=0
    )
    loads = counts.sum(0).astype(float)
    result = balance(loads, 288, 32)
    check(result, loads, 288, 32)
    assert result.status == "gap"
    assert result.gap < 0.001


def test_real_size_deepseek_skew(moeplan_data):
    shares = shares_from_loadstats(moeplan_data / "deepseek-v3r1-loadstats.csv", 256, 0)[::10]
    loads = synthetic_step_counts(shares, steps=200, tokens=8192, top_k=8, seed=0).sum(0) * 1.0
    result = balance(loads, 288, 32)
    check(result, loads, 288, 32)
    assert result.gap < 0.001


def test_without_redundancy_the_bound_goes_beyond_the_mean():
    loads = np.random.default_rng(0).pareto(1.2, (4, 64))
    result = balance(loads, 64, 16, time_limit=10.0)
    check(result, loads, 64, 16)
    assert result.gap < 0.002
    assert result.mean.sum() < 0.9 * result.bound.sum()


def test_medium_layers_reach_a_tenth_of_a_percent():
    loads = np.random.default_rng(1).gamma(2.0, 1000.0, (6, 32))
    result = balance(loads, 40, 8, time_limit=10.0)
    check(result, loads, 40, 8)
    assert result.gap < 0.001


def test_shares_reach_the_mean_where_even_cannot():
    loads = np.random.default_rng(1).pareto(1.5, (3, 32)) + 0.1
    even = balance(loads, 48, 16, workers=1, time_limit=2.0)
    shares = balance(loads, 48, 16, dispatch="shares", time_limit=10.0)
    check(shares, loads, 48, 16)
    assert shares.objective.sum() < even.objective.sum()
    assert shares.gap < 0.002


def test_shares_without_replicas_are_ones():
    loads = np.random.default_rng(1).pareto(1.5, (2, 32)) + 0.1
    result = balance(loads, 32, 8, dispatch="shares", workers=1, time_limit=2.0)
    check(result, loads, 32, 8)
    assert result.slot_share is not None
    assert (result.slot_share == 1.0).all()


def test_a_time_limit_is_kept_and_said():
    loads = np.random.default_rng(0).pareto(0.8, (8, 64))
    start = time.monotonic()
    result = balance(loads, 96, 32, time_limit=0.2, gap=0.0, workers=1)
    assert time.monotonic() - start < 10.0  # not the 60 s that gap 0 would take
    check(result, loads, 96, 32)
    assert result.status == "time_limit"
    assert result.gap > 1e-6


def test_equal_seeds_give_equal_placements():
    loads = np.random.default_rng(0).pareto(1.5, (3, 32))
    first, second = (balance(loads, 40, 8, workers=1, gap=0.003, seed=5) for _ in "ab")
    assert np.array_equal(first.slots, second.slots)


@pytest.mark.parametrize("dispatch", ["even", "shares"])
def test_layers_without_load(dispatch):
    loads = np.zeros((2, 6))
    loads[1, 0] = 9.0
    result = balance(loads, 9, 3, dispatch=dispatch, workers=1, time_limit=5.0)
    check(result, loads, 9, 3)
    assert result.objective.tolist() == pytest.approx([0.0, 3.0])
    assert result.status == "optimal"


def test_one_rank_and_one_slot_per_rank():
    loads = np.random.default_rng(0).pareto(1.5, (2, 8)) + 0.1
    alone = balance(loads, 8, 1)
    assert np.allclose(alone.objective, loads.sum(1))
    assert alone.status == "optimal"
    single = balance(loads, 12, 12)
    check(single, loads, 12, 12)
    assert single.status == "optimal"  # heaviest replica: the greedy is exact


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dispatch": "nearest"}, "even or shares"),
        ({"time_limit": 0.0}, "time limit is 0.0 s"),
        ({"gap": 1.0}, "gap is 1.0"),
        ({"workers": 0}, "0 workers"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        balance(SCARCE, 16, 8, **options)


def test_too_many_slots():
    with pytest.raises(InfeasibleError, match="never holds two replicas"):
        balance(np.ones((1, 2)), 6, 2)
