"""Measured tables of collectives: NCCL and oneCCL, and the engines' own all-reduce.

A row is one call on all ranks of a group; latencies are in milliseconds, message sizes in elements
of the whole tensor (of an all-to-all: what one rank holds for all, itself included). The engines'
all-reduce was timed in a CUDA graph and eagerly, which differ tenfold: they are kernels apart.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hwmodels.kernels.base import Limits, PhysicalCost
from hwmodels.kernels.collective import CollectiveCost, ExchangeLoad, Load, RingLoad
from hwmodels.link import ONE_WAY_RATE, Standard, Transfer
from hwmodels.ops import Floats, Op
from hwmodels.silicon.table import Dropped, Table, too_slow
from hwmodels.silicon.wheel import ENGINES, newest, read, source

PORTS: dict[str, tuple[Standard, float]] = {
    "a100": ("nvlink3", ONE_WAY_RATE["nvlink3"]),
    "h100": ("nvlink4", ONE_WAY_RATE["nvlink4"]),
    "h200": ("nvlink4", ONE_WAY_RATE["nvlink4"]),
    "b200": ("nvlink5", ONE_WAY_RATE["nvlink5"]),
    "b300": ("nvlink5", ONE_WAY_RATE["nvlink5"]),
    "gb200": ("nvlink5", ONE_WAY_RATE["nvlink5"]),
    "gb300": ("nvlink5", ONE_WAY_RATE["nvlink5"]),
    "l40s": ("pcie4", ONE_WAY_RATE["pcie4"]),
    "rtxpro6000-server": ("pcie5", ONE_WAY_RATE["pcie5"]),
    "b60": ("pcie5", ONE_WAY_RATE["pcie5"] / 2),  # 8 lanes
}
"""A port into the node: its standard, and one way bytes per second of the lanes that it has."""
NAMES: dict[str, Transfer] = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
}
FORMATS = {"half": ("bf16", 2), "bfloat16": ("bf16", 2), "int8": ("int8", 1)}
"""Format key and bytes of an element; others are left out."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CommTable(Table):
    """Measured rows of one collective over one link; ``parts`` is empty, ``load`` in its place."""

    op: Transfer
    """How the link is used."""
    load: Load
    """What it carries in each row."""
    link: Standard
    """The link's standard."""
    rate: float
    """One-way rate of a port, bytes/s."""
    level: Literal["node", "network"] = "node"
    """Whether the link joins the ranks of a node, or nodes."""
    parts: tuple[Op, ...] = ()

    def features(self, cost: PhysicalCost, limits: Limits) -> dict[str, Floats]:
        """Return the features of all rows under the choices of a cost model."""
        assert isinstance(cost, CollectiveCost)
        return cost.features(self.load, limits)


def library_tables(device: str) -> list[CommTable]:
    """Return the rows of the communication library, NCCL or oneCCL, in the newest version.

    Parameters
    ----------
    device : str
        Catalog name of a GPU with tables.

    Returns
    -------
    list of CommTable
        One per operation and format. ``frame`` holds ``ranks``, ``bytes`` (of the tensor) and
        ``seconds``; a shape is a size in bytes, of all groups alike.

    Raises
    ------
    InputError
        If the wheel is not installed or has no tables of the device.
    """
    tables = []
    for library in ("nccl", "oneccl"):
        path = newest(device, "comm", library, f"{library}_perf")
        if path is None:
            continue
        frame = read(path)
        for (called, dtype), rows in frame.groupby(["op_name", "nccl_dtype"]):
            if dtype in FORMATS and called in NAMES:
                kernel = str(rows["kernel_source"].iloc[0])
                tables.append(_table(device, library, path, rows, kernel, NAMES[called], dtype))
    return tables


def engine_tables(device: str) -> list[CommTable]:
    """Return the rows of the engines' own all-reduce, one table per engine and kernel.

    Raises
    ------
    InputError
        As `library_tables`.
    """
    tables = []
    for engine in ENGINES:
        path = newest(device, "comm", engine, "custom_allreduce_perf")
        if path is None:
            continue
        frame = read(path)
        for (kernel, dtype), rows in frame.groupby(["kernel_source", "allreduce_dtype"]):
            if dtype in FORMATS:
                tables.append(_table(device, engine, path, rows, str(kernel), "all_reduce", dtype))
    return tables


def _table(
    device: str, engine: str, path: Path, rows: pd.DataFrame, kernel: str, op: Transfer, dtype: str
) -> CommTable:
    name, width = FORMATS[dtype]
    frame = pd.DataFrame(
        {
            "ranks": rows["num_gpus"],
            "bytes": rows["message_size"] * width,
            "seconds": rows["latency"] * 1e-3,
        }
    ).reset_index(drop=True)
    standard, rate = PORTS[device]
    crossing = frame["ranks"] / 2 if standard.startswith("pcie") else 1.0  # a tree's one root
    frame, dropped = believable(frame, _load(op, frame), rate, crossing)
    return CommTable(
        source=source(device, engine, path),
        op=op,
        dtype=name,
        kernel=kernel,
        frame=frame,
        shape=("bytes",),
        swept=("ranks",),
        dropped=dropped,
        load=_load(op, frame),
        link=standard,
        rate=rate,
    )


def _load(op: Transfer, frame: pd.DataFrame) -> Load:
    ranks = frame["ranks"].to_numpy(dtype=np.float64)
    size = frame["bytes"].to_numpy(dtype=np.float64)
    if op != "all_to_all":
        return RingLoad(ranks=ranks, tensor=size, passes=2 if op == "all_reduce" else 1)
    return exchange(ranks, size * (ranks - 1) / ranks)


def exchange(
    ranks: Floats,
    port: Floats,
    *,
    tokens: Floats | None = None,
    experts: Floats | None = None,
    row: Floats | None = None,
    units: Floats | None = None,
) -> ExchangeLoad:
    """Return an exchange's load; what is not given is not stated."""
    none = np.zeros(len(port))
    stated = [none if column is None else column for column in (tokens, experts, row, units)]
    return ExchangeLoad(
        ranks=ranks,
        port=port,
        tokens=stated[0],
        experts=stated[1],
        row=stated[2],
        units=stated[3],
        copies=np.ones(len(port)),
    )


def believable(
    frame: pd.DataFrame, load: Load, rate: float, longer: pd.Series | Floats | float = 1.0
) -> tuple[pd.DataFrame, tuple[Dropped, ...]]:
    """Return the rows that physics allows, and what was left out by rule.

    Parameters
    ----------
    frame : DataFrame
        With ``seconds``.
    load : Load
        Of its rows.
    rate : float
        One-way rate of the link's port, bytes/s.
    longer : array or float
        By how much the bytes' bound is longer than alone on the whole link: shared links, few
        units.
    """
    seconds = frame["seconds"].to_numpy(dtype=np.float64)
    fast = seconds < load.least / rate
    slow = too_slow(seconds, np.asarray(longer) * load.port / rate)
    dropped = tuple(_counted({"faster than the link": fast, "ten times its bound": slow}))
    return frame[~(fast | slow)].reset_index(drop=True), dropped


def _counted(rules: dict[str, NDArray[np.bool_]]) -> Iterator[Dropped]:
    for rule, rows in rules.items():
        if rows.any():
            yield Dropped(rule=rule, rows=int(rows.sum()))
