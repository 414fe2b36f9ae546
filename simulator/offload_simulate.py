"""Simulate a deployment whose experts live in several memories.

As `simulator.simulate`, with three more steps: play the residency over the sequence, choose each
expert's site, and rewrite the steps' work with copies and calls on both processors.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from hwmodels.cluster import Cluster
from hwmodels.ops import GroupedGemm
from simulator.batches import Composition, compose
from simulator.deployment import Deployment, Workload
from simulator.evidence import list_evidence
from simulator.layout import Layout
from simulator.loads import StepLoads, count_loads
from simulator.lowering import lower
from simulator.memory import MemoryNeed, memory_need
from simulator.metrics import sampling_floor
from simulator.offload import Offload
from simulator.offload_decide import Bools, Decisions, decide
from simulator.offload_memory import EXPERT_TERMS, TierNeed, check_tiers, tier_needs
from simulator.offload_result import OffloadResult
from simulator.offload_works import offload_works
from simulator.placement import Placement
from simulator.pricing import price_step
from simulator.program import play
from simulator.result import causes_of
from simulator.site_costs import stops
from simulator.work import Work
from traces.caches_inputs import expert_scores
from traces.model_spec import ModelSpec
from traces.routing_trace import RoutingTrace, check_against_model


def simulate_offload(
    model: ModelSpec,
    trace: RoutingTrace,
    cluster: Cluster,
    deployment: Deployment,
    workload: Workload,
    *,
    steps: int = 32,
    seed: int = 0,
    warmup: int | None = None,
) -> OffloadResult:
    """Predict how a deployment with tiers performs on the work that a trace recorded.

    Parameters
    ----------
    model, trace, cluster, deployment, workload, steps, seed
        As `simulator.simulate`; ``deployment.offload`` says what lives and runs where.
    warmup : int, optional
        Steps that fill cache and predictor before the simulated ones; default as many as
        ``steps`` where there is a cache or the predictor counts uses, else none.

    Raises
    ------
    InputError
        As `simulator.simulate`; also if the trace lacks what a cache score needs, the cluster has
        no path between memories or no such processor, or the layout has pipeline stages.
    InfeasibleError
        If a memory does not hold what it must.
    """
    if deployment.offload is None:
        raise InputError("deployment.offload is missing -- say what lives and runs where")
    if steps < 1:
        raise InputError(f"steps {steps} -- must be at least 1")
    check_against_model(trace, model)
    check_offload(deployment.offload, cluster, deployment)
    if warmup is None:
        warmup = steps if deployment.offload.learns else 0
    layout = deployment.layout_for(model, cluster)
    every = compose(trace, workload, layout.dp, steps=warmup + steps, seed=seed)
    composition = replace(every, batches=every.batches[warmup:])

    def count(part: Composition, first: int) -> StepLoads:
        return count_loads(
            model,
            trace,
            part,
            deployment.dispatcher_for(model, cluster),
            seed=seed + first,
            layout=layout,
            node_of=cluster.node_of,
        )

    loads = count(composition, warmup)
    works = lower(model, loads)
    past = _experts(lower(model, count(every, 0))) if warmup else _experts(works)
    setting = _Setting.of(model, cluster, deployment, _experts(works))
    decisions = _decide(setting, trace, every, past, seed).last(steps)
    result = _play(setting, trace, composition, loads, works, decisions, seed)
    said = f"; the first {warmup} of them only fill cache and predictor" if warmup else ""
    return replace(result, composition=every.statement + said)


def _play(
    setting: "_Setting",
    trace: RoutingTrace,
    composition: Composition,
    loads: StepLoads,
    works: list[Work],
    decisions: Decisions,
    seed: int,
) -> OffloadResult:
    """Check what the memories hold, rewrite the steps, price and play them."""
    model, cluster, offload = setting.model, setting.cluster, setting.offload
    memory, tiers = _check_memory(setting, composition, decisions)
    works = offload_works(
        works, offload, decisions, cluster, setting.expert_bytes, loads.step_tokens
    )
    priced = price_step(works, loads, cluster)
    played = play(priced.items, priced.seconds)
    return OffloadResult(
        step_times=played.step_times,
        step_times_low=play(priced.items, priced.low).step_times,
        step_times_high=play(priced.items, priced.high).step_times,
        seconds_by_cause=causes_of((played,), played.step_times),
        loads=loads,
        memory=memory,
        sampling_floor=_floor(model, setting, loads.step_tokens, seed),
        evidence=list_evidence(trace, composition, works, priced, cluster),
        composition=composition.statement,
        seed=seed,
        first_step=played.step(0),
        offload=offload,
        decisions=decisions,
        tiers=tiers,
        expert_bytes=setting.expert_bytes,
        played=played,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Setting:
    """What is deployed where, in the terms of a rank's slots; n slots on each of G ranks."""

    model: ModelSpec
    cluster: Cluster
    offload: Offload
    placement: Placement
    layout: Layout
    logical: NDArray[np.integer]
    """Logical expert of each slot, [L, G, n]."""
    expert_bytes: float
    """Of one expert on one rank."""

    @classmethod
    def of(
        cls, model: ModelSpec, cluster: Cluster, deployment: Deployment, op: GroupedGemm
    ) -> "_Setting":
        assert deployment.offload is not None
        placement = deployment.placement_for(model, cluster)
        layout = deployment.layout_for(model, cluster)
        return cls(
            model=model,
            cluster=cluster,
            offload=deployment.offload,
            placement=placement,
            layout=layout,
            logical=placement.slots[:, layout.hosts(placement)],
            expert_bytes=model.bytes_per_expert * op.width / model.expert_width,
        )

    def by_slot(self, values: NDArray[Any]) -> NDArray[Any]:
        """Bring values [..., L, E] of logical experts to [..., L, G, n]."""
        layer = np.arange(len(self.logical))[:, None, None]
        return np.asarray(values[..., layer, self.logical])

    @property
    def static(self) -> Bools:
        """Experts that always stay in the fast memory, [L, G, n]."""
        if self.offload.home == self.cluster.device.processor.memory:
            return np.ones(self.logical.shape, dtype=np.bool_)
        return self.by_slot(self.offload.resident_mask(self.model))


