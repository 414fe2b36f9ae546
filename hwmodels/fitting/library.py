"""Fit a cost model to the tables that one's own machine measured, kernel by kernel.

Any physical model with nothing but parameters (no structure to choose) is fitted on the fitted
shapes and scored on the held-out ones.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmodels.fitting.fit import fit, interval, score
from hwmodels.kernels.base import Limits, PhysicalCost
from hwmodels.kernels.library import (
    LibraryGemmCost,
    LibraryRouteCost,
    LibraryRowsCost,
    LoopedAttentionCost,
    LoopedExpertsCost,
)
from hwmodels.kernels.stream import StreamCost
from hwmodels.ops import Floats
from hwmodels.silicon.table import HELD_OUT, Table, shape_hash

MODELS: dict[str, type[PhysicalCost]] = {
    "gemm": LibraryGemmCost,
    "grouped_gemm": LoopedExpertsCost,
    "attention_decode": LoopedAttentionCost,
    "attention_prefill": LoopedAttentionCost,
    "route": LibraryRouteCost,
    "permute": LibraryRowsCost,
    "unpermute": LibraryRowsCost,
    "norm": LibraryRowsCost,
    "rope": LibraryRowsCost,
    "activation": LibraryRowsCost,
    "embedding": LibraryRowsCost,
    "stream": StreamCost,
}
"""Cost model of each kernel of the reference kernels."""


FORMATS = {"gemm", "grouped_gemm", "attention_decode", "attention_prefill", "route"}
"""Kernels that are told apart by the format they multiply in; the others move bytes."""


def fit_library(table: Table, limits: Limits, *, weights: Floats | None = None) -> PhysicalCost:
    """Fit a table's cost model.

    Parameters
    ----------
    table : Table
        Measured by the reference kernels; its ``op`` picks the model.
    limits : Limits
        Peaks and cache of the machine.
    weights : float64 array [n], optional
        Weight of each row's loss: less for what repeats badly.

    Returns
    -------
    PhysicalCost
        With errors and the 10th to 90th percentile on held-out shapes; evidence fitted.
    """
    kind = MODELS[table.op]
    values: dict[str, Any] = {p.name: p.start for p in kind.PARAMETERS}
    start = kind.model_construct(**values)
    features = table.features(start, limits)
    held_out = held_out_of(table)
    seen = {name: array[..., ~held_out] for name, array in features.items()}
    found = fit(
        kind.PARAMETERS,
        kind.time,
        seen,
        table.seconds[~held_out],
        weights=None if weights is None else weights[~held_out],
    )
    predicted, measured = kind.time(found.numbers, features)[held_out], table.seconds[held_out]
    low, high = interval(predicted, measured)
    return start.model_copy(
        update={
            **found.numbers, "low": low, "high": high, "held_out": score(predicted, measured),
            "evidence": "fitted", "kernel": table.kernel, "source": table.source.path,
        }
    )  # fmt: skip


def held_out_of(table: Table) -> NDArray[np.bool_]:
    """Return [n] rows of the shapes that no fit sees: every fourth in the order of their hashes.

    A machine measures few shapes of a kernel; by the hash alone it might hold out none of them.
    """
    _, place = np.unique(shape_hash(table.frame, table.shape), return_inverse=True)
    return np.asarray(place % HELD_OUT == 0)
