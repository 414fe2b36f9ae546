"""The loads of measured expert layers, against hand counts and the authors' loop."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from basis import InputError
from hwmodels.silicon.loads import DRAWS, _raised, balanced, rank_loads


def test_balanced_choices_lie_a_stride_apart() -> None:
    # 8 experts, 2 of each token: 4 apart
    assert balanced(4, 2, 8).tolist() == [1] * 8
    assert balanced(1, 2, 8).tolist() == [1, 0, 0, 0, 1, 0, 0, 0]
    # two tokens, fewer than the stride, start half a stride apart
    assert balanced(2, 2, 8).tolist() == [1, 0, 1, 0, 1, 0, 1, 0]
    # six tokens: residues 0 and 1 of the stride come round again
    assert balanced(6, 2, 8).tolist() == [2, 2, 1, 1, 2, 2, 1, 1]
    # rank 0 of two has the first half
    assert rank_loads(6, 2, 8, 2, "balanced").tolist() == [[2, 2, 1, 1]]


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.sampled_from([1, 3, 16, 80, 1024, 16384]),
    shape=st.sampled_from([(8, 2), (128, 1), (256, 8), (512, 22)]),
    exponent=st.sampled_from(["1.01", "1.2"]),
)
def test_every_pair_finds_an_expert(tokens: int, shape: tuple[int, int], exponent: str) -> None:
    experts, top_k = shape
    loads = rank_loads(tokens, top_k, experts, 1, f"power_law_{exponent}")
    assert loads.shape == (DRAWS, experts)
    assert (loads.sum(axis=1) == tokens * top_k).all()
    assert loads.min() >= 0
    assert loads.max() <= tokens  # a token chooses an expert once


@pytest.mark.parametrize("tokens", [1, 40, 4096])
def test_the_busiest_rank_is_timed(tokens: int) -> None:
    loads = rank_loads(tokens, 8, 256, 32, "power_law_1.2")
    assert loads.shape == (DRAWS, 8)
    assert (loads.sum(axis=1) >= tokens * 8 / 32).all()


def test_a_steeper_law_is_more_uneven() -> None:
    busiest = [rank_loads(16384, 8, 256, 1, f"power_law_{a}").max() for a in ("1.01", "2.5")]
    assert busiest[0] < busiest[1]


def test_draws_differ_and_repeat() -> None:
    first = rank_loads(512, 8, 256, 8, "power_law_1.01")
    assert len({row.tobytes() for row in first}) == DRAWS
    rank_loads.cache_clear()
    assert (rank_loads(512, 8, 256, 8, "power_law_1.01") == first).all()


def _in_turn(counts: NDArray[np.int64], amount: int) -> NDArray[np.int64]:
    """Raise as upstream does: one at a time, ranks in turn, the lowest local expert."""
    counts = counts.copy()
    while amount:
        for rank in counts:
            if amount:
                rank[rank.argmin()] += 1
                amount -= 1
    return counts


@settings(deadline=None, max_examples=40)
@given(
    counts=st.lists(st.lists(st.integers(0, 30), min_size=3, max_size=3), min_size=1, max_size=4),
    amount=st.integers(0, 60),
)
def test_the_remainder_is_spread_as_upstream_spreads_it(
    counts: list[list[int]], amount: int
) -> None:
    before = np.array(counts)
    raised = _raised(before[None], np.array([amount]), 10_000)[0]
    assert np.sort(raised, axis=1).tolist() == np.sort(_in_turn(before, amount), axis=1).tolist()


def test_full_ranks_pass_their_turn() -> None:
    # the first rank takes one more, the second the other four
    raised = _raised(np.array([[[5, 4], [0, 0]]]), np.array([5]), 5)
    assert raised[0].sum(axis=1).tolist() == [10, 4]
    assert raised.max() == 5


def test_an_unknown_distribution_is_refused() -> None:
    with pytest.raises(InputError, match=r"'zipf' -- balanced or power_law"):
        rank_loads(4, 2, 8, 1, "zipf")
