"""Arrivals drawn from a distribution: times in seconds at a rate, lengths from given pairs.

The gaps between requests are independent and gamma distributed. Their coefficient of variation
(standard deviation over mean) says how bursty they are: 0 is one request after another evenly, 1
the exponential gaps of a Poisson process, more than 1 comes in bursts with pauses between.
"""

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from traces.arrivals.checks import check_count, check_rate
from traces.arrivals.requests import Arrivals, Lengths

Floats = NDArray[np.float64]
_LEAST_CV, _MOST_CV = 1e-3, 100.0  # beyond, gaps are all equal or nearly all zero


def poisson(rate: float, count: int, lengths: Lengths, seed: int) -> Arrivals:
    """Draw arrivals with independent exponential gaps, and lengths with replacement.

    Parameters
    ----------
    rate : float
        Requests per second.
    count : int
        Number of requests.
    lengths : Lengths
        Pairs to draw from.
    seed : int
        Of ``numpy.random.default_rng``.

    Raises
    ------
    InputError
        If rate or count is not positive.
    """
    _check(rate, count)
    gaps = _clock(seed).exponential(1 / rate, count)
    return _arrivals(np.cumsum(gaps), lengths, seed, f"Poisson, {rate:g} requests/s")


def gamma(rate: float, cv: float, count: int, lengths: Lengths, seed: int) -> Arrivals:
    """Draw arrivals with independent gamma gaps, and lengths with replacement.

    A gamma distribution of shape ``1 / cv**2`` and mean ``1 / rate`` has the coefficient of
    variation ``cv``; with ``cv`` 1 it is the exponential distribution. vLLM's
    benchmark calls the shape burstiness (``vllm bench serve --burstiness``).

    Parameters
    ----------
    rate : float
        Requests per second.
    cv : float
        Standard deviation of the gaps over their mean, 0.001 to 100.
    count, lengths, seed
        As for `poisson`.

    Raises
    ------
    InputError
        If rate or count is not positive, or ``cv`` is out of range.
    """
    _check(rate, count)
    if not _LEAST_CV <= cv <= _MOST_CV:
        raise InputError(
            f"cv {cv} -- {_LEAST_CV:g} to {_MOST_CV:g} for gamma gaps; 0 is deterministic(...)"
        )
    shape = cv**-2
    gaps = _clock(seed).gamma(shape, 1 / (rate * shape), count)
    said = f"gamma gaps with a coefficient of variation of {cv:g}, {rate:g} requests/s"
    return _arrivals(np.cumsum(gaps), lengths, seed, said)


def deterministic(rate: float, count: int, lengths: Lengths, seed: int) -> Arrivals:
    """Let requests come evenly, the first after one gap; lengths are drawn with replacement.

    Parameters
    ----------
    rate, count, lengths, seed
        As for `poisson`; the seed is that of the lengths.

    Raises
    ------
    InputError
        If rate or count is not positive.
    """
    _check(rate, count)
    times = np.arange(1, count + 1) / rate
    return _arrivals(times, lengths, seed, f"evenly spaced, {rate:g} requests/s")


def _check(rate: float, count: int) -> None:
    check_rate(rate)
    check_count(count)


def _clock(seed: int) -> np.random.Generator:
    """Return the generator of times; lengths are drawn from another."""
    return np.random.default_rng([seed, 1])


def _arrivals(seconds: Floats, lengths: Lengths, seed: int, times: str) -> Arrivals:
    drawn = lengths.draw(len(seconds), seed)
    return Arrivals(
        seconds=seconds,
        inputs=drawn.inputs,
        outputs=drawn.outputs,
        source=f"{times}, lengths drawn from {lengths.statement}, seed {seed}",
    )
