"""A device and a cluster of round figures, so that closed forms can be written by hand."""

from typing import Any

import pytest

from basis import validate
from hwmodels import Cluster, Device

KERNEL = {"launch": "10 us", "compute_efficiency": 0.5, "memory_efficiency": 0.8}
FITTED = {
    "evidence": "fitted",
    "source": "round figures for tests",
    "held_out": {"median": 0.1, "mean": 0.1, "rows": 10},
}


@pytest.fixture
def device_data() -> dict[str, Any]:
    """1 PFLOP/s bf16, 2 TB/s; half and 80 % of it achieved; 10 us a launch."""
    kernels = {
        name: {"bf16": KERNEL | FITTED | {"low": 0.9, "high": 1.2}}
        for name in ("attention_decode", "attention_prefill", "route", "permute", "stream")
    }
    kernels["gemm"] = {"bf16": KERNEL | {"tile_rows": 16}}
    kernels["grouped_gemm"] = {"bf16": KERNEL | {"tile_rows": 8, "ramp_bytes": "1 MB"}}
    return {
        "name": "round",
        "memories": {"hbm": {"kind": "HBM", "capacity": "64 GiB", "bandwidth": "2 TB/s"}},
        "processors": {
            "gpu": {
                "memory": "hbm",
                "flops": {"bf16": "1 PFLOP/s", "fp8": "2 PFLOP/s"},
                "kernels": kernels,
            }
        },
    }


@pytest.fixture
def cluster_data(device_data: dict[str, Any]) -> dict[str, Any]:
    """Two nodes of four; 100 GB/s inside (half achieved, 5 us), 20 GB/s across (all, 20 us)."""

    def link(bandwidth: str, startup: str, efficiency: float) -> dict[str, Any]:
        cost = {"startup": startup, "efficiency": efficiency}
        costs = {"all_to_all": cost, "all_reduce": cost, "copy": cost}
        return {
            "standard": "other",
            "direction": "one-way",
            "bandwidth": bandwidth,
            "costs": costs,
        }

    host = {"kind": "DDR", "capacity": "64 GiB", "bandwidth": "100 GB/s"}
    return {
        "name": "round-4",
        "device": device_data,
        "nodes": 2,
        "node": {
            "devices": 4,
            "interconnect": link("100 GB/s", "5 us", 0.5),
            "memories": {"host": host},
            "links": {"pcie": link("25 GB/s", "8 us", 0.5) | {"ends": ["hbm", "host"]}},
        },
        "network": link("20 GB/s", "20 us", 1.0),
    }


@pytest.fixture
def device(device_data: dict[str, Any]) -> Device:
    return validate(device_data, Device, "test")


@pytest.fixture
def cluster(cluster_data: dict[str, Any]) -> Cluster:
    return validate(cluster_data, Cluster, "test")
