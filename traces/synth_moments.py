"""What the generator is fitted to: loads, and which cells are used together, token by token.

A cell is a (layer, expert) pair; D = L * E. Two cells are compared at the same token, at tokens of
a request some lags apart, and far apart in a request. Frequencies of pairs are turned into
correlations of normal scores (tetrachoric correlations; the integral over the correlation is that
of R. L. Plackett, "A reduction formula for normal multivariate integrals", Biometrika 41, 1954).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from basis.errors import InputError
from traces.counts import step_counts
from traces.routing_trace import RoutingTrace, request_order

Floats = NDArray[np.float64]
LAGS = (1, 2, 4, 8, 16, 32)
"""Tokens between two that are compared."""
FAR_LENGTH = 64
"""Tokens of a request from which its first third is compared with its last one."""
MAX_CELLS = 2048
_CHUNK_ROWS = 4096
_LAST_ANGLE, _STEPS = 1.5, 30  # of asin of a correlation: 0.997 at most
_DOUBTS = 2.0  # joint uses, expected of independent cells, that are added to those counted


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """Statistics of a trace that the generator must reproduce."""

    used: Floats
    """``[D]`` share of the tokens that use a cell."""
    latent: Floats
    """``[2 + lags, D, D]`` correlations of the scores: same token, `LAGS`, far; symmetric."""


def moments(trace: RoutingTrace) -> Moments:
    """Measure a trace.

    Raises
    ------
    InputError
        If it has too many cells, or fewer than two requests of `FAR_LENGTH` tokens.
    """
    cells = trace.num_layers * trace.meta.num_experts
    if cells > MAX_CELLS:
        raise InputError(
            f"trace of {trace.meta.model}: {trace.num_layers} layers x {trace.meta.num_experts} "
            f"experts = {cells} -- a fit compares all pairs of at most {MAX_CELLS}; keep fewer "
            "layers, or give its loads with --loads and a smaller trace with --like"
        )
    request = request_order(trace)
    order = np.lexsort((trace.position, request))
    experts, request = trace.experts[order], request[order]
    far = _far_apart(trace.select(order), request)
    near = _near(experts, request, trace.meta.num_experts)
    pairs = [(near[0][0], near[0][1], len(request)), *near[1:], far]
    latent = np.stack([_latent(joint, used, count) for joint, used, count in pairs])
    np.einsum("dd->d", latent[0])[:] = 1
    return Moments(used=near[0][1], latent=latent)


Pairs = tuple[Floats, Floats, int]
"""Of pairs of tokens: ``[D, D]`` share that uses two cells, ``[D]`` share of each, number."""


def _near(experts: NDArray[np.uint16], request: NDArray[np.int64], num_experts: int) -> list[Pairs]:
    """Compare each token ``[T, L, K]`` with itself and with later ones of its request."""
    offsets = (0, *LAGS)
    cells = experts.shape[1] * num_experts
    joint = np.zeros((len(offsets), cells, cells))
    used = np.zeros((len(offsets), cells))
    counts = np.zeros(len(offsets), np.int64)
    for start in range(0, len(experts), _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS + LAGS[-1])
        dense, owner = _dense(experts[rows], num_experts), request[rows]
        for place, lag in enumerate(offsets):
            later = dense[lag : lag + _CHUNK_ROWS]
            same = owner[: len(later)] == owner[lag : lag + len(later)]
            first = dense[: len(later)] * same[:, None]
            joint[place] += first.T @ later
            used[place] += (first.sum(axis=0) + same.astype(np.float32) @ later) / 2
            counts[place] += np.count_nonzero(same)
    return [
        ((both + both.T) / (2 * max(count, 1)), single / max(count, 1), count)
        for both, single, count in zip(joint, used, counts.tolist(), strict=True)
    ]


def _dense(experts: NDArray[np.uint16], num_experts: int) -> NDArray[np.float32]:
    """Return ``[T, D]``: 1 where a token uses a cell."""
    tokens, layers, _ = experts.shape
    dense = np.zeros((tokens, layers, num_experts), np.float32)
    np.put_along_axis(dense, experts.astype(np.int64), 1, axis=-1)
    return dense.reshape(tokens, -1)


def _far_apart(trace: RoutingTrace, request: NDArray[np.int64]) -> Pairs:
    """Compare the first third of each long request with its last one, weighted by length."""
    lengths = np.bincount(request)
    starts = np.cumsum(lengths) - lengths
    long = np.flatnonzero(lengths >= FAR_LENGTH)
    if len(long) < 2:
        raise InputError(
            f"trace of {trace.meta.model}: {len(long)} requests of at least {FAR_LENGTH} tokens -- "
            "a fit needs two to tell what stays the same within a request; record longer ones"
        )
    third = lengths[long] // 3
    parts = [
        [np.arange(at, at + size) for at, size in zip(begin, third.tolist(), strict=True)]
        for begin in (starts[long], starts[long] + lengths[long] - third)
    ]
    first, last = (
        step_counts(trace, part).reshape(len(long), -1) / third[:, None] for part in parts
    )
    weight = third / third.sum()
    joint = first.T @ (last * weight[:, None])
    return (joint + joint.T) / 2, weight @ (first + last) / 2, int(third.sum())


def _latent(joint: Floats, used: Floats, pairs: int) -> Floats:
    """Return the correlation of normal scores that are above a threshold together as often.

    Rare pairs are drawn towards independence: `_DOUBTS` expected joint uses are added.
    """
    low = 0.5 / max(pairs, 1)
    one = np.clip(used, low, 1 - low)[:, None]
    expected = one * one.T
    doubt = _DOUBTS / (expected * max(pairs, 1) + _DOUBTS)
    excess = (joint - expected) * (1 - doubt)
    rare = ndtri(one)
    return np.where(excess >= 0, 1, -1) * _angle_sine(np.abs(excess), np.sign(excess), rare)


def _angle_sine(excess: Floats, sign: Floats, threshold: Floats) -> Floats:
    """Solve for the size of the correlation that makes joint uses ``[D, D]`` exceed chance so.

    The excess is ``1 / 2 pi`` times the integral over t from 0 to asin(r) of ``exp(-(a^2 - 2 a b
    sin t + b^2) / (2 cos^2 t))``; it is followed by trapezoids until it reaches the one wanted.
    """
    squares, product = threshold**2 + threshold.T**2, threshold * threshold.T

    def density(angle: float) -> Floats:
        sine, cosine = np.sin(angle), np.cos(angle)
        return np.exp((2 * sign * product * sine - squares) / (2 * cosine**2)) / (2 * np.pi)

    found = np.full(excess.shape, _LAST_ANGLE)
    reached, before = np.zeros_like(excess), density(0.0)
    step = _LAST_ANGLE / _STEPS
    for place in range(_STEPS):
        after = density((place + 1) * step)
        area = step * (before + after) / 2
        here = (excess >= reached) & (excess < reached + area)
        part = (excess - reached) / np.maximum(area, 1e-300)
        found[here] = ((place + part) * step)[here]
        reached, before = reached + area, after
    return np.sin(found)
