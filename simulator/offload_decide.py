"""What is resident, what is copied ahead and where each expert runs, for every step, layer, rank.

Decisions follow from the order of accesses and from prices, never from the times of a played
step: first the residency of a whole sequence (static experts, cache, predictor), then the site of
every active expert. S steps, L MoE layers, G ranks, n expert slots of a rank.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from basis.dtypes import bytes_of
from hwmodels.cluster import Cluster
from hwmodels.cost import price
from hwmodels.ops import Copy, GroupedGemm
from simulator.offload import Offload
from simulator.sites import SiteProblem, Where, assign
from traces.caches import replay
from traces.predictors import predict

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


def find_residency(
    offload: Offload,
    active: Bools,
    static: Bools,
    scores: Floats | None = None,
    *,
    seed: int = 0,
) -> Residency:
    """Play static experts, predictor and cache over a sequence of steps.

    Without a cache, experts that were copied ahead are dropped after their layer.

    Parameters
    ----------
    offload : Offload
    active : bool array [S, L, G, n]
        Experts with tokens, in the order of steps.
    static : bool array [L, G, n]
        Experts that always stay.
    scores : float array [S, L, G, n], optional
        Input of a cache score that needs router weights.
    seed : int
        Of a predictor with errors.
    """
    ranks = active.shape[2]
    parts = [
        _rank_residency(
            offload,
            active[:, :, g],
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
    offload: Offload, active: Bools, static: Bools, scores: Floats | None, seed: int
) -> tuple[Bools, Bools]:
    p, cache = offload.predictor, offload.cache
    expected = predict(p.name, active, depth=p.depth, accuracy=p.accuracy, count=p.count, seed=seed)
    if p.name != "all":  # the copies would have to be issued in the step before
        expected[:, : p.depth] = False
    if cache is None:
        ahead = expected & ~static
        return ahead | static, ahead
    played = replay(
        active,
        slots=cache.slots,
        score=cache.score,
        scope=cache.scope,
        scores=scores,
        decay=cache.decay,
        prefetched=expected,
        pinned=static,
    )
    return played.resident | static, np.asarray(played.prefetched)


def decide(
    offload: Offload,
    cluster: Cluster,
    op: GroupedGemm,
    expert_bytes: float,
    residency: Residency,
    cold: Bools,
    aside: Bools | None = None,
) -> Decisions:
    """Choose the site of every active expert.

    Parameters
    ----------
    offload : Offload
    cluster : Cluster
    op : GroupedGemm
        Tokens of every slot, rows [S * L * G, n], as if all ran on the fast processor.
    expert_bytes : float
        Of one expert on one rank.
    residency : Residency
    cold : bool array [L, G, n]
        Experts that have to come all the way from their home.
    aside : bool array [L, G, n], optional
        Table of the site ``planned``.
    """
    tokens = op.tokens_per_expert.reshape(residency.held.shape).astype(np.int64)
    if offload.site.name == "fetch":
        costs = SiteCosts(fast_s=np.zeros(1), side_s=np.zeros(1))
    else:
        costs = site_costs(offload, cluster, op, expert_bytes)
    answer = assign(
        offload.site.name,
        SiteProblem(
            tokens=tokens,
            resident=residency.held,
            fast_s=costs.fast_s[np.minimum(tokens, len(costs.fast_s) - 1)],
            fetch_s=np.where(cold, costs.fetch_s, costs.warm_fetch_s),
            side_s=costs.side_s[np.minimum(tokens, len(costs.side_s) - 1)]
            + cold * costs.read_aside_s,
            fast_fixed=costs.fast_fixed,
            side_fixed=costs.side_fixed,
            threshold=offload.site.threshold,
            aside=None if aside is None else np.broadcast_to(aside, tokens.shape),
        ),
    )
    return Decisions(
        tokens=tokens,
        residency=residency,
        cold=np.broadcast_to(cold, tokens.shape),
        where=answer.where,
        order=answer.order,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteCosts:
    """What a site policy reckons with, seconds."""

    fast_s: Floats
    """What an expert adds to a call on the fast processor, by its tokens, [tokens + 1]."""
    side_s: Floats
    """What it adds on the side processor, activations there and back included."""
    fetch_s: float = 0.0
    """Copy of one expert from its home."""
    warm_fetch_s: float = 0.0
    """Copy of one expert over the last link."""
    read_aside_s: float = 0.0
    """Copy of one expert from its home to the side processor's memory."""
    fast_fixed: float = 0.0
    """Launch of a call."""
    side_fixed: float = 0.0
    """Launch there, and the startups of both activation copies."""


