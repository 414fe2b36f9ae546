"""A step with tiers as work: copies of weights and activations, and calls on two processors.

Takes a step's work as if everything were resident and puts copies and calls in place of the
expert kernel (and of decode attention), each on the stream where it queues. What waits for what
is in docs/background/offload.md; times come from `simulator.pricing`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from basis.dtypes import bytes_of
from hwmodels.cluster import Cluster
from hwmodels.ops import AttentionDecode, Copy, GroupedGemm, Op, Stage
from simulator.offload import Offload
from simulator.offload_decide import Bools, Decisions
from simulator.program import Stream
from simulator.site_costs import resized, stops
from simulator.sites import Where
from simulator.work import Work

After = tuple[tuple[str, int], ...]
Hop = tuple[str, str]
"""Source and target memory of a copy."""
_PERMUTED: After = (("permute", 0),)
_ASIDE_ENDS = {"experts aside", "aside back"}


@dataclass(frozen=True, kw_only=True)
class Route:
    """The way of weights from their home into the fast memory."""

    storage: Hop | None
    """Into the memory before the last link; none where one link joins the two."""
    fetch: Hop | None
    """Over the last link; none where the home is the fast memory."""

    @classmethod
    def of(cls, cluster: Cluster, home: str) -> "Route":
        """Find the way with the fewest hops; errors as `stops`."""
        way = stops(cluster, home)
        if len(way) == 1:
            return cls(storage=None, fetch=None)
        return cls(storage=(home, way[-2]) if len(way) > 2 else None, fetch=(way[-2], way[-1]))


def offload_works(
    works: Sequence[Work],
    offload: Offload,
    decisions: Decisions,
    cluster: Cluster,
    expert_bytes: float,
    step_tokens: NDArray[np.int64],
) -> list[Work]:
    """Rewrite steps for a deployment with tiers.

    Parameters
    ----------
    works : sequence of Work
        From `simulator.lowering.lower`, everything resident.
    offload : Offload
    decisions : Decisions
    cluster : Cluster
    expert_bytes : float
        Of one expert on one rank.
    step_tokens : int64 array [S]
        Tokens of each step: no processor is sent more than these.
    """
    experts = next(w for w in works if w.name == "experts")
    assert isinstance(experts.op, GroupedGemm)
    writer = _Writer(
        experts=experts,
        op=experts.op,
        offload=offload,
        decisions=decisions,
        cluster=cluster,
        route=Route.of(cluster, offload.home),
        expert_bytes=expert_bytes,
        step_tokens=step_tokens,
        routed=_routed(works),
    )
    layer = writer.experts_of_a_layer()
    ends = {w.name for w in layer if w.stream == Stream.COMPUTE or w.name in _ASIDE_ENDS}
    written: list[Work] = []
    for work in works:
        if work is experts:
            written += layer
        elif work.name == "unpermute":  # the layer ends when both processors have ended
            written.append(replace(work, after=tuple((name, 0) for name in sorted(ends))))
        elif offload.attention is not None and isinstance(work.op, AttentionDecode):
            written += _attention_aside(work, work.op, offload.attention, cluster)
        else:
            written.append(work)
    return written


def _routed(works: Sequence[Work]) -> str:
    """Return the last collective between router and experts, or the router where there is none."""
    names = [work.name for work in works]
    between = works[names.index("router") : names.index("permute")]
    return [w.name for w in between if w.stream == Stream.COMMUNICATION or w.name == "router"][-1]


def _attention_aside(work: Work, op: AttentionDecode, name: str, cluster: Cluster) -> list[Work]:
    """Decode attention where the cache is: queries and new keys there, outputs back."""
    fast, memory = cluster.device.processor.memory, cluster.processor(name).memory
    aside = replace(work, stream=Stream.SIDE, on=name)
    if memory == fast:
        return [aside]
    sent = bytes_of(op.activation_dtype, op.num_heads * op.head_dim + op.kv_elements)
    received = bytes_of(op.activation_dtype, op.num_heads * op.v_head_dim)
    tokens = np.asarray(op.tokens)

    def copy(what: str, size: float, source: str, target: str) -> Work:
        return replace(
            work,
            name=f"attention {what}",
            stage=Stage.TRANSFER,
            op=Copy(bytes=tokens * size, source=source, target=target),
            stream=Stream.ACTIVATIONS,
        )

    return [copy("out", sent, fast, memory), aside, copy("back", received, memory, fast)]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Writer:
    """Writes the expert part of a layer."""

    experts: Work
    op: GroupedGemm
    offload: Offload
    decisions: Decisions
    cluster: Cluster
    route: Route
    expert_bytes: float
    step_tokens: NDArray[np.int64]
    routed: str
    """Work after which the experts of a layer are known."""

    def experts_of_a_layer(self) -> list[Work]:
        """Return copies first, in the order in which they queue, then the calls."""
        d, streams = self.decisions, self.offload.predictor.name == "all"
        fast = d.where == Where.FAST
        works = self._demand_copies()
        works += self._whole_layer() if streams else self._copies_ahead()
        works += self._aside()
        works.append(self._call("experts", fast & ~d.residency.ahead, _PERMUTED))
        if d.residency.ahead.any():
            used = fast & d.residency.ahead
            works.append(self._call("experts copied ahead", used, self._after_ahead()))
        for k in range(self.demand):
            one = d.tokens_at(d.fetched & (d.order == k)).sum(axis=1, keepdims=True)
            after = (("fetch", self.demand - 1 - k), *_PERMUTED)
            near = self.offload.copy_engine == "none"  # what it copies passes through its cache
            op = replace(resized(self.op, one), cached=near)
            works.append(self._work("fetched expert", op, after))
        return works

    @property
    def demand(self) -> int:
        """Most experts that a rank copies on demand in a layer."""
        return int(self.decisions.fetched.sum(axis=-1).max(initial=0))

    @property
    def prefetches(self) -> int:
        """Most experts that a rank copies ahead for a layer."""
        return int(self.decisions.residency.ahead.sum(axis=-1).max(initial=0))

    def _demand_copies(self) -> list[Work]:
        d, works = self.decisions, []
        for k in range(self.demand):
            wanted = d.fetched & (d.order == k)
            works += self._copies(
                "fetch", "read", wanted.any(-1), (wanted & d.cold).any(-1), ((self.routed, 0),)
            )
        return works

    def _copies_ahead(self) -> list[Work]:
        """Copy for the layer ``depth`` MoE layers on, behind this layer's own demand.

        Experts that wait in the memory before the last link go first.
        """
        depth, ahead = self.offload.predictor.depth, self.decisions.residency.ahead
        later, warm = np.zeros((2, *ahead.shape[:-1]), dtype=np.int64)
        later[:, :-depth] = ahead[:, depth:].sum(axis=-1)
        warm[:, :-depth] = (ahead & ~self.decisions.cold)[:, depth:].sum(axis=-1)
        works = []
        for k in range(self.prefetches):
            cold = (later > k) & (warm <= k)
            works += self._copies("prefetch", "read ahead", later > k, cold, (("router", 0),))
        return works

    def _whole_layer(self) -> list[Work]:
        """All that is missing of the layer ``depth`` layers on, when the layer before this is done.

        Its buffer is free then. The last ``depth`` layers copy for the first ones of the next
        step, which misses the same experts.
        """
        depth, ahead = self.offload.predictor.depth, self.decisions.residency.ahead
        later, cold = (
            np.roll(chosen.sum(axis=-1), -depth, axis=1)
            for chosen in (ahead, ahead & self.decisions.cold)
        )
        return self._copies("prefetch", "read ahead", later, cold, (("unpermute", 0),))

    def _copies(
        self, name: str, read: str, experts: NDArray[Any], cold: NDArray[Any], after: After
    ) -> list[Work]:
        """Copy so many experts per row into the fast memory, the cold ones all the way."""
        if self.route.fetch is None or not experts.any():
            return []
        works = []
        if self.route.storage is not None and cold.any():
            works.append(self._copy(read, self._bytes(cold), self.route.storage, after))
            after = ((read, 0),)
        works.append(self._copy(name, self._bytes(experts), self.route.fetch, after))
        return works

    def _bytes(self, experts: NDArray[Any]) -> NDArray[np.float64]:
        return np.asarray(experts.ravel() * self.expert_bytes, dtype=np.float64)

    def _after_ahead(self) -> After:
        """Name the layer's last copy; one from the step before had landed when that ended."""
        a_layer = 1 if self.offload.predictor.name == "all" else self.prefetches
        return (("prefetch", self.offload.predictor.depth * a_layer), *_PERMUTED)

    def _aside(self) -> list[Work]:
        d, name = self.decisions, self.offload.site.processor
        if name is None or not d.aside.any():
            return []
        fast, memory = self._fast, self.cluster.processor(name).memory
        rows = d.tokens_at(d.aside).sum(axis=1)
        most = np.broadcast_to(self.step_tokens[:, None, None], self.experts.shape).ravel()
        size = np.minimum(rows, most) * bytes_of(self.op.activation_dtype, self.op.hidden)
        works: list[Work] = []
        after = _PERMUTED
        if memory != self.offload.home and memory != fast:
            weights = self._bytes((d.aside & d.cold).sum(axis=-1))
            hop = (self.offload.home, memory)
            works.append(self._copy("read aside", weights, hop, ((self.routed, 0),)))
            after = (("read aside", 0), *after)
        if memory != fast:
            works.append(self._transfer("aside out", size, (fast, memory), _PERMUTED))
            after = (("aside out", 0), *after)
        call = self._call("experts aside", d.aside, after)
        works.append(replace(call, stream=Stream.SIDE, on=name))
        if memory != fast:
            after = (("experts aside", 0),)
            works.append(self._transfer("aside back", size, (memory, fast), after))
        return works

    @property
    def _fast(self) -> str:
        return self.cluster.device.processor.memory

    def _call(self, name: str, chosen: Bools, after: After) -> Work:
        return self._work(name, resized(self.op, self.decisions.tokens_at(chosen)), after)

    def _copy(self, name: str, size: NDArray[np.float64], hop: Hop, after: After) -> Work:
        """Copy weights: into the fast memory, or on the way there."""
        op = Copy(bytes=size, source=hop[0], target=hop[1])
        engine = self.offload.copy_engine
        shared = engine == "shared" and hop[1] == self._fast
        stream = Stream.FETCH if hop[1] == self._fast else Stream.STORAGE
        return replace(
            self._work(name, op, after),
            stage=Stage.FETCH,
            stream=Stream.COMPUTE if engine == "none" else stream,
            resource=f"copies into {self._fast}" if shared else None,
        )

    def _transfer(self, name: str, size: NDArray[np.float64], hop: Hop, after: After) -> Work:
        """Copy activations."""
        work = self._copy(name, size, hop, after)
        return replace(work, stage=Stage.TRANSFER, stream=Stream.ACTIVATIONS)

    def _work(self, name: str, op: Op, after: After) -> Work:
        return replace(self.experts, name=name, op=op, after=after)
