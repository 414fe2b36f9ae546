import numpy as np
import pytest

from basis import InputError
from simulator.placement import Placement, check_slots


def _placement(slots: list[list[int]], experts: int, ranks: int) -> Placement:
    return Placement(slots=np.array(slots, dtype=np.int32), num_experts=experts, num_ranks=ranks)


def test_tables_of_a_replicated_placement() -> None:
    place = _placement([[0, 1, 2, 0], [2, 1, 0, 1]], experts=3, ranks=2)
    assert place.slots_per_rank == 2
    assert place.rank_of_slot.tolist() == [0, 0, 1, 1]
    assert place.replicas.tolist() == [[2, 1, 1], [1, 2, 1]]
    assert place.replica_slots[0].tolist() == [[0, 3], [1, -1], [2, -1]]
    assert place.replica_slots[1].tolist() == [[2, -1], [1, 3], [0, -1]]
    assert place.hosts[0].tolist() == [[1, 1], [1, 0], [0, 1]]


def test_slots_that_do_not_divide_name_the_allowed_neighbours() -> None:
    with pytest.raises(InputError, match="set redundant_experts to 4 or 16"):
        check_slots(32 + 5, 32, 12)
    with pytest.raises(InputError, match="set redundant_experts to 0 or 8"):
        check_slots(32 + 3, 32, 8)


@pytest.mark.parametrize("redundant", range(0, 40))
def test_the_named_neighbours_divide(redundant: int) -> None:
    try:
        check_slots(30 + redundant, 30, 8)
    except InputError as error:
        for choice in str(error).split("redundant_experts to ")[1].split(" or "):
            check_slots(30 + int(choice), 30, 8)
    else:
        assert (30 + redundant) % 8 == 0


def test_bad_placements_are_refused() -> None:
    with pytest.raises(InputError, match="expert 2 of MoE layer row 0 has no slot"):
        _placement([[0, 1, 1, 0]], experts=3, ranks=2)
    with pytest.raises(InputError, match="names expert 7"):
        _placement([[0, 1, 2, 7]], experts=4, ranks=2)
    with pytest.raises(InputError, match="needs one"):
        _placement([[0, 1]], experts=3, ranks=2)
