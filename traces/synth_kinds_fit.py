"""Finds kinds of tokens in a trace, and how they follow each other along its requests.

Kinds are clusters (k-means) of tokens by the experts that they use in all layers. A request's
preferences are normal, with the covariance that would make kinds of its first third and of its
last third come together as they do (log-normal weights: ``cov = log(1 + relative covariance)``);
then transitions and the strength of preferences are corrected until the tilted chains have the
shares of pairs that were counted.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2
from scipy.linalg import eigh

from traces.synth_kinds import ONE_KIND, Floats, Ints, Kinds, stationary

FAR_LENGTH = 64
"""Tokens of a request from which its first third is compared with its last one."""
_SAMPLE = 30_000  # tokens that are clustered; the others join the nearest cluster
_SWEEPS = 20  # of k-means
_RANK = 16  # common factors of preferences, at most
_REQUESTS = 512  # drawn preferences; half of them the opposites of the others
_ROUNDS = 25
_PACE = (0.7, 0.3)  # exponents of a round's correction: transitions, strength
_STEP = (0.7, 1.4)  # least and most change of the strength in a round
_DOUBTS = 2.0  # transitions, or pairs, of independent kinds that are added to those counted
_LEAST = 0.2  # a pair of kinds comes together at least so often, of what chance would give


def cluster(dense: NDArray[np.float32], count: int, seed: int) -> NDArray[np.float32]:
    """Return centres ``[M, D]``, M <= count, of tokens ``[T, D]``; empty clusters are left out."""
    rng = np.random.default_rng(seed)
    first = dense[np.sort(rng.choice(len(dense), min(count, len(dense)), replace=False))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of clusters that are empty
        centres, kind = kmeans2(dense, first, minit="matrix", iter=_SWEEPS)
    return np.asarray(centres[np.unique(kind)], np.float32)


def sample_rows(tokens: int, seed: int) -> Ints:
    """Choose the tokens that are clustered."""
    rng = np.random.default_rng(seed)
    return np.sort(rng.choice(tokens, min(tokens, _SAMPLE), replace=False))


@dataclass(frozen=True, kw_only=True, eq=False)
class Thirds:
    """Rows of the first and the last third of each long request."""

    first: list[Ints]
    last: list[Ints]
    size: Ints
    """Tokens of each third."""

    @classmethod
    def of(cls, request: Ints) -> "Thirds":
        """Find them in rows that are ordered by request ``[T]``."""
        lengths = np.bincount(request)
        starts = np.cumsum(lengths) - lengths
        long = np.flatnonzero(lengths >= FAR_LENGTH)
        size = lengths[long] // 3
        first, last = (
            [np.arange(at, at + count) for at, count in zip(begin, size.tolist(), strict=True)]
            for begin in (starts[long], starts[long] + lengths[long] - size)
        )
        return cls(first=first, last=last, size=size)

    def together(self, first: Floats, last: Floats) -> Floats:
        """Return ``[N, N]``: how often two things of N meet, of uses ``[R, N]``; symmetric."""
        meet = (first / self.size[:, None]).T @ last / self.size.sum()
        return (meet + meet.T) / 2


def fit_kinds(kind: Ints, request: Ints, *, seed: int) -> Kinds:
    """Fit the chain and the preferences.

    Parameters
    ----------
    kind : int array ``[T]``
        Of every token, all from 0 to M - 1 used.
    request : int array ``[T]``
        Ascending; at least one of `FAR_LENGTH` tokens.
    seed : int
        Of the preferences that are drawn.
    """
    count = int(kind.max()) + 1
    if count == 1:
        return ONE_KIND
    share = np.bincount(kind) / len(kind)
    pairs = _transitions(kind, request, share)
    thirds = Thirds.of(request)
    first, last = (
        np.stack([np.bincount(kind[rows], minlength=count) for rows in part]).astype(np.float64)
        for part in (thirds.first, thirds.last)
    )
    far = thirds.together(first, last)
    loadings, own = _preferences(far, int(thirds.size.sum()))
    kinds = Kinds(
        share=share, loadings=loadings, own=own,
        transitions=pairs / pairs.sum(axis=1, keepdims=True),
    )  # fmt: skip
    return _corrected(kinds, pairs, float(np.trace(far)), seed)


def _transitions(kind: Ints, request: Ints, share: Floats) -> Floats:
    """Return shares ``[M, M]`` of a token and the next one; rows sum to the kinds' shares."""
    same = request[1:] == request[:-1]
    counted = np.zeros((len(share), len(share)))
    np.add.at(counted, (kind[:-1][same], kind[1:][same]), 1)
    counted += _DOUBTS * share
    return counted * (share / counted.sum(axis=1))[:, None]


