"""Measured tables of fused expert layers: permutation, both products, activation, weighted sum.

Each row times one rank in a CUDA graph that repeats the same call, so weights that fit into the
last-level cache are read from there. All ranks' tokens are shown to the rank, and its gate's
top-k is timed with it. Loads are not stored in the tables: they are made again as their authors
made them, see `hwmodels.silicon.loads`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from basis.dtypes import slice_width
from hwmodels.cluster import load_device
from hwmodels.kernels.base import Limits, PhysicalCost
from hwmodels.ops import Floats, GroupedGemm
from hwmodels.silicon.loads import Counts, rank_loads
from hwmodels.silicon.moe_rules import (
    GROUPED_KERNEL,
    geometry,
    known_loads,
    unbelievable,
    untuned,
)
from hwmodels.silicon.table import Dropped, Table
from hwmodels.silicon.wheel import ENGINES, read, source, versions

FORMATS = {
    "bfloat16": "bf16",
    "fp8": "fp8",
    "fp8_block": "fp8_block",
    "nvfp4": "nvfp4",
    "w4a16_mxfp4": "mxfp4",
    "w4a8_mxfp4_mxfp8": "mxfp4_mxfp8",
    "int4_wo": "int4",
}
"""Format keys by the tables' names; others are left out."""
SHAPE = ("hidden_size", "inter_size", "num_experts", "topk", "moe_tp_size", "moe_ep_size")
SWEPT = ("num_tokens",)
KEYS = [*SHAPE, "distribution", *SWEPT]
UNGATED = ((1024, 2688, 512, 22), (2048, 5120, 512, 22), (2688, 1856, 128, 6),
           (4096, 2688, 512, 22), (8192, 5120, 512, 22))  # fmt: skip
