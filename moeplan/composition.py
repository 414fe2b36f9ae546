"""Run a composition: every variant of a published system on every workload, claims beside figures.

A variant is a `simulator.deployment.Deployment` with some parts named by a rule (placement,
residency, cache share) that the model and the earlier half of the requests settle.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from basis.errors import InfeasibleError, InputError
from moeplan.composition_file import (
    Claim,
    Composition,
    Ours,
    Resident,
    Routing,
    Variant,
)
from moeplan.scenario import open_cluster, resolve
from planner.offload_baselines import first_layers, most_frequent, rows_of, uniform
from planner.options import PlanOptions
from planner.plan import baseline_deployments, place
from planner.scoring import Facts
from simulator.deployment import Deployment, Workload
from simulator.offload import Offload
from simulator.result import Result
from simulator.simulate import simulate
from traces.counts import expert_counts
from traces.model_spec import ModelSpec, load_model
from traces.routing_trace import RoutingTrace, check_against_model, read_trace
from traces.splits import split_requests
from traces.synth import synthetic_trace, zipf_shares

_GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, are even in every part of the sequence


@dataclass(frozen=True, kw_only=True)
class Run:
    """One variant on one workload: its result, or why it cannot run."""

    facts: Facts
    """Model, cluster and workload."""
    routing: str
    """Where the routing comes from."""
    own_facts: bool
    """Whether model and routing are the file's."""
    variant: str
    result: Result | None
    refused: str = ""
    """Why there is none: it does not fit into memory, or needs what another trace lacks."""

    @property
    def workload(self) -> Workload:
        """What a step carries."""
        return self.facts.workload

    @property
    def summary(self) -> dict[str, Any] | None:
        """Headline of the result, and `moeplan.composition_file.Metric`'s ``mfu``."""
        if self.result is None:
            return None
        cluster = self.facts.cluster
        peak = cluster.num_ranks * cluster.device.flops("bf16").value
        flops = 2 * self.facts.model.active_params * self.result.tokens_per_second
        return {**self.result.summary(), "mfu": flops / peak}


def run(
    composition: Composition,
    folder: Path,
    *,
    model: Path | None = None,
    trace: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Run]:
    """Simulate every variant on every workload.

    Parameters
    ----------
    composition : Composition
    folder : Path
        What the file's paths are relative to.
    model, trace : Path, optional
        Another model and its recorded trace in place of the file's own.
    progress : callable
        Told what begins.

    Raises
    ------
    InputError
        If a fact is missing or the facts disagree. A variant that does not fit into memory, or
        that asks of the other model or trace what they lack, is a run without a result.
    """
    spec = load_model(model or resolve(folder, composition.model, "model"))
    routed = _trace(composition, spec, folder, trace)
    seen, unseen = split_requests(routed, "early_late")
    own = trace is None and model is None
    runs = []
    for workload in composition.workloads:
        for name, variant in composition.variants.items():
            progress(f"{composition.system}: {name}, {workload.tokens} tokens")
            here = variant.cluster or composition.cluster
            facts = Facts(
                model=spec,
                cluster=open_cluster(here, folder, composition.gpus),
                workload=workload,
                options=PlanOptions(
                    redundant_experts=variant.redundant_experts,
                    dispatch=variant.dispatch,
                    steps=composition.steps,
                    seed=composition.seed,
                ),
                parallelism=variant.parallelism,
            )
            result, refused = _simulate(facts, variant, seen, unseen, composition, own)
            runs.append(
                Run(
                    facts=facts,
                    routing=_routing(routed),
                    own_facts=own,
                    variant=name,
                    result=result,
                    refused=refused,
                )
            )
    return runs


def composition_answer(composition: Composition, runs: list[Run]) -> dict[str, Any]:
    """Return the runs and each claim with our figure, as plain data.

    A claim is answered by the largest figure over the workloads, as "up to" means, and only where
    the runs are of the file's own model and routing. ``same_direction``: whether claimed and our
    ratio lie on the same side of 1 (null: no ratio).
    """
    own = runs[0].own_facts
    return {
        "system": composition.system,
        "paper": composition.paper,
        "model": runs[0].facts.model.name,
        "routing": runs[0].routing,
        "baseline": composition.baseline,
        "runs": [
            {
                "workload": run.workload.model_dump(exclude_none=True),
                "variant": run.variant,
                "summary": run.summary,
                "refused": run.refused,
            }
            for run in runs
        ],
        "own_facts": own,
        "claims": [_claim(claim, runs if own else []) for claim in composition.claims],
        "notes": list(composition.notes),
    }