def _decide(
    setting: _Setting,
    trace: RoutingTrace,
    every: Composition,
    op: GroupedGemm,
    seed: int,
) -> Decisions:
    """Decide for all steps of ``op``, which are those of ``every``."""
    offload, scores = setting.offload, None
    if offload.cache is not None:
        scores = expert_scores(trace, [b.rows for b in every.batches], offload.cache.score)
    table = offload.site_table(setting.model)
    return decide(
        offload,
        setting.cluster,
        op,
        setting.expert_bytes,
        static=setting.static,
        cold=~setting.by_slot(offload.warm_mask(setting.model)),
        aside=None if table is None else setting.by_slot(table),
        scores=None if scores is None else setting.by_slot(scores),
        seed=seed,
    )


def _check_memory(
    setting: _Setting, composition: Composition, decisions: Decisions
) -> tuple[MemoryNeed, dict[str, TierNeed]]:
    """Return what the fast memory needs in the terms of a Result, and all tiers, checked."""
    model, cluster, offload = setting.model, setting.cluster, setting.offload
    whole = memory_need(model, setting.placement, composition.batches, setting.layout)
    tiers = tier_needs(
        whole, model, cluster, offload, decisions, setting.static, setting.expert_bytes
    )
    check_tiers(tiers, model, cluster, offload, decisions, setting.expert_bytes)
    fast = tiers[cluster.device.processor.memory].terms
    experts = sum(fast.get(name, 0.0) for name in EXPERT_TERMS)
    here = any(name.startswith("KV cache") for name in fast)
    held = np.full_like(whole.experts, experts)
    return replace(whole, experts=held, kv_cache=whole.kv_cache * here), tiers


def _floor(model: ModelSpec, setting: _Setting, tokens: NDArray[np.int64], seed: int) -> float:
    ranks = setting.placement.num_ranks * setting.layout.edp
    return sampling_floor(round(float(tokens.mean())), model.top_k, ranks, seed=seed)


def check_offload(offload: Offload, cluster: Cluster, deployment: Deployment) -> None:
    """Check that the cluster has the memories, paths and processors that an offload names.

    Raises
    ------
    InputError
        If it does not, or the layout is one that is not simulated with tiers.
    """
    way = stops(cluster, offload.home)
    if offload.warm is not None and len(way) < 3:
        raise InputError(
            f"offload.warm: one link joins {offload.home!r} and {way[-1]!r} -- nothing lies "
            "between them: leave it out, or name a home behind another memory (nvme)"
        )
    fast = cluster.device.processor.memory
    moves = offload.cache is not None or offload.predictor.name != "none"
    if offload.home == fast and moves:
        raise InputError(
            f"offload.home {fast!r} is the fast memory -- nothing has to be copied: leave out "
            "cache and predictor, or name another memory as home"
        )
    if offload.site.needs_processor:
        cluster.path(offload.home, cluster.processor(offload.site.processor).memory)
        cluster.path(cluster.processor(offload.site.processor).memory, fast)
    if offload.attention is not None:
        cluster.path(cluster.processor(offload.attention).memory, fast)
    if offload.copy_engine == "shared" and cluster.num_ranks > 1:
        raise InputError(
            f"offload.copy_engine shared on {cluster.num_ranks} ranks -- links of a node are given "
            "as each rank's share: use one rank, or own"
        )
    stages = deployment.parallelism.attention.pp
    if stages > 1 or deployment.overlap != "none":
        raise InputError(
            f"offload with {stages} pipeline stages and overlap {deployment.overlap} -- tiers are "
            "simulated in one stage without overlap: set pp to 1 and overlap to none"
        )


def _experts(works: list[Work]) -> GroupedGemm:
    op = next(work.op for work in works if work.name == "experts")
    assert isinstance(op, GroupedGemm)
    return op
