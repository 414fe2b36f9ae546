"""How many of a token's experts the token before it, or some tokens before it, used as well.

Over pairs of tokens of one request whose positions differ by the lag. Figures are shares of the K
experts of a token and layer, beside what independent tokens with the same loads would share.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from traces.counts import expert_counts
from traces.measures.base import About, Floats, Ints, spread
from traces.routing_trace import RoutingTrace

LAGS = (1, 2, 4, 8, 16)
_BLOCK = 2**16  # ids compared at a time: they stay in the cache of a core


@dataclass(frozen=True, kw_only=True, eq=False)
class ReuseResult:
    """Reuse at N lags in L layers; NaN where no two tokens are that far apart."""

    moe_layer_ids: tuple[int, ...]
    lags: tuple[int, ...]
    """Differences of positions, tokens."""
    pairs: Ints
    """``[N]`` pairs of tokens seen."""
    observed: Floats
    """``[N, L]`` mean share of the K experts that both tokens use."""
    independent: Floats
    """``[L]`` the same of independent tokens with the trace's loads: ``sum_e p_e^2 / K``, with p_e
    the share of tokens that use e."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        ids = self.moe_layer_ids
        return {
            "lags": [
                {"lag": lag, "pairs": int(pairs), "reuse": spread(shares, ids)}
                for lag, pairs, shares in zip(self.lags, self.pairs, self.observed, strict=True)
            ],
            "independent": spread(self.independent, ids),
        }


class Reuse:
    """Experts that tokens a lag apart have in common.

    Parameters
    ----------
    about : About
        The data set.
    lags : tuple of int
        Differences of positions, tokens, at least 1.
    """

    def __init__(self, about: About, lags: tuple[int, ...] = LAGS) -> None:
        meta = about.meta
        self._lags, self._top_k, self._layers = lags, meta.top_k, meta.moe_layer_ids
        self.common: Ints = np.zeros((len(lags), meta.num_layers), np.int64)
        """``[N, L]`` experts in common, summed over the pairs."""
        self.pairs: Ints = np.zeros(len(lags), np.int64)
        self.counts: Ints = np.zeros((meta.num_layers, meta.num_experts), np.int64)
        self.tokens = 0
        self._last: tuple[Ints, NDArray[np.uint16]] | None = None  # places, [K, rows, L]

    def add(self, chunk: RoutingTrace) -> None:
        """Compare the tokens of a chunk with those before, in it and in the chunk before."""
        self.tokens += chunk.num_tokens
        self.counts += expert_counts(chunk.experts, self.counts.shape[1])
        place = chunk.request_id.astype(np.int64) << 32 | chunk.position.astype(np.int64)
        choices = np.ascontiguousarray(chunk.experts.transpose(2, 0, 1))  # [K, T, L]
        new = 0
        if self._last is not None:
            new = len(self._last[0])
            place = np.concatenate([self._last[0], place])
            choices = np.concatenate([self._last[1], choices], axis=1)
        for at, lag in enumerate(self._lags):
            before, after = _pairs(place, lag, new)
            self.pairs[at] += len(after)
            self.common[at] += _shared(choices[:, before], choices[:, after])
        # positions of a request ascend: nothing further back is within the largest lag
        keep = slice(-max(self._lags), None)
        self._last = place[keep].copy(), choices[:, keep].copy()

    def merge(self, other: Self) -> None:
        """Add what was found on other whole requests."""
        self.common += other.common
        self.pairs += other.pairs
        self.counts += other.counts
        self.tokens += other.tokens

    def result(self) -> ReuseResult:
        """Return the shares."""
        used = self.counts / max(self.tokens, 1)
        pairs = np.where(self.pairs, self.pairs, np.nan)[:, None]
        return ReuseResult(
            moe_layer_ids=self._layers,
            lags=self._lags,
            pairs=self.pairs.copy(),
            observed=self.common / (pairs * self._top_k),
            independent=(used**2).sum(axis=1) / self._top_k,
        )


def _pairs(place: Ints, lag: int, new: int) -> tuple[Ints, Ints]:
    """Return rows of tokens and of those ``lag`` positions later that are rows ``new`` or later.

    ``place [T]`` ascends: request and position in one number.
    """
    before = np.arange(len(place))
    after = np.searchsorted(place, place + lag)
    found = after < len(place)
    before, after = before[found], after[found]
    right = (place[after] == place[before] + lag) & (after >= new)
    return before[right], after[right]


def _shared(first: NDArray[np.uint16], second: NDArray[np.uint16]) -> Ints:
    """Count, per layer, the ids that ``[K, T, L]`` choices have in common: ``[L]``."""
    top_k, pairs, layers = first.shape
    total = np.zeros(layers, np.int64)
    rows = max(_BLOCK // layers, 1)
    for start in range(0, pairs, rows):
        ones, others = first[:, start : start + rows], second[:, start : start + rows]
        common = np.zeros(ones.shape[1:], np.min_scalar_type(top_k))
        for one in ones:
            for other in others:
                common += one == other
        total += common.sum(axis=0, dtype=np.int64)
    return total
