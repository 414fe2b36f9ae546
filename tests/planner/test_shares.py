import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.packing import cyclic_packing, divisor_counts
from planner.shares import best_split, normalised


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(4, 6, 3), (5, 8, 4), (6, 9, 3), (3, 6, 2)]))
def test_best_split_equals_the_cut_formula(brute, seed, shape):
    experts, num_slots, ranks = shape
    loads = np.random.default_rng(seed).pareto(0.9, experts)
    counts = divisor_counts(loads[None], num_slots, ranks, -0.5)
    slots = cyclic_packing(loads[None], counts, ranks)[0]
    share, busiest = best_split(loads, slots, ranks)
    assert busiest == pytest.approx(brute.split_value(loads, slots, ranks), rel=1e-6)
    assert (share >= 0).all()
    assert np.allclose(np.bincount(slots, share), 1.0)
    per_rank = (share * loads[slots]).reshape(ranks, -1).sum(1)
    assert per_rank.max() == pytest.approx(busiest)


def test_an_expert_without_load_is_split_evenly():
    loads, slots = np.array([4.0, 0.0, 2.0]), np.array([0, 1, 0, 2, 1, 2])
    share, busiest = best_split(loads, slots, 3)
    assert busiest == pytest.approx(2.0)
    assert np.allclose(np.bincount(slots, share), 1.0)
    assert normalised(np.zeros(6), slots, 3).tolist() == [0.5] * 6


def test_all_loads_zero():
    share, busiest = best_split(np.zeros(2), np.array([0, 1]), 2)
    assert busiest == 0.0
    assert share.tolist() == [1.0, 1.0]
