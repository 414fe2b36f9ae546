"""What to do: where the experts go, how good that is on unseen requests, and the proof."""

from planner.affinity import Refined, refine
from planner.balance import BalanceResult, balance
from planner.baselines import contiguous, eplb_placement, round_robin
from planner.certificate import Certificate, certify
from planner.eplb import eplb
from planner.options import Limits, PlanOptions
from planner.plan import Lost, Placed, Plan, baseline_deployments, make_plan, place
from planner.scoring import Facts, Score, score
from planner.solver import SolverResult, solve

__all__ = [
    "BalanceResult",
    "Certificate",
    "Facts",
    "Limits",
    "Lost",
    "Placed",
    "Plan",
    "PlanOptions",
    "Refined",
    "Score",
    "SolverResult",
    "balance",
    "baseline_deployments",
    "certify",
    "contiguous",
    "eplb",
    "eplb_placement",
    "make_plan",
    "place",
    "refine",
    "round_robin",
    "score",
    "solve",
]