"""Nemotron's experts have no gate matrix: hidden, inner width, experts, k."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MoeTable(Table):
    """A table whose rows average several draws of their loads; ``parts`` hold the first."""

    more: Sequence[Sequence[GroupedGemm]] = ()
    """Further draws of each part."""

    def features(self, cost: PhysicalCost, limits: Limits) -> dict[str, Floats]:
        """Return the features of all rows, the mean over the draws."""
        parts = []
        for first, others in zip(self.parts, self.more, strict=True):
            draws = [cost.features(op, limits) for op in (first, *others)]
            parts.append({k: np.mean([d[k] for d in draws], axis=0) for k in draws[0]})
        return {name: np.concatenate([p[name] for p in parts], axis=-1) for name in parts[0]}


def moe_tables(device: str, engines: Sequence[str] = ENGINES) -> list[Table]:
    """Return the measured rows of expert layers.

    Parameters
    ----------
    device : str
        Catalog name of a GPU with tables.
    engines : sequence of str
        Engines that are read; those without tables are passed over.

    Returns
    -------
    list of Table
        One per engine, format and kernel, of the newest version with rows of that format (the
        kernels named for ungated experts apart). ``frame`` holds `SHAPE`, ``num_tokens`` of all
        ranks together, ``distribution`` (balanced, power_law_1.01, power_law_1.2) and
        ``seconds``.

    Raises
    ------
    InputError
        If the wheel is not installed or the device has no tables or no catalog entry.
    """
    tables: list[Table] = []
    for engine in engines:
        taken: set[tuple[str, bool]] = set()
        for path in reversed(versions(device, "moe", engine, "moe_perf")):
            rows = read(path)
            rows["dtype"] = rows["moe_dtype"].map(FORMATS)
            ungated = rows["kernel_source"].str.contains("nongated")
            held = list(zip(rows["dtype"], ungated, strict=True))
            new = np.array([pair not in taken for pair in held], dtype=bool)
            taken |= set(held)
            for (dtype, kernel), group in rows[new].groupby(["dtype", "kernel_source"]):
                known, unknown = known_loads(group, engine, path.parent.name)
                parts, more, frame, dropped = _built(
                    known,
                    str(dtype),
                    load_device(device).limits(str(dtype)),
                    grouped=GROUPED_KERNEL in str(kernel),
                )
                if not parts:
                    continue
                tables.append(
                    MoeTable(
                        source=source(device, engine, path), op="grouped_gemm", dtype=str(dtype),
                        kernel=str(kernel), parts=parts, more=more, frame=frame, shape=SHAPE,
                        swept=SWEPT, dropped=tuple(d for d in (*unknown, *dropped) if d.rows),
                    )
                )  # fmt: skip
    return tables


Built = tuple[list[GroupedGemm], list[list[GroupedGemm]], pd.DataFrame, list[Dropped]]


def _built(rows: pd.DataFrame, dtype: str, limits: Limits, *, grouped: bool) -> Built:
    """Return the operations of all rows, one part for each geometry, and what was left out."""
    valid = rows[rows["latency"] > 0]
    once = valid.groupby(KEYS, as_index=False)[["latency"]].median()
    once["seconds"] = once["latency"] * 1e-3
    slower, beside = untuned(once)
    tuned = once.loc[~slower & ~beside]
    balanced = (tuned["distribution"] == "balanced").to_numpy()
    parts, more, frames = [], [], []
    fast = late = 0
    for place in tuned.groupby([*SHAPE, balanced]).indices.values():
        group = tuned.take(np.asarray(place))
        draws = _draws(group, dtype, grouped=grouped)
        beats, slow = unbelievable(group["seconds"].to_numpy(), draws, limits)
        fast, late = fast + int(beats.sum()), late + int(slow.sum())
        if beats.any() or slow.any():
            group = group[~beats & ~slow]
            draws = _draws(group, dtype, grouped=grouped) if len(group) else []
        if draws:
            parts.append(draws[0])
            more.append(draws[1:])
            frames.append(group)
    frame = pd.concat(frames, ignore_index=True) if frames else tuned.iloc[:0]
    return (
        parts,
        more,
        frame[[*KEYS, "seconds"]],
        [
            Dropped(rule="no measurement", rows=len(rows) - len(valid)),
            Dropped(rule="measured more than once", rows=len(valid) - len(once)),
            Dropped(rule="over twice a larger call's time", rows=int(slower.sum())),
            Dropped(rule="of a run with over a tenth of such rows", rows=int(beside.sum())),
            Dropped(rule="beats the peaks", rows=fast),
            Dropped(rule="over ten times its bound", rows=late),
        ],
    )


def _width(row: "pd.Series[Any]", dtype: str) -> int:
    """Return the width of a rank's experts; loaders pad slices of mxfp4 to whole blocks."""
    width, slices = int(row["inter_size"]), int(row["moe_tp_size"])
    padded = dtype if dtype.startswith("mxfp4") else "bf16"
    return max(slice_width(padded, width, slices), 1)


def _draws(group: pd.DataFrame, dtype: str, *, grouped: bool) -> list[GroupedGemm]:
    """Return one column of operations for each draw of the loads; rows of one geometry."""
    first = group.iloc[0]
    counts: list[Counts] = [
        rank_loads(int(t), int(k), int(e), int(r), str(d), grouped)
        for t, k, e, r, d in zip(
            group["num_tokens"], group["topk"], group["num_experts"], group["moe_ep_size"],
            group["distribution"], strict=True,
        )
    ]  # fmt: skip
    return [
        GroupedGemm(
            tokens_per_expert=np.stack([c[draw] for c in counts]),
            hidden=int(first["hidden_size"]),
            width=_width(first, dtype),
            gated=geometry(group.iloc[:1])[0] not in UNGATED,
            weight_dtype=dtype,
            activation_dtype="fp8" if dtype == "mxfp4_mxfp8" else "bf16",
            tokens=group["num_tokens"].to_numpy(),
        )
        for draw in range(len(counts[0]))
    ]
