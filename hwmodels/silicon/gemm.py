"""Measured tables of dense products: one linear layer on bf16 activations, by n, k and m.

A row is the mean over a CUDA graph that passes in turn through a few copies of the layer (six in
SGLang, up to five in TensorRT-LLM, six in vLLM but one for nvfp4), so that weights which fit the
last-level cache together are read from there. Narrow formats hold the quantisation of their
activations. vLLM's fp8_block was timed without a graph: where the kernel is short, the row is
the host's time.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hwmodels.cluster import load_device
from hwmodels.kernels.base import Limits
from hwmodels.ops import Floats, Gemm
from hwmodels.silicon.table import Dropped, Table, too_slow
from hwmodels.silicon.wheel import ENGINES, newest, read, source

FORMATS = {
    "bfloat16": "bf16",
    "fp8": "fp8",
    "fp8_block": "fp8_block",
    "nvfp4": "nvfp4",
    "int4_wo": "int4",
    "sq": "int8",
}
"""Format keys by the tables' names (sq: smooth-quantised int8); others are left out."""
HOST_TIMED = {("vllm", "fp8_block")}
"""Engine and format of rows that were timed without a CUDA graph."""
COPIES = {"trtllm": 5, "sglang": 6, "vllm": 6}
"""Copies of a layer in the graph, by engine (TensorRT-LLM: fewer where the cache holds not even
these)."""
ONE_COPY = {("vllm", "fp8_block"), ("vllm", "nvfp4")}
"""Engine and format of rows that repeat one layer."""
SHAPE = ("n", "k")
SWEPT = ("m",)
_SMALLEST = 0.1  # share of a kernel's calls, the smallest, that shows the host's time


def gemm_tables(device: str, engines: Sequence[str] = ENGINES) -> list[Table]:
    """Return the measured rows of dense products.

    Parameters
    ----------
    device : str
        Catalog name of a GPU with tables.
    engines : sequence of str
        Engines whose newest tables are read; those without any are passed over.

    Returns
    -------
    list of Table
        One per engine, format and kernel with believable rows. A shape is (n, k), swept is m; the
        operations take and give bf16 activations.

    Raises
    ------
    InputError
        If the wheel is not installed or the device has no tables or no catalog entry.
    """
    tables = []
    for engine in engines:
        path = newest(device, "gemm", engine, "gemm_perf")
        if path is None:
            continue
        rows = read(path)
        rows["dtype"] = rows["gemm_dtype"].map(FORMATS)
        rows["seconds"] = rows["latency"] * 1e-3
        for (dtype, kernel), group in rows.groupby(["dtype", "kernel_source"], sort=True):
            frame = group.groupby([*SHAPE, *SWEPT], as_index=False)[["seconds"]].median()
            limits = load_device(device).limits(str(dtype))
            host_timed = (engine, dtype) in HOST_TIMED
            keep, dropped = _believable(frame, str(dtype), limits, host_timed)
            frame = frame[keep].reset_index(drop=True)
            if frame.empty:
                continue
            tables.append(
                Table(
                    source=source(device, engine, path), op="gemm", dtype=str(dtype),
                    kernel=str(kernel), parts=[_operation(frame, str(dtype))], frame=frame,
                    shape=SHAPE, swept=SWEPT, dropped=dropped,
                )
            )  # fmt: skip
    return tables


def copies_of(table: Table) -> int:
    """Return through how many copies of the layer a row's graph passes in turn."""
    engine = table.source.engine
    return 1 if (engine, table.dtype) in ONE_COPY else COPIES[engine]


def _operation(frame: pd.DataFrame, dtype: str) -> Gemm:
    m, n, k = (frame[c].to_numpy() for c in ("m", "n", "k"))
    return Gemm(m=m, n=n, k=k, weight_dtype=dtype, activation_dtype="bf16")


def _believable(
    frame: pd.DataFrame, dtype: str, limits: Limits, host_timed: bool
) -> tuple[NDArray[np.bool_], tuple[Dropped, ...]]:
    """Return which rows stay, and by which rules the others go.

    The lower bound counts products and weights; activations may come from the cache, which the
    layer before leaves them in.
    """
    op, seconds = _operation(frame, dtype), frame["seconds"].to_numpy()
    products = op.flops() / limits.flops
    least: Floats = np.maximum(products, op.weight_bytes() / limits.bandwidth)
    bound: Floats = np.maximum(products, op.bytes_moved() / limits.bandwidth)
    rules = {
        "faster than the peak rates, its weights stayed in the cache": seconds < least,
        "over ten times its bound": too_slow(seconds, bound),
    }
    if host_timed:
        small = bound <= np.quantile(bound, _SMALLEST)
        rules["bound below the host's time, timed without a graph"] = least < np.median(
            seconds[small]
        )
    keep = np.ones(len(frame), dtype=bool)
    dropped = []
    for rule, out in rules.items():
        dropped.append(Dropped(rule=rule, rows=int((keep & out).sum())))
        keep &= ~out
    return keep, tuple(d for d in dropped if d.rows)