def _preferences(far: Floats, tokens: int) -> tuple[Floats, Floats]:
    """Return loadings ``[M, r]`` and own variances ``[M]`` of the preferences.

    ``far`` ``[M, M]`` is the share of pairs of tokens, far apart in a request, of two kinds.
    """
    share = far.sum(axis=0)
    chance = np.maximum(np.outer(share, share), 1e-12)
    doubt = _DOUBTS / (chance * tokens + _DOUBTS)
    covariance = np.log(np.maximum(1 + (far / chance - 1) * (1 - doubt), _LEAST))
    values, vectors = eigh(covariance)
    most = slice(-1, -1 - _RANK, -1)
    loadings = vectors[:, most] * np.sqrt(np.maximum(values[most], 0))
    own = np.diag(covariance) - np.square(loadings).sum(axis=1)
    return loadings, np.maximum(own, 0)


def _corrected(kinds: Kinds, pairs: Floats, far: float, seed: int) -> Kinds:
    """Move transitions and the strength of preferences until ``pairs`` and ``far`` hold.

    ``far`` is the share of pairs of tokens, far apart, that are of the same kind.
    """
    normals, chance = _normals(kinds, seed), np.square(kinds.share).sum()
    for _ in range(_ROUNDS):
        chains = kinds.chains(kinds.preferences(*normals))
        shares = stationary(chains)
        drawn = np.einsum("rz,rzy->zy", shares, chains) / len(shares)
        lasting = np.square(shares).sum() / len(shares) - chance
        gain = max(far - chance, 0) / max(lasting, 1e-12)
        gain = np.clip(gain ** _PACE[1], *_STEP)
        moved = kinds.transitions * (pairs / np.maximum(drawn, 1e-12)) ** _PACE[0]
        kinds = replace(
            kinds,
            transitions=moved / moved.sum(axis=1, keepdims=True),
            loadings=kinds.loadings * gain,
            own=kinds.own * gain**2,
        )
    return kinds


def pairs_of_kinds(kinds: Kinds, lags: Iterable[int], *, seed: int) -> Floats:
    """Return ``[2 + lags, M, M]``: the shares of the kinds of two tokens of a request.

    At the same token, at the lags, and far apart; symmetric, each sums to 1.
    """
    chains = kinds.chains(kinds.preferences(*_normals(kinds, seed)))
    shares = stationary(chains)
    found = [np.diag(kinds.share)]
    for lag in lags:
        ahead = np.linalg.matrix_power(chains, lag)
        found.append(np.einsum("rz,rzy->zy", shares, ahead) / len(shares))
    found.append(shares.T @ shares / len(shares))
    return np.stack([(each + each.T) / 2 for each in found])


def _normals(kinds: Kinds, seed: int) -> tuple[Floats, Floats]:
    rng = np.random.default_rng([seed, len(kinds.share)])
    common, own = (
        rng.standard_normal((_REQUESTS // 2, size))
        for size in (kinds.loadings.shape[1], len(kinds.own))
    )
    return np.concatenate([common, -common]), np.concatenate([own, -own])
