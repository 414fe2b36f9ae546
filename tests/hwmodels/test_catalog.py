"""The catalog loads, passes its own check, answers to names, and its page is current."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from pydantic import BaseModel

from basis import InputError
from hwmodels import catalog_names, check_catalog, load_cluster, load_device, load_hardware
from hwmodels.catalog_page import render
from hwmodels.figures import CostModel, Figure

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "hardware-catalog.md"
NEAR_DATA = {"duplex", "monde", "gpu-cxl-ndp", "attacc", "aim", "hbm-pim", "neupims"}
"""First words of the near-data systems, which have tests of their own."""
GPUS = [
    *("a100", "a100-pcie", "a30", "a40", "a5000", "a6000", "ascend-910c", "b200", "b300", "b60"),
    *("gb10", "gb200", "gb300", "h100", "h100-pcie", "h200", "l4", "l40s", "m3-ultra", "m4-max"),
    *("mi300x", "mi325x", "mi355x", "rtx4090", "rtx4090-local", "rtx5090", "rtxpro6000"),
    "rtxpro6000-server",
]
CPUS = ["epyc-9654", "epyc-9755", "grace", "xeon-6980p", "xeon-8480"]
DEVICES = GPUS + CPUS
MEMORIES = [
    *("micron-9550-pro-7680gb", "micron-cz120-256gb", "samsung-9100-pro-4tb"),
    "samsung-990-pro-2tb",
]
CLUSTERS = [
    *("a100-pcie-8", "a30-8", "b60-8", "cloudmatrix-384", "dgx-spark", "epyc-genoa-2s"),
    *("epyc-turin-2s", "gb200-nvl72", "gb300-nvl72", "grace-superchip", "h100-pcie-8"),
    *("hgx-a100-8", "hgx-b200-8", "hgx-b300-8", "hgx-h100-8", "hgx-h200-8", "hybrimoe-a6000"),
    *("ktransformers-4x4090", "l4-8", "l40s-8", "mac-studio-m3-ultra", "macbook-m4-max"),
    *("mi300x-8", "mi325x-8", "mi355x-8", "moe-infinity-a5000", "moelens-a40", "pregated-a100"),
    *("rtx4090-8", "rtx5090-8", "rtxpro6000-server-8", "workstation-rtx4090"),
    *("workstation-rtxpro6000", "xeon-gnr-2s", "xeon-spr-2s"),
]


def _near_data(name: str) -> bool:
    return any(name.startswith(word) for word in NEAR_DATA)


def test_names() -> None:
    names = catalog_names()
    assert [n for n in names["devices"] if not _near_data(n)] == sorted(DEVICES)
    assert names["memories"] == sorted(MEMORIES)
    assert [n for n in names["clusters"] if not _near_data(n)] == sorted(CLUSTERS)
    every = [name for kind in names.values() for name in kind]
    assert len(every) == len(set(every))


def test_catalog_passes_its_own_check() -> None:
    assert check_catalog() == []


def _figures(part: object) -> Iterator[Figure | CostModel]:
    if isinstance(part, dict):
        for item in part.values():
            yield from _figures(item)
    elif isinstance(part, BaseModel):
        if isinstance(part, Figure | CostModel):
            yield part
        for name in type(part).model_fields:
            yield from _figures(getattr(part, name))


@pytest.mark.parametrize("name", DEVICES + MEMORIES + CLUSTERS)
def test_every_figure_has_a_source(name: str) -> None:
    entry = load_hardware(name)
    sources = getattr(entry, "sources", {}) | getattr(getattr(entry, "device", 0), "sources", {})
    figures = list(_figures(entry))
    assert len(figures) >= 2
    for figure in figures:
        assert figure.source != "not stated"
        assert " " in figure.source or figure.source in sources


@pytest.mark.parametrize("name", GPUS)
def test_a_gpu_states_units_cache_and_power(name: str) -> None:
    device = load_device(name)
    assert device.processor.compute_units is not None
    if not name.startswith(("ascend", "m3", "m4")):  # their vendors print neither
        assert device.processor.cache is not None
        assert device.power is not None


@pytest.mark.parametrize("name", CPUS)
def test_a_cpu_states_channels_and_domains(name: str) -> None:
    memory = load_device(name).memory
    channels = memory.stacks * memory.bus_bits * memory.pin_rate
    assert memory.bandwidth.value == pytest.approx(channels, rel=1e-3)
    assert memory.stacks % memory.numa == 0


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
    assert processors == {"gpu", "cpu"}
    for cluster in clusters.values():  # from everywhere into the memory of the device
        home = cluster.device.processor.memory
        assert all(cluster.path(name, home) for name in cluster.node.memories)


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
        ("mi325x", 1307.4e12, 6e12),
        ("mi355x", 2516.6e12, 8e12),
        ("a100-pcie", 312e12, 1.935e12),
        ("a30", 165e12, 933e9),
        ("h100-pcie", 756.5e12, 2e12),
        ("l4", 121e12, 300e9),
        ("b300", 2.25e15, 7.7e12),
        ("gb300", 2.5e15, 8e12),
        ("rtx5090", 209.5e12, 1.792e12),
        ("rtxpro6000-server", 467.8e12, 1.597e12),
        ("b60", 98.3e12, 456e9),
        ("gb10", 125e12, 273e9),
        ("ascend-910c", 752e12, 3.2e12),
        ("m3-ultra", 28.3e12, 819e9),
        ("m4-max", 16.2e12, 546e9),
        ("epyc-9654", 14.75e12, 460.8e9),
        ("epyc-9755", 44.2e12, 576e9),
        ("xeon-8480", 229.4e12, 307.2e9),
        ("xeon-6980p", 524.3e12, 844.8e9),
        ("grace", 28.6e12, 384e9),
    ],
)
def test_peaks(name: str, bf16: float, bandwidth: float) -> None:
    device = load_device(name)
    assert device.flops("bf16").value == pytest.approx(bf16)
    assert device.memory.bandwidth.value == pytest.approx(bandwidth)


WHEEL = {
    "a100": "a100_sxm",
    "a100-pcie": "a100_pcie",
    "a30": "a30",
    "b200": "b200_sxm",
    "b300": "b300_sxm",
    "b60": "b60",
    "gb200": "gb200",
    "gb300": "gb300",
    "h100": "h100_sxm",
    "h100-pcie": "h100_pcie",
    "h200": "h200_sxm",
    "l4": "l4",
    "l40s": "l40s",
    "rtxpro6000-server": "rtx_pro_6000_server",
}
OTHERWISE = {("rtxpro6000-server", "mem_bw")}
"""The tables' own file takes the workstation edition's 1792 GB/s, the catalog the 1597 of the
server edition's data sheet."""


