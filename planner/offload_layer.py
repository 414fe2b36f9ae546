"""One MoE layer under a residency: the time of its experts in each step that it is planned on.

The layer ends when the last of three timelines ends: the fast processor's calls, the copies with
the fetched experts behind them, and the other processor with its activations. Steps with equal
tokens per expert are one pattern with a weight. Seconds.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from planner.offload_costs import ExpertTimes, Floats

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Rule = Literal["home", "planned", "any"]
"""What is not kept runs at home (or is fetched, where nothing computes there); under planned each
such expert may be either, but always the same; under any each expert runs in every step where that
step is shortest (a bound only)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """The distinct steps of one layer; P patterns, E experts."""

    tokens: Ints
    """Tokens of each expert, [P, E]."""
    weight: Floats
    """Share of the steps that look so, [P]; sums to 1."""
    times: ExpertTimes

    @classmethod
    def of(cls, counts: NDArray[Any], times: ExpertTimes) -> Self:
        """Gather equal steps of ``counts`` [S, E]."""
        tokens, seen = np.unique(counts.astype(np.int64), axis=0, return_counts=True)
        return cls(tokens=tokens, weight=seen / len(counts), times=times)

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.tokens.shape[1])

    @cached_property
    def fast(self) -> Floats:
        """What an expert adds to the fast group's compute and memory time, [2, P, E]."""
        return self.times.fast.parts[:, self.tokens]

    @cached_property
    def call(self) -> Floats:
        """A fetched expert's own call, [P, E]."""
        return self.times.fast.alone[self.tokens]

    @cached_property
    def side(self) -> Floats:
        """What an expert adds aside to compute and memory time, [2, P, E]; inf without a side."""
        if self.times.side is None:
            return np.full((2, *self.tokens.shape), np.inf)
        return self.times.side.parts[:, self.tokens]

    @property
    def side_start(self) -> float:
        """Launch and startups of the activations' copies, paid once where anything is aside."""
        return self.times.transfer + (self.times.side.launch if self.times.side else 0.0)

    def seconds(self, keep: Bools, fetch: Bools) -> Floats:
        """Time of the experts in each step under C residencies.

        Parameters
        ----------
        keep, fetch : bool [C, E]
            What is resident and what is fetched at each use; the rest is computed aside.

        Returns
        -------
        float64 [C, P]
        """
        total = self._longest(keep, self.fast, self.times.fast.launch)
        if fetch.any():
            own = fetch.astype(float) @ self.call.T
            total = np.maximum(total + own, self._landed(fetch))
        aside = ~(keep | fetch)
        if aside.any():
            total = np.maximum(total, self._aside(aside))
        return total

    def mean(self, keep: Bools, fetch: Bools) -> Floats:
        """Mean over the steps, [C]."""
        return np.asarray(self.seconds(keep, fetch) @ self.weight)

    def landing(self, fetch: Bools) -> int:
        """Most experts that a step fetches, of one residency's ``fetch`` [E]."""
        return int(((self.tokens > 0) & fetch).sum(axis=1).max(initial=0))

    def _longest(self, chosen: Bools, parts: Floats, start: float) -> Floats:
        """Time of one call: start + the larger of compute and memory, [C, P]; 0 without work."""
        which = chosen.astype(float)
        begun = which @ (self.tokens > 0).T > 0
        return np.asarray(np.max([which @ part.T for part in parts], axis=0) + start * begun)

    def _aside(self, chosen: Bools) -> Floats:
        """Other processor with its activations: at most a step's tokens go each way."""
        rows = chosen.astype(float) @ self.tokens.T
        sent = np.minimum(rows, self.tokens.sum(axis=1) // self.times.top_k)
        start = self._longest(chosen, self.side, self.side_start)
        return np.asarray(start + self.times.per_token * sent)

    def _landed(self, fetch: Bools) -> Floats:
        """When the fetched experts end if only copies delay them, [C, P].

        ``max_k (end of copy k + calls from the k-th on)``, copied by falling tokens.
        """
        total = np.zeros((len(fetch), len(self.tokens)))
        some = np.flatnonzero(fetch.any(axis=1))
        order = np.argsort(-self.tokens, axis=-1, kind="stable")
        call = np.take_along_axis(self.call, order, axis=-1)
        used = np.take_along_axis(self.tokens > 0, order, axis=-1)
        fetched = fetch[some][:, order] & used
        rest = np.cumsum((fetched * call)[..., ::-1], axis=-1)[..., ::-1]
        ends = np.cumsum(fetched, axis=-1) * self.times.fetch + self.times.lead + rest
        total[some] = np.where(fetched, ends, 0.0).max(axis=-1)
        return total
