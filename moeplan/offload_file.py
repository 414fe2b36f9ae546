"""plan.json of an offload plan: the contract's keys, and what lives, runs and is copied where.

Times are seconds per step (in decode the time per output token), memory and traffic bytes.
"""

from typing import Any

import numpy as np

from basis.units import format_quantity
from moeplan.plan_file import about, mean_causes, rests_on, scored, trace_warnings
from moeplan.report_tables import NAMES
from moeplan.scenario import Scenario
from planner.offload_plan import TIE, OffloadCertificate, OffloadPlan
from planner.offload_sample import OffloadFacts
from planner.scoring import Score
from simulator.deployment import Deployment
from traces.model_spec import ModelSpec


def offload_to_dict(
    scenario: Scenario, facts: OffloadFacts, plan: OffloadPlan, other: OffloadPlan
) -> dict[str, Any]:
    """Write an offload plan as the contents of plan.json.

    Parameters
    ----------
    scenario : Scenario
    facts : OffloadFacts
        What was asked of the planner.
    plan, other : OffloadPlan
        Of the headline split, and the same question on the other one.
    """
    model = scenario.model
    found = {"plan": plan.predicted, **plan.baselines}
    return {
        **about(scenario, plan.deployment, facts.workload),
        "certificate": _proof(plan.certificate),
        "split": plan.split,
        "chosen": plan.name,
        **scored(plan.predicted, plan.baselines),
        "other_split": {
            "split": other.split,
            "chosen": other.name,
            **scored(other.predicted, other.baselines),
            "certificate": _proof(other.certificate),
            "ties": list(other.ties),
        },
        "offload": {
            "home": facts.options.home,
            "processor": facts.processor,
            "slots": plan.slots,
            "num_experts": model.num_moe_layers * model.num_experts,
            "fast_bytes": plan.fast_bytes,
            "bytes_per_expert": model.bytes_per_expert,
            "certificates": {rule: _proof(its) for rule, its in plan.certificates.items()},
            "certificate_of": _certified(plan),
            "ties": list(plan.ties),
            "tie_within": TIE,
            "planned_on": plan.planned_on,
            "tokens_per_second_by_seed": [r.tokens_per_second for r in plan.predicted.results],
            "engine": _engine(model, plan),
        },
        "details": {name: _details(score) for name, score in found.items()},
        "verdict": _verdict(plan, other),
        "alternatives": [vars(lost) for lost in plan.alternatives],
        **rests_on(plan.predicted),
        "warnings": _warnings(scenario, facts, plan),
    }


def _certified(plan: OffloadPlan) -> str:
    """Say whose time the certificate's objective is: proofs are of residencies without a cache."""
    rows = plan.deployment.offload
    cached = rows is not None and rows.cache is not None
    return "the best candidate without a cache" if cached else "the plan"


def _proof(its: OffloadCertificate) -> dict[str, Any]:
    return {**vars(its), "gap": its.gap, "unit": "seconds per step"}


def _details(score: Score) -> dict[str, Any]:
    paths = [result.critical_path for result in score.results]  # type: ignore[attr-defined]
    causes = sorted(set().union(*paths))
    return {
        "seconds_by_cause": mean_causes(score),
        "critical_path_s": {c: float(np.mean([p.get(c, 0.0) for p in paths])) for c in causes},
    }


def _engine(model: ModelSpec, plan: OffloadPlan) -> dict[str, Any]:
    """Return what engines can load; empty where nothing computes experts at home."""
    if not plan.engine:
        return {}
    names = {"gpu_experts": "experts", "gpu_layers": "layers", "last_gpu_layers": "last_layers"}
    rows = plan.engine["experts"].offload
    assert rows is not None
    return {
        "gpu_experts": [list(row) for row in rows.resident or ()],
        "gpu_layers": _whole_layers(model, plan.engine["layers"]),
        "last_gpu_layers": _whole_layers(model, plan.engine["last_layers"]),
        "step_time_s": {
            "plan": _seconds(plan.predicted),
            **{key: _seconds(plan.engine_predicted[name]) for key, name in names.items()},
        },
    }


def _whole_layers(model: ModelSpec, deployment: Deployment) -> list[int]:
    """Return the indices, in the model, of the layers whose experts all stay."""
    assert deployment.offload is not None
    whole = deployment.offload.resident_mask(model).all(axis=1)
    return [model.moe_layer_ids[row] for row in np.flatnonzero(whole)]


def _seconds(score: Score) -> float:
    return float(score.step_times.mean())


def _verdict(plan: OffloadPlan, other: OffloadPlan) -> dict[str, Any]:
    """Compare the plan with the best baseline on requests that it was not planned on."""
    best, slower = _against_best(plan)
    time = format_quantity(_seconds(plan.predicted), "s")
    if best is None or slower is None:
        answer = f"Deploy this plan ({plan.name}): {time} per step; nothing else fits"
    elif abs(slower) <= TIE:
        answer = (
            f"Not worth a plan: {NAMES[best]} is as good (a tie: {slower:+.2%} time per step) at "
            f"{time} per step"
        )
    elif slower > 0:
        answer = (
            f"Deploy this plan ({plan.name}): {time} per step; {NAMES[best]}, the best that "
            f"engines do by themselves, takes {slower:.1%} longer"
        )
    else:
        answer = f"Take {NAMES[best]}: on requests not planned on it takes {-slower:.1%} less time"
    elsewhere, its = _against_best(other)
    return {
        "answer": f"{answer}.",
        "worth_it": slower is None or slower > TIE,
        "tie": slower is not None and abs(slower) <= TIE,
        "default": best,
        "gain_over_default": slower,
        "noise": None if best is None else plan.gain_over(best)[1],
        "other_split": {"default": elsewhere, "gain_over_default": its},
    }


def _against_best(plan: OffloadPlan) -> tuple[str | None, float | None]:
    """Return the fastest baseline that fits, and how much longer its step is than the plan's."""
    if not plan.baselines:
        return None, None
    best = min(plan.baselines, key=lambda n: _seconds(plan.baselines[n]))
    return best, _seconds(plan.baselines[best]) / _seconds(plan.predicted) - 1


def _warnings(scenario: Scenario, facts: OffloadFacts, plan: OffloadPlan) -> list[str]:
    said = trace_warnings(scenario, facts.workload)
    if any(its.status == "time_limit" for its in plan.certificates.values()):
        said.append("An integer programme ran into its time limit; its bound holds.")
    if _certified(plan) != "the plan":
        said.append(
            "The plan has a cache; the proof is of the best candidate without one, against all "
            "residencies without one."
        )
    if not plan.engine:
        said.append(
            f"No processor computes at {facts.options.home}: every expert that is not kept is "
            "fetched, which no engine's file can say."
        )
    return said