@pytest.mark.parametrize("name", WHEEL)
def test_the_tables_gpus_agree_with_the_tables_own_file(name: str) -> None:
    package = pytest.importorskip("aiconfigurator_core")
    file = Path(package.__file__).parent / "systems" / f"{WHEEL[name]}.yaml"
    theirs = yaml.safe_load(file.read_text())["gpu"]
    device = load_device(name)
    ours = {
        "mem_bw": device.memory.bandwidth.value,
        "bfloat16_tc_flops": device.flops("bf16").value,
        "power": device.power.value,
    }
    ours |= {f"{d}_tc_flops": f.value for d, f in device.processor.flops.items() if d != "bf16"}
    for key in set(ours) & set(theirs):
        same = theirs[key] == pytest.approx(ours[key], rel=0.03)
        assert same != ((name, key) in OTHERWISE), key


@pytest.mark.parametrize(
    ("name", "engine", "version", "least"),
    [
        ("a100", "vllm", "0.14.0", 0.8),
        ("b200", "vllm", "0.24.0", 0.8),
        ("b300", "vllm", "0.24.0", 0.8),
        ("gb200", "vllm", "0.24.0", 0.8),
        ("gb300", "vllm", "0.24.0", 0.8),
        ("h100", "vllm", "0.24.0", 0.8),
        ("h200", "vllm", "0.24.0", 0.8),
        ("l40s", "vllm", "0.24.0", 0.8),
        ("rtxpro6000-server", "vllm", "0.24.0", 0.94),  # of 1792 GB/s it would be 0.85
    ],
)
def test_the_largest_measured_gemms_come_near_the_peaks(name, engine, version, least) -> None:
    """Operands of four times the cache: at most the peaks, and nearly the bandwidth."""
    package = pytest.importorskip("aiconfigurator_core")
    file = Path(package.__file__).parent / "systems" / "data" / WHEEL[name] / "gemm" / engine
    rows = pd.read_parquet(file / version / "gemm_perf.parquet")
    device = load_device(name)
    m, n, k = (rows[c].to_numpy(float) for c in ("m", "n", "k"))
    large = (rows.gemm_dtype == "bfloat16") & (2 * n * k > 4 * device.processor.cache.value)
    seconds = rows.latency.to_numpy() * 1e-3
    moved = (2 * (n * k + m * k + m * n) / seconds)[large] / device.memory.bandwidth.value
    computed = (2 * m * n * k / seconds)[large] / device.flops("bf16").value
    assert least < np.quantile(moved, 0.99) < 1
    assert 0.7 < np.quantile(computed, 0.99) < 1


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
        ("gb300-nvl72x2", 144, 2),
        ("cloudmatrix-384", 384, 1),
        ("dgx-sparkx2", 2, 2),
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
        ("zzz", None, "known are a100-pcie-8"),
        ("none/such.yaml", None, "no such file"),
    ],
)
def test_wrong_names(name: str, gpus: int | None, said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_cluster(name, gpus)


def test_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == render()
