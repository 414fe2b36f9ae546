"""Memories, paths and processors: prices against rooflines and paths written by hand."""

import copy
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from basis import InputError, validate
from hwmodels import (
    AllReduce,
    AttentionDecode,
    Cluster,
    Copy,
    Gemm,
    GroupedGemm,
    load_cluster,
    load_device,
    price,
)

HIDDEN, WIDTH = 4096, 1536
WEIGHTS = 3 * HIDDEN * WIDTH * 2
"""Bytes of one expert in bf16."""


def experts(*tokens: int) -> GroupedGemm:
    """One row per count: an expert alone."""
    return GroupedGemm(
        tokens_per_expert=np.asarray(tokens)[:, None],
        hidden=HIDDEN,
        width=WIDTH,
        gated=True,
        weight_dtype="bf16",
        activation_dtype="bf16",
    )


def edge(bandwidth: str, startup: str, efficiency: float, ends: tuple[str, str]) -> dict[str, Any]:
    cost = {"startup": startup, "efficiency": efficiency, "low": 0.9, "high": 1.1}
    return {
        "standard": "other",
        "direction": "one-way",
        "bandwidth": bandwidth,
        "ends": list(ends),
        "costs": {"copy": cost},
    }


@pytest.fixture
def tiers(cluster_data: dict[str, Any]) -> dict[str, Any]:
    """hbm - host at 12.5 GB/s achieved, host - nvme at 3, cxl alone; a CPU at 80 of 100 GB/s."""
    data = copy.deepcopy(cluster_data)
    memory = {"kind": "DDR", "capacity": "64 GiB", "bandwidth": "100 GB/s"}
    data["node"]["memories"] |= {
        "nvme": {"kind": "NVMe", "capacity": "2 TiB", "bandwidth": "5 GB/s"},
        "cxl": memory,
    }
    data["node"]["links"]["drive"] = edge("4 GB/s", "100 us", 0.75, ("nvme", "host"))
    kernel = {"launch": "50 us", "compute_efficiency": 0.5, "memory_efficiency": 0.9}
    data["node"]["processors"] = {
        "cpu": {
            "memory": "host",
            "bandwidth": "80 GB/s",
            "flops": {"bf16": "2 TFLOP/s"},
            "kernels": {
                name: {"bf16": kernel} for name in ("gemm", "grouped_gemm", "attention_decode")
            },
        }
    }
    return data


@pytest.fixture
def graph(tiers: dict[str, Any]) -> Cluster:
    return validate(tiers, Cluster, "test")


def test_a_path_has_the_fewest_hops(tiers: dict[str, Any], graph: Cluster) -> None:
    assert graph.route("nvme", "hbm") == ("drive", "pcie")
    assert graph.route("hbm", "nvme") == ("pcie", "drive")
    assert graph.route("host", "host") == ()
    assert [link.ends for link in graph.path("nvme", "hbm")] == [("nvme", "host"), ("hbm", "host")]
    tiers["node"]["links"]["direct"] = edge("1 GB/s", "1 us", 1, ("nvme", "hbm"))
    assert validate(tiers, Cluster, "test").route("nvme", "hbm") == ("direct",)


def test_memories_without_a_path_are_refused(graph: Cluster) -> None:
    said = "no path from 'cxl' to 'hbm' -- edges: hbm-host, nvme-host"
    with pytest.raises(InputError, match=said):
        graph.path("cxl", "hbm")
    with pytest.raises(InputError, match=said):
        price(Copy(bytes=1, source="cxl", target="hbm"), graph)
    with pytest.raises(InputError, match="no memory 'tape'"):
        graph.path("tape", "hbm")


def test_a_copy_over_two_links_is_pipelined(graph: Cluster) -> None:
    told = price(Copy(bytes=np.array([0, 6e9]), source="nvme", target="hbm"), graph)
    np.testing.assert_allclose(told.seconds, [0, 108e-6 + 6e9 / 3e9])
    np.testing.assert_allclose(told.high, 1.1 * told.seconds)  # the drive's link is the slowest


def test_a_slow_memory_holds_a_copy_up(tiers: dict[str, Any]) -> None:
    tiers["node"]["memories"]["host"]["bandwidth"] = "2 GB/s"
    graph = validate(tiers, Cluster, "test")
    seconds = price(Copy(bytes=6e9, source="nvme", target="hbm"), graph).seconds[0]
    assert seconds == pytest.approx(108e-6 + 6e9 / 2e9)


def test_a_copy_within_a_memory_is_its_own_processors(tiers: dict[str, Any]) -> None:
    stream = {"launch": "7 us", "compute_efficiency": 1, "memory_efficiency": 0.5}
    tiers["node"]["processors"]["cpu"]["kernels"]["stream"] = {"bf16": stream}
    graph = validate(tiers, Cluster, "test")
    inside = [price(Copy(bytes=1e9, source=m, target=m), graph).seconds[0] for m in ("host", "hbm")]
    assert inside == pytest.approx([7e-6 + 2e9 / 50e9, 10e-6 + 2e9 / 1.6e12])


