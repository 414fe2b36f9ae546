"""plan.json: a plan as plain data, with its certificate, its prediction and what it rests on.

The report and the exports read this file and nothing else. Loads are tokens, times seconds,
traffic and memory bytes; rank loads are relative to the layer's mean rank (1 is the mean).
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import moeplan
from basis.errors import InputError
from basis.schema import read_data
from hwmodels.engines import engines_of
from moeplan.scenario import Scenario
from moeplan.verdict import judge
from planner.plan import Plan
from planner.scoring import Score
from simulator.deployment import Deployment, Workload

SCHEMA = "moeplan.plan/1"


def to_dict(scenario: Scenario, plan: Plan, other: Plan) -> dict[str, Any]:
    """Write a placement plan as the contents of plan.json.

    Parameters
    ----------
    scenario : Scenario
    plan : Plan
        The plan that is deployed, of the headline split.
    other : Plan
        The same question on the other split, for comparison.
    """
    return {
        **about(scenario, plan.deployment, scenario.step),
        "certificate": _certificate(plan),
        "second_stage": plan.refined.summary(),
        "split": plan.split,
        "chosen": plan.name,
        **scored(plan.predicted, plan.baselines),
        "without_redundancy": plan.without_redundancy and plan.without_redundancy.summary(),
        "other_split": {"split": other.split, **scored(other.predicted, other.baselines)},
        "details": {n: _details(s) for n, s in {"plan": plan.predicted, **plan.baselines}.items()},
        "verdict": judge(plan, other),
        "alternatives": [vars(lost) for lost in plan.alternatives],
        **rests_on(plan.predicted),
        "warnings": _warnings(scenario, plan),
    }


def about(scenario: Scenario, deployment: Deployment, step: Workload) -> dict[str, Any]:
    """Return what every kind of plan begins with: the facts and the deployment."""
    model, plain = scenario.model, deployment.model_dump(mode="json")
    return {
        "schema": SCHEMA,
        "moeplan_version": moeplan.__version__,
        "scenario": _scenario(scenario, step),
        "model_family": model.family,
        "num_hidden_layers": model.num_layers,
        "num_experts": model.num_experts,
        "moe_layer_ids": list(model.moe_layer_ids),
        "physical_to_logical_map": plain["physical_to_logical_map"],
        "dispatch": plain["dispatch"],
        **({"slot_share": plain["slot_share"]} if plain["slot_share"] else {}),
        "parallelism": plain["parallelism"],
        "node_of_rank": scenario.cluster.node_of.tolist(),
        "deployment": plain,
    }


def scored(predicted: Score, baselines: Mapping[str, Score]) -> dict[str, Any]:
    """Return a plan's figures and those of its baselines, the same keys in all."""
    return {
        "predicted": predicted.summary(),
        "baselines": {name: score.summary() for name, score in baselines.items()},
    }


def rests_on(predicted: Score) -> dict[str, Any]:
    """Return what a prediction rests on, by kernel, and how its steps were composed."""
    first = predicted.results[0]
    return {"evidence": [vars(item) for item in first.evidence], "composition": first.composition}


def mean_causes(score: Score) -> dict[str, float]:
    """Seconds per step by cause, mean over seeds."""
    names = score.results[0].seconds_by_cause
    return {n: float(np.mean([r.seconds_by_cause[n] for r in score.results])) for n in names}


def read_plan(path: Path) -> dict[str, Any]:
    """Read a plan.json.

    Raises
    ------
    InputError
        If the file is not one, or of another schema version.
    """
    data = read_data(path)
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise InputError(f"{path}: schema is {found!r} -- expected a plan.json of {SCHEMA!r}")
    return data


def _kernels(engine: str | None, prices: str, device: str) -> str:
    """Say whose kernels priced it, and whose could."""
    if engine:
        return f"kernels of {engine} ({prices})"
    fitted = ", ".join(engines_of(device))
    return "engine-neutral kernels" + (
        f" (fitted on measurements: engine: {fitted})" * bool(fitted)
    )


def _scenario(scenario: Scenario, step: Workload) -> dict[str, Any]:
    model, trace, cluster, file = scenario.model, scenario.trace, scenario.cluster, scenario.file
    return {
        "name": scenario.name,
        "model": model.name,
        "model_summary": (
            f"{model.num_moe_layers} MoE layers x {model.num_experts} experts, top-{model.top_k}, "
            f"{model.total_params / 1e9:.1f} B parameters, experts in {model.expert_dtype}"
        ),
        "trace": trace.meta.model,
        "trace_summary": f"{trace.num_tokens:,} tokens of {trace.num_requests:,} requests",
        "trace_note": trace.meta.note,
        "synthetic": trace.meta.synthetic,
        "cluster": cluster.name,
        "cluster_summary": (
            f"{cluster.num_ranks} x {cluster.device.name} on {cluster.num_nodes} node"
            f"{'s' if cluster.num_nodes > 1 else ''}"
            f", {_kernels(file.engine, file.prices, cluster.device.name)}"
        ),
        "engine": file.engine,
        "prices": file.prices if file.engine else None,
        "ranks_per_node": cluster.ranks_per_node,
        "workload": {"phase": step.phase, "tokens_per_step": step.tokens},
        "redundant_experts": file.plan.redundant_experts,
        "objective": file.plan.objective,
    }


def _certificate(plan: Plan) -> dict[str, Any]:
    proof = plan.certificate
    return {
        "problem": proof.problem,
        "unit": "tokens on the busiest rank, summed over MoE layers",
        "objective": proof.objective,
        "bound": proof.bound,
        "gap": proof.gap,
        "status": proof.status,
        "mean_bound": float(proof.mean_by_layer.sum()),
        "seconds": proof.seconds,
        "per_layer": {
            "objective": proof.objective_by_layer.tolist(),
            "bound": proof.bound_by_layer.tolist(),
            "mean": proof.mean_by_layer.tolist(),
        },
    }


def _details(score: Score) -> dict[str, Any]:
    results = score.results
    load = np.mean([r.rank_load for r in results], axis=0)
    return {
        "seconds_by_cause": mean_causes(score),
        "rank_load": np.round(load * load.shape[1], 5).tolist(),
        "traffic": np.mean([r.traffic for r in results], axis=0).round().tolist(),
    }


def trace_warnings(scenario: Scenario, step: Workload) -> list[str]:
    """Say what a reader should know of the trace and the step before believing a headline."""
    said = []
    model, trace = scenario.model, scenario.trace
    if trace.meta.synthetic:
        said.append("The trace is synthetic: it shows how the tool works, not how a model routes.")
    per_expert = trace.num_tokens / 2 * model.top_k / model.num_experts
    error = 1 / math.sqrt(max(per_expert, 1e-9))
    if error > 0.05:
        said.append(
            f"An expert has {per_expert:.0f} tokens per layer in the part planned on: its load is "
            f"known to {error:.0%} (one standard error). Record more tokens."
        )
    if step.tokens < scenario.cluster.num_ranks:
        said.append("Fewer tokens in a step than ranks: some ranks have no attention work at all.")
    return said


def _warnings(scenario: Scenario, plan: Plan) -> list[str]:
    said = trace_warnings(scenario, scenario.step)
    if plan.certificate.status == "time_limit":
        said.append("The first stage ran into its time limit; the bound holds, the gap is open.")
    return said
