"""What a predicted step time rests on: for each kind of kernel and input, its class and source.

Shares are of the ranks' busy time, so that a reader sees how much of the answer hangs on what.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from basis.evidence import Evidence
from hwmodels.cluster import Cluster
from hwmodels.cost_compute import kernel_of
from hwmodels.link import Transfer
from hwmodels.ops import (
    AllGather,
    AllReduce,
    AllToAll,
    Copy,
    ReduceScatter,
)
from simulator.batches import Composition
from simulator.pricing import PricedStep
from simulator.work import Work
from traces.routing_trace import RoutingTrace

_TRANSFERS: dict[type, Transfer] = {
    AllToAll: "all_to_all",
    AllReduce: "all_reduce",
    AllGather: "all_gather",
    ReduceScatter: "reduce_scatter",
}


@dataclass(frozen=True, kw_only=True)
class EvidenceItem:
    """What a part of the prediction rests on."""

    what: str
    """Kernels, or an input of the simulation."""
    evidence: Evidence
    """Evidence class."""
    source: str
    """Where the figures come from."""
    share: float | None
    """Share of the ranks' busy time; None for an input."""


def list_evidence(
    trace: RoutingTrace,
    composition: Composition,
    works: Sequence[Work],
    priced: PricedStep,
    cluster: Cluster,
) -> tuple[EvidenceItem, ...]:
    """List the inputs, then the kernels by falling share of busy time."""
    busy = priced.seconds.sum()
    names: dict[tuple[str, Evidence, str], list[str]] = defaultdict(list)
    share: dict[tuple[str, Evidence, str], float] = defaultdict(float)
    times = _seconds(works, priced)
    for work, evidence, seconds in zip(works, priced.evidence, times, strict=True):
        kind, source = _source(work, cluster)
        if work.name not in names[kind, evidence, source]:
            names[kind, evidence, source].append(work.name)
        share[kind, evidence, source] += float(seconds / busy)
    kernels = [
        EvidenceItem(
            what=f"{kind}: {', '.join(names[kind, evidence, source])}",
            evidence=evidence,
            source=source,
            share=part,
        )
        for (kind, evidence, source), part in sorted(share.items(), key=lambda pair: -pair[1])
    ]
    return (*_inputs(trace, composition), *kernels)


def _inputs(trace: RoutingTrace, composition: Composition) -> tuple[EvidenceItem, ...]:
    meta = trace.meta
    kind = "synthetic" if meta.synthetic else "recorded"
    origin = f"{kind} trace of {meta.model}" + (f", {meta.source}" if meta.source else "")
    routing = EvidenceItem(
        what="routing",
        evidence="assumed" if meta.synthetic else "measured",
        source=origin,
        share=None,
    )
    batches = EvidenceItem(
        what="batch composition", evidence="assumed", source=composition.statement, share=None
    )
    return routing, batches


def _seconds(works: Sequence[Work], priced: PricedStep) -> list[float]:
    """Busy time of each work over all steps, layers and ranks; equal names share theirs."""
    total: dict[str, float] = defaultdict(float)
    for item, seconds in zip(priced.items, priced.seconds.sum(axis=(0, 2)).tolist(), strict=True):
        total[item.name] += seconds
    bearers = Counter(work.name for work in works)
    return [total[work.name] / bearers[work.name] for work in works]


def _source(work: Work, cluster: Cluster) -> tuple[str, str]:
    """Return the kind of kernel and the source of its cost model."""
    op = work.op
    if isinstance(op, Copy):
        path = cluster.path(op.source, op.target)
        keys = sorted({link.cost("copy").source for link in path})
        cited = "; ".join(cluster.sources.get(key, key) for key in keys)
        return f"copy {op.source} to {op.target}", cited
    if isinstance(op, (AllToAll, AllReduce, AllGather, ReduceScatter)):
        ports = (cluster.node.interconnect, cluster.network if cluster.num_nodes > 1 else None)
        links = [link for link in ports if link is not None]
        name = _TRANSFERS[type(op)]
        if isinstance(op, AllToAll) and any(op.phase in link.costs for link in links):
            name = op.phase or name
        sources = {link.cost(name).source for link in links}
        return name, "; ".join(sorted(cluster.sources.get(s, s) for s in sources))
    processor = cluster.processor(work.on)
    kind, dtype, _ = kernel_of(op, processor)
    source = processor.kernel(kind, dtype)[0].source
    cited = cluster.device.sources.get(source, cluster.sources.get(source, source))
    return kind if work.on is None else f"{kind} on {work.on}", cited
