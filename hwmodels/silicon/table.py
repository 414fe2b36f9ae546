"""Measured rows of one kernel as operations and seconds, and what was left out of them.

One `Table` belongs to one device, engine, version, kernel and format, the finest at which
parameters are fitted. Its rows are operations of `hwmodels.ops`, so that a fit and a price speak
of the same work; a *shape* (weights, heads, layout) is what the held-out split hashes, the
*swept* columns (tokens, context) are what the measured mode interpolates over.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hwmodels.cluster import load_device
from hwmodels.kernels.attention import AttentionKernels
from hwmodels.kernels.base import Limits, PhysicalCost
from hwmodels.ops import Floats, Op
from hwmodels.silicon.wheel import Source

HELD_OUT = 4  # one shape in so many
SLOWEST = 10.0
"""A row may take so many times its bound ..."""
GRACE = 10e-6
"""... to which launches of a call add so much, s."""


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """Rows that a rule left out."""

    rule: str
    rows: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """Measured rows of one kernel in one format."""

    source: Source
    op: str
    """The kernel's key in a processor's ``kernels``: gemm, grouped_gemm, attention_decode, ..."""
    dtype: str
    """Format key in the catalog: bf16, fp8_block, ..."""
    kernel: str
    """The engine's own name of the kernel."""
    parts: Sequence[Op]
    """Columns of operations; their rows one after another are the rows of ``frame``."""
    frame: pd.DataFrame
    """n rows: the shape's columns, the swept ones, and ``seconds``."""
    shape: tuple[str, ...]
    """Columns of ``frame`` that make a shape."""
    swept: tuple[str, ...]
    """Numeric columns of ``frame`` that vary within a shape."""
    dropped: tuple[Dropped, ...] = ()

    @property
    def seconds(self) -> Floats:
        """Measured time [n], s."""
        return self.frame["seconds"].to_numpy(dtype=np.float64)

    @property
    def held_out(self) -> NDArray[np.bool_]:
        """[n] rows of the shapes that no fit sees: a quarter, by a hash of the shape."""
        return shape_hash(self.frame, self.shape) % HELD_OUT == 0

    def features(self, cost: PhysicalCost, limits: Limits) -> dict[str, Floats]:
        """Return the features of all rows under the choices of a cost model."""
        parts = [cost.features(part, limits) for part in self.parts]
        return {name: np.concatenate([p[name] for p in parts], axis=-1) for name in parts[0]}

    def predicted(self, cost: PhysicalCost | AttentionKernels, limits: Limits) -> Floats:
        """Return the seconds [n] that a cost model says of all rows."""
        if isinstance(cost, PhysicalCost):
            return cost.time(cost.numbers(), self.features(cost, limits))
        return np.concatenate([cost.seconds(part, limits) for part in self.parts])


def limits_of(table: Table) -> Limits:
    """Return the peaks of the device whose table it is, for what its rows multiply."""
    attention = table.op.startswith(("attention", "mla"))
    dtype = table.parts[0].activation_dtype if attention else table.dtype  # type: ignore[union-attr]
    return load_device(table.source.device).limits(dtype)


def too_slow(seconds: Floats, bound: Floats, slowest: float = SLOWEST) -> NDArray[np.bool_]:
    """Return [n] which rows take so much longer than their bound that something else was timed."""
    return np.asarray(seconds > slowest * (bound + GRACE))


def shape_hash(frame: pd.DataFrame, columns: Sequence[str]) -> NDArray[np.uint64]:
    """Return a hash [n] of the named columns that does not depend on the machine or the order."""
    shapes = frame[list(columns)].drop_duplicates()  # far fewer than rows, and text is slow
    text = shapes.astype(str).agg("|".join, axis=1).to_numpy(dtype=object)
    rows = frame.groupby(list(columns), sort=False, dropna=False).ngroup().to_numpy()
    return pd.util.hash_array(text)[rows]
