"""Whether loads stay the same: over the trace, and from domain to domain.

The distance of two loads of a layer is their total variation: half the sum over the experts of the
difference of shares, 0 (the same) to 1 (no expert in common). Two samples of the same source differ
too, so every distance stands beside a floor: what chance alone would show.
"""

from dataclasses import dataclass
from itertools import combinations
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from traces.counts import expert_counts
from traces.measures.base import About, Floats, Ints, groups, plain, spread
from traces.routing_trace import RoutingTrace

WINDOWS = 8
MAX_BYTES = 2**28
"""Domains are not compared where their counts would take more than this (bytes)."""
_FARTHEST = 10  # pairs of domains that to_dict lists


@dataclass(frozen=True, kw_only=True, eq=False)
class DriftResult:
    """Distances between parts of a trace; L layers, W windows, D domains with tokens.

    NaN where a part has no tokens.
    """

    moe_layer_ids: tuple[int, ...]
    early_late: Floats
    """``[L]`` first half of the requests against the rest."""
    even_odd: Floats
    """``[L]`` even-numbered requests against odd ones: the same mix of requests, so this is the
    floor of ``early_late``."""
    independent: Floats
    """``[L]`` what two halves of independent tokens would show, see `floor`."""
    windows: Floats
    """``[W, W]`` mean over the layers, between windows of as many requests each, in order."""
    windows_floor: Floats
    """``[W, W]`` mean over the layers, of independent tokens times ``alike``."""
    domains: tuple[str, ...]
    domain_tokens: Ints
    """``[D]``"""
    between_domains: Floats
    """``[D, D]`` mean over the layers."""
    between_domains_floor: Floats
    """``[D, D]`` mean over the layers, of independent tokens times ``alike``."""
    alike: float
    """``even_odd`` over ``independent``, means over the layers, at least 1: how much farther
    apart two samples are because tokens of a request are alike."""
    domains_left_out: str
    """Why domains are not compared, where memory forbids; else empty."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; of the pairs of domains those farthest above their floor."""
        ids = self.moe_layer_ids
        return {
            "early_late": spread(self.early_late, ids),
            "even_odd": spread(self.even_odd, ids),
            "independent": spread(self.independent, ids),
            "alike": plain(self.alike),
            "windows": plain(self.windows),
            "windows_floor": plain(self.windows_floor),
            "domains": len(self.domains),
            "domains_farthest": self._farthest(),
            "domains_left_out": self.domains_left_out,
        }

    def _farthest(self) -> list[dict[str, Any]]:
        above = self.between_domains - self.between_domains_floor
        pairs = sorted(combinations(range(len(self.domains)), 2), key=lambda ab: -above[ab])
        return [
            {
                "domains": [self.domains[a], self.domains[b]],
                "tokens": [int(self.domain_tokens[a]), int(self.domain_tokens[b])],
                "distance": float(self.between_domains[a, b]),
                "floor": float(self.between_domains_floor[a, b]),
            }
            for a, b in pairs[:_FARTHEST]
        ]


