"""What the generator is fitted to: loads, and which cells are used together, token by token.

A cell is a (layer, expert) pair; D = L * E. The first tokens of requests are for themselves: they
are often a template. After them, two cells are compared at the same token, at tokens of
a request some lags apart, and far apart in a request. How much more often they are used together
than the kinds of the tokens explain is turned into a correlation of normal scores (tetrachoric
correlation, by the series of K. Pearson, Phil. Trans. R. Soc. A 195, 1900; here a mixture over the
kinds).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import vq
from scipy.special import ndtri

from basis.errors import InputError
from traces.counts import step_counts
from traces.routing_trace import RoutingTrace, request_order
from traces.synth_kinds import Kinds
from traces.synth_kinds_fit import (
    FAR_LENGTH,
    Thirds,
    cluster,
    fit_kinds,
    pairs_of_kinds,
    sample_rows,
)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
LAGS = (1, 2, 4, 8, 16, 32)
"""Tokens between two that are compared."""
MAX_CELLS = 2048
_CHUNK_ROWS = 4096
_ORDERS = 60  # of the series
_LAST, _STEPS = 0.96, 16  # the largest correlation, and how many are tried; between them, linear
_BLOCK = 64  # cells that are compared with all others at a time
_DOUBTS = 2.0  # joint uses, expected of independent cells, that are added to those counted
_DOUBTFUL_TOKENS = 4.0  # of the average kind, that are added to those of each
_OPENING = 16  # first tokens of a request that are much the same in all: a template
_LEAST_OPENINGS = 64  # requests
_RAREST = 1e-5  # share of a kind's tokens; rarer cells are taken to be as rare


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """Statistics of a trace that the generator must reproduce."""

    kinds: Kinds
    used: Floats
    """``[M, D]`` share of a kind's tokens that use a cell."""
    opening: Floats
    """``[P, D]`` the same of the first P tokens of requests, whatever their kind; all the rest is
    about the tokens after them."""
    latent: Floats
    """``[2 + lags, D, D]`` correlations of the scores, given the kinds: same token, `LAGS`, far;
    symmetric."""


