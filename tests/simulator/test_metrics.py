import numpy as np
import pytest

from simulator.metrics import distinct_nodes, sampling_floor, straggler


def test_straggler_of_known_loads() -> None:
    assert straggler(np.array([[2, 2, 2], [3, 0, 0], [0, 0, 0]])).tolist() == [1.0, 3.0, 1.0]


def test_floor_of_one_choice_is_the_number_of_ranks() -> None:
    assert sampling_floor(1, 1, 8) == 8.0
    assert sampling_floor(5, 2, 1) == 1.0


def test_floor_of_two_choices_on_two_ranks_is_closed_form() -> None:
    # two choices: both on one rank (1/2) gives 2, one each (1/2) gives 1
    assert sampling_floor(2, 1, 2, samples=40_000) == pytest.approx(1.5, abs=0.02)


def test_floor_falls_with_the_batch() -> None:
    floors = [sampling_floor(batch, 4, 8) for batch in (16, 64, 256, 1024)]
    assert floors == sorted(floors, reverse=True)


def test_distinct_nodes_of_known_tokens() -> None:
    node_of_expert = np.array([[0, 0, 1, 2]])
    experts = np.array([[[0, 1]], [[0, 2]], [[3, 2]], [[1, 1]]])
    assert distinct_nodes(experts, node_of_expert)[:, 0].tolist() == [1, 2, 2, 1]
