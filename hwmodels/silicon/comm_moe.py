"""Measured tables of dispatch and combine: DeepEP in two modes, and the engines' all-to-all.

Tokens choose experts evenly. DeepEP's normal kernels and the engines' high-throughput ones send a
token once to each rank that it visits (across nodes once to each node), the low-latency ones once
per expert. DeepEP's columns are in microseconds, NVLink's in milliseconds.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import gammaln

from hwmodels.kernels.collective import Load
from hwmodels.link import ONE_WAY_RATE
from hwmodels.ops import PHASES, Floats, Phase
from hwmodels.silicon.comm import PORTS, CommTable, believable, exchange
from hwmodels.silicon.wheel import newest, read, source, versions

SHAPE = ("hidden", "topk", "experts", "tokens", "ranks")
ACROSS = "h200"
"""The device measured across nodes; H100's tables repeat its numbers, row for row."""
NODE = 8  # GPUs of a node in DeepEP's tables
CONGESTED = 8
"""Nodes with which DeepEP's normal kernels got a third of the network's rate: a table apart."""
_GROUPS = 4  # nodes that DeepEP's benchmark lets a token visit at most
_FULL_UNITS = 24  # with fewer (SMs, or experts in the low-latency mode) the link is not reached
LOW_LATENCY = ("deepep_ll", "trtllm_deepep_ll", "deepep_v2_generation")
"""Kernels that send a token once for each of its experts."""
_WIRE = {"bfloat16": 2.0, "fp8": 1 + 4 / 128, "nvfp4": 0.5 + 1 / 16}
"""Bytes of an element as it is sent, scales included."""


def deepep_tables(device: str) -> list[CommTable]:
    """Return DeepEP's rows as SGLang's collector measured them, inside a node and across nodes.

    Parameters
    ----------
    device : str
        Catalog name of a GPU with tables.

    Returns
    -------
    list of CommTable
        By mode (kernel ``deepep_ll``, ``deepep_normal``), phase and level; those across nodes are
        of the newest version that has some, of H200 (`ACROSS`). ``frame`` holds `SHAPE`, ``units``
        (SMs; 0: all), ``nodes`` and ``seconds``.

    Raises
    ------
    InputError
        If the wheel is not installed or has no tables of the device.
    """
    tables = []
    for mode, columns in (("ll", _low_latency), ("normal", _normal)):
        paths = versions(device, "comm", "sglang", f"wideep_deepep_{mode}_perf")
        for phase in PHASES:
            inside = _newest_with(paths, lambda f: f["node_num"] == 1)
            if inside is not None:
                path, rows = inside
                tables.append(_inside(device, path, columns(rows, phase), f"deepep_{mode}", phase))
            across = _newest_with(paths, lambda f: f["node_num"] > 1)
            if across is not None and device == ACROSS:
                path, rows = across
                tables += _across(device, path, columns(rows, phase), f"deepep_{mode}", phase)
    return tables


def _newest_with(
    paths: Sequence[Path], chosen: Callable[[pd.DataFrame], pd.Series]
) -> tuple[Path, pd.DataFrame] | None:
    for path in reversed(paths):
        frame = read(path)
        rows = frame[chosen(frame)]
        if len(rows):
            return path, rows
    return None


def _low_latency(rows: pd.DataFrame, phase: Phase) -> pd.DataFrame:
    frame = _shape(rows)
    frame["units"] = 0
    frame["seconds"] = rows[f"{phase}_avg_t_us"].to_numpy() * 1e-6
    sent = rows[f"{phase}_bandwidth_gbps"].to_numpy() * 1e9 * frame["seconds"]  # bytes, as counted
    frame["copied"] = sent
    return frame


def _normal(rows: pd.DataFrame, phase: Phase) -> pd.DataFrame:
    frame = _shape(rows)
    frame["units"] = rows[f"{phase}_sms"].to_numpy()
    parts = rows[f"{phase}_transmit_us"] + rows[f"{phase}_notify_us"]
    frame["seconds"] = parts.to_numpy() * 1e-6
    nodes = frame["nodes"].to_numpy(dtype=np.float64)
    reached = np.where(
        nodes > 1,
        _visited(np.minimum(nodes, _GROUPS), frame["topk"]),
        visited_ranks(frame["experts"], frame["topk"], NODE),
    )
    frame["copied"] = frame["tokens"] * reached * _row(frame["hidden"], phase)
    return frame


