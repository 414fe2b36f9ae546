"""Measured tables of grouped-query attention: decode and prefill of one layer, equal lengths.

Each row repeats one call in a CUDA graph on the same data, so caches that fit into the last-level
cache are read from there. TensorRT-LLM's rows hold the rotary embedding and the write of the new
keys and values too, SGLang's the write; vLLM's are the attention kernel alone.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Literal, TypedDict

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hwmodels.cluster import load_device
from hwmodels.kernels.base import Limits
from hwmodels.ops import AttentionDecode, AttentionPrefill, Floats
from hwmodels.silicon.table import Dropped, Table, too_slow
from hwmodels.silicon.wheel import ENGINES, newest, read, source

Phase = Literal["context", "generation"]
PHASES: tuple[Phase, ...] = ("context", "generation")
AttentionOp = AttentionDecode | AttentionPrefill


class Geometry(TypedDict):
    """What all rows of a shape have in common, as the operations take it."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    kv_elements: int
    kv_dtype: str
    activation_dtype: str
    window: int


MakeOp = Callable[[pd.DataFrame], AttentionOp]

FORMATS = {"bfloat16": "bf16", "float16": "bf16", "fp8": "fp8"}
"""Formats by the tables' names; others are left out."""
SHAPE = ("num_heads", "num_key_value_heads", "head_dim", "window")
SWEPT = ("batch_size", "context", "step")


def attention_tables(device: str, engines: Sequence[str] = ENGINES) -> list[Table]:
    """Return the measured rows of attention with plain or grouped heads.

    Parameters
    ----------
    device : str
        Catalog name of a GPU with tables.
    engines : sequence of str
        Engines whose newest tables are read; those without any are passed over.

    Returns
    -------
    list of Table
        One per engine, phase, kernel and format of products and cache. ``dtype`` is the cache's
        format; where a table also has rows that multiply in fp8, their kernel's name ends in
        ``(fp8 products)``. All operations take and give bf16 activations: casts are the kernel's.

    Raises
    ------
    InputError
        If the wheel is not installed or the device has no tables or no catalog entry.
    """
    tables = []
    for engine in engines:
        for phase in PHASES:
            path = newest(device, "attention", engine, f"{phase}_attention_perf")
            if path is not None:
                tables += _split(device, engine, path, phase)
    return tables


def _split(device: str, engine: str, path: Path, phase: Phase) -> list[Table]:
    frame = read(path)
    frame["window"] = frame["window_size"].clip(lower=0) if "window_size" in frame else 0
    frame["context"] = frame["isl"] + frame["step"]
    tables = []
    for key, rows in frame.groupby(["kernel_source", "attn_dtype", "kv_cache_dtype"]):
        kernel, products, stored = (str(part) for part in key)
        if products not in FORMATS or stored not in FORMATS:
            continue
        tables.append(
            make_table(
                rows,
                device=device,
                engine=engine,
                path=path,
                op="attention_prefill" if phase == "context" else "attention_decode",
                dtype=FORMATS[stored],
                kernel=kernel if products != "fp8" else f"{kernel} (fp8 products)",
                shape=SHAPE,
                swept=SWEPT,
                make=_make(phase, FORMATS[stored]),
            )
        )
    return tables


def _make(phase: Phase, stored: str) -> MakeOp:
    """Return what turns the rows of one shape into operations."""

    def make(rows: pd.DataFrame) -> AttentionOp:
        heads, kv_heads, dim, window = (int(rows[c].iloc[0]) for c in SHAPE)
        batch, queries, context = (rows[c].to_numpy() for c in ("batch_size", "isl", "context"))
        geometry: Geometry = {
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": dim,
            "v_head_dim": dim,
            "kv_elements": 2 * kv_heads * dim,
            "kv_dtype": stored,
            "activation_dtype": "bf16",
            "window": window,
        }
        if phase == "generation":
            seen = np.minimum(context, window) if window else context
            return AttentionDecode(tokens=batch, context=batch * seen, **geometry)
        pairs = batch * causal_pairs(queries, context - queries, window)
        return AttentionPrefill(tokens=batch * queries, pairs=pairs, **geometry)

    return make


