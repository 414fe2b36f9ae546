"""Wrong device and cluster files, each refused (or warned of) with the message that helps."""

import copy
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml

from basis import InputError, validate
from hwmodels import (
    Cluster,
    Device,
    Link,
    Memory,
    catalog_names,
    check_cluster,
    check_device,
    check_hardware,
    load_cluster,
    load_device,
    load_hardware,
)
from hwmodels.check import check_link, check_part
from hwmodels.link import FULL_LANES, ONE_WAY_RATE, RATE_SOURCE

CATALOG = Path(str(files("hwmodels"))) / "catalog"


def changed(data: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """Copy ``data`` with the entry at a dotted path set (or, with None, removed)."""
    data = copy.deepcopy(data)
    *way, last = path.split(".")
    part = data
    for step in way:
        part = part.setdefault(step, {})
    part.pop(last, None)
    if value is not None:
        part[last] = value
    return data


def catalog(kind: str, name: str) -> dict[str, Any]:
    return yaml.safe_load((CATALOG / kind / f"{name}.yaml").read_text())


def written(data: dict[str, Any], folder: Path) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


FLOPS = "processors.gpu.flops"
DEVICE_CASES = [
    ("h100", f"{FLOPS}.bf16", "1979 TFLOP/s", "looks like the sparse figure"),
    ("h200", f"{FLOPS}.fp8", "3958 TFLOP/s", "looks like the sparse figure"),
    ("a100", f"{FLOPS}.bf16", "624 TFLOP/s", "looks like the sparse figure"),
    ("mi300x", f"{FLOPS}.bf16", "2614.9 TFLOP/s", "looks like the sparse figure"),
    ("h100", f"{FLOPS}.bf16", "98.9 TFLOP/s", "both must agree within 15 %"),
    ("h100", f"{FLOPS}.bf16", "989 TB/s", "unknown unit 'TB/s'"),
    ("h100", f"{FLOPS}.bf16", 989e12, "unit missing"),
    ("h100", f"{FLOPS}.bf16", None, "bf16 is missing"),
    ("h100", "memories.hbm.capacity", "80 TB", "GB .* against GiB"),
    ("h100", "memories.hbm.capacity", "74.5 GB", "GB .* against GiB"),
    ("h100", "memories.hbm.bandwidth", "3.35 GB/s", "stacks x bus x pin rate"),
    ("h100", "memories.hbm.bandwidth", "33.5 TB/s", "stacks x bus x pin rate"),
    ("h100", "memories.hbm.bandwith", "3.35 TB/s", "did you mean 'bandwidth'"),
    ("h100", "processors.gpu.memory", "hbn", "'hbn' is not a memory"),
    ("duplex-xpu", "processors.pim.memory", "stack", "'stack' is not a memory"),
    ("duplex-xpu", "processors.pim.bandwidth", "13.4 TB/s", "or cite its source"),
    ("duplex-xpu", "processors.pim.flops.bf16", "21.3 TFLOP/s", "0.20 x units x clock"),
    ("h100", "processors.gpu.kernels.gemm", {}, "kernels.gemm: bf16 is missing"),
    ("h100", "processors.gpu.kernels.gemm.fp7", {}, "fp7"),
]


@pytest.mark.parametrize(("name", "path", "value", "said"), DEVICE_CASES)
def test_wrong_device_files(name: str, path: str, value, said: str, tmp_path: Path) -> None:
    file = written(changed(catalog("devices", name), path, value), tmp_path)
    with pytest.raises(InputError, match=said):
        load_device(file)


@pytest.mark.parametrize(
    ("flops", "suspect"),
    [
        ({"bf16": "1979 TFLOP/s"}, "bf16"),
        ({"bf16": "1513 TFLOP/s"}, "bf16"),
        ({"bf16": "700 TFLOP/s", "fp8": "2800 TFLOP/s"}, "fp8"),
        ({"bf16": "1400 TFLOP/s", "fp8": "1200 TFLOP/s"}, "bf16"),
    ],
)
def test_sparse_rates_are_found_without_units_and_clock(flops, suspect: str, device_data) -> None:
    device = validate(changed(device_data, FLOPS, flops), Device, "test")
    errors = [f for f in check_device(device) if f.level == "error"]
    assert [f.where for f in errors] == [f"processors.gpu.flops.{suspect}"]
    assert "sparse" in errors[0].message


def test_units_and_clock_prove_a_rate_dense(device_data) -> None:
    data = changed(device_data, FLOPS, {"bf16": "1979 TFLOP/s"})
    data = changed(data, "processors.gpu.compute_units", 264)
    data = changed(data, "processors.gpu.clock", "1.83 GHz")
    data = changed(data, "processors.gpu.flops_per_clock_per_unit", {"bf16": 4096})
    assert check_device(validate(data, Device, "test")) == []


def test_round_decimal_capacity_is_warned_of(device_data) -> None:
    data = changed(device_data, "memories.hbm.capacity", "80 GB")
    findings = check_device(validate(data, Device, "test"))
    assert [(f.level, f.where) for f in findings] == [("warning", "memories.hbm.capacity")]


def test_unexplained_source_is_warned_of(device_data) -> None:
    figure = {"value": "64 GiB", "evidence": "datasheet", "source": "sheet"}
    data = changed(device_data, "memories.hbm.capacity", figure)
    findings = check_device(validate(data, Device, "test"))
    assert [(f.level, f.where) for f in findings] == [("warning", "memories.hbm.capacity")]
    cited = data | {"sources": {"sheet": "its data sheet"}}
    assert check_device(validate(cited, Device, "test")) == []


LINK = "node.interconnect"
CPU = "node.processors.cpu"
DDR = {"kind": "DDR5", "capacity": "64 GiB", "bandwidth": "76.8 GB/s"}
CLUSTER_CASES = [
    ("hgx-h100-8", f"{LINK}.bandwidth", "900 GB/s", "sum of both directions of nvlink4"),
    ("hgx-b200-8", f"{LINK}.bandwidth", "1.8 TB/s", "write 900 GB/s"),
    ("mi300x-8", f"{LINK}.bandwidth", "896 GB/s", "write 448 GB/s"),
    ("hgx-h100-8", "node.links.pcie.bandwidth", "128 GB/s", "sum of both directions of pcie5"),
    ("hgx-h100-8", f"{LINK}.bandwidth", "600 GB/s", "carries at most 450 GB/s"),
    ("hgx-h100-8", f"{LINK}.bandwidth", "225 GB/s", "0.50 x lanes x rate per lane"),
    ("hgx-h100-8", f"{LINK}.bandwidth", "450 Gb/s", "ambiguous unit"),
    ("hgx-h100-8", f"{LINK}.direction", "both", "one-way"),
    ("hgx-h100-8", f"{LINK}.direction", None, "direction: missing"),
    ("hgx-h100-8", LINK, None, "8 devices without an interconnect"),
    ("hgx-h100-8", "device", "h1000", "did you mean 'h100'"),
    ("hgx-h100-8", "node.links.pcie.ends", ["hbm", "nvme"], "'nvme' is not a memory"),
    ("hgx-h100-8", "node.links.pcie.ends", ["hbm", "hbm"], "two different memories"),
    ("hgx-h100-8", "node.links.pcie.ends", None, "name the two memories"),
    ("gpu-cxl-ndp", "node.links.nvme.bandwidth", "63 GB/s", "pcie5 x4 carries at most 15.75 GB/s"),
    ("gpu-cxl-ndp", "node.memories.nvme.bandwidth", "28 GB/s", "its lanes carry 15.76 GB/s"),
    ("gpu-cxl-ndp", "node.links.cxl.ends", ["cxl", "dram"], "'dram' is not a memory"),
    ("gpu-cxl-ndp", f"{CPU}.memory", "dram", "'dram' is not a memory of the node"),
    ("gpu-cxl-ndp", f"{CPU}.flops.bf16", "288 TFLOP/s", "2.00 x units x clock"),
    ("gpu-cxl-ndp", f"{CPU}.bandwidth", "614.4 GB/s", "above the 307.2 GB/s of memory 'host'"),
    ("gpu-cxl-ndp", "node.memories.host.bandwidth", "614.4 GB/s", "2.00 x stacks x bus x pin rate"),
    ("gpu-cxl-ndp", "node.memories.host.capacity", "512 GB", "GB .* against GiB"),
    (
        "gpu-cxl-ndp",
        "node.processors.gpu",
        {"memory": "cxl", "flops": {"bf16": "1 TFLOP/s"}},
        "too",
    ),
    ("gpu-cxl-ndp", "node.processors.ndp.flops.bf16", None, "bf16 is missing"),
    ("workstation-rtx4090", "node.memories.hbm", DDR, "the device has one of that name too"),
    ("l40s-8", "nodes", 2, "without a network"),
    ("l40s-8", "gpus", 9, "the cluster has 8"),
    ("l40s-8", "node.device", 8, "did you mean 'devices'"),
]


@pytest.mark.parametrize(("name", "path", "value", "said"), CLUSTER_CASES)
def test_wrong_cluster_files(name: str, path: str, value, said: str, tmp_path: Path) -> None:
    file = written(changed(catalog("clusters", name), path, value), tmp_path)
    with pytest.raises(InputError, match=said):
        load_cluster(file)


def test_all_errors_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    data = changed(catalog("devices", "h100"), f"{FLOPS}.bf16", "1979 TFLOP/s")
    data = changed(data, "memories.hbm.bandwidth", "33.5 TB/s")
    with pytest.raises(InputError, match="2 errors") as refused:
        load_device(written(data, tmp_path))
    assert str(tmp_path) in str(refused.value)


def test_a_plain_file_of_ones_own_loads(tmp_path: Path, device_data, cluster_data) -> None:
    (tmp_path / "gpu.yaml").write_text(yaml.safe_dump(device_data))
    data = changed(cluster_data, "device", "gpu.yaml")
    cluster = load_cluster(written(data, tmp_path), gpus=3)
    assert (cluster.device.name, cluster.num_ranks, cluster.num_nodes) == ("round", 3, 1)
    assert check_cluster(cluster) == []
    assert cluster.device.memory.bandwidth.evidence == "assumed"


def test_a_device_without_kernels_gets_assumed_ones(device_data) -> None:
    device = validate(changed(device_data, "processors.gpu.kernels", None), Device, "test")
    cost, evidence = device.kernel("grouped_gemm", "bf16")
    assert (evidence, cost.low, cost.high) == ("assumed", 0.5, 2.0)


def test_cluster_without_nodes_is_a_mapping() -> None:
    with pytest.raises(InputError, match="expected a mapping"):
        validate([], Cluster, "test")


def test_a_memory_that_no_link_reaches_is_warned_of(cluster_data) -> None:
    data = changed(cluster_data, "node.memories.disk", DDR)
    findings = check_cluster(validate(data, Cluster, "test"))
    assert [(f.level, f.where) for f in findings] == [("warning", "node.memories.disk")]


MORE_DEVICE_CASES = [
    ("h100", "power", "0.7 W", "error", "power", "5 GFLOP/s to 4 TFLOP/s is known"),
    ("h100", "price", "250000 USD/h", "warning", "price", "not its purchase"),
    ("h100", "processors.gpu.clock", "1830 GHz", "error", "processors.gpu.clock", "prefix"),
    ("h100", "processors.gpu.cache", "50 GB", "error", "processors.gpu.cache", "prefix"),
    (
        "h100",
        "processors.gpu.kernels.stream.bf16.launch",
        "5 ms",
        "warning",
        "processors.gpu.kernels.stream.bf16.launch",
        "ms against us",
    ),
    ("xeon-6980p", "memories.host.numa", 5, "error", "memories.host.numa", "share the channels"),
    (
        "epyc-9654",
        "processors.cpu.flops.bf16",
        "29.5 TFLOP/s",
        "error",
        "processors.cpu.flops.bf16",
        "2.00 x units x clock",
    ),
]


@pytest.mark.parametrize(("name", "path", "value", "level", "where", "said"), MORE_DEVICE_CASES)
def test_findings_of_a_device(name, path, value, level, where, said) -> None:
    found = check_device(validate(changed(catalog("devices", name), path, value), Device, "test"))
    assert (level, where) in [(f.level, f.where) for f in found]
    assert any(said in f.message for f in found)


MORE_CLUSTER_CASES = [
    ("hgx-h100-8", "node.power", "700 W", "error", "may draw 5.6 kW"),
    ("hgx-h100-8", "network.bandwidth", "50 Gbit/s", "warning", "an eighth of what infiniband-ndr"),
    ("hgx-h100-8", "node.links.pcie.costs.copy.startup", "10 ms", "warning", "ms against us"),
]


@pytest.mark.parametrize(("name", "path", "value", "level", "said"), MORE_CLUSTER_CASES)
def test_findings_of_a_cluster(name, path, value, level, said, tmp_path: Path) -> None:
    found = check_hardware(written(changed(catalog("clusters", name), path, value), tmp_path))
    assert [f.level for f in found] == [level]
    assert said in found[0].message


def _devices() -> list[Device]:
    return [load_device(name) for name in catalog_names()["devices"]]


@pytest.mark.parametrize("device", _devices(), ids=lambda d: d.name)
def test_a_doubled_rate_is_refused(device: Device) -> None:
    """Whatever a file can prove with units and clock, twice of it is an error at that place."""
    for name, processor in device.processors.items():
        for dtype, figure in processor.flops.items():
            known = processor.flops_per_clock_per_unit.get(dtype)
            if not (known and processor.clock and processor.compute_units):
                continue
            flops = processor.flops | {dtype: figure.times(2)}
            wrong = processor.model_copy(update={"flops": flops})
            parts = device.processors | {name: wrong}
            found = check_device(device.model_copy(update={"processors": parts}))
            errors = [f.where for f in found if f.level == "error"]
            assert f"processors.{name}.flops.{dtype}" in errors


@pytest.mark.parametrize("device", _devices(), ids=lambda d: d.name)
def test_a_memory_is_no_faster_than_its_pins(device: Device) -> None:
    for name, memory in device.memories.items():
        if memory.pin_rate is None:
            continue
        faster = memory.model_copy(update={"bandwidth": memory.bandwidth.times(1.15)})
        slower = memory.model_copy(update={"bandwidth": memory.bandwidth.times(0.85)})
        assert {f.where for f in check_part(faster)} >= {"bandwidth"}, name
        assert {f.where for f in check_part(slower)} >= {"bandwidth"}, name


@pytest.mark.parametrize("standard", ONE_WAY_RATE)
def test_a_port_carries_its_rate_and_no_more(standard: str) -> None:
    def levels(factor: float, lanes: int | None = None) -> list[str]:
        rate = f"{ONE_WAY_RATE[standard] * factor:.1f} B/s"
        data = {"standard": standard, "direction": "one-way", "bandwidth": rate, "lanes": lanes}
        return [f.level for f in check_link(validate(data, Link, "test"))]

    assert levels(1) == levels(0.6) == []
    assert levels(1.1) == levels(2) == levels(8) == ["error"]
    assert levels(1 / 8) == ["warning"]
    assert RATE_SOURCE[standard]
    if (full := FULL_LANES.get(standard)) is not None:
        assert levels(1 / full, lanes=1) == []
        assert levels(2 / full, lanes=1) == ["error"]


def test_known_standards_have_rate_and_source() -> None:
    assert set(ONE_WAY_RATE) == set(RATE_SOURCE)
    assert set(FULL_LANES) <= set(ONE_WAY_RATE)


def test_a_part_cites_in_full() -> None:
    figure = {"value": "4 TB", "evidence": "datasheet"}
    data = {"kind": "NVMe, PCIe 5 x4", "capacity": figure, "bandwidth": "14.8 GB/s"}
    found = check_part(validate(data, Memory, "test"))
    assert [(f.level, f.where) for f in found] == [("warning", "capacity")]
    key = {"value": "4 TB", "evidence": "datasheet", "source": "sheet"}
    found = check_part(validate(data | {"capacity": key}, Memory, "test"))
    assert "source 'sheet' is not in sources" in found[0].message


def test_names_of_any_kind() -> None:
    assert load_hardware("micron-cz120-256gb").kind.startswith("DDR5")
    assert load_hardware("hgx-h100-8x2").num_ranks == 16
    with pytest.raises(InputError, match=r"unknown hardware 'h10'.*did you mean 'h100'"):
        load_hardware("h10")


def test_parts_stand_in_a_cluster_by_name(cluster_data, tmp_path: Path) -> None:
    data = changed(cluster_data, "node.memories.nvme", "samsung-9100-pro-4tb")
    cluster = load_cluster(written(data, tmp_path))
    assert cluster.memory("nvme").bandwidth.value == pytest.approx(14.8e9)
    part = {"kind": "DDR5 on CXL", "capacity": "96 GiB", "bandwidth": "20 GB/s"}
    (tmp_path / "part.yaml").write_text(yaml.safe_dump(part))
    cluster = load_cluster(written(changed(data, "node.memories.cxl", "part.yaml"), tmp_path))
    assert cluster.memory("cxl").capacity.value == 96 * 2**30
    with pytest.raises(InputError, match="unknown memory 'samsung'"):
        load_cluster(written(changed(data, "node.memories.nvme", "samsung"), tmp_path))
