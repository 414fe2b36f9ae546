"""How often an expert cache of each size would hit, on a data set of any size.

One request is served at a time (a workstation): every token is a step, request after request, and
a step accesses the K experts of each layer in the order of layers, as `traces.caches` defines it
with `traces.caches_inputs.token_steps`. The cache starts empty and is kept from request to request;
first uses are misses. Hit rates are shares of the accesses, sizes are experts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from traces.batches import Phase
from traces.caches import LruStacks, Scope
from traces.caches_play import Pool
from traces.caches_stack import Stacks, largest_key, worth
from traces.measures.base import About, Ints
from traces.measures.cache_keys import Read, keyed, largest
from traces.measures.sample import chosen_requests
from traces.meta import TraceMeta
from traces.routing_trace import RoutingTrace
from traces.trace_set import CHUNK_ROWS, TraceSet, chunks_of

POLICIES = ("lru", "lfu", "belady")
"""Of these `belady` knows the future: no real cache can hit more often."""
POOL_TOKENS = 10_000
"""Tokens that are worth playing through a cache of all layers, which is slow."""
_STEPS = 1024  # played at a time by LRU


@dataclass(frozen=True, kw_only=True, eq=False)
class CacheCurve:
    """Hit rates of one policy for C sizes."""

    policy: str
    scope: str
    phase: str
    sizes: tuple[int, ...]
    """Slots in each layer (scope layer), or in all layers together (scope global)."""
    hit_rate: NDArray[np.float64]
    """``[C]`` hits over accesses, first uses included."""
    hit_rate_by_layer: NDArray[np.float64] | None
    """``[L, C]``; None where all layers share a cache."""
    accesses: int
    """Uses of an expert by a token in a layer."""
    first_uses: int
    """Accesses that no cache can hit, because the expert was never used before."""
    tokens: int
    """Played; whole requests, rows of the phase."""
    tokens_of_phase: int
    """Of the whole data set; more than ``tokens`` if requests were left out."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        by_layer = self.hit_rate_by_layer
        return {
            "policy": self.policy, "scope": self.scope, "phase": self.phase,
            "slots": list(self.sizes), "hit_rate": self.hit_rate.tolist(),
            "hit_rate_by_layer": None if by_layer is None else by_layer.tolist(),
            "accesses": self.accesses, "first_uses": self.first_uses, "tokens": self.tokens,
            "tokens_share": self.tokens / self.tokens_of_phase,
        }  # fmt: skip


def default_sizes(meta: TraceMeta, scope: Scope = "layer") -> tuple[int, ...]:
    """Return sizes worth looking at: k, 1.5k, 2k, 3k, 4k, E/4, E/2, 3E/4 (times L if global)."""
    few = [int(meta.top_k * factor) for factor in (1, 1.5, 2, 3, 4)]
    many = [int(meta.num_experts * share) for share in (0.25, 0.5, 0.75)]
    sizes = sorted({size for size in few + many if meta.top_k <= size <= meta.num_experts})
    return tuple(size * (meta.num_layers if scope == "global" else 1) for size in sizes)


def cache_curve(
    traces: TraceSet | RoutingTrace,
    policy: str,
    *,
    scope: Scope = "layer",
    phase: Phase = "decode",
    sizes: Sequence[int] | None = None,
    tokens: int | None = None,
    rows: int = CHUNK_ROWS,
) -> CacheCurve:
    """Play a cache over a data set, in memory that does not grow with it.

    The hits are exactly those of `traces.caches.hit_rate_curve`. With slots per layer one pass
    gives all sizes (`traces.caches_stack`); a cache of all layers is played once for each size.

    Parameters
    ----------
    traces : TraceSet or RoutingTrace
    policy : {"lru", "lfu", "belady"}
        Defined in `traces.caches_scores.score_keys`.
    scope : {"layer", "global"}
        Slots in each layer, or one cache for all layers.
    phase : {"decode", "prefill", "any"}
        Rows that are played.
    sizes : sequence of int, optional
        Slots, from 0; `default_sizes` by default.
    tokens : int, optional
        Play a sample of whole requests of at most so many tokens (`chosen_requests`); all by
        default.
    rows : int
        Tokens read at a time.

    Raises
    ------
    InputError
        If a name is unknown, a size negative, or there is no row of the phase.
    """
    meta = traces.meta
    sizes = default_sizes(meta, scope) if sizes is None else tuple(sizes)
    _check(policy, scope, phase, sizes)
    about = About.of(traces)
    chosen = chosen_requests(about, tokens)
    read = _Reader(traces, phase, chosen, rows)
    steps = int(about.lengths[chosen].sum())  # at least as many as are played
    if scope == "layer":
        by_layer, first_uses = _by_layer(policy, read, steps, meta)
        by_layer = by_layer[:, np.minimum(sizes, meta.num_experts)]
        hits = by_layer.sum(axis=0)
    else:
        hits, first_uses = _pooled(policy, read, steps, meta, sizes)
    if not read.played:
        raise InputError(
            f"trace of {meta.model}: no {phase} rows in the {steps} tokens that were looked at -- "
            "ask for phase 'any', or for more tokens"
        )
    per_layer = read.played * meta.top_k
    return CacheCurve(
        policy=policy, scope=scope, phase=phase, sizes=sizes,
        hit_rate=hits / (per_layer * meta.num_layers),
        hit_rate_by_layer=by_layer / per_layer if scope == "layer" else None,
        accesses=per_layer * meta.num_layers, first_uses=first_uses,
        tokens=read.played, tokens_of_phase=read.of_phase,
    )  # fmt: skip