def causal_pairs(
    queries: NDArray[np.int64], before: NDArray[np.int64], window: int = 0
) -> NDArray[np.int64]:
    """Return the (query, key) pairs that causality and a window leave.

    Parameters
    ----------
    queries : ndarray [n]
        New tokens of one sequence.
    before : ndarray [n]
        Cached tokens in front of them.
    window : int
        Each query sees at most so many keys, its own included; 0: all before it.

    Returns
    -------
    ndarray [n]
        Pairs of one sequence: query i sees min(before + i, window) keys, i from 1.
    """
    full = queries * before + queries * (queries + 1) // 2
    if not window:
        return full
    # the queries that would see more keys than the window
    beyond = np.clip(before + queries - window, 0, queries)
    first = before + queries - beyond + 1  # keys the first of them would see
    excess = beyond * (first - window) + beyond * (beyond - 1) // 2
    return full - np.where(beyond > 0, excess, 0)


def make_table(
    rows: pd.DataFrame,
    *,
    device: str,
    engine: str,
    path: Path,
    op: str,
    dtype: str,
    kernel: str,
    shape: tuple[str, ...],
    swept: tuple[str, ...],
    make: MakeOp,
) -> Table:
    """Return one kernel's believable rows as a table, latencies in ms turned into seconds.

    Rows measured more than once count once, with their median. Rows are left out that beat the
    device's peaks (a cache that fits into the last-level cache need not come from memory), that
    take over ten times the bound with 10 us of launch, or that are no measurement at all.
    """
    keys = [*dict.fromkeys((*shape, *swept, "isl"))]
    valid = rows[(rows["latency"] > 0) & (rows[keys[0]] > 0) & (rows["isl"] > 0)]
    if "num_key_value_heads" in shape:
        valid = valid[valid["num_key_value_heads"] > 0]
    once = valid.groupby(keys, as_index=False)[["latency"]].median()
    once["seconds"] = once["latency"] * 1e-3
    kept, parts = [], []
    beats = slow = 0
    for _, group in once.groupby(list(shape), sort=True):
        seconds = group["seconds"].to_numpy(dtype=np.float64)
        column = make(group)
        least, roofline = bounds(column, limits(device), limits(device, dtype).flops)
        fast = seconds < least
        late = too_slow(seconds, roofline)
        beats, slow = beats + int(fast.sum()), slow + int(late.sum())
        group = group[~fast & ~late]
        if len(group):
            kept.append(group)
            parts.append(make(group))
    frame = pd.concat(kept, ignore_index=True) if kept else once.iloc[:0]
    dropped = (
        Dropped(rule="no measurement", rows=len(rows) - len(valid)),
        Dropped(rule="measured more than once", rows=len(valid) - len(once)),
        Dropped(rule="beats the peaks", rows=beats),
        Dropped(rule="over ten times its bound", rows=slow),
    )
    return Table(
        source=source(device, engine, path),
        op=op,
        dtype=dtype,
        kernel=kernel,
        parts=parts,
        frame=frame[[*keys, "seconds"]],
        shape=shape,
        swept=swept,
        dropped=tuple(d for d in dropped if d.rows),
    )


def bounds(op: AttentionOp, peaks: Limits, fastest: float) -> tuple[Floats, Floats]:
    """Return what no row can beat, and the roofline of bf16; seconds [n].

    Products may be in the cache's format (``fastest``, FLOP/s), whatever the row says of its
    activations, and bytes that fit into the last-level cache need not come from memory.
    """
    moved = op.bytes_moved()
    least = np.maximum(op.flops() / fastest, (moved - peaks.cache) / peaks.bandwidth)
    return least, np.maximum(op.flops() / peaks.flops, moved / peaks.bandwidth)


@cache
def limits(device: str, products: str = "bf16") -> Limits:
    """Return the peaks of a catalog device for products in one format."""
    return load_device(device).limits(products)
