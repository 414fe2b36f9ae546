import numpy as np
import pytest

from basis.errors import InputError
from planner.baselines import contiguous, eplb_placement, round_robin
from planner.eplb import eplb


def test_contiguous_is_the_identity_without_redundancy():
    placement = contiguous(3, 8, 8, 4)
    assert placement.slots.tolist() == [list(range(8))] * 3
    assert placement.num_ranks == 4


def test_contiguous_repeats_the_first_experts():
    assert contiguous(1, 6, 8, 4).slots.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1]]


def test_round_robin_deals_experts_to_ranks():
    placement = round_robin(2, 8, 8, 4)
    assert placement.slots[0].reshape(4, 2).tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_eplb_placement_holds_the_map_of_eplb():
    loads = np.random.default_rng(1).pareto(1.0, (2, 12))
    placement = eplb_placement(loads, 16, 8, num_nodes=2, num_groups=4)
    assert np.array_equal(placement.slots, eplb(loads, 16, 4, 2, 8))


@pytest.mark.parametrize("place", [contiguous, round_robin])
def test_placements_that_ignore_loads_are_valid(place):
    placement = place(2, 12, 16, 8)
    assert placement.slots.shape == (2, 16)
    assert (placement.replicas >= 1).all()


def test_slots_must_divide_over_ranks():
    with pytest.raises(InputError, match="do not divide"):
        round_robin(1, 8, 9, 4)
    with pytest.raises(InputError, match="do not divide"):
        contiguous(1, 8, 9, 4)
