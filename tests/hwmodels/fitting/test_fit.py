"""The generic fit against rows that known parameters made."""

import numpy as np
import pytest

from hwmodels.fitting.fit import fit, interval, score
from hwmodels.kernels.base import Features, Numbers, Parameter
from hwmodels.ops import Floats

LINE = (
    Parameter(name="fixed", low=1e-7, high=1e-3, start=1e-5),
    Parameter(name="rate", low=1e9, high=1e13, start=1e11),
    Parameter(name="share", low=0.0, high=1.0, start=0.9, scale="linear"),
)


def _time(numbers: Numbers, features: Features) -> Floats:
    moved = features["bytes"] * (1 + numbers["share"] * features["extra"])
    return numbers["fixed"] + moved / numbers["rate"]


def _features(rows: int = 400) -> Features:
    rng = np.random.default_rng(0)
    return {"bytes": 10 ** rng.uniform(3, 9, rows), "extra": rng.integers(0, 2, rows).astype(float)}


TRUE = {"fixed": 4e-6, "rate": 2.5e12, "share": 0.3}


def test_known_parameters_are_found() -> None:
    features = _features()
    found = fit(LINE, _time, features, _time(TRUE, features))
    assert found.loss < 1e-4
    assert found.numbers == pytest.approx(TRUE, rel=1e-2)


def test_a_few_wild_rows_do_not_decide() -> None:
    features = _features()
    measured = _time(TRUE, features)
    measured[:20] *= 10
    found = fit(LINE, _time, features, measured)
    assert found.numbers["rate"] == pytest.approx(TRUE["rate"], rel=0.05)
    assert found.numbers["fixed"] == pytest.approx(TRUE["fixed"], rel=0.05)


def test_weights_say_which_rows_count() -> None:
    features = _features()
    measured = _time(TRUE, features)
    measured[200:] *= 2
    weights = np.where(np.arange(400) < 200, 1.0, 1e-9)
    found = fit(LINE, _time, features, measured, weights=weights)
    assert found.numbers["rate"] == pytest.approx(TRUE["rate"], rel=0.02)


def test_parameters_stay_inside_their_bounds() -> None:
    features = _features()
    found = fit(LINE, _time, features, _time({**TRUE, "fixed": 1e-2}, features))
    for parameter in LINE:
        assert parameter.low <= found.numbers[parameter.name] <= parameter.high


def test_scores_and_intervals() -> None:
    predicted, measured = np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 2.0])
    errors = score(predicted, measured)
    assert (errors.median, errors.mean, errors.rows) == (0.5, pytest.approx(1 / 3), 3)
    low, high = interval(np.ones(11), np.arange(11) / 5)
    assert (low, high) == pytest.approx((0.2, 1.8))
    assert interval(np.ones(3), np.full(3, 1.5))[0] == 1.0