def moments(trace: RoutingTrace, num_kinds: int, *, seed: int = 0) -> Moments:
    """Measure a trace.

    Parameters
    ----------
    num_kinds : int
        M, at most.
    seed : int
        Of the clusters.

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
    trace, request = trace.select(order), request[order]
    opening, body = _opening(trace, request)
    trace, request = trace.select(body), request[body]
    far = _far_apart(trace, request)
    near = _near(trace.experts, request, trace.meta.num_experts)
    kind, used = _kinds(trace, num_kinds, seed)
    kinds = fit_kinds(kind, request, seed=seed)
    overall = near[0][0].diagonal()
    used = _smoothed(used, np.bincount(kind), overall)
    between = pairs_of_kinds(kinds, LAGS, seed=seed)
    latent = np.stack(
        [
            _latent(joint, used, pairs, count)
            for (joint, count), pairs in zip([*near, far], between, strict=True)
        ]
    )
    np.einsum("dd->d", latent[0])[:] = 1
    return Moments(kinds=kinds, used=used, opening=opening, latent=latent)


def _opening(trace: RoutingTrace, request: Ints) -> tuple[Floats, NDArray[np.bool_]]:
    """Return the shares ``[P, D]`` of uses at each of the first P tokens, and which rows follow.

    P is 0 where too few requests are long enough to tell.
    """
    lengths = np.bincount(request)
    place = np.arange(len(request)) - (np.cumsum(lengths) - lengths)[request]
    enough = np.count_nonzero(lengths >= _OPENING + FAR_LENGTH) >= _LEAST_OPENINGS
    first = [np.flatnonzero(place == at) for at in range(_OPENING if enough else 0)]
    cells = trace.num_layers * trace.meta.num_experts
    uses = step_counts(trace, first).reshape(len(first), cells) if enough else np.empty((0, cells))
    tokens = np.array([len(rows) for rows in first])[:, None]
    shares = uses / np.maximum(tokens, 1)
    return np.clip(shares, 0, 1 - 0.5 / np.maximum(tokens, 1)), place >= len(first)


def _kinds(trace: RoutingTrace, count: int, seed: int) -> tuple[Ints, Floats]:
    """Return the kind of each token ``[T]``, and the uses of cells by kinds ``[M, D]``."""
    experts = trace.meta.num_experts
    rows = sample_rows(trace.num_tokens, seed)
    centres = cluster(_dense(trace.experts[rows], experts), count, seed)
    found, used = np.empty(trace.num_tokens, np.int64), np.zeros(centres.shape)
    for start in range(0, trace.num_tokens, _CHUNK_ROWS):
        chunk = slice(start, start + _CHUNK_ROWS)
        dense = _dense(trace.experts[chunk], experts)
        found[chunk] = vq(dense, centres)[0]
        used += np.eye(len(centres), dtype=np.float32)[found[chunk]].T @ dense
    return found, used


def _smoothed(used: Floats, tokens: Ints, overall: Floats) -> Floats:
    """Return shares ``[M, D]`` of uses, drawn to those of all tokens, whose mean they keep."""
    kinds = (used + _DOUBTFUL_TOKENS * overall) / (tokens + _DOUBTFUL_TOKENS)[:, None]
    mean = tokens / tokens.sum() @ kinds
    kinds *= overall / np.maximum(mean, 1e-12)
    return np.minimum(kinds, 1 - 0.5 / tokens[:, None])


Pairs = tuple[Floats, int]
"""Of pairs of tokens: ``[D, D]`` share that uses two cells, and number."""


def _near(experts: NDArray[np.uint16], request: Ints, num_experts: int) -> list[Pairs]:
    """Compare each token ``[T, L, K]`` with itself and with later ones of its request."""
    offsets = (0, *LAGS)
    cells = experts.shape[1] * num_experts
    joint = np.zeros((len(offsets), cells, cells))
    counts = np.zeros(len(offsets), np.int64)
    for start in range(0, len(experts), _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS + LAGS[-1])
        dense, owner = _dense(experts[rows], num_experts), request[rows]
        for place, lag in enumerate(offsets):
            later = dense[lag : lag + _CHUNK_ROWS]
            same = owner[: len(later)] == owner[lag : lag + len(later)]
            joint[place] += (dense[: len(later)] * same[:, None]).T @ later
            counts[place] += np.count_nonzero(same)
    return [
        ((both + both.T) / (2 * max(count, 1)), count)
        for both, count in zip(joint, counts.tolist(), strict=True)
    ]


def _dense(experts: NDArray[np.uint16], num_experts: int) -> NDArray[np.float32]:
    """Return ``[T, D]``: 1 where a token uses a cell."""
    tokens, layers, _ = experts.shape
    dense = np.zeros((tokens, layers, num_experts), np.float32)
    np.put_along_axis(dense, experts.astype(np.int64), 1, axis=-1)
    return dense.reshape(tokens, -1)


def _far_apart(trace: RoutingTrace, request: Ints) -> Pairs:
    """Compare the first third of each long request with its last one, weighted by length."""
    thirds = Thirds.of(request)
    if len(thirds.size) < 2:
        raise InputError(
            f"trace of {trace.meta.model}: {len(thirds.size)} requests of at least {FAR_LENGTH} "
            "tokens -- a fit needs two to tell what stays the same within a request; record longer "
            "ones"
        )
    first, last = (
        step_counts(trace, part).reshape(len(part), -1).astype(np.float64)
        for part in (thirds.first, thirds.last)
    )
    return thirds.together(first, last), int(thirds.size.sum())


def _latent(joint: Floats, used: Floats, between: Floats, pairs: int) -> Floats:
    """Return the correlation of normal scores that are above their thresholds together as often.

    Parameters
    ----------
    joint : float array ``[D, D]``
        Share of the pairs of tokens that use two cells.
    used : float array ``[M, D]``
        Share of the tokens of a kind that use a cell.
    between : float array ``[M, M]``
        Share of the pairs of tokens that are of two kinds; symmetric.
    pairs : int
        How many were counted. Rare ones are drawn towards what the kinds explain: `_DOUBTS`
        expected joint uses are added.
    """
    used = np.clip(used, _RAREST, 1 - _RAREST)
    expected = used.T @ between @ used
    excess = (joint - expected) * (1 - _DOUBTS / (expected * max(pairs, 1) + _DOUBTS))
    orders = _orders(ndtri(used))
    weighted = [between @ order for order in orders]
    found = np.empty_like(excess)
    for start in range(0, len(excess), _BLOCK):
        rows = slice(start, start + _BLOCK)
        terms = [one[:, rows].T @ other for one, other in zip(orders, weighted, strict=True)]
        found[rows] = _solved(excess[rows], terms)
    return (found + found.T) / 2


def _orders(threshold: Floats) -> list[Floats]:
    """Return what a threshold a contributes to each order of the series.

    Two cells with thresholds a and b are used together more often than independent ones by the sum
    over n of ``r^n / n! He(n-1, a) f(a) He(n-1, b) f(b)``, He the Hermite polynomials and f the
    normal density.
    """
    found = []
    before = np.zeros_like(threshold)
    now = np.exp(-np.square(threshold) / 2) / np.sqrt(2 * np.pi)  # f He(n-1) / sqrt(n!) of n = 1
    for n in range(1, _ORDERS + 1):
        found.append(now)
        before, now = now, (threshold * now - (n - 1) / np.sqrt(n) * before) / np.sqrt(n + 1)
    return found


def _solved(excess: Floats, terms: list[Floats]) -> Floats:
    """Return the correlations at which the series with these terms is the excess.

    From 0 outwards, for the excess rises with the correlation but its series, cut off, does not
    quite do so at the ends.
    """
    found = np.zeros_like(excess)
    for sign in (1, -1):
        reached = np.zeros_like(excess)
        for place in range(_STEPS):
            correlation = sign * _LAST * (place + 1) / _STEPS
            further = np.maximum(sign * _sum_of(terms, correlation), reached)
            part = (sign * excess - reached) / np.maximum(further - reached, 1e-300)
            found += sign * _LAST / _STEPS * np.clip(part, 0, 1)
            reached = further
    return found


def _sum_of(terms: list[Floats], correlation: float) -> Floats:
    total = np.zeros_like(terms[0])
    for term in reversed(terms):  # Horner
        total += term
        total *= correlation
    return total
