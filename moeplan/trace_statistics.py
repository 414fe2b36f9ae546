"""Everything that `moeplan trace stats` finds in a trace: which measures, on which tokens.

What streams is measured on all tokens, in one pass; what needs random access (steps of batches,
caches) on a sample of whole requests, which is the whole trace up to 200,000 tokens, or to fewer
where a model has many experts and a cache is slow to play. Figures are shares, ratios or tokens, as
each result says; each says of how many tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from basis.errors import InputError
from simulator.placement import Placement
from traces.batches import Phase
from traces.caches import Scope
from traces.convert import read_npz
from traces.measures.balance import Balance, balance
from traces.measures.base import About, measure
from traces.measures.caches import POLICIES, POOL_TOKENS, CacheCurve, cache_curve
from traces.measures.coactivation import CoActivation, CoActivations
from traces.measures.drift import Drift, DriftResult
from traces.measures.flow import Flow, FlowResult
from traces.measures.load import Load, LoadResult
from traces.measures.locality import Locality, Segments
from traces.measures.placement import LocalActivation, LocalActivations, contiguous_slots
from traces.measures.reuse import Reuse, ReuseResult
from traces.measures.run import Maker, statistics
from traces.measures.sample import SAMPLE_TOKENS, Sample, Sampled, chosen_requests
from traces.measures.segment_cache import SegmentCache, segment_cache
from traces.measures.support import Support, SupportResult
from traces.meta import TraceMeta
from traces.routing_trace import RoutingTrace, request_order
from traces.trace_set import TraceSet, open_traces

SCHEMA = "moeplan.trace-stats/1"
CURVE_CELLS, SEGMENT_CELLS = 2**30, 2**27
"""Tokens x layers x experts that are played through caches, and through those that see ahead."""
RANKS = 8
"""Of the contiguous placement whose local choices are counted; fewer where they do not divide."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """All figures of one data set."""

    about: About
    files: tuple[str, ...]
    load: LoadResult
    flow: FlowResult
    reuse: ReuseResult
    drift: DriftResult
    support: SupportResult
    coactivation: CoActivation
    locality: Locality
    local: LocalActivation
    placement: str
    """Name of the placement of ``local``."""
    sample: Sampled
    balance: Balance
    segment_cache: SegmentCache
    caches: tuple[CacheCurve, ...]
    """Of each policy, with slots per layer; then of each, with one cache for all layers."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        meta = self.about.meta
        parts = ("load", "reuse", "flow", "coactivation", "drift", "support", "locality", "balance",
                 "segment_cache")  # fmt: skip
        return {
            "schema": SCHEMA,
            "model": meta.model,
            "synthetic": meta.synthetic,
            "source": meta.source,
            "licence": meta.licence,
            "note": meta.note,
            "files": list(self.files),
            "tokens": self.about.num_tokens,
            "requests": self.about.num_requests,
            "num_experts": meta.num_experts,
            "top_k": meta.top_k,
            "moe_layer_ids": list(meta.moe_layer_ids),
            **{name: getattr(self, name).to_dict() for name in parts},
            "caches": [curve.to_dict() for curve in self.caches],
            "local_activation": {"placement": self.placement} | self.local.to_dict(),
            "sample": self.sample.to_dict(),
        }


def find_statistics(
    paths: Sequence[Path],
    *,
    placed: tuple[str, Placement] | None = None,
    scheduler: str | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Found:
    """Measure a trace.

    Parameters
    ----------
    paths
        Parquet files, one folder of them, or one npz file.
    placed
        Name and placement whose local choices are counted; experts in order of their ids without.
    scheduler
        Of Dask, see `traces.measures.run.statistics`.
    tell
        Told what begins.

    Raises
    ------
    InputError
        If a file is bad, the files are of different models, or an npz is to go to a scheduler.
    """
    traces = _opened(paths)
    if scheduler and not isinstance(traces, TraceSet):
        raise InputError(
            f"{paths[0]} with a scheduler -- workers read Parquet files -- convert it, or leave "
            "the scheduler out"
        )
    meta = traces.meta
    name, placement = placed or _contiguous(meta)
    makers: tuple[Maker, ...] = (
        Load, Flow, Reuse, Drift, Support, CoActivations,
        partial(Segments, tokens=SAMPLE_TOKENS),
        partial(LocalActivations, slots=placement.slots, ranks=placement.num_ranks),
        Sample,
    )  # fmt: skip
    tell(f"loads, reuse, flow, pairs of {traces.num_tokens:,} tokens")
    results = _measured(traces, makers, scheduler)
    load, flow, reuse, drift, support, pairs, locality, local, sample = results
    about = About.of(traces)

    def phase(tokens: int) -> Phase:
        """Return decode where a sample of so many tokens has such rows."""
        return "decode" if support.decode_requests[chosen_requests(about, tokens)].any() else "any"

    tell(f"steps of batches of {sample.trace.num_tokens:,} tokens")
    steps = balance(sample.trace, phase=phase(SAMPLE_TOKENS))
    tell("caches that see a segment ahead")
    segments = segment_cache(_part(sample.trace, SEGMENT_CELLS))
    curves = []
    played: tuple[tuple[Scope, int], ...] = (
        ("layer", _tokens(meta, CURVE_CELLS)),
        ("global", POOL_TOKENS),
    )
    for scope, most in played:
        for policy in POLICIES:
            tell(f"cache: {policy}, {scope}")
            curves.append(cache_curve(traces, policy, scope=scope, phase=phase(most), tokens=most))
    names = [f.path.name for f in traces.files] if isinstance(traces, TraceSet) else [paths[0].name]
    return Found(
        about=about,
        files=tuple(names),
        load=load,
        flow=flow,
        reuse=reuse,
        drift=drift,
        support=support,
        coactivation=pairs,
        locality=locality,
        local=local,
        placement=name,
        sample=sample,
        balance=steps,
        segment_cache=segments,
        caches=tuple(curves),
    )


def _contiguous(meta: TraceMeta) -> tuple[str, Placement]:
    ranks = next(r for r in range(min(RANKS, meta.num_experts), 0, -1) if not meta.num_experts % r)
    slots = contiguous_slots(meta.num_layers, meta.num_experts)
    placement = Placement(
        slots=slots.astype(np.int32), num_experts=meta.num_experts, num_ranks=ranks
    )
    return "experts in order of their ids", placement


def _tokens(meta: TraceMeta, cells: int) -> int:
    """Return the tokens that make so many cells, at most those of the sample, at least one."""
    return max(min(SAMPLE_TOKENS, cells // (meta.num_layers * meta.num_experts)), 1)


def _part(trace: RoutingTrace, cells: int) -> RoutingTrace:
    """Return whole requests of a trace that make at most about so many cells."""
    about = About.of(trace)
    chosen = chosen_requests(about, _tokens(trace.meta, cells))
    return trace if chosen.all() else trace.select(chosen[request_order(trace)])


def _opened(paths: Sequence[Path]) -> TraceSet | RoutingTrace:
    if len(paths) == 1 and paths[0].suffix == ".npz":
        return read_npz(paths[0])
    return open_traces(paths[0] if len(paths) == 1 else paths)


def _measured(
    traces: TraceSet | RoutingTrace, makers: Sequence[Maker], scheduler: str | None
) -> list[Any]:
    if isinstance(traces, TraceSet):
        return statistics(traces, makers, scheduler)
    measures = [make(About.of(traces)) for make in makers]
    measure(traces, measures)
    return [each.result() for each in measures]
