"""How evenly a layer's experts are used: counts of (token, choice) pairs, and what follows.

All figures are of long-run loads, over all tokens; what a single step sees is more uneven. With K
of E experts chosen per token, a layer's counts sum to tokens times K.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from traces.counts import expert_counts
from traces.measures.base import About, Floats, Ints, groups, plain, spread
from traces.routing_trace import RoutingTrace

MAX_BYTES = 2**28
"""Counts by domain are left out where they would take more than this (bytes)."""
PHASES = ("prefill", "decode")


@dataclass(frozen=True, kw_only=True, eq=False)
class Loads:
    """Unevenness of loads; L layers, E experts.

    A layer without any token has NaN everywhere.
    """

    counts: Ints
    """``[L, E]`` (token, choice) pairs of each expert."""
    moe_layer_ids: tuple[int, ...]

    @property
    def max_over_mean(self) -> Floats:
        """``[L]`` busiest expert over the mean: 1 is even, E is one expert for all."""
        return self.counts.max(axis=1) / self._mean

    @property
    def entropy_bits(self) -> Floats:
        """``[L]`` Shannon entropy of the shares, bits."""
        shares = self._shares
        terms = np.where(shares > 0, shares * np.log2(np.where(shares > 0, shares, 1)), 0.0)
        return np.where(self.counts.any(axis=1), np.abs(terms.sum(axis=1)), np.nan)

    @property
    def entropy_share(self) -> Floats:
        """``[L]`` entropy over its largest value, log2 E; 1 for a single expert."""
        largest = np.log2(self.counts.shape[1])
        return self.entropy_bits / largest if largest else self.entropy_bits + 1.0

    @property
    def gini(self) -> Floats:
        """``[L]`` Gini coefficient: half the mean difference of two experts' loads over the mean.

        0 is even, (E - 1) / E is one expert for all. From the sorted loads x_1 <= ... <= x_E:
        ``2 sum_i i x_i / (E sum_i x_i) - (E + 1) / E``.
        """
        experts = self.counts.shape[1]
        ranks = np.arange(1, experts + 1)
        weighted = (np.sort(self.counts, axis=1) * ranks).sum(axis=1)
        return 2 * weighted / (experts * experts * self._mean) - (experts + 1) / experts

    @property
    def unused(self) -> Ints:
        """``[L]`` experts that no token used."""
        return (self.counts == 0).sum(axis=1)

    @property
    def _mean(self) -> Floats:
        mean = self.counts.mean(axis=1)
        return np.where(mean > 0, mean, np.nan)

    @property
    def _shares(self) -> Floats:
        return self.counts / (self._mean * self.counts.shape[1])[:, None]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values: of each figure the mean, the worst layer and every layer."""
        ids = self.moe_layer_ids
        return {
            "max_over_mean": spread(self.max_over_mean, ids),
            "entropy_bits": spread(self.entropy_bits, ids),
            "entropy_share": spread(self.entropy_share, ids),
            "gini": spread(self.gini, ids),
            "unused_experts": spread(self.unused.astype(float), ids),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadPart:
    """Loads of the tokens of one phase or domain."""

    tokens: int
    loads: Loads

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, means and worst layers only."""
        figures = self.loads.to_dict()
        for figure in figures.values():
            del figure["each"]
        return {"tokens": self.tokens} | figures


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadResult:
    """Loads of all tokens, of each phase and of each domain that has tokens."""

    tokens: int
    loads: Loads
    by_phase: dict[str, LoadPart]
    by_domain: dict[str, LoadPart]
    domains_left_out: str
    """Why ``by_domain`` is empty, where it is for want of memory; else empty."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"tokens": self.tokens} | self.loads.to_dict() | plain(self, ("tokens", "loads"))


class Load:
    """Counts of each layer's experts, by phase and domain.

    Parameters
    ----------
    about : About
        The data set.
    max_bytes : int
        Domains are not told apart where their counts would take more than this (bytes).
    """

    def __init__(self, about: About, max_bytes: int = MAX_BYTES) -> None:
        meta, self._domains = about.meta, about.domains
        self._layers = meta.moe_layer_ids
        row = 2 * meta.num_layers * meta.num_experts * 8
        self._apart = row * len(about.domains) <= max_bytes
        self._left_out = (
            ""
            if self._apart
            else f"{len(about.domains)} domains take {row * len(about.domains) / 2**20:.0f} MiB of "
            f"counts, at most {max_bytes / 2**20:.0f} MiB"
        )
        kinds = (2, len(about.domains) if self._apart else 1)
        self.counts: Ints = np.zeros((*kinds, meta.num_layers, meta.num_experts), np.int64)
        """``[phase, domain, L, E]``; one domain where they are not told apart."""
        self.tokens: Ints = np.zeros(kinds, np.int64)
        """``[phase, domain]``"""

    def add(self, chunk: RoutingTrace) -> None:
        """Count the choices of a chunk."""
        domain = chunk.domain if self._apart else np.zeros_like(chunk.domain)
        for label, rows in groups(domain.astype(np.int64) * 2 + chunk.decode):
            at = (label % 2, label // 2)
            experts = chunk.experts[rows]
            self.counts[at] += expert_counts(experts, self.counts.shape[-1])
            self.tokens[at] += len(experts)

    def merge(self, other: Self) -> None:
        """Add the counts of another part."""
        self.counts += other.counts
        self.tokens += other.tokens

    def result(self) -> LoadResult:
        """Return the figures of everything counted."""
        names = self._domains if self._apart else ()
        return LoadResult(
            tokens=int(self.tokens.sum()),
            loads=self._loads(self.counts.sum(axis=(0, 1))),
            by_phase=self._parts(PHASES, 0),
            by_domain=self._parts(names, 1),
            domains_left_out=self._left_out,
        )

    def _loads(self, counts: Ints) -> Loads:
        return Loads(counts=counts, moe_layer_ids=self._layers)

    def _parts(self, names: tuple[str, ...], axis: int) -> dict[str, LoadPart]:
        tokens, counts = self.tokens.sum(axis=1 - axis), self.counts.sum(axis=1 - axis)
        return {
            name: LoadPart(tokens=int(tokens[i]), loads=self._loads(counts[i]))
            for i, name in enumerate(names)
            if tokens[i]
        }
