"""What hardware can do: operations as columns, devices and clusters as YAML, prices in seconds."""

from hwmodels.check import Finding, check_cluster, check_device
from hwmodels.cluster import (
    catalog_names,
    check_catalog,
    check_hardware,
    load_cluster,
    load_device,
    load_hardware,
    load_memory,
)
from hwmodels.cost import Price, price
from hwmodels.device import Device, Memory, Processor
from hwmodels.figures import Figure, KernelCost, TransferCost
from hwmodels.link import Link
from hwmodels.ops import (
    AllGather,
    AllReduce,
    AllToAll,
    AttentionDecode,
    AttentionPrefill,
    Copy,
    Elementwise,
    Gemm,
    GroupedGemm,
    Op,
    Permute,
    ReduceScatter,
    Route,
    Stage,
)
from hwmodels.topology import Cluster, Node

__all__ = [
    "AllGather",
    "AllReduce",
    "AllToAll",
    "AttentionDecode",
    "AttentionPrefill",
    "Cluster",
    "Copy",
    "Device",
    "Elementwise",
    "Figure",
    "Finding",
    "Gemm",
    "GroupedGemm",
    "KernelCost",
    "Link",
    "Memory",
    "Node",
    "Op",
    "Permute",
    "Price",
    "Processor",
    "ReduceScatter",
    "Route",
    "Stage",
    "TransferCost",
    "catalog_names",
    "check_catalog",
    "check_cluster",
    "check_device",
    "check_hardware",
    "load_cluster",
    "load_device",
    "load_hardware",
    "load_memory",
    "price",
]
