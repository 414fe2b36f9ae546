"""Some whole requests of a data set, for statistics that need random access or much time.

Requests are ordered by a hash of their number, and taken while they fit into a number of tokens:
the same ones however the data set is cut into chunks or parts, spread over all of it. Unit: tokens.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from traces.measures.base import About
from traces.routing_trace import RoutingTrace

SAMPLE_TOKENS = 200_000


def chosen_requests(about: About, tokens: int | None = SAMPLE_TOKENS) -> NDArray[np.bool_]:
    """Say which requests a sample of at most so many tokens takes.

    Parameters
    ----------
    about : About
        Of the whole data set, R requests.
    tokens : int, optional
        At most so many, but for a single request that is longer; None takes all.

    Returns
    -------
    bool array ``[R]``
        All, where they fit. Else the longest beginning of the hash order that fits; where not even
        the first one does, the shortest request alone.

    Raises
    ------
    InputError
        If ``tokens`` is below 1.
    """
    if tokens is not None and tokens < 1:
        raise InputError(f"sample of {tokens} tokens -- must be at least 1, or none for all")
    lengths = about.lengths
    if tokens is None or lengths.sum() <= tokens:
        return np.ones(len(lengths), np.bool_)
    order = np.argsort(_mixed(np.arange(len(lengths), dtype=np.uint64)), kind="stable")
    taken = order[np.cumsum(lengths[order]) <= tokens]
    chosen = np.zeros(len(lengths), np.bool_)
    chosen[taken if len(taken) else lengths.argmin()] = True
    return chosen


def _mixed(number: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash numbers one to one: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    state = (number + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


@dataclass(frozen=True, kw_only=True, eq=False)
class Sampled:
    """What was taken of a data set, and how much of it that is."""

    trace: RoutingTrace
    """Request after request by number, positions ascending; without weights and candidates."""
    num_tokens: int
    """Of the whole data set."""
    num_requests: int
    """Of the whole data set."""

    @property
    def whole(self) -> bool:
        """Whether nothing was left out."""
        return self.trace.num_tokens == self.num_tokens

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        taken = self.trace.num_tokens
        return {
            "tokens": taken,
            "requests": self.trace.num_requests,
            "tokens_share": taken / self.num_tokens,
            "whole": self.whole,
        }


class Sample:
    """Collects the rows of the chosen requests; a `Measure` whose result is a `Sampled`.

    Parameters
    ----------
    about : About
    tokens : int, optional
        As in `chosen_requests`.
    """

    def __init__(self, about: About, tokens: int | None = SAMPLE_TOKENS) -> None:
        self._about, self._chosen = about, chosen_requests(about, tokens)
        self._parts: list[RoutingTrace] = []

    def add(self, chunk: RoutingTrace) -> None:
        """Keep the rows of chosen requests."""
        rows = np.flatnonzero(self._chosen[chunk.request_id])
        if len(rows):
            meta = replace(chunk.meta, num_candidates=0)
            bare = replace(
                chunk, meta=meta, weights=None, candidates=None, candidate_scores=None
            )  # fmt: skip
            self._parts.append(bare.select(rows))

    def merge(self, other: Self) -> None:
        """Take in the rows of another part."""
        self._parts += other._parts

    def result(self) -> Sampled:
        """Return the sample, in the order of the data set.

        Raises
        ------
        InputError
            If no row was seen.
        """
        if not self._parts:
            raise InputError("sample: no tokens were given to it -- feed it the data set's chunks")
        parts = sorted(self._parts, key=lambda part: int(part.request_id[0]))
        names = parts[0].columns
        first = parts[0]
        trace = RoutingTrace(
            meta=first.meta,
            domains=first.domains,
            **{name: np.concatenate([part.columns[name] for part in parts]) for name in names},
        )
        return Sampled(
            trace=trace,
            num_tokens=self._about.num_tokens,
            num_requests=self._about.num_requests,
        )