def _claim(claim: Claim, runs: list[Run]) -> dict[str, Any]:
    ours = None if claim.ours is None else _answer(claim.ours, runs)
    ratio = claim.ours is not None and claim.ours.over is not None
    same = None
    if ratio and ours is not None and claim.value is not None:
        same = (ours > 1) == (claim.value > 1)
    return {
        "claim": claim.text,
        "confidence": claim.confidence,
        "claimed": claim.value,
        "ours": ours,
        "same_direction": same,
        "remark": claim.remark,
    }


def _answer(ours: Ours, runs: list[Run]) -> float | None:
    asked = [run for run in runs if ours.phase in (None, run.workload.phase)]
    figures = {(r.workload, r.variant): (r.summary or {}).get(ours.metric) for r in asked}
    found = []
    for (workload, variant), value in figures.items():
        below = figures.get((workload, ours.over)) if ours.over else 1.0
        if variant == ours.of and value is not None and below:
            found.append(float(value) / float(below))
    return max(found, default=None)


def _simulate(
    facts: Facts,
    variant: Variant,
    seen: RoutingTrace,
    unseen: RoutingTrace,
    composition: Composition,
    own: bool,
) -> tuple[Result | None, str]:
    """Simulate a variant: its result, or why there is none."""
    try:
        deployment = _deployment(facts, variant, seen)
        steps, seed = composition.steps, composition.seed
        result = simulate(
            facts.model, unseen, facts.cluster, deployment, facts.workload, steps=steps, seed=seed
        )
    except InfeasibleError as error:
        return None, str(error)
    except InputError as error:
        if own:
            raise
        return None, str(error)
    return result, ""


def _deployment(facts: Facts, variant: Variant, seen: RoutingTrace) -> Deployment:
    """Settle what a variant says by rule, given the earlier requests."""
    if variant.placement == "plan":
        deployment = place(facts, seen).deployment
    else:
        deployment = baseline_deployments(facts, seen)[variant.placement]
    counts = expert_counts(seen.experts, facts.model.num_experts)
    settled = {"overlap": variant.overlap, "offload": _offload(variant, counts)}
    return deployment.model_copy(update=settled)


def _offload(variant: Variant, counts: NDArray[np.int64]) -> Offload | None:
    """Return the tiers with residency and cache settled by the experts' uses [L, E]."""
    if variant.offload is None:
        return None
    settled: dict[str, Any] = {}
    if variant.resident is not None:
        settled["resident"] = _resident(variant.resident, counts)
    if variant.cache is not None:
        settled["cache"] = variant.cache.for_model(*counts.shape)
    return Offload.model_validate(dict(variant.offload) | settled)


def _resident(rule: Resident, counts: NDArray[np.int64]) -> tuple[tuple[int, ...], ...]:
    layers, experts = counts.shape
    slots = round(rule.share * counts.size)
    if rule.by == "frequent":
        return rows_of(most_frequent(counts, slots))
    make = first_layers if rule.by == "front" else uniform
    return rows_of(make(layers, experts, slots))


def _trace(
    composition: Composition, model: ModelSpec, folder: Path, given: Path | None
) -> RoutingTrace:
    wanted = composition.trace
    if given or isinstance(wanted, str):
        trace = read_trace(given or resolve(folder, str(wanted), "trace"))
        check_against_model(trace, model)
        return trace
    return _synthetic(wanted, model)


def _synthetic(wanted: Routing, model: ModelSpec) -> RoutingTrace:
    """Draw the routing of a model; requests begin at contexts in no order."""
    shares = zipf_shares(model.num_experts, wanted.exponent, model.num_moe_layers, wanted.seed)
    trace = synthetic_trace(
        shares,
        tokens=wanted.tokens,
        requests=wanted.requests,
        top_k=model.top_k,
        seed=wanted.seed,
        model=model.name,
        reuse=wanted.reuse,
        candidates=wanted.candidates or 0,
    )
    low, high = wanted.context
    start = low + np.floor((high - low + 1) * (trace.request_id * _GOLDEN % 1)).astype(np.int32)
    return replace(
        trace,
        meta=replace(trace.meta, moe_layer_ids=model.moe_layer_ids),
        position=(trace.position + start).astype(np.int32),
    )


def _routing(trace: RoutingTrace) -> str:
    made = "synthetic" if trace.meta.synthetic else "recorded"
    return f"{made}, {trace.num_tokens} tokens of {trace.num_requests} requests"
