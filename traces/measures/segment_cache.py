"""The hit rate of an expert cache that sees m tokens ahead (SCH), and of LRU and LFU beside it.

J. Liang et al., "Not all models suit expert offloading: on local routing consistency of
mixture-of-expert models", ICLR 2026 (arXiv 2505.16056), section 2.3: a cache of rho times K experts
per layer lets the expert go that is used least in the next m tokens. As in the published code, the
m tokens begin with the current one (whose experts stay anyway), end with the request at the latest,
of equals the one used longer ago goes, and every request starts with an empty cache. Sizes are
experts, hit rates shares of all accesses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from basis.errors import InputError
from traces.caches_stack import Stacks, worth
from traces.measures.base import Floats, Ints, plain
from traces.measures.locality import ROUTING_LENGTHS
from traces.routing_trace import RoutingTrace, request_order

RATIOS = (1.0, 1.5, 2.0, 3.0, 4.0)
"""Cache sizes over K."""
COMPARED = 2.0
"""The ratio at which layers are compared with LRU and LFU: the published recommendation."""
_CELLS = 2**16  # (request, layer, expert) that are played at a time: what a processor's cache holds


@dataclass(frozen=True, kw_only=True, eq=False)
class SegmentCache:
    """Hit rates of M lengths, L layers, E experts."""

    lengths: tuple[int, ...]
    """m, tokens."""
    top_k: int
    moe_layer_ids: tuple[int, ...]
    tokens: int
    hit_rate: Floats
    """``[M, L, E + 1]`` by number of slots per layer, 0 to E."""
    lru: Floats
    """``[L, E + 1]`` of a cache that lets the expert go that was used longest ago."""
    lfu: Floats
    """``[L, E + 1]`` the one used least since the request began; of equals used longest ago."""

    def slots(self, ratio: float) -> int:
        """Return the slots of a cache of ``ratio`` times K experts, at most E."""
        return min(int(ratio * self.top_k), self.lru.shape[1] - 1)

    def correlation(self, other: Floats, ratio: float = COMPARED) -> Floats:
        """Return ``[M]`` Pearson's correlation over layers with ``other [L, E + 1]``.

        NaN where either is the same in all layers.
        """
        slots = self.slots(ratio)
        mine = self.hit_rate[:, :, slots] - self.hit_rate[:, :, slots].mean(axis=1, keepdims=True)
        theirs = other[:, slots] - other[:, slots].mean()
        spread = np.sqrt((mine**2).sum(axis=1) * (theirs**2).sum())
        nothing = np.full(len(mine), np.nan)
        return np.divide((mine * theirs).sum(axis=1), spread, out=nothing, where=spread > 1e-12)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, of `RATIOS` only."""
        slots = [self.slots(ratio) for ratio in RATIOS]
        by_layer = self.hit_rate[:, :, slots]
        return {
            "tokens": self.tokens,
            "ratios": list(RATIOS),
            "slots": slots,
            "lengths": [
                {"length": m, "hit_rate": plain(rates.mean(axis=0)), "by_layer": plain(rates.T)}
                for m, rates in zip(self.lengths, by_layer, strict=True)
            ],
            "lru": plain(self.lru[:, slots].mean(axis=0)),
            "lfu": plain(self.lfu[:, slots].mean(axis=0)),
            "correlation_over_layers": {
                "ratio": COMPARED,
                "lru": plain(self.correlation(self.lru)),
                "lfu": plain(self.correlation(self.lfu)),
            },
        }


