"""Fit the cost of expert layers on a measured table, and say how it does on unseen shapes."""

from typing import Any

import numpy as np

from hwmodels.figures import HeldOut
from hwmodels.fitting.fit import fit, interval, score
from hwmodels.kernels.base import Limits
from hwmodels.kernels.grouped_gemm import GroupedGemmCost
from hwmodels.ops import Floats
from hwmodels.silicon.table import Table

HEIGHTS: tuple[tuple[int, ...], ...] = ((16, 64, 128), (128,))
"""Tile heights of an engine that tunes them, and of one that does not."""
_ROWS = 4000  # rows of a table that the fit sees


def fit_moe(table: Table, limits: Limits) -> GroupedGemmCost:
    """Fit the parameters on the fitted shapes of one table.

    Parameters
    ----------
    table : Table
        Rows of one engine's kernel in one format.
    limits : Limits
        Peaks of the device, in the format that is multiplied.

    Returns
    -------
    GroupedGemmCost
        With the tile heights that leave the smaller error on the *fitted* rows, the interval and
        the errors on the held-out ones. Without held-out rows ``held_out`` is None and the
        interval is that of the fitted rows.
    """
    held, seconds = table.held_out, table.seconds
    if not (~held).any():
        held = np.zeros_like(held)
    shown = np.flatnonzero(~held)
    if len(shown) > _ROWS:
        shown = np.sort(np.random.default_rng(0).choice(shown, _ROWS, replace=False))
    best: tuple[float, GroupedGemmCost, dict[str, Floats]] | None = None
    for heights in HEIGHTS:
        choice = _with({p.name: p.start for p in GroupedGemmCost.PARAMETERS}, heights)
        features = table.features(choice, limits)
        found = fit(
            choice.PARAMETERS, choice.time, _rows(features, shown), seconds[shown],
            starts=2, evaluations=120,
        )  # fmt: skip
        if best is None or found.loss < best[0]:
            best = found.loss, _with(found.numbers, heights), features
    assert best is not None
    _, cost, features = best
    scored = np.flatnonzero(held) if held.any() else shown
    predicted = cost.time(cost.numbers(), _rows(features, scored))
    low, high = interval(predicted, seconds[scored])
    errors: HeldOut | None = score(predicted, seconds[scored]) if held.any() else None
    return cost.model_copy(
        update={"low": low, "high": high, "held_out": errors, "evidence": "fitted"}
    )


def _rows(features: dict[str, Floats], rows: np.ndarray) -> dict[str, Floats]:
    return {name: values[..., rows] for name, values in features.items()}


def _with(numbers: dict[str, float], heights: tuple[int, ...]) -> GroupedGemmCost:
    """Return a cost of numbers that are in SI already: nothing is read from text."""
    values: dict[str, Any] = dict(numbers)
    return GroupedGemmCost.model_construct(**values, tile_rows=heights)
