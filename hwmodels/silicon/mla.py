"""Measured tables of multi-head latent attention: the kernel alone, absorbed or expanded.

Decode is absorbed everywhere: all heads share one latent of 512 and a rotary part of 64. Prefill
is expanded (keys 192, values 128 wide, a pair for each head), but for SGLang on GPUs before
Blackwell, whose rows were measured absorbed. Tables of whole modules (projections and attention)
are no kernel and are not read.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from hwmodels.ops import AttentionDecode, AttentionPrefill
from hwmodels.silicon.attention import (
    FORMATS,
    PHASES,
    AttentionOp,
    Geometry,
    MakeOp,
    Phase,
    causal_pairs,
    make_table,
)
from hwmodels.silicon.table import Table
from hwmodels.silicon.wheel import ENGINES, newest, read

LATENT, ROPE, NOPE, VALUE = 512, 64, 128, 128  # DeepSeek-V3, the only model measured
SHAPE = ("num_heads",)
SWEPT = ("batch_size", "context", "step")


def mla_tables(device: str, engines: Sequence[str] = ENGINES) -> list[Table]:
    """Return the measured rows of the latent attention kernel.

    Parameters
    ----------
    device : str
        Catalog name of a GPU with tables.
    engines : sequence of str
        Engines whose newest tables are read; vLLM has tables of whole modules only.

    Returns
    -------
    list of Table
        One per engine, phase, kernel and format of the cache; a shape is the heads of a rank
        (the tables' ``tp_size`` follows from them and changes nothing).

    Raises
    ------
    InputError
        If the wheel is not installed or the device has no tables or no catalog entry.
    """
    tables = []
    for engine in engines:
        for phase in PHASES:
            path = newest(device, "mla", engine, f"{phase}_mla_perf")
            if path is not None:
                tables += _split(device, engine, path, phase)
    return tables


def _split(device: str, engine: str, path: Path, phase: Phase) -> list[Table]:
    frame = read(path)
    frame["context"] = frame["isl"] + frame["step"]
    tables = []
    for key, rows in frame.groupby(["kernel_source", "mla_dtype", "kv_cache_dtype"]):
        kernel, products, stored = (str(part) for part in key)
        if products not in FORMATS or stored not in FORMATS:
            continue
        absorbed = phase == "generation" or kernel in ("flash_attention", "triton")
        tables.append(
            make_table(
                rows,
                device=device,
                engine=engine,
                path=path,
                op="mla_prefill" if phase == "context" else "mla_decode",
                dtype=FORMATS[stored],
                kernel=kernel,
                shape=SHAPE,
                swept=SWEPT,
                make=_make(phase, absorbed, FORMATS[stored]),
            )
        )
    return tables


def _make(phase: Phase, absorbed: bool, stored: str) -> MakeOp:
    """Return what turns the rows of one number of heads into operations."""

    def make(rows: pd.DataFrame) -> AttentionOp:
        heads = int(rows["num_heads"].iloc[0])
        batch, queries, context = (rows[c].to_numpy() for c in ("batch_size", "isl", "context"))
        geometry: Geometry = {
            "num_heads": heads,
            "num_kv_heads": 1 if absorbed else heads,
            "head_dim": (LATENT if absorbed else NOPE) + ROPE,
            "v_head_dim": LATENT if absorbed else VALUE,
            "kv_elements": LATENT + ROPE if absorbed else heads * (NOPE + ROPE + VALUE),
            "kv_dtype": stored if absorbed else "bf16",  # expanded keys are activations
            "activation_dtype": "bf16",
            "window": 0,
        }
        if phase == "generation":
            return AttentionDecode(tokens=batch, context=batch * context, **geometry)
        pairs = batch * causal_pairs(queries, context - queries)
        return AttentionPrefill(tokens=batch * queries, pairs=pairs, **geometry)

    return make
