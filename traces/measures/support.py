"""What a trace can and cannot support: how exact its loads are, and what it does not contain.

Tokens of one request use alike experts, so they count for less than as many independent tokens.
The variance of a load is therefore taken from request to request (cluster sampling): for the share
p_e of tokens that use expert e, with n_re uses among the n_r tokens of request r of R, ::

    Var(p_e) = R / (R - 1) * sum_r (n_re - p_e n_r)^2 / T^2

(ratio estimator; W. G. Cochran, "Sampling Techniques", 3rd ed. 1977, section 6.4). The sums
of n_re^2 and of n_re n_r are whole numbers, so that parts add up exactly.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from traces.counts import expert_counts
from traces.measures.base import About, Floats, Ints, plain, spread
from traces.routing_trace import RoutingTrace

Verdict = Literal["yes", "roughly", "no"]
ENOUGH, ROUGH = 0.05, 0.2
"""Relative standard errors of an average load up to which a placement by load is well founded, or
roughly. A convention: a rank that holds n experts has about this over sqrt(n)."""
STEP_TOKENS, FEW_STEP_TOKENS = 256, 16
"""Tokens of different requests that a decode step is to have, for stragglers or roughly."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Finding:
    """One question and whether the trace answers it."""

    question: str
    answer: Verdict
    value: float
    """The number behind the answer; NaN where not known."""
    why: str
    """What the number is, and what would be needed."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return plain(self)


@dataclass(frozen=True, kw_only=True, eq=False)
class SupportResult:
    """What T tokens of R requests can tell; L layers, E experts, NaN where not known."""

    moe_layer_ids: tuple[int, ...]
    tokens: int
    requests: int
    consecutive: int
    """Tokens whose predecessor in the request is in the trace."""
    decode_tokens: int
    decode_requests: NDArray[np.bool_]
    """``[R]`` whether the request has tokens of the decode phase."""
    domains: tuple[str, ...]
    """That have tokens."""
    standard_error: Floats
    """``[L, E]`` of the share of tokens that use the expert, from request to request."""
    relative_standard_error: Floats
    """``[L]`` root mean square of ``standard_error`` over the mean share K / E: of the load of an
    average expert, relative to the mean load."""
    max_over_mean_standard_error: Floats
    """``[L]`` of the load max/mean: that of the busiest expert's share, over the mean share. That
    the busiest of several close ones is taken, which raises max/mean, is not in it."""
    independent_standard_error: float
    """``relative_standard_error`` if all tokens were independent and loads even:
    ``sqrt((1 - K/E) / (T K/E))``."""
    effective_tokens: Floats
    """``[L]`` independent tokens that would give the same standard errors:
    ``sum_e p_e (1 - p_e) / sum_e Var(p_e)``."""
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        ids = self.moe_layer_ids
        figures = ("relative_standard_error", "max_over_mean_standard_error", "effective_tokens")
        return plain(self, (*figures, "standard_error", "moe_layer_ids", "decode_requests")) | {
            name: spread(getattr(self, name), ids) for name in figures
        }


class Support:
    """Sums over the requests of the squares of their loads.

    Parameters
    ----------
    about : About
        The data set.
    """

    def __init__(self, about: About) -> None:
        meta = about.meta
        cells = (meta.num_layers, meta.num_experts)
        self._about = about
        self.counts: Ints = np.zeros(cells, np.int64)
        """``[L, E]`` sum of n_re."""
        self.squares: Ints = np.zeros(cells, np.int64)
        """``[L, E]`` sum of n_re^2."""
        self.products: Ints = np.zeros(cells, np.int64)
        """``[L, E]`` sum of n_re n_r."""
        self.decode_tokens = 0
        self.decode_requests = np.zeros(about.num_requests, np.bool_)
        self.consecutive = 0
        self.domain_tokens: Ints = np.zeros(len(about.domains), np.int64)
        self._open: tuple[int, Ints] | None = None  # a request that may go on: number, counts
        self._last = -2  # request and position of the last token, in one number; none yet

    def add(self, chunk: RoutingTrace) -> None:
        """Count the choices of each request."""
        request = chunk.request_id
        place = request.astype(np.int64) << 32 | chunk.position.astype(np.int64)
        # a next request has a higher number in the upper half, so its first token is no successor
        self.consecutive += int((np.diff(place, prepend=self._last) == 1).sum())
        self._last = int(place[-1])
        self.decode_tokens += int(chunk.decode.sum())
        self.decode_requests[request[chunk.decode]] = True
        self.domain_tokens += np.bincount(chunk.domain, minlength=len(self.domain_tokens))
        edges = [0, *(np.flatnonzero(np.diff(request)) + 1).tolist(), len(request)]
        for start, stop in pairwise(edges):
            self._add_request(int(request[start]), chunk.experts[start:stop])

    def _add_request(self, number: int, experts: Any) -> None:
        counts = expert_counts(experts, self.counts.shape[1])
        if self._open is not None and self._open[0] == number:
            counts += self._open[1]
        else:
            self._close()
        self._open = number, counts

    def _close(self) -> None:
        if self._open is not None:
            number, counts = self._open
            self.counts += counts
            self.squares += counts * counts
            self.products += counts * self._about.lengths[number]
            self._open = None

    def merge(self, other: Self) -> None:
        """Add the sums of other whole requests."""
        self._close()
        other._close()
        self.counts += other.counts
        self.squares += other.squares
        self.products += other.products
        self.decode_tokens += other.decode_tokens
        self.decode_requests |= other.decode_requests
        self.consecutive += other.consecutive
        self.domain_tokens += other.domain_tokens

    def result(self) -> SupportResult:
        """Return standard errors and what follows from them."""
        self._close()
        meta, lengths = self._about.meta, self._about.lengths
        tokens, requests = int(lengths.sum()), len(lengths)
        used = self.counts / tokens
        variance = self._variance()
        mean = meta.top_k / meta.num_experts
        error = np.sqrt(variance)
        relative = np.sqrt(variance.mean(axis=1)) / mean
        busiest = used.argmax(axis=1)[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            effective = (used * (1 - used)).sum(axis=1) / variance.sum(axis=1)
        return SupportResult(
            moe_layer_ids=meta.moe_layer_ids,
            tokens=tokens,
            requests=requests,
            consecutive=self.consecutive,
            decode_tokens=self.decode_tokens,
            decode_requests=self.decode_requests,
            domains=tuple(
                name
                for name, count in zip(self._about.domains, self.domain_tokens, strict=True)
                if count
            ),
            standard_error=error,
            relative_standard_error=relative,
            max_over_mean_standard_error=np.take_along_axis(error, busiest, 1)[:, 0] / mean,
            independent_standard_error=float(np.sqrt((1 - mean) / (tokens * mean))),
            effective_tokens=np.where(np.isfinite(effective), effective, np.nan),
            findings=self._findings(float(relative.mean())),
        )

    def _variance(self) -> Floats:
        """Return ``[L, E]`` Var(p_e); NaN with a single request."""
        lengths = self._about.lengths
        tokens, requests = int(lengths.sum()), len(lengths)
        if requests < 2:
            return np.full(self.counts.shape, np.nan)
        # times T^2, in whole numbers of any size: what cancels does so exactly
        uses, squares, products = (
            sums.astype(object) for sums in (self.counts, self.squares, self.products)
        )
        moved = tokens**2 * squares - 2 * tokens * uses * products
        moved += uses**2 * int((lengths**2).sum())
        return (moved * requests / ((requests - 1) * tokens**4)).astype(np.float64)

    def _findings(self, relative: float) -> tuple[Finding, ...]:
        about = self._about
        tokens, requests = int(about.lengths.sum()), about.num_requests
        domains = int((self.domain_tokens > 0).sum())
        decode = self.decode_tokens / tokens
        return (
            Finding(
                question="placement by load",
                answer=_at_most(relative, ENOUGH, ROUGH),
                value=relative,
                why="standard error of an average expert's load over the mean load, mean over the "
                f"layers; up to {ENOUGH:g} is enough, up to {ROUGH:g} rough",
            ),
            Finding(
                question="stragglers of a step",
                answer=_at_most(-requests, -STEP_TOKENS, -FEW_STEP_TOKENS),
                value=requests,
                why="requests, so tokens that a decode step can have from different ones; "
                f"{STEP_TOKENS} are enough, {FEW_STEP_TOKENS} rough, for no larger batches",
            ),
            Finding(
                question="held-out scores",
                answer="yes" if requests > 1 else "no",
                value=requests,
                why="requests; a plan is scored on requests that it has not seen: at least 2",
            ),
            Finding(
                question="difference between domains",
                answer="yes" if domains > 1 else "no",
                value=domains,
                why="domains that have tokens; at least 2",
            ),
            Finding(
                question="locality from token to token",
                answer="yes" if self.consecutive else "no",
                value=self.consecutive,
                why="tokens whose predecessor in the request is in the trace",
            ),
            Finding(
                question="decode",
                answer="yes" if decode else "no",
                value=decode,
                why="share of tokens recorded in the decode phase",
            ),
            Finding(
                question="prefill",
                answer="yes" if decode < 1 else "no",
                value=1 - decode,
                why="share of tokens recorded in the prefill phase",
            ),
        )


def _at_most(value: float, enough: float, rough: float) -> Verdict:
    return "yes" if value <= enough else "roughly" if value <= rough else "no"
