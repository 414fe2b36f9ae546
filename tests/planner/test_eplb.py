import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basis.errors import InputError
from planner.eplb import eplb

README_LOADS = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
README_MAP = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def flat_reference(loads, num_slots, num_ranks):
    """The algorithm for one layer, one replica at a time, in plain Python."""
    experts, counts = list(range(len(loads))), [1] * len(loads)
    while len(experts) < num_slots:
        chosen = max(range(len(loads)), key=lambda e: loads[e] / counts[e])
        experts.append(chosen)
        counts[chosen] += 1
    ranks, load = [[] for _ in range(num_ranks)], [0.0] * num_ranks
    for e in sorted(experts, key=lambda e: -loads[e] / counts[e]):
        room = [g for g in range(num_ranks) if len(ranks[g]) < num_slots // num_ranks]
        g = min(room, key=lambda g: load[g])
        ranks[g].append(e)
        load[g] += loads[e] / counts[e]
    return [e for rank in ranks for e in rank]


def test_readme_vector():
    assert eplb(np.array(README_LOADS), 16, 4, 2, 8).tolist() == README_MAP


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(2, 5))
def test_flat_equals_the_plain_algorithm(seed, ranks, per_rank):
    rng = np.random.default_rng(seed)
    slots = ranks * per_rank
    experts = int(rng.integers(1, slots + 1))
    loads = rng.pareto(1.0, (3, experts)) + 0.01
    expected = [flat_reference(list(layer), slots, ranks) for layer in loads]
    assert eplb(loads, slots, 1, 1, ranks).tolist() == expected


def test_one_slot_per_rank_keeps_the_order():
    assert eplb(np.array([[5.0, 1.0, 1.0]]), 4, 1, 1, 4).tolist() == [[0, 1, 2, 0]]


def test_hierarchical_keeps_groups_inside_nodes():
    loads = np.random.default_rng(0).pareto(1.0, (20, 32))
    slots = eplb(loads, 40, 8, 4, 8).reshape(20, 4, 10)
    for layer in slots:
        owner = [set(node // 4) for node in layer]  # expert group = id // 4
        assert [len(groups) for groups in owner] == [2, 2, 2, 2]
        assert set().union(*owner) == set(range(8))


def test_groups_that_do_not_divide_over_nodes_mean_flat():
    loads = np.random.default_rng(0).pareto(1.0, (5, 12))
    assert np.array_equal(eplb(loads, 16, 3, 2, 8), eplb(loads, 16, 1, 1, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((16, 4, 2, 5), "slots over ranks"),
        ((16, 5, 5, 8), "experts over expert groups"),
        ((16, 4, 3, 8), "ranks over nodes"),
        ((8, 4, 2, 8), "needs at least one"),
    ],
)
def test_bad_numbers(arguments, message):
    with pytest.raises(InputError, match=message):
        eplb(np.array(README_LOADS), *arguments)


def test_loads_need_two_dimensions():
    with pytest.raises(InputError, match="1 dimensions"):
        eplb(np.ones(8), 8, 1, 1, 8)
