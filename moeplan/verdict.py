"""The answer in one sentence: is this plan worth deploying, and against what.

A difference is a tie within the noise of the batch composition (twice the standard error over
paired seeds) or 0.2 %, and a plan is worth deploying from 1 % over the engine's default.
"""

from typing import Any

from planner.plan import Plan
from planner.scoring import Score

TIE = 0.002
"""Relative throughput below which a difference is called a tie whatever the noise; assumed."""
WORTH = 0.01
"""Relative throughput from which changing the placement is worth the trouble; assumed."""


def judge(plan: Plan, other: Plan) -> dict[str, Any]:
    """Compare a plan with the engine's default and with EPLB, on held-out requests."""
    default, default_noise = plan.predicted.gain_over(plan.baselines["contiguous"])
    eplb, eplb_noise = plan.predicted.gain_over(plan.baselines["eplb"])
    worth_it = default > max(default_noise, WORTH)
    tie = abs(eplb) <= max(eplb_noise, TIE)
    return {
        "answer": _sentence(default, eplb, worth_it=worth_it, tie=tie) + _without(plan),
        "worth_it": worth_it,
        "tie": tie,
        "gain_over_default": default,
        "gain_over_default_noise": default_noise,
        "gain_over_eplb": eplb,
        "gain_over_eplb_noise": eplb_noise,
        "noise": max(default_noise, eplb_noise),
        "other_split": _other(other),
    }


def _sentence(default: float, eplb: float, *, worth_it: bool, tie: bool) -> str:
    if not worth_it:
        return (
            f"Not worth it: {default:+.1%} tokens/s against the engine's default placement on "
            "requests that it was not planned on."
        )
    against = (
        "as good as EPLB (a tie)"
        if tie
        else f"{eplb:+.1%} against EPLB"
        if eplb > 0
        else f"but {-eplb:.1%} below EPLB"
    )
    return (
        f"Deploy this placement: {default:+.1%} tokens/s against the engine's default placement, "
        f"{against}, predicted on requests that it was not planned on."
    )


def _without(plan: Plan) -> str:
    """Say so if one slot per expert does better than the redundancy that was asked for."""
    if plan.without_redundancy is None:
        return ""
    over_plan, noise = plan.without_redundancy.gain_over(plan.predicted)
    if over_plan <= max(noise, TIE):
        return ""
    over_default, _ = plan.without_redundancy.gain_over(plan.baselines["contiguous"])
    return (
        f" A plan without redundant experts would do better: {over_default:+.1%} against the "
        "default (set redundant_experts: 0)."
    )


def _other(other: Plan) -> dict[str, float]:
    def gain(base: Score) -> float:
        return other.predicted.gain_over(base)[0]

    return {
        "gain_over_default": gain(other.baselines["contiguous"]),
        "gain_over_eplb": gain(other.baselines["eplb"]),
    }
