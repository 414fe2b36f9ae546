"""Which experts of a layer the same tokens use: pairs against independence, and clusters of them.

Counts are tokens that use both experts of a pair. The pairs expected of independent choices keep
each expert's load and the fact that a token's K experts are distinct. Clusters are scored beside
those that the same procedure finds in counts drawn from the expectation: it finds some in noise.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.spatial.distance import squareform
from scipy.special import gammaln, xlogy

from traces.measures.base import About, Floats, Ints, plain, spread
from traces.routing_trace import RoutingTrace

MAX_BYTES = 2**30
_STRONGEST = 10
_LEAST_EXPECTED = 5.0  # a lift of fewer expected tokens is mostly chance
_MOST_CLUSTERS = 16
_CHUNK_CELLS = 2**22


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """Two experts of a layer."""

    experts: tuple[int, int]
    tokens: int
    """That use both."""
    lift: float
    """Tokens over those expected."""
    deviation: float
    """``(tokens - expected) / sqrt(expected)``: independent tokens stay within a few of 0."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return plain(self)


@dataclass(frozen=True, kw_only=True, eq=False)
class Clusters:
    """A partition of a layer's experts by average linkage on the lift."""

    members: tuple[tuple[int, ...], ...]
    """The number of clusters, 2 to 16, is the one of the largest modularity."""
    modularity: float
    """Share of the pairs that are inside clusters, minus the share expected there. 0 where every
    expert is as good a partner as any other; below 1."""
    modularity_by_chance: float
    """What the procedure finds where the expectation is the truth: counts drawn from it."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return plain(self)


@dataclass(frozen=True, kw_only=True, eq=False)
class CoActivation:
    """Pairs of L layers of E experts."""

    tokens: int
    moe_layer_ids: tuple[int, ...]
    pairs: Ints
    """``[L, E, E]`` tokens that use both; symmetric, 0 on the diagonal."""
    expected: Floats
    """``[L, E, E]`` see `expected_pairs`."""
    strongest: tuple[tuple[Pair, ...], ...]
    """Of each layer, by deviation; of pairs with at least 5 tokens expected."""
    clusters: tuple[Clusters, ...]
    """Of each layer; none where a token has a single expert."""
    skipped: str = ""
    """Why there are no layers, where that is so."""

    @property
    def lift(self) -> Floats:
        """``[L, E, E]`` tokens over those expected; 1 is independence, NaN where none are."""
        nothing = np.full(self.pairs.shape, np.nan)
        return np.divide(self.pairs, self.expected, out=nothing, where=self.expected > 0)

    @property
    def departure(self) -> Floats:
        """``[L]`` total variation distance of the pairs from the expected ones, 0 to 1.

        The share of the pairs that would have to be others.
        """
        total = np.maximum(self.pairs.sum(axis=(1, 2)), 1)
        apart: Floats = np.abs(self.pairs - self.expected).sum(axis=(1, 2)) / (2 * total)
        return apart

    @property
    def departure_by_chance(self) -> Floats:
        """``[L]`` what ``departure`` would be about if all pairs were chosen independently.

        From the mean deviation of a Poisson count, ``2 e^-mu mu^(m + 1) / m!`` with m = floor(mu).
        """
        mu = self.expected
        floor = np.floor(mu)
        deviation = 2 * np.exp(xlogy(floor + 1, mu) - mu - gammaln(floor + 1))
        total = np.maximum(self.pairs.sum(axis=(1, 2)), 1)
        near: Floats = deviation.sum(axis=(1, 2)) / (2 * total)
        return near

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, without the pairs themselves."""
        ids = self.moe_layer_ids
        return {
            "tokens": self.tokens,
            "departure": spread(self.departure, ids),
            "departure_by_chance": spread(self.departure_by_chance, ids),
            "strongest": plain(dict(zip(ids, self.strongest, strict=True))),
            "modularity": spread(np.array([c.modularity for c in self.clusters]), ids)
            if self.clusters else None,
            "clusters": plain(dict(zip(ids, self.clusters, strict=False))),
            "skipped": self.skipped,
        }  # fmt: skip


