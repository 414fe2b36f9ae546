"""Fit the dense product's cost model on one table: structure on some shapes, numbers on all.

How an engine picks its tiles is seen from a part of the fitted shapes, by hash; then the numbers
are fitted on all of them. The held-out shapes only score.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from basis import DTYPES, InputError
from hwmodels.fitting.fit import fit, interval, score
from hwmodels.kernels.base import Features, Limits
from hwmodels.kernels.gemm import GemmCost
from hwmodels.silicon.gemm import HOST_TIMED, copies_of
from hwmodels.silicon.table import HELD_OUT, Table, shape_hash

LEAST_SHAPES = 20
"""Fitted shapes below which nothing is fitted."""
ROWS = 6000
"""Rows that the numbers are fitted on, drawn at random from the fitted shapes."""
_TRIAL_ROWS = 1500
_BETTER = 0.95  # of the error, that two parameters for the cache must reach
Choice = dict[str, Any]
Rows = NDArray[np.int64]
Mask = NDArray[np.bool_]
_CHOICES: tuple[Choice, ...] = (
    {"tiles": "fastest", "split_k": False},
    {"tiles": "fastest", "split_k": True},
    {"tiles": "by_rows", "split_k": False},
)


def fit_gemm(table: Table, limits: Limits) -> GemmCost:
    """Fit a table's cost model and score it on the shapes held out.

    Parameters
    ----------
    table : Table
        Measured products of one device, engine, format and kernel.
    limits : Limits
        Peaks of this device for this format.

    Returns
    -------
    GemmCost
        With errors and the 10th to 90th percentile on held-out shapes; evidence fitted.

    Raises
    ------
    InputError
        With fewer shapes than `LEAST_SHAPES` to fit, with none to score on, or from rows timed
        without a CUDA graph, which do not show what a call costs beyond its work.
    """
    held_out = table.held_out
    inner = shape_hash(table.frame, table.shape) // HELD_OUT % HELD_OUT == 0
    _check(table, held_out, inner)
    rng = np.random.default_rng(0)
    trial = (
        _some(~held_out & ~inner, _TRIAL_ROWS, rng),
        _some(~held_out & inner, _TRIAL_ROWS, rng),
    )
    errors = {n: _trial(table, limits, choice, trial) for n, choice in enumerate(_CHOICES)}
    best = min(errors, key=lambda n: errors[n])
    choice = _CHOICES[best]
    warm = {**choice, "copies": copies_of(table)}
    if limits.cache and _trial(table, limits, warm, trial) < _BETTER * errors[best]:
        choice = warm
    features = table.features(_unfitted(choice), limits)
    rows = _some(~held_out, ROWS, rng)
    numbers = _numbers(choice, table, features, rows, starts=3, evaluations=150)
    predicted = GemmCost.time(numbers, _at(features, np.flatnonzero(held_out)))
    measured = table.seconds[held_out]
    low, high = interval(predicted, measured)
    return _unfitted(choice).model_copy(
        update={
            **numbers, "low": low, "high": high, "held_out": score(predicted, measured),
            "evidence": "fitted", "kernel": table.kernel, "source": table.source.path,
        }
    )  # fmt: skip


def _check(table: Table, held_out: Mask, inner: Mask) -> None:
    """Refuse a table that cannot be fitted and scored."""
    name = f"{table.source.path} ({table.dtype}, {table.kernel})"
    if (table.source.engine, table.dtype) in HOST_TIMED:
        raise InputError(
            f"{name}: timed without a CUDA graph -- a fit needs short calls too -- take the fit of "
            "another engine that runs the same kernels"
        )
    shapes = len(table.frame.loc[~held_out, list(table.shape)].drop_duplicates())
    if shapes < LEAST_SHAPES or not held_out.any() or not (inner & ~held_out).any():
        raise InputError(
            f"{name}: {shapes} shapes to fit and {held_out.sum()} rows to score -- at least "
            f"{LEAST_SHAPES} shapes and one row -- leave this kernel out"
        )


def _trial(table: Table, limits: Limits, choice: Choice, rows: tuple[Rows, Rows]) -> float:
    """Fit a structure on some rows; return the mean |log error| on others."""
    features = table.features(_unfitted(choice), limits)
    numbers = _numbers(choice, table, features, rows[0], starts=1, evaluations=60)
    predicted = GemmCost.time(numbers, _at(features, rows[1]))
    return float(np.abs(np.log(predicted / table.seconds[rows[1]])).mean())


def _unfitted(choice: Choice) -> GemmCost:
    """Return a model of this structure at the parameters' starts."""
    values: dict[str, Any] = {p.name: p.start for p in GemmCost.PARAMETERS}
    return GemmCost.model_construct(**choice, **values)


def _numbers(
    choice: Choice, table: Table, features: Features, rows: Rows, *, starts: int, evaluations: int
) -> dict[str, float]:
    """Fit the parameters that the structure has; the others stay without effect."""
    absent: dict[str, float] = {} if choice["split_k"] else {"split": 0.0}
    if DTYPES[table.dtype].compute == "bf16":
        absent |= {"quantise": 0.0, "quantise_row": 0.0}
    if "copies" not in choice:
        absent |= {"kept": 0.0, "cache_speed": 1.0}
    found = fit(
        [p for p in GemmCost.PARAMETERS if p.name not in absent],
        lambda numbers, given: GemmCost.time({**numbers, **absent}, given),
        _at(features, rows),
        table.seconds[rows],
        starts=starts,
        evaluations=evaluations,
    )
    return found.numbers | absent


def _some(mask: Mask, most: int, rng: np.random.Generator) -> Rows:
    """Return the rows of a mask, at most so many, drawn at random."""
    return np.sort(rng.permutation(np.flatnonzero(mask))[:most])


def _at(features: Features, rows: Rows) -> Features:
    return {name: array[..., rows] for name, array in features.items()}
