import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basis.errors import InfeasibleError, InputError
from planner.eplb import eplb
from planner.packing import (
    checked_loads,
    cyclic_packing,
    divisor_counts,
    has_duplicates,
    host_mask,
    rank_loads,
    replica_counts,
    without_duplicates,
)


@st.composite
def instances(draw):
    """Skewed loads [layers, experts] with a feasible number of slots and ranks."""
    ranks = draw(st.integers(1, 6))
    per_rank = draw(st.integers(1, 5))
    slots = ranks * per_rank
    experts = draw(st.integers(per_rank, slots))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    return rng.pareto(0.8, (3, experts)), slots, ranks


@settings(max_examples=100, deadline=None)
@given(instances(), st.sampled_from([-0.8, -0.5, 0.0, 0.5]))
def test_cyclic_packing_is_feasible(instance, offset):
    loads, num_slots, ranks = instance
    counts = divisor_counts(loads, num_slots, ranks, offset)
    assert (counts >= 1).all()
    assert (counts <= ranks).all()
    slots = cyclic_packing(loads, counts, ranks)
    assert slots.shape == (3, num_slots)
    assert np.array_equal(replica_counts(slots, loads.shape[1]), counts)
    assert not has_duplicates(slots, ranks).any()


def test_divisor_counts_offset_zero_is_the_greedy_of_eplb():
    loads = np.random.default_rng(0).pareto(1.0, (4, 24))
    counts = divisor_counts(loads, 32, 32, 0.0)
    assert np.array_equal(counts, replica_counts(eplb(loads, 32, 1, 1, 8), 24))


def test_divisor_counts_never_exceed_the_ranks():
    counts = divisor_counts(np.array([[1000.0, 1.0, 1.0, 1.0]]), 8, 4, 0.0)
    assert counts.max() == 4


def test_rank_loads_by_hand():
    slots = np.array([[0, 1, 0, 2]])
    assert rank_loads(np.array([[6.0, 2.0, 1.0]]), slots, 2).tolist() == [[5.0, 4.0]]
    mask = host_mask(slots, 3, 2)
    assert mask[0].tolist() == [[True, True], [True, False], [False, True]]


def test_duplicates_of_eplb_are_separated():
    loads = np.random.default_rng(2).pareto(1.2, (100, 64))
    slots = eplb(loads, 80, 1, 1, 8)
    assert has_duplicates(slots, 8).sum() > 10  # it does that often: a wasted slot
    fixed = without_duplicates(slots, 64, 8)
    possible = (replica_counts(slots, 64) <= 8).all(1)
    assert possible.sum() > 40
    assert not has_duplicates(fixed[possible], 8).any()
    assert has_duplicates(fixed[~possible], 8).all()
    assert np.array_equal(replica_counts(fixed, 64), replica_counts(slots, 64))


@pytest.mark.parametrize(
    ("loads", "slots", "ranks", "message"),
    [
        (np.ones(4), 4, 2, "expected"),
        (np.array([[1.0, -2.0]]), 2, 2, "expert 1 in layer row 0 is -2.0"),
        (np.array([[1.0, np.nan]]), 2, 2, "is nan"),
        (np.ones((1, 4)), 5, 2, "do not divide"),
        (np.ones((1, 4)), 2, 2, "every expert needs one"),
        (np.ones((1, 4)), 4, 0, "0 ranks"),
    ],
)
def test_bad_input(loads, slots, ranks, message):
    with pytest.raises(InputError, match=message):
        checked_loads(loads, slots, ranks)


def test_more_slots_than_distinct_replicas_is_infeasible():
    with pytest.raises(InfeasibleError, match="at most 4") as error:
        checked_loads(np.ones((1, 2)), 6, 2)
    assert error.value.levers
