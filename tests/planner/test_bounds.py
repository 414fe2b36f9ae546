import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.bounds import company_bound, mean_bound, replica_range, scarcity_bound
from planner.packing import divisor_counts

SHAPES = [(3, 4, 2), (4, 4, 2), (4, 6, 2), (4, 6, 3), (5, 6, 3), (5, 9, 3), (4, 8, 4), (6, 8, 4)]


def skewed(seed, experts):
    return np.floor(np.random.default_rng(seed).pareto(0.9, experts) * 50)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(SHAPES))
def test_bounds_hold_against_brute_force(brute, seed, shape):
    experts, slots, ranks = shape
    loads = skewed(seed, experts)
    even = brute.best_even(loads, slots, ranks)
    shares = brute.best_shares(loads, slots, ranks)
    assert shares <= even + 1e-9
    assert mean_bound(loads[None], ranks)[0] <= shares
    assert scarcity_bound(loads[None], slots, ranks)[0] <= shares
    assert company_bound(loads[None], slots, ranks)[0] <= even


def test_scarcity_is_the_least_heaviest_replica():
    # 600 in three, 560 in three, the rest once: 8 slots for 4 experts
    loads = np.array([[600.0, 560.0, 120.0, 20.0]])
    assert scarcity_bound(loads, 8, 4)[0] == pytest.approx(200.0)


def test_company_without_redundancy_is_exact_for_one_dominant_expert():
    loads = np.array([[100.0, 4.0, 3.0, 2.0, 1.0, 1.0]])
    assert company_bound(loads, 6, 2)[0] == pytest.approx(100 + 1 + 1)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(SHAPES))
def test_replica_range_contains_every_good_placement(brute, seed, shape):
    experts, slots, ranks = shape
    loads = skewed(seed, experts)
    counts = divisor_counts(loads[None], slots, ranks, 0.0)[0]
    upper = 1.1 * max(brute.best_even(loads, slots, ranks), (loads / counts).max())
    least, most = replica_range(loads, slots, ranks, upper)
    for placed in brute.placements(experts, slots, ranks):
        counts = np.bincount(placed, minlength=experts)
        if (loads / counts)[placed].reshape(ranks, -1).sum(1).max() <= upper:
            assert (least <= counts).all()
            assert (counts <= most).all()