def _shape(rows: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "hidden": rows["hidden_size"].to_numpy(),
            "topk": rows["num_topk"].to_numpy(),
            "experts": rows["num_experts"].to_numpy(),
            "tokens": rows["num_token"].to_numpy(),
            "ranks": NODE * rows["node_num"].to_numpy(),
            "nodes": rows["node_num"].to_numpy(),
        }
    )


def _row(hidden: pd.Series, phase: Phase) -> Floats:
    """Bytes of a row: fp8 with a scale per 128 on the way there, bf16 back."""
    width = _WIRE["fp8"] if phase == "dispatch" else _WIRE["bfloat16"]
    return hidden.to_numpy(dtype=np.float64) * width


def visited_ranks(experts: pd.Series, topk: pd.Series, ranks: int | NDArray[np.int64]) -> Floats:
    """Return how many ranks a token visits on average when it draws k distinct experts evenly.

    ``R (1 - C(E - E/R, k) / C(E, k))``; its own rank counts when visited.
    """
    e, k = (column.to_numpy(dtype=np.float64) for column in (experts, topk))
    elsewhere = e - e / ranks
    ways = _log_choose(np.maximum(elsewhere, k), k) - _log_choose(e, k)
    return np.asarray(ranks * (1 - np.where(elsewhere >= k, np.exp(ways), 0.0)))


def _visited(groups: Floats, topk: pd.Series) -> Floats:
    """Return how many of equal groups of many experts k draws hit on average."""
    return np.asarray(groups * (1 - (1 - 1 / groups) ** topk.to_numpy(dtype=np.float64)))


def _log_choose(n: Floats, k: Floats) -> Floats:
    return np.asarray(gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1))


def _inside(device: str, path: Path, frame: pd.DataFrame, kernel: str, phase: Phase) -> CommTable:
    frame["port"] = frame["copied"] * (NODE - 1) / NODE
    return _table(device, "sglang", path, frame, kernel, phase, _row(frame["hidden"], phase))


def _across(
    device: str, path: Path, frame: pd.DataFrame, kernel: str, phase: Phase
) -> list[CommTable]:
    """Return what goes through the network: all but the share of the rank's own node."""
    nodes = frame["nodes"].to_numpy(dtype=np.float64)
    frame["port"] = frame["copied"] * (nodes - 1) / nodes
    tables = []
    crowded = (frame["nodes"] == CONGESTED) & (kernel == "deepep_normal")
    for called, chosen in ((kernel, ~crowded), (f"{kernel}_{CONGESTED}_nodes", crowded)):
        part = frame[chosen].reset_index(drop=True)
        if len(part):
            row = _row(part["hidden"], phase)
            tables.append(_table(device, "sglang", path, part, called, phase, row, "network"))
    return tables


def exchange_tables(device: str) -> list[CommTable]:
    """Return TensorRT-LLM's and vLLM's dispatch and combine by backend, all formats together.

    Those of ``moe_a2a_perf`` (DeepEP inside the engines; what vLLM sends is not stated and taken
    as fp8 there and bf16 back), and TensorRT-LLM's own kernels over NVLink, where the preparation
    counts with the dispatch.

    Raises
    ------
    InputError
        As `deepep_tables`.
    """
    tables = []
    for engine in ("trtllm", "vllm"):
        path = newest(device, "comm", engine, "moe_a2a_perf")
        if path is None:
            continue
        rows = read(path)
        for (backend, phase), part in rows.groupby(["comm_backend", "phase"]):
            frame = _engine_rows(part, str(backend))
            named = (str(backend), cast(Phase, phase))
            tables.append(_sent(device, engine, path, frame, *named))
    path = newest(device, "comm", "trtllm", "trtllm_alltoall_perf")
    return tables if path is None else tables + _nvlink(device, path)


