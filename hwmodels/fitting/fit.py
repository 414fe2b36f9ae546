"""Fit a physical cost model: the parameters that make log(predicted / measured) small.

Bounded nonlinear least squares with a soft absolute loss, from a few starts, on features that
are computed once. What is minimised is close to the mean absolute relative error, and does not
let a few wild rows decide.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

from hwmodels.figures import HeldOut
from hwmodels.kernels.base import Features, Numbers, Parameter
from hwmodels.ops import Floats

_SOFT = 0.03  # |log error| at which the loss turns from square to absolute
_WORST = 50.0  # |log error| of a prediction that is no number


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Fitted parameters with the mean |log error| that they leave on the rows fitted."""

    numbers: dict[str, float]
    loss: float


def fit(
    parameters: Sequence[Parameter],
    time: Callable[[Numbers, Features], Floats],
    features: Features,
    measured: Floats,
    *,
    weights: Floats | None = None,
    starts: int = 3,
    seed: int = 0,
    evaluations: int = 400,
) -> Fit:
    """Fit parameters on measured rows.

    Parameters
    ----------
    parameters : sequence of Parameter
        Bounds and starts.
    time : callable
        Seconds [n] of parameters by name and features.
    features : dict of ndarray
        Of the rows fitted.
    measured : ndarray [n]
        Seconds.
    weights : ndarray [n], optional
        Weight of each row's loss.
    starts : int
        The stated start, then random ones between it and the bounds.
    seed : int
        Of the random starts.
    evaluations : int
        Most evaluations of a start, not counting those for derivatives.

    Returns
    -------
    Fit
        The best of the starts.
    """
    low, high, start = (
        np.array([_inner(p, getattr(p, name)) for p in parameters])
        for name in ("low", "high", "start")
    )
    target = np.log(measured)
    scale = 1.0 if weights is None else np.sqrt(weights / weights.mean())

    def errors(x: Floats) -> Floats:
        seconds = time(_named(parameters, x), features)
        with np.errstate(divide="ignore", invalid="ignore"):
            error = np.log(seconds) - target
        return scale * np.nan_to_num(error, nan=_WORST, posinf=_WORST, neginf=-_WORST)

    rng = np.random.default_rng(seed)
    best: Fit | None = None
    for number in range(starts):
        pull = 0.0 if number == 0 else 0.6 * rng.random(len(start))
        begin = start + pull * (rng.uniform(low, high) - start)
        begin = np.clip(begin, low + 1e-9 * (high - low), high - 1e-9 * (high - low))
        found = least_squares(
            errors, begin, bounds=(low, high), loss="soft_l1", f_scale=_SOFT,
            x_scale=np.maximum(high - low, 1e-12), max_nfev=evaluations,
        )  # fmt: skip
        loss = float(np.abs(errors(found.x)).mean())
        if best is None or loss < best.loss:
            best = Fit(numbers=_named(parameters, found.x), loss=loss)
    assert best is not None
    return best


def score(predicted: Floats, measured: Floats) -> HeldOut:
    """Return median and mean of |predicted / measured - 1|."""
    error = np.abs(predicted / measured - 1)
    return HeldOut(median=float(np.median(error)), mean=float(error.mean()), rows=len(error))


def interval(predicted: Floats, measured: Floats) -> tuple[float, float]:
    """Return the 10th and 90th percentile of measured / predicted, 1 included."""
    low, high = np.percentile(measured / predicted, [10, 90])
    return float(min(low, 1.0)), float(max(high, 1.0))


def _inner(parameter: Parameter, value: float) -> float:
    return float(np.log(value)) if parameter.scale == "log" else value


def _named(parameters: Sequence[Parameter], x: Floats) -> dict[str, float]:
    return {
        p.name: float(np.exp(v)) if p.scale == "log" else float(v)
        for p, v in zip(parameters, x, strict=True)
    }
