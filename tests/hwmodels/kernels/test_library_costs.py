"""Kernels as loops over library calls: closed forms, limits, and parameters found again."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.kernels.base import Limits
from hwmodels.kernels.library import (
    LibraryGemmCost,
    LibraryRouteCost,
    LibraryRowsCost,
    LoopedAttentionCost,
    LoopedExpertsCost,
)
from hwmodels.ops import (
    AttentionDecode,
    AttentionPrefill,
    Elementwise,
    Gemm,
    GroupedGemm,
    Permute,
    Route,
)

LIMITS = Limits(flops=1e11, bandwidth=2e10, units=1, cache=1e6)
GEMM = LibraryGemmCost(
    launch="2 us", compute_efficiency=0.5, memory_efficiency=0.8, packing=0.5, rows=2.0
)


def _gemm(m, n=64, k=32):
    return Gemm(m=m, n=n, k=k, weight_dtype="fp32", activation_dtype="fp32")


def test_a_single_row_is_not_packed():
    weights, rows = 64 * 32 * 4 / 2e10, 96 * 4 / 2e10
    products = 2 * 64 * 32 / (0.5 * 1e11)
    one = 2e-6 + products + weights / 0.8 + 2 * rows
    two = 2e-6 + 2 * products + 1.5 * weights / 0.8 + 2 * 2 * rows
    assert GEMM.seconds(_gemm(np.array([1, 2])), LIMITS) == pytest.approx([one, two], rel=1e-12)
    assert GEMM.seconds(_gemm(0), LIMITS).tolist() == [0.0]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=8))
def test_experts_are_their_products_one_after_the_other(counts):
    """The loop equals the sum of two products per expert, but for launches and rows between."""
    shared = {"compute_efficiency": 0.5, "memory_efficiency": 0.8, "packing": 0.5, "rows": 0.0}
    loop = LoopedExpertsCost(launch="3 us", call="7 us", **shared)
    single = LibraryGemmCost(launch="0 s", **shared)
    op = GroupedGemm(
        tokens_per_expert=np.array([counts]), hidden=48, width=16, gated=True,
        weight_dtype="fp32", activation_dtype="fp32",
    )  # fmt: skip
    busy = [count for count in counts if count]
    each = sum(
        single.seconds(_gemm(count, 32, 48), LIMITS)[0]
        + single.seconds(_gemm(count, 48, 16), LIMITS)[0]
        for count in busy
    )
    expected = 3e-6 + 7e-6 * len(busy) + each if busy else 0.0
    assert loop.seconds(op, LIMITS)[0] == pytest.approx(expected, rel=1e-9)


def test_quickselect_goes_over_all_scores_where_a_heap_would_not_do():
    cost = LibraryRouteCost(
        launch="0 s", score="1 ns", select="10 ns", choice="100 ns", compute_efficiency=1,
        memory_efficiency=1, packing=0, rows=0,
    )  # fmt: skip

    def extra(experts, top_k):
        op = Route(tokens=3, hidden=8, experts=experts, top_k=top_k, activation_dtype="fp32")
        product = cost.model_copy(update={"score": 0.0, "select": 0.0, "choice": 0.0})
        return cost.seconds(op, LIMITS)[0] - product.seconds(op, LIMITS)[0]

    assert extra(128, 2) == pytest.approx(3 * (128e-9 + 2 * 100e-9))  # 64 k <= E: a heap
    assert extra(127, 2) == pytest.approx(3 * (127e-9 + 1270e-9 + 2 * 100e-9))


def test_rows_cost_their_index_beside_their_bytes():
    cost = LibraryRowsCost(
        launch="1 us", row="5 ns", memory_efficiency=0.5, cache_speed=4.0, kept=1.0
    )
    moved = Permute(rows=np.array([10, 10_000]), row_bytes=256)
    small, large = cost.seconds(moved, LIMITS)
    assert small == pytest.approx(1e-6 + 50e-9 + 2 * 2560 / (4 * 2e10))  # from the cache
    assert large == pytest.approx(1e-6 + 50e-6 + 2 * 2.56e6 / (0.5 * 2e10), rel=0.01)
    norm = Elementwise(bytes=5120, part="norm", tokens=10)
    assert cost.seconds(norm, LIMITS)[0] == pytest.approx(small)


HEADS = {
    "num_heads": 8, "num_kv_heads": 4, "head_dim": 64, "v_head_dim": 64, "kv_elements": 512,
    "kv_dtype": "fp32", "activation_dtype": "fp32",
}  # fmt: skip
ATTENTION = LoopedAttentionCost(
    launch="10 us", call="5 us", compute_efficiency=0.5, exponentials=1e9, memory_efficiency=0.5,
    rows=0.0,
)  # fmt: skip


def test_decode_attends_request_by_request():
    op = AttentionDecode(tokens=3, context=600, **HEADS)
    products, scores = 2 * 600 * 8 * 128 / (0.5 * 1e11), 600 * 8 / 1e9
    cache = 600 * 512 * 4 / (0.5 * 2e10)
    expected = 10e-6 + 3 * 5e-6 + products + scores + cache
    assert ATTENTION.seconds(op, LIMITS)[0] == pytest.approx(expected)


@pytest.mark.parametrize(("length", "tiles"), [(64, 1), (65, 2), (256, 4)])
def test_prefill_multiplies_all_keys_that_a_tile_sees(length, tiles):
    pairs = length * (length + 1) // 2
    op = AttentionPrefill(tokens=2 * length, pairs=2 * pairs, **HEADS)
    height = length / tiles
    whole = 2 * (pairs + length * (min(height, 64) - 1) / 2)
    expected = (
        10e-6 + 2 * tiles * 5e-6 + 2 * whole * 8 * 128 / (0.5 * 1e11) + whole * 8 / 1e9
        + 2 * length * 512 * 4 / (0.5 * 2e10)
    )  # fmt: skip
    assert ATTENTION.seconds(op, LIMITS)[0] == pytest.approx(expected)