def _check(policy: str, scope: str, phase: str, sizes: Sequence[int]) -> None:
    allowed = (
        ("cache policy", policy, POLICIES),
        ("cache scope", scope, get_args(Scope)),
        ("phase", phase, get_args(Phase)),
    )
    for what, value, names in allowed:
        if value not in names:
            raise InputError(f"unknown {what} {value!r} -- one of {', '.join(names)}")
    if not sizes or min(sizes) < 0:
        raise InputError(f"cache sizes {list(sizes)} -- must be at least one count, from 0")


def _chunks(traces: TraceSet | RoutingTrace, rows: int) -> Iterator[RoutingTrace]:
    if isinstance(traces, TraceSet):
        return traces.chunks(rows=rows)
    return chunks_of(traces, rows)


def _of_phase(decode: NDArray[np.bool_], phase: Phase) -> NDArray[np.bool_]:
    return {"decode": decode, "prefill": ~decode, "any": np.ones_like(decode)}[phase]


class _Reader:
    """Reads the experts of the chosen requests' rows of a phase, as often as it is called."""

    def __init__(
        self, traces: TraceSet | RoutingTrace, phase: Phase, chosen: NDArray[np.bool_], rows: int
    ) -> None:
        self._traces, self._phase, self._chosen, self._rows = traces, phase, chosen, rows
        self.played = self.of_phase = 0
        """Rows given, and rows of the phase in all, of the last reading."""

    def __call__(self) -> Iterator[NDArray[np.uint16]]:
        self.played = self.of_phase = 0
        for chunk in _chunks(self._traces, self._rows):
            wanted = _of_phase(chunk.decode, self._phase)
            self.of_phase += int(np.count_nonzero(wanted))
            wanted = wanted & self._chosen[chunk.request_id]
            if wanted.any():
                self.played += int(np.count_nonzero(wanted))
                yield chunk.experts[wanted]


def _by_layer(policy: str, read: Read, steps: int, meta: TraceMeta) -> tuple[Ints, int]:
    """Count the hits ``[L, E + 1]`` by slots, and the first uses."""
    if policy == "lru":
        recent, seen = LruStacks(meta.num_layers, meta.num_experts), 0
        for experts in read():
            for first in range(0, len(experts), _STEPS):
                used = experts[first : first + _STEPS].astype(np.int64)
                active = np.zeros((len(used), meta.num_layers, meta.num_experts), np.bool_)
                np.put_along_axis(active, used, True, axis=2)
                recent.play(active)
            seen += experts.size
        return recent.hits, seen - int(recent.hits[:, -1].sum())
    return _stacked(policy, read, steps, meta)


def _stacked(policy: str, read: Read, steps: int, meta: TraceMeta) -> tuple[Ints, int]:
    layers, experts = meta.num_layers, meta.num_experts
    if largest(policy, steps) > largest_key(experts):
        raise InputError(
            f"{policy} cache over {steps} tokens of {experts} experts -- its counts would not fit "
            "64 bits; play a sample of the requests (tokens=...)"
        )
    stacks, places = Stacks(layers, experts), np.zeros((layers, experts + 1), np.int64)
    now = worth(np.full((layers, 1), -1), np.arange(experts), experts)
    flat, offset = now.reshape(-1), (np.arange(layers) * (experts + 1))[:, None]
    with keyed(policy, read, steps, layers * experts) as chunks:
        for cells, keys in chunks:
            values = worth(keys, cells % experts, experts)
            found = np.empty(cells.shape, np.int64)
            for step, (used, value) in enumerate(zip(cells, values, strict=True)):
                flat[used] = value
                found[step] = stacks.access(used, now)
            counted = np.bincount((found + offset).reshape(-1), minlength=places.size)
            places += counted.reshape(places.shape)
    hits = np.pad(np.cumsum(places[:, :-1], axis=1), ((0, 0), (1, 0)))
    return hits, int(places[:, -1].sum())


def _pooled(
    policy: str, read: Read, steps: int, meta: TraceMeta, sizes: Sequence[int]
) -> tuple[Ints, int]:
    """Count the hits ``[C]`` of one cache for all layers, and the first uses."""
    layers, cells = meta.num_layers, meta.num_layers * meta.num_experts
    nothing = np.empty(0, np.int64)
    pools = [Pool(size, np.full(cells, -1.0), nothing) for size in sizes]
    hits, seen = np.zeros(len(sizes), np.int64), np.zeros(cells, np.bool_)
    with keyed(policy, read, steps, cells) as chunks:
        for used, keys in chunks:
            seen[used.reshape(-1)] = True
            ordered = keys * layers + _tie(policy, layers)[:, None]
            wanted = used.reshape(-1, used.shape[2]).tolist()
            values = ordered.reshape(-1, used.shape[2]).tolist()
            for place, pool in enumerate(pools):
                hits[place] += _play(pool, wanted, values)
    return hits, int(np.count_nonzero(seen))


def _tie(policy: str, layers: int) -> Ints:
    """Order the layers of a step: later ones were used later, and are used later again."""
    order = np.arange(layers)
    return layers - 1 - order if policy == "belady" else order


def _play(pool: Pool, wanted: list[list[int]], values: list[Any]) -> int:
    hits, resident = 0, pool.resident
    for cells, keys in zip(wanted, values, strict=True):
        hits += sum(map(resident.__getitem__, cells))
        pool.touch(cells, keys)
        pool.admit(cells, spared=cells)
    return hits
