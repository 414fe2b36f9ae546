"""Fits the generator of `traces.synth_model` to a trace, by moments.

Kinds of tokens come first. What they leave of the covariance of the scores at the same token gives
common factors; the covariances at all lags say how much of each factor changes slowly or quickly
along a request. Then traces are drawn, and what outlasts a token is strengthened until the reuse of
every layer is that of the trace; the means are moved until the loads of every kind are.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh
from scipy.optimize import nnls
from scipy.special import ndtri
from scipy.stats import norm

from traces.counts import expert_counts
from traces.measures.base import About, measure
from traces.measures.reuse import Reuse
from traces.meta import TraceMeta
from traces.routing_trace import RoutingTrace, request_order
from traces.synth_draw import Sampler, draw_trace
from traces.synth_model import NEVER, Process, SynthFit
from traces.synth_moments import LAGS, Moments, moments

Floats = NDArray[np.float64]
NAMES = ("request", "slow", "quick", "token")
KINDS = 40
"""Of tokens, at most; of 1, 40, 64, 96 and 128 tried on even requests of gpt-oss-20b."""
TOKENS_OF_KIND = 300
"""Of the trace, at least, on average."""
CELLS_OF_KIND = 16
"""Cells for each kind, at least: few cannot tell many kinds apart."""
RANK = 24
"""Common factors, at most; of 24 to 64 tried on the same."""
QUICK = 0.5
"""Decay of the quick process; of 0.4 to 0.6 tried on the same, with one kind."""
_REUSE_LAGS = (1, 16)  # at the second one the quick process has faded
_LEAST_REUSE = 0.01
_MOST_GAIN = 2.5  # in a round
_EAGER = (3.0, 3.0, 3.0, 3.0, 2.0, 2.0, 2.0, 1.5, 1.0, 1.0)
"""Exponents of the rounds' gains: first above 1, for a part of the reuse is the kinds' and does not
grow; then falling, for each round's trace scatters."""
_SLOW = (0.9, 0.95, 0.97, 0.98, 0.985, 0.99)
_SWEEPS = 4  # of principal factors
_MOST = 0.95  # of a cell's variance in factors, of the rest in what outlasts a token
_LEAST_WEIGHT = 0.05  # as of an expert that 2 % of the tokens use
_LEAST_TOKENS = 60_000  # drawn in each round
_LOAD_CELLS = 2**25  # scores drawn for one correction of the loads, about
_LEAST_OF_KIND = 256  # tokens drawn for it
_LOAD_RATES = (1.0, 1.0, 0.5, 0.33, 0.25, 0.2)
_QUANTILES = 101


