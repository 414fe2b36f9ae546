"""Counts of operations against hand-made tables, and what the columns refuse."""

import numpy as np
import pytest

from basis import InputError
from hwmodels import (
    AllReduce,
    AllToAll,
    AttentionDecode,
    AttentionPrefill,
    Copy,
    Elementwise,
    Gemm,
    GroupedGemm,
    Permute,
    Route,
)


def test_gemm_counts() -> None:
    op = Gemm(m=np.array([3, 0]), n=5, k=7, weight_dtype="fp8", activation_dtype="bf16")
    assert len(op) == 2
    np.testing.assert_array_equal(op.flops(), [2 * 3 * 5 * 7, 0])
    np.testing.assert_array_equal(op.bytes_moved(), [5 * 7 + 2 * 3 * (5 + 7), 0])


def test_scalars_make_a_column_of_one() -> None:
    assert len(Gemm(m=1, n=2, k=3, weight_dtype="bf16", activation_dtype="bf16")) == 1


def test_attention_decode_gqa_reads_the_cache_once() -> None:
    op = AttentionDecode(
        tokens=np.array([2]),
        context=np.array([300]),  # 100 and 200 tokens
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        v_head_dim=64,
        kv_elements=2 * 128,
        kv_dtype="fp8",
        activation_dtype="bf16",
    )
    np.testing.assert_array_equal(op.flops(), [2 * 300 * 8 * 128])
    np.testing.assert_array_equal(op.bytes_moved(), [300 * 256 + 2 * 2 * 8 * 128])


def test_attention_prefill_counts_causal_pairs() -> None:
    op = AttentionPrefill(
        tokens=4,
        pairs=4 * 5 // 2,
        num_heads=1,
        num_kv_heads=1,
        head_dim=16,
        v_head_dim=8,
        kv_elements=24,
        kv_dtype="bf16",
        activation_dtype="bf16",
    )
    causal = np.tril(np.ones((4, 4)))
    assert op.flops()[0] == causal.sum() * (2 * 16 + 2 * 8)
    assert op.bytes_moved()[0] == 4 * 2 * (24 + 24)


def test_grouped_gemm_equals_its_experts_one_by_one() -> None:
    counts = np.array([[3, 0, 5], [0, 0, 0]])
    op = GroupedGemm(
        tokens_per_expert=counts,
        hidden=8,
        width=4,
        gated=True,
        weight_dtype="bf16",
        activation_dtype="bf16",
    )
    flops = sum(2 * m * (2 * 4) * 8 + 2 * m * 8 * 4 for m in (3, 5))
    np.testing.assert_array_equal(op.flops(), [flops, 0])
    np.testing.assert_array_equal(op.active(), [2, 0])
    np.testing.assert_array_equal(op.weight_bytes(), [2 * 2 * 3 * 8 * 4, 0])
    # in: hidden; out: up and gate; in: width; out: hidden
    np.testing.assert_array_equal(op.activation_bytes(), [8 * 2 * (8 + 8 + 4 + 8), 0])


def test_grouped_gemm_without_gate_has_two_matrices() -> None:
    op = GroupedGemm(
        tokens_per_expert=np.array([[1]]),
        hidden=8,
        width=4,
        gated=False,
        weight_dtype="bf16",
        activation_dtype="bf16",
    )
    assert op.flops()[0] == 2 * 2 * 8 * 4
    assert op.activation_bytes()[0] == 2 * (8 + 4 + 4 + 8)


def test_route_permute_elementwise_bytes() -> None:
    route = Route(tokens=3, hidden=8, experts=4, top_k=2, activation_dtype="bf16")
    assert route.flops()[0] == 2 * 3 * 8 * 4
    assert route.bytes_moved()[0] == 2 * (8 * 4 + 3 * 8) + 4 * 3 * (2 * 4 + 2 * 2)
    assert Permute(rows=3, row_bytes=10).bytes_moved()[0] == 60
    assert Elementwise(bytes=7).bytes_moved()[0] == 7


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: Gemm(m=[1, 2], n=[1, 2, 3], k=1, weight_dtype="bf16", activation_dtype="bf16"),
            "columns of different length",
        ),
        (lambda: Gemm(m=-1, n=1, k=1, weight_dtype="bf16", activation_dtype="bf16"), ">= 0"),
        (lambda: Gemm(m=1, n=1, k=1, weight_dtype="fp9", activation_dtype="bf16"), "'fp9'"),
        (lambda: Permute(rows=np.array([np.nan]), row_bytes=1), "finite"),
        (lambda: Elementwise(bytes=np.array(["a"])), "numbers are expected"),
        (lambda: Copy(bytes=np.ones((2, 2)), source="hbm", target="host"), "1 dimension"),
        (lambda: AllToAll(traffic=np.ones((2, 3))), "3 dimension"),
        (lambda: AllToAll(traffic=np.ones((1, 2, 3))), r"\[n, ranks, ranks\]"),
        (lambda: AllReduce(bytes=1, ranks=()), "at least one"),
        (lambda: AllReduce(bytes=1, ranks=(0, 0)), "distinct"),
        (
            lambda: Route(tokens=1, hidden=1, experts=2, top_k=3, activation_dtype="bf16"),
            "between 1 and the number of experts",
        ),
    ],
)
def test_bad_columns_are_refused(make, said) -> None:
    with pytest.raises(InputError, match=said):
        make()


@pytest.mark.parametrize(("counts", "hidden"), [(np.array([1, 2]), 8), (np.array([[1]]), 0)])
def test_bad_grouped_gemm_is_refused(counts, hidden) -> None:
    with pytest.raises(InputError, match="GroupedGemm"):
        GroupedGemm(
            tokens_per_expert=counts,
            hidden=hidden,
            width=4,
            gated=True,
            weight_dtype="bf16",
            activation_dtype="bf16",
        )