class CoActivations:
    """Counts pairs; a `Measure` whose result is a `CoActivation`.

    Parameters
    ----------
    about : About
        Nothing is counted where the counts would take more than `MAX_BYTES`.
    """

    def __init__(self, about: About) -> None:
        meta = about.meta
        layers, experts = meta.num_layers, meta.num_experts
        size = 8 * layers * experts**2
        self._skipped = ""
        if size > MAX_BYTES:
            self._skipped = (
                f"pairs of {experts} experts in {layers} layers take {size / 2**30:.1f} GiB, at "
                f"most {MAX_BYTES / 2**30:.0f} GiB"
            )
        self._meta, self._tokens = meta, 0
        self._ids = () if self._skipped else meta.moe_layer_ids
        self._pairs = np.zeros((len(self._ids), experts, experts), np.int64)

    def add(self, chunk: RoutingTrace) -> None:
        """Count the pairs of each token."""
        layers, experts, _ = self._pairs.shape
        top_k = chunk.meta.top_k
        first, second = np.triu_indices(top_k, 1)
        self._tokens += chunk.num_tokens
        if not len(first) or self._skipped:
            return
        rows = max(_CHUNK_CELLS // (layers * len(first)), 1)
        flat = self._pairs.reshape(-1)
        offset = (np.arange(layers) * experts**2)[:, None]
        for start in range(0, chunk.num_tokens, rows):
            chosen = chunk.experts[start : start + rows].astype(np.int64)
            key = chosen[..., first] * experts + chosen[..., second] + offset
            flat += np.bincount(key.reshape(-1), minlength=len(flat))

    def merge(self, other: Self) -> None:
        """Take in the pairs of another part."""
        self._pairs += other._pairs
        self._tokens += other._tokens

    def result(self) -> CoActivation:
        """Return pairs, expectation and clusters."""
        pairs = self._pairs + self._pairs.swapaxes(1, 2)
        expected = np.array([expected_pairs(of_layer) for of_layer in pairs]).reshape(pairs.shape)
        both = list(zip(pairs, expected, strict=True))
        known = self._meta.top_k > 1 and self._meta.num_experts > 2
        return CoActivation(
            tokens=self._tokens,
            moe_layer_ids=self._ids,
            pairs=pairs,
            expected=expected,
            strongest=tuple(_strongest(*layer) for layer in both),
            clusters=tuple(clusters(*layer) for layer in both) if known else (),
            skipped=self._skipped,
        )


def expected_pairs(pairs: Ints, rounds: int = 500) -> Floats:
    """Return the pairs ``[E, E]`` that independent choices with the same loads would give.

    Quasi-independence (L. Goodman, "The analysis of cross-classified data", JASA 1968):
    ``w_a w_b`` for a != b and 0 on the diagonal, with each expert's sum over partners as observed,
    which is its load times K - 1. The w are found by proportional fitting.

    Parameters
    ----------
    pairs : int64 array ``[E, E]``
        Symmetric, 0 on the diagonal.
    rounds : int
        Of fitting, at most; it ends earlier where all sums agree to 1e-9.
    """
    partners = pairs.sum(axis=1).astype(np.float64)
    weight = np.sqrt(partners)
    for _ in range(rounds):
        others = np.maximum(weight.sum() - weight, 0)
        fitted = weight * others
        if (np.abs(fitted - partners) <= 1e-9 * np.maximum(partners, 1)).all():
            break
        ratio = np.divide(partners, fitted, out=np.ones_like(fitted), where=fitted > 0)
        weight = weight * np.sqrt(ratio)
    expected = np.outer(weight, weight)
    np.fill_diagonal(expected, 0)
    return expected


def _strongest(pairs: Ints, expected: Floats) -> tuple[Pair, ...]:
    first, second = np.triu_indices(len(pairs), 1)
    seen, mean = pairs[first, second], expected[first, second]
    enough = np.flatnonzero(mean >= _LEAST_EXPECTED)
    deviation = (seen[enough] - mean[enough]) / np.sqrt(mean[enough])
    order = np.argsort(-deviation, kind="stable")[:_STRONGEST]
    return tuple(
        Pair(
            experts=(int(first[at]), int(second[at])),
            tokens=int(seen[at]),
            lift=float(seen[at] / mean[at]),
            deviation=float(deviation[place]),
        )
        for place, at in zip(order, enough[order], strict=True)
    )


def clusters(pairs: Ints, expected: Floats, seed: int = 0) -> Clusters:
    """Find clusters of experts that are chosen together; `Clusters` says how.

    Parameters
    ----------
    pairs : int64 array ``[E, E]``
    expected : float array ``[E, E]``
        `expected_pairs` of these.
    seed : int
        Of the counts drawn by chance.
    """
    label, modularity = _partition(pairs, expected)
    members = [np.flatnonzero(label == name).tolist() for name in np.unique(label)]
    upper = np.triu_indices(len(pairs), 1)
    drawn = np.zeros(pairs.shape, np.int64)
    drawn[upper] = np.random.default_rng(seed).poisson(expected[upper])
    drawn += drawn.T
    return Clusters(
        members=tuple(tuple(each) for each in sorted(members)),
        modularity=modularity,
        modularity_by_chance=_partition(drawn, expected_pairs(drawn))[1],
    )


def _partition(pairs: Ints, expected: Floats) -> tuple[Ints, float]:
    """Return the cluster of each expert and the modularity."""
    lift = (pairs + 1) / (expected + 1)  # + 1: pairs that are rarely expected say little
    distance = 1 / lift
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform((distance + distance.T) / 2, checks=False), method="average")
    most = min(_MOST_CLUSTERS, len(pairs) - 1)
    labels = cut_tree(tree, n_clusters=list(range(2, most + 1))).T
    excess = (pairs - expected) / max(int(pairs.sum()), 1)
    scores = [_inside(excess, label) for label in labels]
    best = int(np.argmax(scores))
    return labels[best], float(scores[best])


def _inside(excess: Floats, label: NDArray[np.int64]) -> float:
    return float(excess[label[:, None] == label].sum())
