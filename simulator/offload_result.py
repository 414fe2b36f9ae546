"""What a simulation of a deployment with tiers answers besides an ordinary Result.

Hit rates count (step, layer, expert) accesses, shares count (token, expert) pairs, bytes are those
of the copies that were played, and the critical path says which stage the step time is spent on.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.offload import Offload
from simulator.offload_decide import Bools, Decisions
from simulator.offload_memory import TierNeed
from simulator.program import Item, Played, Stream
from simulator.result import Result
from simulator.sites import Where


@dataclass(frozen=True, kw_only=True, eq=False)
class OffloadResult(Result):
    """A `Result` of steps in which experts are fetched, or computed beside the fast processor."""

    offload: Offload
    decisions: Decisions
    tiers: dict[str, TierNeed]
    """Need and limit of each memory by name, of its fullest rank; the fast one first."""
    expert_bytes: float
    """Bytes of one expert on one rank."""
    played: Played
    """All steps in time."""

    @property
    def hit_rate(self) -> float:
        """Share of accesses whose expert was in the fast memory, or on its way, in time or late.

        An access is an expert with tokens in a layer of a step; static, cached and prefetched
        experts count as hits.
        """
        active = self.decisions.tokens > 0
        return _share(active & self.decisions.residency.held, active)

    @property
    def prefetch_precision(self) -> float:
        """Share of the experts copied ahead that their layer used; 1 where none were copied."""
        ahead = self.decisions.residency.ahead
        return _share(ahead & (self.decisions.tokens > 0), ahead)

    @property
    def fetched_bytes_per_token(self) -> float:
        """Bytes of weights copied into the fast memory, ahead and on demand, per token."""
        d = self.decisions
        copies = np.count_nonzero(d.fetched) + np.count_nonzero(d.residency.ahead)
        return float(copies * self.expert_bytes / self.loads.step_tokens.sum())

    @cached_property
    def site_shares(self) -> dict[str, float]:
        """Share of (token, expert) pairs by where they are computed."""
        d = self.decisions
        fast = d.where == Where.FAST
        sites = {
            "resident": fast & ~d.residency.ahead,
            "copied_ahead": fast & d.residency.ahead,
            "fetched": d.fetched,
            "aside": d.aside,
        }
        total = max(int(d.tokens.sum()), 1)
        return {name: float(d.tokens[chosen].sum() / total) for name, chosen in sites.items()}

    @cached_property
    def critical_path(self) -> dict[str, float]:
        """Seconds per step by stage along the longest path, mean over steps; sums to the step time.

        A copy of weights appears as ``fetch`` only for the time in which the step waits for it;
        time of the side processor is marked ``(aside)``.
        """
        return critical_path(self.played)

    @property
    def busy(self) -> dict[str, float]:
        """Seconds per step that each stream works, mean over steps and ranks."""
        per_item = self.played.busy.mean(axis=(0, 2))
        seconds = {stream.name.lower(): 0.0 for stream in Stream}
        for item, took in zip(self.played.items, per_item.tolist(), strict=True):
            seconds[Stream(item.stream).name.lower()] += took
        return {name: took for name, took in seconds.items() if took}

    def summary(self) -> dict[str, float | int | str]:
        """Return the headline as JSON scalars, that of `Result` first."""
        shares = {f"pairs_{name}": share for name, share in self.site_shares.items()}
        memory = {f"memory_bytes_{name}": tier.total for name, tier in self.tiers.items()}
        return {
            **super().summary(),
            "hit_rate": self.hit_rate,
            "prefetch_precision": self.prefetch_precision,
            "fetched_bytes_per_token": self.fetched_bytes_per_token,
            **shares,
            **memory,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the timeline as plain JSON data."""
        return {
            **super().to_dict(),
            "tiers": {
                name: {"terms": dict(tier.terms), "total": tier.total, "limit": tier.limit}
                for name, tier in self.tiers.items()
            },
            "critical_path_s": self.critical_path,
            "busy_s": self.busy,
        }


def critical_path(played: Played) -> dict[str, float]:
    """Split step times by stage along the path of items that each began when the last ended.

    Returns
    -------
    dict
        Seconds per step, mean over steps, by `Stage` (``(aside)`` on another processor), and
        ``wait`` for a shared resource.
    """
    seconds: dict[str, float] = defaultdict(float)
    waited = _waited_for(played.items)
    for step in range(len(played.end)):
        item, rank = _last(played.end[step])
        while item >= 0:
            start, end = played.start[step, item, rank], played.end[step, item, rank]
            kind = played.items[item]
            aside = " (aside)" if kind.stream == Stream.SIDE else ""
            seconds[f"{kind.stage.value}{aside}"] += float(end - start)
            groups = kind.groups
            if groups is not None:  # the rank that came last began it
                members = [g for g, its in enumerate(groups) if its == groups[rank]]
                rank = max(members, key=lambda g: played.ready[step, item, g])
            ready = played.ready[step, item, rank]
            seconds["wait"] += float(start - ready)
            ends = played.end[step, :, rank]
            item = max(waited[item], key=lambda i: ends[i], default=-1) if ready > 0 else -1
    return {name: total / len(played.end) for name, total in seconds.items() if total}


def _last(end: NDArray[np.float64]) -> tuple[int, int]:
    item, rank = np.unravel_index(end.argmax(), end.shape)
    return int(item), int(rank)


def _waited_for(items: tuple[Item, ...]) -> list[tuple[int, ...]]:
    """Return for each item the earlier ones that it may not begin before."""
    in_stream: dict[int, int] = {}
    waited = []
    for i, item in enumerate(items):
        named = item.after if item.after is not None else (i - 1,) * (i > 0)
        ahead = in_stream.get(item.stream)
        waited.append(named if ahead is None else (*named, ahead))
        in_stream[item.stream] = i
    return waited


def _share(part: Bools, whole: Bools) -> float:
    count = np.count_nonzero(whole)
    return float(np.count_nonzero(part) / count) if count else 1.0
