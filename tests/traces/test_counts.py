"""Counting against brute force, at chunk edges, and conservation."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import traces.counts
from basis.errors import InputError
from traces.counts import expert_counts, step_counts
from traces.routing_trace import RoutingTrace

Make = Callable[..., RoutingTrace]


def brute_force(experts: np.ndarray, num_experts: int) -> np.ndarray:
    counts = np.zeros((experts.shape[1], num_experts), np.int64)
    for token in experts:
        for layer, chosen in enumerate(token):
            for expert in chosen:
                counts[layer, expert] += 1
    return counts


@settings(deadline=None)
@given(
    tokens=st.integers(0, 40), layers=st.integers(1, 4), top_k=st.integers(1, 4),
    chunk=st.integers(1, 60), seed=st.integers(0, 999),
)  # fmt: skip
def test_counts_equal_brute_force(
    tokens: int, layers: int, top_k: int, chunk: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    experts = rng.integers(5, size=(tokens, layers, top_k)).astype(np.uint16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traces.counts, "_CHUNK_CELLS", chunk)
        counts = expert_counts(experts, 5)
    assert np.array_equal(counts, brute_force(experts, 5))
    assert counts.dtype == np.int64


def test_leading_axes_are_tokens() -> None:
    experts = np.random.default_rng(0).integers(7, size=(4, 5, 3, 2))
    assert np.array_equal(expert_counts(experts, 7), expert_counts(experts.reshape(20, 3, 2), 7))


def test_an_id_out_of_range_is_not_counted_elsewhere() -> None:
    experts = np.zeros((3, 2, 1), np.uint16)
    experts[1, 0] = 4
    with pytest.raises(InputError, match="expert id 4 -- ids must be below 4"):
        expert_counts(experts, 4)


@settings(deadline=None)
@given(
    steps=st.integers(1, 6), batch=st.integers(1, 30), chunk=st.integers(1, 200),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_step_counts_are_the_counts_of_each_step(
    make_trace: Make, steps: int, batch: int, chunk: int, seed: int
) -> None:
    trace = make_trace()
    rows = np.random.default_rng(seed).integers(trace.num_tokens, size=(steps, batch))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traces.counts, "_CHUNK_CELLS", chunk)
        counts = step_counts(trace, rows)
    expected = [expert_counts(trace.experts[step], trace.meta.num_experts) for step in rows]
    assert np.array_equal(counts, expected)
    assert counts.dtype == np.int32
    assert (counts.sum(axis=-1) == batch * trace.meta.top_k).all()


def test_ragged_steps(make_trace: Make) -> None:
    trace = make_trace()
    rows = [np.array([3]), np.array([], np.int64), np.arange(20)]
    counts = step_counts(trace, rows)
    assert counts.sum(axis=-1).tolist() == [[2] * 3, [0] * 3, [40] * 3]
    assert np.array_equal(counts[2], expert_counts(trace.experts, 8))
