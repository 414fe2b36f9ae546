"""What to do: where the experts go, how good that is on unseen requests, and the proof."""

from planner.affinity import Refined, refine
from planner.balance import BalanceResult, balance
from planner.baselines import contiguous, eplb_placement, round_robin
from planner.certificate import Certificate, certify
from planner.eplb import eplb
from planner.layouts import Candidate, enumerate_layouts
from planner.layouts_measured import Measured
from planner.layouts_plan import LayoutPlan, confirm_layouts, plan_layouts
from planner.layouts_question import Sweep
from planner.layouts_score import LayoutScores, score_layouts
from planner.layouts_search import Proof
from planner.offload_options import OffloadOptions
from planner.offload_plan import OffloadCertificate, OffloadPlan, make_offload_plan
from planner.offload_sample import OffloadFacts
from planner.options import Limits, PlanOptions
from planner.plan import Lost, Placed, Plan, baseline_deployments, make_plan, place
from planner.scoring import Facts, Score, score
from planner.solver import SolverResult, solve
from planner.streaming_bound import StreamingBound

__all__ = [
    "BalanceResult",
    "Candidate",
    "Certificate",
    "Facts",
    "LayoutPlan",
    "LayoutScores",
    "Limits",
    "Lost",
    "Measured",
    "OffloadCertificate",
    "OffloadFacts",
    "OffloadOptions",
    "OffloadPlan",
    "Placed",
    "Plan",
    "PlanOptions",
    "Proof",
    "Refined",
    "Score",
    "SolverResult",
    "StreamingBound",
    "Sweep",
    "balance",
    "baseline_deployments",
    "certify",
    "confirm_layouts",
    "contiguous",
    "enumerate_layouts",
    "eplb",
    "eplb_placement",
    "make_offload_plan",
    "make_plan",
    "place",
    "plan_layouts",
    "refine",
    "round_robin",
    "score",
    "score_layouts",
    "solve",
]