def segment_cache(trace: RoutingTrace, lengths: Sequence[int] = ROUTING_LENGTHS) -> SegmentCache:
    """Play the caches over the requests of a trace, each on its own.

    Parameters
    ----------
    trace : RoutingTrace
        In memory; the tokens of a request in order of position, whatever their phase.
    lengths : sequence of int
        m, tokens.

    Raises
    ------
    InputError
        If a length is below 1, or the trace has no tokens.
    """
    if not lengths or min(lengths) < 1:
        raise InputError(f"segment lengths {list(lengths)} -- at least one, from 1 token")
    if not trace.num_tokens:
        raise InputError(f"trace of {trace.meta.model}: no tokens -- nothing to measure")
    blocks = _blocks(trace)
    rules: list[int | str] = [*lengths, "lru", "lfu"]
    rates = [_play(blocks, trace, rule) for rule in rules]
    return SegmentCache(
        lengths=tuple(lengths), top_k=trace.meta.top_k, moe_layer_ids=trace.meta.moe_layer_ids,
        tokens=trace.num_tokens, hit_rate=np.array(rates[:-2]), lru=rates[-2], lfu=rates[-1],
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class _Block:
    """Requests that are played side by side, longest first; R of them, of at most T tokens."""

    experts: Ints
    """``[T, R, L, K]``; row t holds those of the first ``running[t]`` requests."""
    running: Ints
    """``[T]`` requests longer than t tokens."""


def _blocks(trace: RoutingTrace) -> list[_Block]:
    request = request_order(trace)
    rows = np.lexsort((trace.position, request))
    lengths = np.bincount(request)
    starts = np.cumsum(lengths) - lengths
    order = np.argsort(-lengths, kind="stable")
    count = max(_CELLS // (trace.num_layers * trace.meta.num_experts), 1)
    blocks = []
    for first in range(0, len(order), count):
        taken = order[first : first + count]
        token = np.arange(lengths[taken[0]])[:, None]
        place = np.minimum(token, lengths[taken] - 1) + starts[taken]
        running = (lengths[taken] > token).sum(axis=1)
        blocks.append(_Block(experts=trace.experts[rows[place]], running=running))
    return blocks


def _play(blocks: list[_Block], trace: RoutingTrace, rule: int | str) -> Floats:
    """Return hit rates ``[L, E + 1]`` by slots; the rule is a length, "lru" or "lfu"."""
    layers, experts = trace.num_layers, trace.meta.num_experts
    places = np.zeros((layers, experts + 1), np.int64)
    for block in blocks:
        places += _play_block(block, experts, rule)
    hits = np.cumsum(places[:, :-1], axis=1) / (trace.num_tokens * trace.meta.top_k)
    return np.pad(hits, ((0, 0), (1, 0)))


def _play_block(block: _Block, experts: int, rule: int | str) -> Ints:
    """Count the accesses ``[L, E + 1]`` of one block by their place in the stack."""
    tokens, requests, layers, top_k = block.experts.shape
    groups = requests * layers
    offset = np.arange(groups)[:, None] * experts
    chosen = block.experts.reshape(tokens, groups, top_k)
    stacks = Stacks(groups, experts)
    last, score = np.zeros(groups * experts, np.int64), np.zeros(groups * experts, np.int64)
    ids, running = np.arange(experts), (block.running * layers).tolist()
    ahead = rule if isinstance(rule, int) else 0
    layer = np.tile(np.arange(layers), requests)[:, None] * (experts + 1)
    places = np.zeros(layers * (experts + 1), np.int64)

    def cells(step: int) -> Ints:
        return chosen[step, : running[step]] + offset[: running[step]]

    for step in range(min(ahead, tokens)):
        score[cells(step)] += 1
    for step in range(tokens):
        now = running[step]
        used = cells(step)
        last[used] = step + 1
        if rule != "lru":
            score[used] += 1 if rule == "lfu" else -1
        seen, worths = last[: now * experts], score[: now * experts]
        key = np.where(seen > 0, worths * (tokens + 1) + seen, -1).reshape(now, experts)
        place = stacks.access(used, worth(key, ids, experts))
        places += np.bincount((place + layer[:now]).reshape(-1), minlength=len(places))
        if ahead and step + ahead < tokens:
            score[cells(step + ahead)] += 1
    return places.reshape(layers, experts + 1)
