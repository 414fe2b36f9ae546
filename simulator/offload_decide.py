"""What is resident, what is copied ahead and where each expert runs, for every step, layer, rank.

Decisions follow from the order of accesses and from prices, never from the times of a played
step. What is resident depends on what was copied in earlier steps, and that on the sites chosen
there: both are played together, step by step. S steps, L MoE layers, G ranks, n slots of a rank.
"""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from hwmodels.cluster import Cluster
from hwmodels.ops import GroupedGemm
from simulator.offload import Offload
from simulator.site_costs import SiteCosts, site_costs
from simulator.sites import SiteProblem, Where, assign, sites_of
from traces.caches import replay
from traces.caches_play import Loaded
from traces.predictors import most_used, predict

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Residency:
    """Which slots' experts are in the fast memory; all arrays [S, L, G, n]."""

    held: Bools
    """There when the layer runs, static, cached or copied ahead."""
    ahead: Bools
    """Copied for this layer before it was routed, used or not."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Decisions:
    """Everything that the programs of S steps are written from; all arrays [S, L, G, n]."""

    tokens: NDArray[np.int64]
    residency: Residency
    cold: Bools
    """Not even in the memory before the last link; all of them where one link is the whole way."""
    where: NDArray[np.int8]
    """`Where` each expert runs."""
    order: NDArray[np.int64]
    """Place on its timeline, from 0."""

    def tokens_at(self, chosen: Bools) -> NDArray[np.int64]:
        """Tokens of the chosen experts, 0 elsewhere, as rows [S * L * G, n]."""
        return np.where(chosen, self.tokens, 0).reshape(-1, self.tokens.shape[-1])

    @property
    def fetched(self) -> Bools:
        """Copied on demand."""
        return np.asarray(self.where == Where.FETCH)

    @property
    def aside(self) -> Bools:
        """Computed by the side processor."""
        return np.asarray(self.where == Where.SIDE)

    def last(self, steps: int) -> Self:
        """Return those of the last steps."""
        return replace(
            self,
            tokens=self.tokens[-steps:],
            residency=Residency(
                held=self.residency.held[-steps:], ahead=self.residency.ahead[-steps:]
            ),
            cold=self.cold[-steps:],
            where=self.where[-steps:],
            order=self.order[-steps:],
        )


def decide(
    offload: Offload,
    cluster: Cluster,
    op: GroupedGemm,
    expert_bytes: float,
    *,
    static: Bools,
    cold: Bools,
    aside: Bools | None = None,
    scores: Floats | None = None,
    seed: int = 0,
) -> Decisions:
    """Play static experts, predictor, cache and the sites of active experts over all steps.

    Parameters
    ----------
    offload : Offload
    cluster : Cluster
    op : GroupedGemm
        Tokens of every slot, rows [S * L * G, n], as if all ran on the fast processor.
    expert_bytes : float
        Of one expert on one rank.
    static : bool array [L, G, n]
        Experts that always stay.
    cold : bool array [L, G, n]
        Experts that have to come all the way from their home.
    aside : bool array [L, G, n], optional
        Table of the site ``planned``.
    scores : float array [S, L, G, n], optional
        Input of a cache score that needs router weights.
    seed : int
        Of a predictor with errors.
    """
    tokens = op.tokens_per_expert.reshape(-1, *static.shape).astype(np.int64)
    problem = _problem(offload, cluster, op, expert_bytes, tokens, cold, aside)
    residency = find_residency(offload, problem, static, scores, seed=seed)
    answer = assign(offload.site.name, replace(problem, resident=residency.held))
    return Decisions(
        tokens=tokens,
        residency=residency,
        cold=np.broadcast_to(cold, tokens.shape),
        where=answer.where,
        order=answer.order,
    )


def _problem(
    offload: Offload,
    cluster: Cluster,
    op: GroupedGemm,
    expert_bytes: float,
    tokens: NDArray[np.int64],
    cold: Bools,
    aside: Bools | None,
) -> SiteProblem:
    """Write the sites' problem of all steps, with nothing resident."""
    if offload.site.name == "fetch":
        costs = SiteCosts(fast_s=np.zeros(1), side_s=np.zeros(1))
    else:
        costs = site_costs(offload, cluster, op, expert_bytes)
    return SiteProblem(
        tokens=tokens,
        resident=np.zeros(1, dtype=np.bool_),
        fast_s=costs.fast_s[np.minimum(tokens, len(costs.fast_s) - 1)],
        fetch_s=np.where(cold, costs.fetch_s, costs.warm_fetch_s),
        side_s=costs.side_s[np.minimum(tokens, len(costs.side_s) - 1)] + cold * costs.read_aside_s,
        fast_fixed=costs.fast_fixed,
        side_fixed=costs.side_fixed,
        threshold=offload.site.threshold,
        aside=None if aside is None else np.broadcast_to(aside, tokens.shape),
    )


def find_residency(
    offload: Offload,
    problem: SiteProblem,
    static: Bools,
    scores: Floats | None = None,
    *,
    seed: int = 0,
) -> Residency:
    """Play static experts, predictor and cache over a sequence of steps.

    An expert enters the cache when it is copied: ahead, or on demand because its site says so.
    What the side processor computes does not enter. Without a cache, experts that were copied
    ahead are dropped after their layer.

    Parameters
    ----------
    problem : SiteProblem
        Of the experts [S, L, G, n], in the order of steps; residents are filled in here.
    static, scores, seed
        As `decide`.
    """
    ranks = problem.tokens.shape[2]
    parts = [
        _rank_residency(
            offload,
            problem,
            g,
            static[:, g],
            None if scores is None else scores[:, :, g],
            seed + g,
        )
        for g in range(ranks)
    ]
    return Residency(
        held=np.stack([held for held, _ in parts], axis=2),
        ahead=np.stack([ahead for _, ahead in parts], axis=2),
    )


def _rank_residency(
    offload: Offload,
    problem: SiteProblem,
    rank: int,
    static: Bools,
    scores: Floats | None,
    seed: int,
) -> tuple[Bools, Bools]:
    p, cache = offload.predictor, offload.cache
    active = problem.tokens[:, :, rank] > 0
    expected = predict(p.name, active, depth=p.depth, accuracy=p.accuracy, count=p.count, seed=seed)
    if p.name != "all":  # the copies would have to be issued in the step before
        expected[:, : p.depth] = False
    if cache is None:
        ahead = expected & ~static
        ahead = ahead if p.count is None else most_used(ahead, active, p.count)
        return ahead | static, ahead
    played = replay(
        active,
        slots=cache.slots,
        score=cache.score,
        scope=cache.scope,
        scores=scores,
        decay=cache.decay,
        prefetched=expected,
        most_ahead=p.count,
        pinned=static,
        loaded=_copied(offload, problem, rank, static),
    )
    return played.resident | static, np.asarray(played.prefetched)


def _copied(offload: Offload, problem: SiteProblem, rank: int, static: Bools) -> Loaded | None:
    """Return which misses a rank's site copies; None where it copies all of them."""
    if offload.site.name == "fetch":
        return None

    def copied(step: int, layers: slice, resident: Bools) -> Bools:
        due = problem.part((step, layers, rank), resident | static[layers])
        return np.asarray(sites_of(offload.site.name, due) == Where.FETCH)

    return copied
