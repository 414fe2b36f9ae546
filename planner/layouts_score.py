"""The chosen layout scored in full, beside what engines do without being asked for a layout.

All at the choice's running requests, on the requests that it was not planned on; tokens/s of all
ranks. A layout that engines would use is left out, with the reason, where it cannot run at all.
"""

from dataclasses import dataclass, replace

from basis.errors import MoeplanError
from planner.baselines import contiguous
from planner.layouts import redundant_for
from planner.layouts_memory import Rejected
from planner.layouts_plan import LayoutPlan
from planner.layouts_question import Sweep, at_lengths, at_size
from planner.scoring import Facts, Score, score
from simulator.deployment import Deployment
from simulator.parallelism import AttentionLayout, ExpertLayout, Parallelism
from traces.routing_trace import RoutingTrace
from traces.splits import split_requests


@dataclass(frozen=True, kw_only=True)
class LayoutScores:
    """The choice and what it is compared with."""

    predicted: Score
    baselines: dict[str, Score]
    """Experts in order in ``contiguous``, the chosen layout; ``dp_ep``, attention DP = EP on all
    ranks; ``tensor_parallel``, TP over a node and PP over nodes. Of equal ones the last."""
    left_out: tuple[Rejected, ...]
    """Baselines that cannot run, and why."""


def score_layouts(
    facts: Facts, trace: RoutingTrace, plan: LayoutPlan, *, sweep: Sweep | None = None
) -> LayoutScores:
    """Score the choice of a plan of layouts and its baselines, once per seed.

    Parameters
    ----------
    facts, trace, sweep : Facts, RoutingTrace, Sweep
        What `planner.layouts_plan.plan_layouts` was asked.
    plan : LayoutPlan
    """
    unseen = split_requests(trace, plan.split)[1]
    if sweep is not None:
        unseen = at_lengths(unseen, sweep)

    def found(deployment: Deployment) -> Score:
        asked = at_size(facts, plan.chosen.size, parallelism=deployment.parallelism)
        options = asked.options.model_copy(update={"seeds": facts.options.seeds})
        return score(replace(asked, options=options), unseen, deployment)

    baselines, left_out = {}, []
    for name, parallelism in _engine_layouts(facts, plan).items():
        try:
            baselines[name] = found(_in_order(facts, parallelism))
        except MoeplanError as error:
            left_out.append(Rejected(name=name, why=str(error)))
    return LayoutScores(
        predicted=found(plan.chosen.deployment), baselines=baselines, left_out=tuple(left_out)
    )


def _engine_layouts(facts: Facts, plan: LayoutPlan) -> dict[str, Parallelism]:
    """Layouts of the baselines by name, each once."""
    nodes, each = facts.cluster.num_nodes, facts.cluster.ranks_per_node
    usual = {
        "contiguous": plan.chosen.candidate.parallelism,
        "dp_ep": Parallelism.dp_ep(facts.cluster.num_ranks),
        "tensor_parallel": Parallelism(
            attention=AttentionLayout(dp=1, tp=each, pp=nodes), experts=ExpertLayout(ep=1, tp=each)
        ),
    }
    names = {parallelism.model_dump_json(): name for name, parallelism in usual.items()}
    return {name: usual[name] for name in names.values()}


def _in_order(facts: Facts, parallelism: Parallelism) -> Deployment:
    experts, ep = facts.model.num_experts, parallelism.experts.ep
    slots = experts + redundant_for(experts, ep)
    place = contiguous(facts.model.num_moe_layers, experts, slots, ep)
    return Deployment.of(place, parallelism=parallelism)
