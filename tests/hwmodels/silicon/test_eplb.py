"""Balanced loads against the plain greedy algorithm with heaps, and what it must keep."""

import heapq

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from basis import InputError
from hwmodels.silicon.eplb import balanced_ranks, placed, replicated


def _replicated(counts: list[int], slots: int) -> list[float]:
    heap = [(-c, e) for e, c in enumerate(counts)]
    heapq.heapify(heap)
    copies = [1] * len(counts)
    owners = list(range(len(counts)))
    for _ in range(slots - len(counts)):
        _, expert = heapq.heappop(heap)
        copies[expert] += 1
        owners.append(expert)
        heapq.heappush(heap, (-counts[expert] / copies[expert], expert))
    return [counts[e] / copies[e] for e in owners]


def _rank_sums(load: list[float], ranks: int) -> list[float]:
    heap = [(0.0, r) for r in range(ranks)]
    sums, held = [0.0] * ranks, [0] * ranks
    for tokens in sorted(load, reverse=True):
        total, rank = heapq.heappop(heap)
        sums[rank] += tokens
        held[rank] += 1
        if held[rank] < len(load) // ranks:
            heapq.heappush(heap, (total + tokens, rank))
    return sums


_counts = st.lists(st.integers(0, 500), min_size=8, max_size=8)


@given(_counts, st.sampled_from([8, 12, 16]), st.sampled_from([1, 2, 4]))
def test_same_as_the_greedy_algorithm(counts, slots, ranks):
    load = replicated(np.array([counts]), slots)
    assert list(load[0]) == pytest.approx(_replicated(counts, slots))
    assert placed(load, ranks)[0].sum(axis=1) == pytest.approx(_rank_sums(list(load[0]), ranks))


@given(_counts, st.sampled_from([8, 12, 16]), st.sampled_from([2, 4]))
def test_keeps_all_tokens_and_puts_the_busiest_rank_first(counts, slots, ranks):
    out = balanced_ranks(np.array([counts]), slots, ranks)[0]
    assert out.shape == (ranks, slots // ranks)
    assert out.sum() == sum(counts)
    assert out.sum(axis=1).max() <= out.sum(axis=1)[0] + slots  # but for rounding of shares
    assert np.issubdtype(out.dtype, np.integer)


def test_spare_slots_split_the_hottest_expert():
    assert replicated(np.array([[90, 10, 10, 10]]), 6)[0] == pytest.approx([30, 10, 10, 10, 30, 30])


def test_wrong_numbers_of_slots_are_refused():
    with pytest.raises(InputError, match="slots: 3 -- at least the number of experts"):
        replicated(np.ones((1, 4), dtype=np.int64), 3)
    with pytest.raises(InputError, match="ranks: 3 -- a divisor of the number of slots"):
        placed(np.ones((1, 4)), 3)
