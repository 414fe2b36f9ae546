"""Streaming kernels and routers: limits by hand, and the parts that they are made of."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.kernels.base import Limits
from hwmodels.kernels.gemm import GemmCost
from hwmodels.kernels.route import RouteCost
from hwmodels.kernels.stream import StreamCost
from hwmodels.ops import Elementwise, Gemm, Permute, Route

LIMITS = Limits(flops=1e15, bandwidth=1e12, units=100, cache=50e6)
STREAM = StreamCost.model_validate(
    {"launch": "2 us", "memory_efficiency": 0.5, "cache_speed": 2.0, "kept": 0.8}
)
SCORES = GemmCost.model_validate(
    {
        "launch": "3 us",
        "compute_efficiency": 0.5,
        "sustained": 0.8,
        "memory_efficiency": 0.9,
        "feed": "100 GB/s",
        "step": "1 ns",
        "store": 0.4,
        "sharpness": 2.0,
    }
)


def test_in_the_cache_and_far_beyond_it() -> None:
    # 10 MB fit and pass at 2 TB/s; of 4 GB next to nothing does, and half of 1 TB/s is reached
    seconds = STREAM.seconds(Elementwise(bytes=np.array([0, 10_000_000, 4_000_000_000])), LIMITS)
    np.testing.assert_allclose(seconds, [0, 2e-6 + 5e-6, 2e-6 + 8e-3], rtol=1e-9)


def test_permuted_rows_are_read_and_written() -> None:
    rows = STREAM.seconds(Permute(rows=1000, row_bytes=5000), LIMITS)
    np.testing.assert_allclose(rows, STREAM.seconds(Elementwise(bytes=10_000_000), LIMITS))


def test_without_a_cache_all_comes_from_memory() -> None:
    bare = Limits(flops=1e15, bandwidth=1e12, units=100)
    np.testing.assert_allclose(STREAM.seconds(Elementwise(bytes=1000), bare), [2e-6 + 2e-9])


@given(st.integers(1, 10**10), st.integers(0, 10**9))
def test_more_bytes_take_no_less(size: int, more: int) -> None:
    less, greater = STREAM.seconds(Elementwise(bytes=np.array([size, size + more])), LIMITS)
    assert greater >= less * (1 - 1e-12)


def test_a_router_is_a_product_and_a_selection() -> None:
    cost = RouteCost(scores=SCORES, selection="4 us")
    tokens = np.array([0, 7, 300])
    op = Route(tokens=tokens, hidden=2048, experts=128, top_k=8, activation_dtype="bf16")
    product = Gemm(m=tokens, n=128, k=2048, weight_dtype="bf16", activation_dtype="bf16")
    expected = SCORES.seconds(product, LIMITS) + np.array([0, 4e-6, 4e-6])
    np.testing.assert_allclose(cost.seconds(op, LIMITS), expected)


def test_fixed_times_of_both_parts_scale() -> None:
    scaled = RouteCost(scores=SCORES, selection="4 us").with_fixed(0.5)
    assert scaled.selection == pytest.approx(2e-6)
    assert scaled.scores.launch == pytest.approx(1.5e-6)