class Drift:
    """Counts of each layer's experts in windows of requests, and by domain.

    Parameters
    ----------
    about : About
        The data set.
    windows : int
        Windows of as many requests each, even.
    max_bytes : int
        Domains are not compared where their counts would take more than this (bytes).
    """

    def __init__(self, about: About, windows: int = WINDOWS, max_bytes: int = MAX_BYTES) -> None:
        meta = about.meta
        self._layers, self._top_k = meta.moe_layer_ids, meta.top_k
        self._requests, self._domains = about.num_requests, about.domains
        cells = (meta.num_layers, meta.num_experts)
        size = len(about.domains) * meta.num_layers * meta.num_experts * 8
        self._left_out = ""
        if size > max_bytes:
            self._left_out = (
                f"{len(about.domains)} domains take {size / 2**20:.0f} MiB of counts, at most "
                f"{max_bytes / 2**20:.0f} MiB"
            )
            self._domains = ()
        self.windows: Ints = np.zeros((windows, 2, *cells), np.int64)
        """``[W, even or odd request, L, E]``"""
        self.domains: Ints = np.zeros((len(self._domains), *cells), np.int64)
        """``[D, L, E]``"""

    def add(self, chunk: RoutingTrace) -> None:
        """Count the choices of a chunk."""
        request = chunk.request_id.astype(np.int64)
        window = request * len(self.windows) // self._requests
        names = max(len(self._domains), 1)
        domain = chunk.domain.astype(np.int64) if self._domains else 0
        for label, rows in groups((window * 2 + request % 2) * names + domain):
            part, at = divmod(label, names)
            counts = expert_counts(chunk.experts[rows], self.windows.shape[-1])
            self.windows[part // 2, part % 2] += counts
            if self._domains:
                self.domains[at] += counts

    def merge(self, other: Self) -> None:
        """Add the counts of another part."""
        self.windows += other.windows
        self.domains += other.domains

    def result(self) -> DriftResult:
        """Return distances and floors."""
        windows, half = self.windows.sum(axis=1), len(self.windows) // 2
        even, odd = self.windows.sum(axis=0)
        even_odd, independent = distance(even, odd), floor(even, odd, self._top_k)
        by_chance = float(independent.mean())
        alike = max(float(even_odd.mean()) / by_chance, 1.0) if by_chance else 1.0
        used = np.flatnonzero(self.domains.any(axis=(1, 2)))
        domains = self.domains[used]
        between, between_floor = _matrix(domains, self._top_k)
        over_time, over_time_floor = _matrix(windows, self._top_k)
        return DriftResult(
            moe_layer_ids=self._layers,
            early_late=distance(windows[:half].sum(axis=0), windows[half:].sum(axis=0)),
            even_odd=even_odd,
            independent=independent,
            windows=over_time,
            windows_floor=over_time_floor * alike,
            domains=tuple(self._domains[i] for i in used),
            domain_tokens=domains[:, 0].sum(axis=-1) // self._top_k,
            between_domains=between,
            between_domains_floor=between_floor * alike,
            alike=alike,
            domains_left_out=self._left_out,
        )


def distance(first: NDArray[Any], second: NDArray[Any]) -> Floats:
    """Return the total variation distance ``[...]`` of loads ``[..., E]``; NaN without tokens."""
    return np.abs(_shares(first) - _shares(second)).sum(axis=-1) / 2


def floor(first: NDArray[Any], second: NDArray[Any], top_k: int) -> Floats:
    """Return the expected distance of two samples of independent tokens from one source.

    A token uses expert e with the probability p_e of both samples together, so its share of a
    sample of T tokens has the variance ``p_e (1 - p_e) / (K^2 T)``; the mean of the absolute value
    of a normal variable is ``sqrt(2 / pi)`` of its standard deviation.

    Parameters
    ----------
    first, second : int arrays ``[..., E]``
        (token, choice) pairs of each expert.
    top_k : int
        K.

    Returns
    -------
    float64 array ``[...]``, NaN without tokens
    """
    one, other = (counts.sum(axis=-1, keepdims=True) / top_k for counts in (first, second))
    one, other = np.where(one > 0, one, np.nan), np.where(other > 0, other, np.nan)
    used = (first + second) / (one + other)
    variance = used * (1 - used) / top_k**2 * (1 / one + 1 / other)
    return np.sqrt(2 / np.pi * np.maximum(variance, 0)).sum(axis=-1) / 2


def _shares(counts: NDArray[Any]) -> Floats:
    with np.errstate(invalid="ignore"):
        return counts / counts.sum(axis=-1, keepdims=True)


def _matrix(parts: Ints, top_k: int) -> tuple[Floats, Floats]:
    """Return distance and floor ``[n, n]`` of parts ``[n, L, E]``, means over the layers."""
    size = len(parts)
    found, by_chance = np.zeros((size, size)), np.zeros((size, size))
    for a, b in combinations(range(size), 2):
        found[a, b] = found[b, a] = distance(parts[a], parts[b]).mean()
        by_chance[a, b] = by_chance[b, a] = floor(parts[a], parts[b], top_k).mean()
    return found, by_chance