@given(size=st.floats(0, 1e12), more=st.floats(0, 1e12))
def test_longer_ways_and_larger_copies_take_longer(size: float, more: float) -> None:
    cluster = load_cluster("workstation-rtx4090")
    sizes = np.array([size, size + more])
    one = price(Copy(bytes=sizes, source="host", target="hbm"), cluster).seconds
    two = price(Copy(bytes=sizes, source="nvme", target="hbm"), cluster).seconds
    assert one[0] <= one[1]
    assert (two >= one).all()


def test_each_processor_has_its_own_roofline(graph: Cluster) -> None:
    few, many = price(experts(1, 4000), graph, on="cpu").seconds
    activations = (2 * HIDDEN + 3 * WIDTH) * 2
    assert few == pytest.approx(50e-6 + (WEIGHTS + activations) / (0.9 * 80e9))
    assert many == pytest.approx(50e-6 + 4000 * 6 * HIDDEN * WIDTH / 1e12)
    gpu, named = (price(experts(1), graph, on=name).seconds[0] for name in (None, "gpu"))
    padded = (WEIGHTS + activations + 1e6) / 1.6e12
    assert gpu == named == pytest.approx(10e-6 + padded)


def test_attention_beside_the_gpu(graph: Cluster) -> None:
    op = AttentionDecode(
        tokens=8,
        context=8 * 4096,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        v_head_dim=128,
        kv_elements=2048,
        kv_dtype="bf16",
        activation_dtype="bf16",
    )
    seconds = price(op, graph, on="cpu").seconds[0]
    assert seconds == pytest.approx(50e-6 + float(op.bytes_moved()[0]) / (0.9 * 80e9))


def test_a_processor_without_a_bandwidth_reads_at_its_memorys(tiers: dict[str, Any]) -> None:
    assert validate(tiers, Cluster, "test").bandwidth("cpu").value == 80e9
    del tiers["node"]["processors"]["cpu"]["bandwidth"]
    cluster = validate(tiers, Cluster, "test")
    assert cluster.bandwidth("cpu").value == 100e9
    assert cluster.bandwidth().value == cluster.bandwidth("gpu").value == 2e12
    assert cluster.processor().memory == "hbm"


@pytest.mark.parametrize(
    ("op", "on", "said"),
    [
        (experts(1), "npu", "no processor 'npu' -- processors are gpu, cpu"),
        (Copy(bytes=1, source="host", target="hbm"), "cpu", "Copy on 'cpu' -- only compute"),
        (AllReduce(bytes=1, ranks=(0, 1)), "gpu", "AllReduce on 'gpu' -- only compute"),
    ],
)
def test_wrong_processors_are_refused(op, on: str, said: str, graph: Cluster) -> None:
    with pytest.raises(InputError, match=said):
        price(op, graph, on=on)


def test_scaled_reaches_node_processors(graph: Cluster) -> None:
    op = Gemm(m=4, n=4096, k=4096, weight_dtype="bf16", activation_dtype="bf16")
    slow = price(op, graph, on="cpu").seconds[0]
    assert price(op, graph.scaled(fixed=0), on="cpu").seconds[0] == pytest.approx(slow - 50e-6)
    fast = graph.scaled(rates=2, fixed=0)
    assert price(op, fast, on="cpu").seconds[0] == pytest.approx((slow - 50e-6) / 2)
    assert fast.bandwidth("cpu").value == 160e9
    assert fast.memory("nvme").bandwidth.value == 10e9


# Duplex (MICRO 2024), published: 4 x the bandwidth, 8 operations per byte, 21.3 TFLOP/s a stack
STACKS, EXTERNAL, FACTOR, OP_PER_BYTE = 5, 3.35e12, 4, 8


def test_the_pim_of_duplex_is_sized_as_published() -> None:
    device = load_device("duplex-xpu")
    pim = device.processors["pim"]
    assert device.memory.bandwidth.value == EXTERNAL
    assert pim.bandwidth is not None
    assert pim.bandwidth.value == pytest.approx(FACTOR * EXTERNAL)
    per_stack = pim.flops_for("bf16").value / STACKS
    assert per_stack == pytest.approx(21.3e12)
    assert per_stack == pytest.approx(OP_PER_BYTE * FACTOR * EXTERNAL / STACKS, rel=0.01)


def test_gpu_and_pim_of_duplex_tie_near_32_tokens_per_expert() -> None:
    """GPU: w / B; PIM: 2 n (w / 2) / F, weights only; equal at n = F / B = 31.8."""
    cluster = load_cluster("duplex-4")
    pim = cluster.processor("pim").flops_for("bf16").value
    closed = pim / EXTERNAL
    assert closed == pytest.approx(32, rel=0.02)

    counts = np.arange(1, 65)
    on_gpu, on_pim = (price(experts(*counts), cluster, on=name).seconds for name in ("gpu", "pim"))
    # with activations the GPU reads (1 + n a / w) times the weights: n = n0 / (1 - n0 a / w)
    activations = (2 * HIDDEN + 3 * WIDTH) * 2
    exact = closed / (1 - closed * activations / WEIGHTS)
    assert counts[on_pim <= on_gpu].max() == int(exact)
    np.testing.assert_allclose(on_gpu, (WEIGHTS + counts * activations) / EXTERNAL)
    assert on_gpu[0] / on_pim[0] == pytest.approx(FACTOR, rel=1e-3)
