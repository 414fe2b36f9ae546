"""plan.json of a plan of layouts: the contract's keys, and what the search over layouts found.

Throughput is generated tokens/s of all ranks, TPOT the step time in seconds, memory in bytes of
the fullest rank.
"""

from typing import Any

from basis.units import format_quantity
from moeplan.plan_file import about, mean_causes, rests_on, scored, trace_warnings
from moeplan.report_tables import NAMES
from moeplan.scenario import Scenario
from moeplan.verdict import WORTH
from planner.layouts_plan import LayoutPlan
from planner.layouts_score import LayoutScores
from simulator.deployment import Workload

_USUAL = ("dp_ep", "tensor_parallel")
"""Baselines that an engine's user would start with."""


def layouts_to_dict(
    scenario: Scenario, plan: LayoutPlan, confirmation: str, scores: LayoutScores
) -> dict[str, Any]:
    """Write a plan of layouts as the contents of plan.json.

    Parameters
    ----------
    scenario : Scenario
    plan : LayoutPlan
        Of the headline split.
    confirmation : str
        What `planner.layouts_plan.confirm_layouts` said of the other split.
    scores : LayoutScores
        The choice and its baselines on the headline split.
    """
    step = Workload(decode_batch=plan.chosen.size)
    found = {"plan": scores.predicted, **scores.baselines}
    by_seed = [r.tokens_per_second for r in scores.predicted.results]
    return {
        **about(scenario, plan.chosen.deployment, step),
        "certificate": _certificate(scenario, plan),
        "split": plan.split,
        "chosen": plan.chosen.candidate.name,
        **scored(scores.predicted, scores.baselines),
        "layouts": {
            **plan.to_dict(),
            "confirmation": confirmation,
            "tokens_per_second_by_seed": by_seed,
        },
        "details": {n: {"seconds_by_cause": mean_causes(score)} for n, score in found.items()},
        "verdict": _verdict(plan, scores),
        "alternatives": [vars(lost) for lost in (*plan.alternatives, *scores.left_out)],
        **rests_on(scores.predicted),
        "warnings": _warnings(scenario, plan, step),
    }


def _certificate(scenario: Scenario, plan: LayoutPlan) -> dict[str, Any]:
    """Proof of the search: no point that was not simulated can reach more than the bound."""
    limit = scenario.file.plan.limits.tpot_p99
    under = "" if limit is None else f", TPOT p99 at most {format_quantity(limit, 's')}"
    objective = plan.chosen.tokens_per_second
    return {
        "problem": (
            f"most tokens/s of all ranks over {plan.enumerated} layouts and "
            f"{len(plan.question.sizes)} batch sizes as far as they fit into memory{under}: "
            f"{plan.question.statement}; as the simulator plays held-out requests"
        ),
        "unit": "tokens/s of all ranks; the bound is an upper one",
        "objective": objective,
        "bound": objective * (1 + plan.proof.open_gain),
        "gap": plan.proof.open_gain,
        "status": "optimal" if plan.proof.proved else "time_limit",
        "seconds": plan.seconds,
    }


def _verdict(plan: LayoutPlan, scores: LayoutScores) -> dict[str, Any]:
    """Compare the choice with the runner-up, and with the better of the usual layouts."""
    chosen, runner = plan.chosen, plan.runner_up
    answer = (
        f"Deploy {chosen.candidate.name}: {chosen.tokens_per_second:,.0f} tokens/s with "
        f"{chosen.size:,} running requests, TPOT {format_quantity(chosen.step_time, 's')}"
    )
    usual = [name for name in _USUAL if name in scores.baselines]
    gain = noise = name = None
    if usual:
        name = max(usual, key=lambda n: scores.baselines[n].mean("tokens_per_second"))
        gain, noise = scores.predicted.gain_over(scores.baselines[name])
        answer += f", {gain:+.1%} against {NAMES[name]}"
    if runner is not None and plan.tie:
        answer += f"; {runner.candidate.name} is as good (a tie)"
    elif runner is not None:
        ahead = chosen.gain_over(runner)[0]
        answer += f"; {ahead:+.1%} over the next best, {runner.candidate.name}"
    return {
        "answer": f"{answer}.",
        "worth_it": gain is not None and gain > max(noise or 0.0, WORTH),
        "tie": plan.tie,
        "default": name,
        "gain_over_default": gain,
        "noise": noise,
    }


def _warnings(scenario: Scenario, plan: LayoutPlan, step: Workload) -> list[str]:
    said = trace_warnings(scenario, step)
    if not plan.proof.proved:
        said.append(
            f"The search over layouts ran into its time limit: {plan.proof.open_points} points "
            f"were not simulated and could by their bound gain up to {plan.proof.open_gain:.1%}."
        )
    return said