def site_costs(
    offload: Offload, cluster: Cluster, op: GroupedGemm, expert_bytes: float
) -> SiteCosts:
    """Price experts one by one, at every number of tokens that occurs.

    The launch of a call is what two equal experts in one call save against two calls.
    """
    fast, home = cluster.device.processor.memory, offload.home
    counts = np.unique(op.tokens_per_expert)
    counts = counts[counts > 0]
    fast_s, fast_fixed = _per_expert(op, counts, cluster, None)
    last = stops(cluster, home)[-2:][0]
    costs = SiteCosts(
        fast_s=fast_s,
        side_s=np.zeros(1),
        fetch_s=_copy_seconds(expert_bytes, home, fast, cluster),
        warm_fetch_s=_copy_seconds(expert_bytes, last, fast, cluster),
        fast_fixed=fast_fixed,
    )
    name = offload.site.processor
    if name is None or not offload.site.needs_processor:
        return costs
    side_s, side_fixed = _per_expert(op, counts, cluster, name)
    memory = cluster.processor(name).memory
    if memory != fast:
        row = bytes_of(op.activation_dtype, op.hidden)
        there, back = (
            [_copy_seconds(n * row, *ends, cluster) for n in (1, 2)]
            for ends in ((fast, memory), (memory, fast))
        )
        per_row = there[1] - there[0] + back[1] - back[0]
        side_s = side_s + per_row * np.arange(len(side_s))
        side_fixed += 2 * (there[0] + back[0]) - there[1] - back[1]
    read = _copy_seconds(expert_bytes, home, memory, cluster)
    return replace(costs, side_s=side_s, read_aside_s=read, side_fixed=side_fixed)


def _per_expert(
    op: GroupedGemm, counts: NDArray[np.integer], cluster: Cluster, on: str | None
) -> tuple[Floats, float]:
    """Return what an expert adds by its tokens, [tokens + 1], and what a call costs besides."""
    table = np.zeros(int(counts.max(initial=0)) + 1)
    if not len(counts):
        return table, 0.0
    pairs = np.stack([np.concatenate([counts, counts]), np.concatenate([0 * counts, counts])], 1)
    one, two = np.split(price(resized(op, pairs), cluster, on=on).seconds, 2)
    table[counts] = two - one
    return table, float((2 * one - two).max())


def resized(op: GroupedGemm, tokens_per_expert: NDArray[np.integer]) -> GroupedGemm:
    """Return the same experts with other tokens, [rows, experts]."""
    return GroupedGemm(
        tokens_per_expert=tokens_per_expert,
        hidden=op.hidden,
        width=op.width,
        gated=op.gated,
        weight_dtype=op.weight_dtype,
        activation_dtype=op.activation_dtype,
    )


def stops(cluster: Cluster, home: str) -> tuple[str, ...]:
    """Memories from the home to the fast one, both included; the way with the fewest hops.

    Raises
    ------
    InputError
        If a memory is unknown or no path joins the two.
    """
    passed = [home]
    for link in cluster.path(home, cluster.device.processor.memory):
        one, other = link.ends or (home, home)
        passed.append(other if one == passed[-1] else one)
    return tuple(passed)


def _copy_seconds(size: float, source: str, target: str, cluster: Cluster) -> float:
    if source == target:
        return 0.0
    op = Copy(bytes=np.array([size]), source=source, target=target)
    return float(price(op, cluster).seconds[0])
