"""What a site policy reckons with: prices of single experts on both processors, and of copies.

A group's time is taken to add up over its experts: what one more expert adds to a call, at every
number of tokens that occurs, and what the call costs besides. Seconds.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from basis.dtypes import bytes_of
from hwmodels.cluster import Cluster
from hwmodels.cost import price
from hwmodels.ops import Copy, GroupedGemm
from simulator.offload import Offload

Floats = NDArray[np.float64]


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
