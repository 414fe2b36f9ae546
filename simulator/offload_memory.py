"""Bytes in each memory of a rank when experts live in several tiers, and whether they fit.

The fast memory holds everything but the experts as `simulator.memory` counts it, and besides the
resident experts, the cache's slots and the buffers that copies land in; the home holds every
expert that is not always resident. Figures of a node's memories are a rank's share.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from basis.errors import InfeasibleError
from basis.units import format_quantity
from hwmodels.cluster import Cluster
from simulator.memory import USABLE, MemoryNeed
from simulator.offload import Offload
from simulator.offload_decide import Bools, Decisions
from simulator.site_costs import stops
from traces.model_spec import ModelSpec

_SIDE_OF_RESIDENT = {"list", "list_code", "split", "ops_per_byte", "one_unit"}
"""Sites that may compute a resident expert aside, so that its home keeps a copy."""
EXPERT_TERMS = ("resident experts", "expert cache", "landing buffers")
"""Terms of the fast memory that hold experts."""
Terms = dict[str, float]
"""Bytes by what takes them."""


@dataclass(frozen=True, kw_only=True)
class TierNeed:
    """What the fullest rank needs of one memory."""

    terms: Terms
    limit: float
    """Bytes that may be taken: 90 % of the capacity, as in `simulator.memory`."""

    @property
    def total(self) -> float:
        """Bytes."""
        return sum(self.terms.values())


def tier_needs(
    need: MemoryNeed,
    model: ModelSpec,
    cluster: Cluster,
    offload: Offload,
    decisions: Decisions,
    static: Bools,
    expert_bytes: float,
) -> dict[str, TierNeed]:
    """Count the bytes of every memory that is used, by its name, the fast one first.

    Parameters
    ----------
    need : MemoryNeed
        Everything resident; its experts are not counted here.
    static : bool array [L, G, n]
        Experts that always stay in the fast memory.
    expert_bytes : float
        Of one expert on one rank.
    """
    fast = cluster.device.processor.memory
    fullest = int((need.weights + need.kv_cache + need.buffers).argmax())
    layers = len(static)
    always = _fullest(static) * expert_bytes
    tiers: dict[str, Terms] = {fast: {"weights outside experts": float(need.weights[fullest])}}
    tiers[fast] |= {"resident experts": always, "buffers": float(need.buffers[fullest])}
    if offload.cache is not None:
        count = offload.cache.slots * (layers if offload.cache.scope == "layer" else 1)
        tiers[fast]["expert cache"] = count * expert_bytes
    landing = landing_experts(offload, decisions)
    if extra := max(0, landing - (0 if offload.cache is None else offload.cache.slots)):
        tiers[fast]["landing buffers"] = extra * expert_bytes
    if offload.home != fast:
        kept = static if offload.site.name not in _SIDE_OF_RESIDENT else np.zeros_like(static)
        warm = ~decisions.cold[0] & ~kept
        between = stops(cluster, offload.home)[1:-1]
        tiers |= {stop: {"landing buffers": landing * expert_bytes} for stop in between}
        if between:
            tiers[between[-1]]["warm experts"] = _fullest(warm) * expert_bytes
        tiers.setdefault(offload.home, {})["experts"] = _fullest(~kept & ~warm) * expert_bytes
    at = fast if offload.attention is None else cluster.processor(offload.attention).memory
    cache = tiers.setdefault(at, {})
    cache[f"KV cache at a mean context of {need.mean_context:.0f}"] = float(need.kv_cache[fullest])
    return {
        name: TierNeed(terms=terms, limit=USABLE * cluster.memory(name).capacity.value)
        for name, terms in tiers.items()
    }


def _fullest(experts: Bools) -> int:
    """Most experts of a rank, of [L, G, n]."""
    return int(experts.sum(axis=(0, 2)).max())


def landing_experts(offload: Offload, decisions: Decisions) -> int:
    """Most copied experts of a rank that are there at a time, besides what a cache kept.

    While a layer runs these are its own copied experts and those that are already on their way
    for the next ``depth`` layers; with a cache they land in its slots as far as these go.
    """
    ahead = decisions.residency.ahead.sum(axis=-1)
    if offload.predictor.name == "all":
        return int((offload.predictor.depth + 1) * ahead.max(initial=0))
    total = decisions.fetched.sum(axis=-1) + ahead
    if offload.cache is not None:
        return int(total.max(initial=0))
    for later in range(1, offload.predictor.depth + 1):
        total[:, :-later] += ahead[:, later:]
    return int(total.max(initial=0))


def check_tiers(
    tiers: Mapping[str, TierNeed],
    model: ModelSpec,
    cluster: Cluster,
    offload: Offload,
    decisions: Decisions,
    expert_bytes: float,
) -> None:
    """Check that every memory holds what it must.

    Raises
    ------
    InfeasibleError
        For the memory that lacks most: its terms, its limit, and what would make it fit.
    """
    name, tier = max(tiers.items(), key=lambda pair: pair[1].total - pair[1].limit)
    if tier.total <= tier.limit:
        return
    listed = " + ".join(f"{what} {_gb(size)}" for what, size in tier.terms.items() if size)
    raise InfeasibleError(
        f"{model.name} does not fit on {cluster.name}: memory {name} {_gb(tier.total)} ({listed}) "
        f"-- at most {_gb(tier.limit)} ({USABLE:.0%} of "
        f"{_gb(cluster.memory(name).capacity.value)})",
        levers=_levers(name, tiers, _landing_if_evicted(offload, decisions), expert_bytes),
    )


def _landing_if_evicted(offload: Offload, decisions: Decisions) -> int:
    """Return how many more experts could have to land at once if fewer were resident."""
    if offload.site.name == "home" or offload.cache is not None:
        return 0
    active = int((decisions.tokens > 0).sum(axis=-1).max(initial=0))
    return max(0, active - landing_experts(offload, decisions))


def _levers(
    name: str, tiers: Mapping[str, TierNeed], landing: int, expert_bytes: float
) -> tuple[str, ...]:
    """Say, each by itself, what would make the memory fit."""
    tier = tiers[name]
    excess = tier.total - tier.limit
    levers = []
    for what, unit in (("resident experts", "resident experts"), ("expert cache", "cache slots")):
        size = tier.terms.get(what, 0.0)
        fewer = int(np.ceil(excess / expert_bytes)) + landing
        if size >= fewer * expert_bytes:
            levers.append(f"{fewer} fewer {unit} (of {round(size / expert_bytes)}, all layers)")
    spare = {n: t.limit - t.total for n, t in tiers.items() if n != name}
    if "experts" in tier.terms and any(room >= excess for room in spare.values()):
        other = max(spare, key=lambda n: spare[n])
        levers.append(f"at least {_gb(excess)} of experts in {other}, which has room")
    moving = sum(v for k, v in tier.terms.items() if k.startswith("KV cache") or k == "buffers")
    if moving > excess:
        levers.append(f"a batch at most {1 - excess / moving:.0%} of this one")
    levers.append(f"a memory {name} of at least {_gb(tier.total / USABLE)}")
    return tuple(levers)


def _gb(value: float) -> str:
    return format_quantity(float(value), "B")