def fit_trace(trace: RoutingTrace, *, kinds: int = KINDS, seed: int = 0) -> SynthFit:
    """Fit a generator to a trace.

    Parameters
    ----------
    trace : RoutingTrace
        At most `traces.synth_moments.MAX_CELLS` (layer, expert) pairs, and at least two requests
        of `traces.synth_moments.FAR_LENGTH` tokens. Seconds to minutes: time grows with tokens
        times cells squared.
    kinds : int
        Of tokens, from 1; fewer where there are not `TOKENS_OF_KIND` tokens and
        `CELLS_OF_KIND` cells for each.
    seed : int
        Of the clusters, and of the traces that are drawn to correct the fit.

    Raises
    ------
    InputError
        If the trace is too large or too short.
    """
    cells = trace.num_layers * trace.meta.num_experts
    most = min(kinds, trace.num_tokens // TOKENS_OF_KIND, cells // CELLS_OF_KIND)
    target = moments(trace, max(most, 1), seed=seed)
    lengths = np.bincount(request_order(trace))
    used, slow = np.concatenate([target.used, target.opening]), _slow_decay(target)
    fit = SynthFit(
        meta=_meta(trace.meta, f"fitted to {_described(trace)}"),
        kinds=target.kinds,
        means=_first_means(used),
        processes=_processes(target, slow),
        lengths=np.quantile(lengths, np.linspace(0, 1, _QUANTILES)),
        prompt_share=float(np.mean(~trace.decode)),
    )
    return _with_reuse(fit, trace, used, lengths, seed)


def _with_reuse(
    fit: SynthFit, trace: RoutingTrace, used: Floats, lengths: NDArray[np.int64], seed: int
) -> SynthFit:
    """Strengthen what outlasts a token until the drawn reuse is that of the trace."""
    wanted, layers = _reuse_by_speed(trace), trace.num_layers
    repeated = np.tile(lengths, -(-_LEAST_TOKENS // trace.num_tokens))
    fit = match_loads(fit, used, seed=seed)
    for round_, eager in enumerate(_EAGER):
        drawn = _reuse_by_speed(draw_trace(fit, repeated, seed=seed + 1 + round_))
        ratio = np.maximum(wanted, _LEAST_REUSE) / np.maximum(drawn, _LEAST_REUSE)
        gains = np.clip(ratio**eager, 1 / _MOST_GAIN, _MOST_GAIN)
        lasting, quick = gains
        gains = np.stack([lasting, np.ones(layers), quick, np.ones(layers)])  # as `NAMES`
        fit = _strengthened(fit, np.repeat(gains, used.shape[1] // layers, axis=1))
        fit = match_loads(fit, used, seed=seed + 1 + round_)
    return fit


def _reuse_by_speed(trace: RoutingTrace) -> Floats:
    """Return ``[2, L]``: reuse above chance that outlasts `_REUSE_LAGS`, and that is lost there."""
    measured = Reuse(About.of(trace), lags=_REUSE_LAGS)
    measure(trace, [measured])
    found = measured.result()
    near, far = found.observed - found.independent
    return np.stack([far, near - far])


def _strengthened(fit: SynthFit, gains: Floats) -> SynthFit:
    """Multiply the variances ``[processes, D]``, and keep 1 in all."""
    whole = sum(
        gain * (process.common + process.own)
        for gain, process in zip(gains, fit.processes, strict=True)
    )
    return replace(
        fit,
        processes=tuple(
            replace(
                process,
                loadings=(process.loadings * np.sqrt(gain / whole)[:, None]).astype(np.float32),
                own=(process.own * gain / whole).astype(np.float32),
            )
            for gain, process in zip(gains, fit.processes, strict=True)
        ),
    )


def _described(trace: RoutingTrace) -> str:
    kind = "synthetic trace" if trace.meta.synthetic else "trace"
    return (
        f"a {kind} of {trace.meta.model} ({trace.num_tokens} tokens, {trace.num_requests} requests)"
    )


def _meta(like: TraceMeta, note: str) -> TraceMeta:
    return TraceMeta(
        model=like.model, num_experts=like.num_experts, top_k=like.top_k,
        moe_layer_ids=like.moe_layer_ids, source="traces.synth_fit, drawn by traces.synth_draw",
        licence=like.licence, synthetic=True, note=f"synthetic: {note}",
    )  # fmt: skip


def _first_means(used: Floats) -> Floats:
    """Return mean scores that are above 0 as often as the cells are used."""
    low = 1e-6
    return np.where(used > 0, ndtri(np.clip(used, low, 1 - low)), NEVER)


def _slow_decay(target: Moments) -> float:
    """Choose the decay that fits the average cell's autocorrelation best (least squares)."""
    used = target.kinds.share @ target.used
    curve = np.einsum("hdd,d->h", target.latent[1:], used) / used.sum()
    return min((nnls(_design(slow), curve)[1], slow) for slow in _SLOW)[1]


def _design(slow: float) -> Floats:
    """Return ``[lags + 1, 3]``: what request, slow and quick processes leave at `LAGS` and far."""
    lags = np.array([*LAGS, np.inf])[:, None]
    return np.array([1.0, slow, QUICK]) ** lags


def _processes(target: Moments, slow: float) -> tuple[Process, ...]:
    """Find common factors at the same token, and split them over the processes by the lags."""
    latent = target.latent
    # by how much the use of a cell changes with its score: rare cells' correlations are noise
    slope = norm.pdf(ndtri(np.clip(target.used, 1e-6, 1 - 1e-6)))
    weight = np.maximum(np.sqrt(target.kinds.share @ np.square(slope)), _LEAST_WEIGHT)
    weighted = _factors(latent[0] * weight * weight[:, None], _MOST * weight**2, RANK)
    loadings = weighted / weight[:, None]
    unmix = np.linalg.pinv(weighted) * weight
    by_lag = np.linalg.pinv(_design(slow))
    parts = [_possible(part) for part in np.tensordot(by_lag, unmix @ latent[1:] @ unmix.T, 1)]
    parts.append(_possible(np.eye(len(unmix)) - sum(parts)))
    whole = _power(
        np.sum(parts, axis=0), -0.5
    )  # what could not be met is shared out, so that all is 1
    found = [loadings @ whole @ _power(part, 0.5) for part in parts]
    common = np.array([np.square(each).sum(axis=1) for each in found])
    variance = by_lag @ np.einsum("hdd->hd", latent[1:])
    own = np.maximum(variance - common[:-1], 0)
    rest = 1 - common.sum(axis=0)
    own *= np.minimum(_MOST * rest / np.maximum(own.sum(axis=0), 1e-12), 1)
    return tuple(
        Process(
            name=name,
            decay=decay,
            loadings=each.astype(np.float32),
            own=np.maximum(alone, 0).astype(np.float32),
        )
        for name, decay, each, alone in zip(
            NAMES, (1.0, slow, QUICK, 0.0), found, [*own, rest - own.sum(axis=0)], strict=True
        )
    )


def _possible(covariance: Floats) -> Floats:
    """Return the nearest covariance: without negative eigenvalues."""
    return _spectral(covariance, lambda values: np.maximum(values, 0))


def _power(covariance: Floats, exponent: float) -> Floats:
    return _spectral(covariance, lambda values: np.maximum(values, 1e-9) ** exponent)


def _spectral(matrix: Floats, change: Callable[[Floats], Floats]) -> Floats:
    values, vectors = eigh((matrix + matrix.T) / 2)
    return (vectors * change(values)) @ vectors.T


def _factors(covariance: Floats, variance: Floats, rank: int) -> Floats:
    """Return loadings ``[D, r]`` that explain the covariances of different cells.

    Principal axis factoring: the diagonal is replaced by what the factors explain of it, over and
    over. They never explain more than the variance given.
    """
    cells = len(covariance)
    reduced = covariance.copy()
    common = variance / 2
    loadings = np.zeros((cells, 1))
    for _ in range(_SWEEPS):
        np.einsum("dd->d", reduced)[:] = common
        values, vectors = eigh(reduced, subset_by_index=[max(cells - rank, 0), cells - 1])
        loadings = vectors * np.sqrt(np.maximum(values, 0))
        explained = np.square(loadings).sum(axis=1)
        loadings *= np.sqrt(np.minimum(variance / np.maximum(explained, 1e-12), 1))[:, None]
        common = np.minimum(explained, variance)
    return loadings


def match_loads(fit: SynthFit, used: Floats, *, seed: int) -> SynthFit:
    """Move the mean scores until independent tokens use each cell as often as wanted.

    Parameters
    ----------
    fit : SynthFit
    used : float array ``[M + P, D]`` or ``[1, D]``
        Share of the tokens of each kind, and of each of the first P of a request, that use a cell;
        or of all tokens, of a generator with P = 0. Below 1; every layer sums to top-k.
    seed : int
    """
    rng = np.random.default_rng([seed, used.shape[1]])
    means, share = fit.means.copy(), fit.kinds.share
    tokens = min(max(_LOAD_CELLS // used.shape[1], 4096), 50_000)
    counts = np.full(len(means), _LEAST_OF_KIND)
    counts[: len(share)] = np.maximum(np.round(tokens * share), _LEAST_OF_KIND)
    together = len(used) == 1
    low = 0.5 / (counts.sum() if together else counts[:, None])
    goal = ndtri(np.clip(used, low, 1 - low))
    for rate in _LOAD_RATES:
        sampler = Sampler(replace(fit, means=means))
        drawn = np.stack(
            [
                _used(sampler, np.full(count, kind), rng, fit.meta.num_experts)
                for kind, count in enumerate(counts.tolist())
            ]
        )
        if together:
            drawn = share[None] @ drawn
        means += rate * np.where(used > 0, goal - ndtri(np.clip(drawn, low, 1 - low)), 0)
    return replace(fit, means=means)


def _used(
    sampler: Sampler, kinds: NDArray[np.int64], rng: np.random.Generator, num_experts: int
) -> Floats:
    """Draw tokens, some at a time, and return the share ``[D]`` that uses each cell."""
    total: Any = 0
    for part in np.array_split(kinds, max(len(kinds) // 2048, 1)):
        total = total + expert_counts(sampler.independent(part, rng), num_experts)
    return np.asarray(total).reshape(-1) / len(kinds)
