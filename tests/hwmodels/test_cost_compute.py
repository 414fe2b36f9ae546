"""Kernel prices against closed forms of a device of round figures; monotone in the work."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels import (
    AttentionDecode,
    AttentionPrefill,
    Cluster,
    Device,
    Elementwise,
    Gemm,
    GroupedGemm,
    Permute,
    Price,
    Route,
    load_cluster,
    price,
)
from hwmodels.cost_compute import price_compute

LAUNCH, FLOPS, BANDWIDTH = 10e-6, 0.5 * 1e15, 0.8 * 2e12
GEOMETRY = {
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 128,
    "v_head_dim": 128,
    "kv_elements": 2048,
    "kv_dtype": "bf16",
    "activation_dtype": "bf16",
}


def on_device(op, device: Device) -> Price:
    return price_compute(op, device.processor, device.memory.bandwidth)


def gemm(m, n: int = 4096, k: int = 4096, dtype: str = "bf16") -> Gemm:
    return Gemm(m=m, n=n, k=k, weight_dtype=dtype, activation_dtype="bf16")


def experts(counts) -> GroupedGemm:
    return GroupedGemm(
        tokens_per_expert=np.asarray(counts),
        hidden=1024,
        width=512,
        gated=True,
        weight_dtype="bf16",
        activation_dtype="bf16",
    )


def test_gemm_that_computes_long(device: Device) -> None:
    seconds = on_device(gemm(2**20), device).seconds[0]
    assert seconds == pytest.approx(LAUNCH + 2 * 2**20 * 4096**2 / FLOPS)


def test_gemm_of_one_row_reads_its_weights(device: Device) -> None:
    op = gemm(1)
    seconds = on_device(op, device).seconds[0]
    assert seconds == pytest.approx(LAUNCH + (2 * 4096**2 + 2 * 2 * 4096) / BANDWIDTH)


def test_tiny_gemm_is_its_launch(device: Device) -> None:
    assert on_device(gemm(1, 8, 8), device).seconds[0] == pytest.approx(LAUNCH, rel=1e-3)


def test_rows_are_padded_to_whole_tiles(device: Device) -> None:
    seconds = on_device(gemm(np.array([2**14 + 1, 2**14 + 16])), device).seconds
    assert seconds[0] == seconds[1] == pytest.approx(LAUNCH + 2 * (2**14 + 16) * 4096**2 / FLOPS)


def test_narrow_weights_use_the_fast_units(device: Device) -> None:
    wide = on_device(gemm(2**20), device)
    narrow = on_device(gemm(2**20, dtype="fp8"), device)
    assert narrow.seconds[0] - LAUNCH == pytest.approx((wide.seconds[0] - LAUNCH) / 2)
    assert narrow.evidence == "assumed"


def test_format_without_units_multiplies_in_bf16(device: Device) -> None:
    assert device.flops("nvfp4").value == device.flops("bf16").value


def test_experts_read_only_active_weights(device: Device) -> None:
    expert_bytes = 2 * 3 * 1024 * 512
    row_bytes = 2 * (2 * 1024 + 3 * 512)
    one, three = on_device(experts([[1, 0, 0, 0], [1, 1, 1, 0]]), device).seconds
    assert one == pytest.approx(LAUNCH + (expert_bytes + 1e6 + row_bytes) / BANDWIDTH)
    assert three - LAUNCH == pytest.approx(3 * (one - LAUNCH))


def test_experts_compute_padded_tiles_of_each(device: Device) -> None:
    seconds = on_device(experts([[80_001, 7, 0]]), device).seconds[0]
    padded = 80_008 + 8
    assert seconds == pytest.approx(LAUNCH + padded * 2 * 3 * 1024 * 512 / FLOPS)


def test_spreading_few_tokens_over_more_experts_costs_more(device: Device) -> None:
    packed, spread = on_device(experts([[4, 0, 0, 0], [1, 1, 1, 1]]), device).seconds
    assert packed < spread


def test_decode_is_bound_by_the_cache(device: Device) -> None:
    op = AttentionDecode(tokens=64, context=64 * 10_000, **GEOMETRY)
    moved = 640_000 * 2048 * 2 + 64 * 2 * 32 * 256
    assert on_device(op, device).seconds[0] == pytest.approx(LAUNCH + moved / BANDWIDTH)


def test_prefill_is_bound_by_flops(device: Device) -> None:
    op = AttentionPrefill(tokens=32_768, pairs=32_768 * 32_769 // 2, **GEOMETRY)
    flops = 2 * (32_768 * 32_769 // 2) * 32 * 256
    assert on_device(op, device).seconds[0] == pytest.approx(LAUNCH + flops / FLOPS)


def test_streams_move_bytes(device: Device) -> None:
    moved = on_device(Permute(rows=10**6, row_bytes=4096), device).seconds[0]
    assert moved == pytest.approx(LAUNCH + 2 * 4096e6 / BANDWIDTH)
    added = on_device(Elementwise(bytes=10**9), device).seconds[0]
    assert added == pytest.approx(LAUNCH + 1e9 / BANDWIDTH)


def test_router_is_a_roofline_too(device: Device) -> None:
    op = Route(tokens=10**6, hidden=4096, experts=256, top_k=8, activation_dtype="bf16")
    bound = max(op.flops()[0] / FLOPS, op.bytes_moved()[0] / BANDWIDTH)
    assert on_device(op, device).seconds[0] == pytest.approx(LAUNCH + bound)


@pytest.mark.parametrize(
    "op",
    [
        gemm(0),
        experts([[0, 0]]),
        AttentionDecode(tokens=0, context=0, **GEOMETRY),
        AttentionPrefill(tokens=0, pairs=0, **GEOMETRY),
        Route(tokens=0, hidden=8, experts=4, top_k=1, activation_dtype="bf16"),
        Permute(rows=0, row_bytes=8),
        Elementwise(bytes=0),
    ],
)
def test_no_work_costs_nothing(op, device: Device) -> None:
    assert on_device(op, device).seconds[0] == 0


def test_interval_and_evidence_come_with_the_price(cluster: Cluster) -> None:
    told = price(Elementwise(bytes=10**9), cluster)
    np.testing.assert_allclose(told.low, 0.9 * told.seconds)
    np.testing.assert_allclose(told.high, 1.2 * told.seconds)
    assert told.evidence == "assumed"  # the bandwidth of the test's device names no source


def test_evidence_is_the_fits_where_the_peak_is_a_data_sheets() -> None:
    h100 = load_cluster("hgx-h100-8")
    assert price(gemm(64), h100).evidence == "fitted"
    assert price(gemm(64, dtype="int8"), h100).evidence == "transfer"
    assert price(Elementwise(bytes=1), h100).evidence == "assumed"


@pytest.mark.parametrize("name", ["hgx-h100-8", "hgx-a100-8", "gb200-nvl72"])
def test_doubling_rates_halves_the_time_without_fixed_parts(name: str) -> None:
    cluster = load_cluster(name)
    once, twice = cluster.scaled(fixed=0), cluster.scaled(rates=2, fixed=0)
    for op in (
        gemm(np.array([1, 100, 10_000])),
        experts([[1, 0], [50, 500]]),
        AttentionDecode(tokens=8, context=9000, **GEOMETRY),
        Elementwise(bytes=10**6),
    ):
        np.testing.assert_allclose(price(op, twice).seconds, price(op, once).seconds / 2)


def test_fixed_parts_are_all_that_fixed_scales(cluster: Cluster) -> None:
    plain, double = price(gemm(7), cluster), price(gemm(7), cluster.scaled(fixed=2))
    np.testing.assert_allclose(double.seconds - plain.seconds, LAUNCH)


COUNTS = st.lists(st.integers(0, 3000), min_size=4, max_size=4)


@settings(deadline=None, max_examples=50)
@given(counts=COUNTS, more=COUNTS, name=st.sampled_from(["hgx-h100-8", "l40s-8", "mi300x-8"]))
def test_more_tokens_are_never_cheaper(counts: list[int], more: list[int], name: str) -> None:
    cluster = load_cluster(name)
    grown = np.array(counts) + np.array(more)
    few, many = price(experts([counts, grown]), cluster).seconds
    assert few <= many
    few, many = price(gemm(np.array([sum(counts), int(grown.sum())])), cluster).seconds
    assert few <= many


@settings(deadline=None, max_examples=50)
@given(m=st.integers(1, 10**5), n=st.integers(1, 10**4), k=st.integers(1, 10**4))
def test_never_faster_than_the_data_sheet(m: int, n: int, k: int) -> None:
    device = load_cluster("hgx-h200-8").device
    op = gemm(m, n, k)
    bound = max(op.flops()[0] / 989.4e12, op.bytes_moved()[0] / 4.8e12)
    assert on_device(op, device).seconds[0] > bound