def _engine_rows(rows: pd.DataFrame, backend: str) -> pd.DataFrame:
    frame = pd.DataFrame(
        {
            "hidden": rows["hidden_size"],
            "topk": rows["topk"],
            "experts": rows["num_experts"],
            "tokens": rows["num_tokens"],
            "ranks": rows["ep_size"],
            "nodes": rows["node_num"],
            "units": rows["sms"],
            "wire": rows["comm_dtype"].replace("default", "fp8"),
            "seconds": rows["latency"] * 1e-6,
        }
    ).reset_index(drop=True)
    ranks = frame["ranks"].to_numpy()
    low = backend in LOW_LATENCY
    frame["copies"] = (
        frame["topk"] if low else visited_ranks(frame["experts"], frame["topk"], ranks)
    )
    return frame


def _nvlink(device: str, path: Path) -> list[CommTable]:
    """Return TensorRT-LLM's NVLink kernels; experts are spread evenly, so min(k, ranks) visits."""
    frame = read(path)
    keys = ["kernel_source", "moe_dtype", "num_tokens", "hidden_size", "topk", "num_experts",
            "moe_ep_size"]  # fmt: skip
    wide = frame.pivot_table(index=keys, columns="op_name", values="latency", aggfunc="median")
    tables = []
    for kernel, rows in wide.reset_index().groupby("kernel_source"):
        prepare = rows["alltoall_prepare"].fillna(0.0)
        times = {
            "dispatch": rows["alltoall_dispatch"] + prepare,
            "combine": rows["alltoall_combine"],
        }
        for phase in PHASES:
            part = _nvlink_rows(rows, times[phase])
            tables.append(_sent(device, "trtllm", path, part, str(kernel), phase))
    return tables


def _nvlink_rows(rows: pd.DataFrame, milliseconds: pd.Series) -> pd.DataFrame:
    frame = pd.DataFrame(
        {
            "hidden": rows["hidden_size"],
            "topk": rows["topk"],
            "experts": rows["num_experts"],
            "tokens": rows["num_tokens"],
            "ranks": rows["moe_ep_size"],
            "nodes": 1,
            "units": 0,
            "wire": rows["moe_dtype"],
            "copies": np.minimum(rows["topk"], rows["moe_ep_size"]),
            "seconds": milliseconds * 1e-3,
        }
    )
    return frame[frame["seconds"].notna()].reset_index(drop=True)


def _sent(
    device: str, engine: str, path: Path, frame: pd.DataFrame, kernel: str, phase: Phase
) -> CommTable:
    """Return a table of rows sent in their own format on the way there, in bf16 back."""
    width = frame["wire"].map(_WIRE).fillna(_WIRE["bfloat16"]) if phase == "dispatch" else 2.0
    row = (frame["hidden"] * width).to_numpy(dtype=np.float64)
    sent = frame["tokens"] * frame["copies"] * row
    frame["port"] = sent * (frame["ranks"] - 1) / frame["ranks"]
    return _table(device, engine, path, frame, kernel, phase, row)


def _table(
    device: str,
    engine: str,
    path: Path,
    frame: pd.DataFrame,
    kernel: str,
    phase: Phase,
    row: Floats,
    level: Literal["node", "network"] = "node",
) -> CommTable:
    network = level == "network"
    rate = ONE_WAY_RATE["infiniband-ndr"] if network else PORTS[device][1]
    frame = frame.assign(row=row)
    blocks = np.where(frame["units"] > 0, frame["units"], frame["experts"])
    longer = np.maximum(_FULL_UNITS / blocks, 1.0)
    kept, dropped = believable(frame, _load(frame, level), rate, longer)
    return CommTable(
        source=source(device, engine, path),
        op=phase,
        dtype="bf16",
        kernel=kernel,
        frame=kept,
        shape=SHAPE,
        swept=("tokens",),
        dropped=dropped,
        load=_load(kept, level),
        link="infiniband-ndr" if network else PORTS[device][0],
        rate=rate,
        level=level,
    )


def _load(frame: pd.DataFrame, level: str) -> Load:
    members = "nodes" if level == "network" else "ranks"
    names = (members, "port", "tokens", "experts", "row", "units")
    columns = [frame[name].to_numpy(dtype=np.float64) for name in names]
    return exchange(
        columns[0],
        columns[1],
        tokens=columns[2],
        experts=columns[3],
        row=columns[4],
        units=columns[5],
    )
