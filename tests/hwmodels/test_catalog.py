"""The catalog loads, passes its own check, answers to names, and its page is current."""

from pathlib import Path

import numpy as np
import pytest

from basis import InputError
from hwmodels import catalog_names, check_catalog, load_cluster, load_device
from hwmodels.catalog_page import render

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "hardware-catalog.md"
DEVICES = [
    *("a100", "a40", "a5000", "a6000", "b200", "duplex-xpu", "gb200", "h100", "h200", "l40s"),
    *("mi300x", "rtx4090", "rtx4090-local", "rtxpro6000"),
]
CLUSTERS = [
    *("duplex-4", "duplex-8", "gb200-nvl72", "gpu-cxl-ndp"),
    *("hgx-a100-8", "hgx-b200-8", "hgx-h100-8", "hgx-h200-8", "hybrimoe-a6000"),
    *("ktransformers-4x4090", "l40s-8", "mi300x-8", "moe-infinity-a5000", "moelens-a40", "monde"),
    *("pregated-a100", "rtx4090-8", "workstation-rtx4090", "workstation-rtxpro6000"),
]


def test_names() -> None:
    assert catalog_names() == {"devices": DEVICES, "clusters": CLUSTERS}


def test_catalog_passes_its_own_check() -> None:
    assert check_catalog() == []


def test_every_figure_has_a_source() -> None:
    for name in DEVICES:
        device = load_device(name)
        figures = [device.memory.capacity, device.memory.bandwidth]
        figures += [] if device.power is None else [device.power]
        for processor in device.processors.values():
            figures += processor.flops.values()
            for by_dtype in processor.kernels.values():
                assert all(cost.source in device.sources for cost in by_dtype.values())
        assert all(f.source in device.sources for f in figures)


def test_figures_of_a_node_have_sources() -> None:
    for name in CLUSTERS:
        node = load_cluster(name).node
        figures = [f for m in node.memories.values() for f in (m.capacity, m.bandwidth)]
        figures += [f for p in node.processors.values() for f in p.flops.values()]
        figures += [link.bandwidth for link in node.links.values()]
        assert all(f.source != "not stated" for f in figures)
        assert all("copy" in link.costs for link in node.links.values())


def test_names_of_memories_and_processors() -> None:
    clusters = {name: load_cluster(name) for name in CLUSTERS}
    memories = {n for c in clusters.values() for n in (*c.device.memories, *c.node.memories)}
    processors = {n for c in clusters.values() for n in (*c.device.processors, *c.node.processors)}
    assert memories == {"hbm", "host", "nvme", "cxl"}
    assert processors == {"gpu", "cpu", "ndp", "pim"}
    for cluster in clusters.values():  # from everywhere into the fast memory
        assert all(cluster.path(name, "hbm") for name in cluster.node.memories)


@pytest.mark.parametrize(
    ("name", "bf16", "bandwidth"),
    [  # vendors' dense figures, FLOP/s and B/s
        ("a100", 312e12, 2.039e12),
        ("h100", 989.4e12, 3.35e12),
        ("h200", 989.4e12, 4.8e12),
        ("b200", 2.25e15, 7.7e12),
        ("gb200", 2.5e15, 8e12),
        ("l40s", 362.05e12, 864e9),
        ("rtx4090", 165.2e12, 1.008e12),
        ("rtxpro6000", 503.8e12, 1.792e12),
        ("a40", 149.7e12, 696e9),
        ("a5000", 111.1e12, 768e9),
        ("a6000", 154.8e12, 768e9),
        ("mi300x", 1307.4e12, 5.3e12),
    ],
)
def test_peaks(name: str, bf16: float, bandwidth: float) -> None:
    device = load_device(name)
    assert device.flops("bf16").value == pytest.approx(bf16)
    assert device.memory.bandwidth.value == pytest.approx(bandwidth)


def test_the_local_card_differs_in_its_4_bit_experts_only() -> None:
    card, local = load_device("rtx4090"), load_device("rtx4090-local")
    assert local.memories == card.memories
    assert local.processor.flops == card.processor.flops
    ours, theirs = dict(local.processor.kernels), dict(card.processor.kernels)
    mine, other = ours.pop("grouped_gemm"), theirs.pop("grouped_gemm")
    assert ours == theirs
    assert {name for name in mine if mine[name] != other.get(name)} == {"mxfp4", "int4"}


def test_fitted_models_state_their_held_out_error() -> None:
    fitted = [
        cost
        for name in DEVICES
        for by_dtype in load_device(name).processor.kernels.values()
        for cost in by_dtype.values()
        if cost.evidence == "fitted"
    ]
    assert len(fitted) >= 6 * 4  # six GPUs, at least GEMM, experts and two kinds of attention
    assert all(cost.held_out is not None and cost.held_out.rows > 100 for cost in fitted)


@pytest.mark.parametrize(
    ("name", "ranks", "nodes"),
    [
        ("hgx-h100-8", 8, 1),
        ("hgx-h100-8x2", 16, 2),
        ("hgx-b200-8x4", 32, 4),
        ("gb200-nvl72", 72, 1),
    ],
)
def test_sizes(name: str, ranks: int, nodes: int) -> None:
    cluster = load_cluster(name)
    assert (cluster.name, cluster.num_ranks, cluster.num_nodes) == (name, ranks, nodes)
    assert cluster.ranks_per_node == ranks // nodes
    np.testing.assert_array_equal(np.bincount(cluster.node_of), [ranks // nodes] * nodes)


def test_the_first_gpus_may_cut_a_node() -> None:
    cluster = load_cluster("hgx-h100-8x2", gpus=11)
    assert (cluster.num_ranks, cluster.num_nodes, cluster.ranks_per_node) == (11, 2, 8)
    np.testing.assert_array_equal(cluster.node_of, [0] * 8 + [1] * 3)
    small = load_cluster("hgx-h100-8", gpus=2)
    assert (small.num_ranks, small.num_nodes, small.ranks_per_node) == (2, 1, 2)


@pytest.mark.parametrize(
    ("name", "gpus", "said"),
    [
        ("hgx-h100-8", 0, "ask for 1 to 8"),
        ("hgx-h100-8", 16, "hgx-h100-8xN"),
        ("rtx4090-8", 9, "ask for 1 to 8"),
        ("rtx4090-8x2", None, "no network between nodes"),
        ("hgx-h10-8", None, "did you mean 'hgx-h100-8'"),
        ("hgx-h100-8x0", None, "did you mean 'hgx-h100-8'"),
        ("zzz", None, "known are duplex-4"),
        ("none/such.yaml", None, "no such file"),
    ],
)
def test_wrong_names(name: str, gpus: int | None, said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_cluster(name, gpus)


def test_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == render()
