import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.local_search import iterated_search, kick, swap_search
from planner.packing import (
    cyclic_packing,
    divisor_counts,
    has_duplicates,
    rank_loads,
    replica_counts,
    threshold_counts,
)


def packed(seed, layers, experts, num_slots, ranks):
    loads = np.random.default_rng(seed).pareto(1.0, (layers, experts)) + 0.01
    counts = divisor_counts(loads, num_slots, ranks, -0.5)
    return loads, cyclic_packing(loads, counts, ranks)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(12, 16, 4), (16, 16, 8), (5, 12, 3), (9, 9, 1)]))
def test_swaps_keep_the_counts_and_never_raise_the_peak(seed, shape):
    experts, num_slots, ranks = shape
    loads, start = packed(seed, 4, experts, num_slots, ranks)
    slots, busiest = swap_search(loads, start, ranks)
    assert np.array_equal(replica_counts(slots, experts), replica_counts(start, experts))
    assert not has_duplicates(slots, ranks).any()
    assert np.allclose(busiest, rank_loads(loads, slots, ranks).max(1))
    assert (busiest <= rank_loads(loads, start, ranks).max(1) * (1 + 1e-12)).all()


def test_no_single_swap_improves_the_result():
    loads, start = packed(1, 1, 12, 16, 4)
    slots, busiest = swap_search(loads, start, 4)
    rank = np.arange(16) // 4
    load = rank_loads(loads, slots, 4)[0]
    top = int(load.argmax())
    for s in np.flatnonzero(rank == top):
        for t in np.flatnonzero(rank != top):
            swapped = slots.copy()
            swapped[0, [s, t]] = swapped[0, [t, s]]
            if not has_duplicates(swapped, 4)[0]:
                after = rank_loads(loads, swapped, 4)[0]
                assert max(after[top], after[rank[t]]) >= busiest[0] * (1 - 1e-9)


def test_search_in_chunks_equals_search_layer_by_layer():
    loads, start = packed(2, 30, 64, 80, 8)
    slots, _ = swap_search(loads, start, 8)
    single = [swap_search(loads[i : i + 1], start[i : i + 1], 8)[0][0] for i in range(30)]
    assert np.array_equal(slots, single)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_kicks_are_feasible(seed):
    _, start = packed(seed, 6, 12, 16, 4)
    kicked = kick(start.copy(), 12, 4, np.random.default_rng(seed))
    assert not has_duplicates(kicked, 4).any()
    assert (replica_counts(kicked, 12) >= 1).all()


def test_iterated_search_improves_and_respects_target_and_deadline():
    loads, start = packed(3, 5, 32, 40, 8)
    start, before = swap_search(loads, start, 8)
    rng = np.random.default_rng(0)
    options = {"rng": rng, "patience": 50}
    slots, after = iterated_search(
        loads, start, 8, target=np.zeros(5), deadline=time.monotonic() + 2, **options
    )
    assert (after <= before).all()
    assert after.sum() < before.sum()
    assert np.allclose(after, rank_loads(loads, slots, 8).max(1))
    for target, deadline in ((before, time.monotonic() + 2), (np.zeros(5), 0.0)):
        same, _ = iterated_search(loads, start, 8, target=target, deadline=deadline, **options)
        assert np.array_equal(same, start)


def test_threshold_counts_spare_the_ranks():
    # 4.45 and 2.33 mean loads on 8 ranks: five and three replicas, not six and four.
    loads = np.array([[4.45, 2.33, *[1.22 / 62] * 62]])
    counts = threshold_counts(loads, 72, 8, np.array([1.0]))
    assert counts[0, :2].tolist() == [5, 3]
    assert counts.sum() == 72
    assert divisor_counts(loads, 72, 8, 0.0)[0, :2].tolist() == [6, 4]


def test_threshold_counts_with_too_few_slots_split_the_heaviest():
    loads = np.array([[8.0, 4.0, 1.0, 1.0]])
    assert threshold_counts(loads, 6, 3, np.array([1.0]))[0].tolist() == [3, 1, 1, 1]
