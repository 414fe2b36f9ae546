"""Drawn arrivals against the distributions that they are said to have."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from basis.errors import InputError
from traces.arrivals import Arrivals, Lengths, deterministic, gamma, poisson

ONE = Lengths.fixed(1, 1)
COUNT = 20_000


def _gaps(arrivals: Arrivals) -> NDArray[np.float64]:
    return np.diff(arrivals.seconds, prepend=0.0)


def test_poisson_has_exponential_gaps_and_drawn_pairs() -> None:
    lengths = Lengths(inputs=np.array([1, 2, 3]), outputs=np.array([10, 20, 30]))
    arrivals = poisson(4.0, COUNT, lengths, seed=0)
    gaps = np.diff(arrivals.seconds)
    assert arrivals.rate == pytest.approx(4.0, rel=0.03)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.03)  # exponential: equal
    assert (arrivals.outputs == 10 * arrivals.inputs).all()
    assert np.bincount(arrivals.inputs)[1:] / COUNT == pytest.approx([1 / 3] * 3, abs=0.02)
    again = poisson(4.0, COUNT, lengths, seed=0)
    assert (again.seconds == arrivals.seconds).all()
    assert (poisson(4.0, COUNT, lengths, seed=1).seconds != arrivals.seconds).any()


@pytest.mark.parametrize("cv", [0.1, 0.5, 1.0, 2.0, 3.0])
def test_gamma_gaps_have_the_mean_and_the_variation_asked_for(cv: float) -> None:
    """Tolerances: 4 standard errors; that of a variance from the kurtosis 3 + 6 cv^2."""
    gaps = _gaps(gamma(8.0, cv, COUNT, ONE, seed=5))
    of_mean = cv / COUNT**0.5
    assert gaps.mean() == pytest.approx(1 / 8, rel=4 * of_mean)
    of_deviation = ((2 + 6 * cv**2) / COUNT) ** 0.5 / 2
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=4 * (of_mean + of_deviation))


@pytest.mark.parametrize("cv", [0.5, 1.0, 2.0])
def test_gamma_gaps_are_gamma_distributed(cv: float) -> None:
    """Kolmogorov-Smirnov against the distribution of scipy, and against one that it is not."""
    gaps = _gaps(gamma(3.0, cv, COUNT, ONE, seed=1))
    wanted = stats.gamma(a=1 / cv**2, scale=cv**2 / 3)
    assert stats.kstest(gaps, wanted.cdf).pvalue > 0.01
    other = stats.gamma(a=1 / (1.1 * cv) ** 2, scale=(1.1 * cv) ** 2 / 3)
    assert stats.kstest(gaps, other.cdf).pvalue < 1e-6


def test_without_extra_variation_gamma_is_poisson() -> None:
    gaps = _gaps(gamma(3.0, 1.0, COUNT, ONE, seed=2))
    assert stats.kstest(gaps * 3, "expon").pvalue > 0.01
    drawn = _gaps(poisson(3.0, COUNT, ONE, seed=3))
    assert stats.ks_2samp(gaps, drawn).pvalue > 0.01


def test_deterministic_arrivals_come_evenly() -> None:
    arrivals = deterministic(4.0, 9, Lengths.fixed(7, 3), seed=0)
    np.testing.assert_allclose(arrivals.seconds, [0.25 * i for i in range(1, 10)])
    assert arrivals.rate == pytest.approx(4.0)
    assert arrivals.inputs.tolist() == [7] * 9
    nearly = gamma(4.0, 1e-3, 9, Lengths.fixed(7, 3), seed=0)
    np.testing.assert_allclose(nearly.seconds, arrivals.seconds, rtol=0.01)


@settings(deadline=None, max_examples=30)
@given(
    rate=st.floats(1e-3, 1e6), cv=st.floats(1e-3, 100.0), count=st.integers(1, 50),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_rate_and_variation_gives_arrivals_in_order(
    rate: float, cv: float, count: int, seed: int
) -> None:
    lengths = Lengths(inputs=np.array([5, 9]), outputs=np.array([2, 4]))
    drawn = gamma(rate, cv, count, lengths, seed)
    assert len(drawn) == count  # Arrivals itself refuses disorder
    assert {*zip(drawn.inputs.tolist(), drawn.outputs.tolist(), strict=True)} <= {(5, 2), (9, 4)}
    same = poisson(rate, count, lengths, seed)
    assert drawn.inputs.tolist() == same.inputs.tolist()  # lengths do not depend on the times


def test_sources_say_what_was_drawn() -> None:
    lengths = Lengths(inputs=np.array([5, 9]), outputs=np.array([2, 4]), source="conv.csv")
    said = gamma(2.0, 1.5, 3, lengths, seed=7).source
    assert said == (
        "gamma gaps with a coefficient of variation of 1.5, 2 requests/s, lengths drawn from "
        "2 pair(s) of conv.csv, seed 7"
    )
    assert deterministic(2.0, 3, ONE, 0).source.startswith("evenly spaced, 2 requests/s")
    assert poisson(2.0, 3, ONE, 0).source == (
        "Poisson, 2 requests/s, lengths drawn from 1 pair(s), seed 0"
    )


def test_impossible_draws() -> None:
    for draw in (poisson, deterministic):
        with pytest.raises(InputError, match="positive"):
            draw(0.0, 1, ONE, 0)
        with pytest.raises(InputError, match="at least 1"):
            draw(1.0, 0, ONE, 0)
    for cv in (0.0, -1.0, 101.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"0.001 to 100 for gamma"):
            gamma(1.0, cv, 1, ONE, 0)
