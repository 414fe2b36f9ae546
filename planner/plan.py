"""From a trace to a placement with its proof, its score and the choices that lost.

Planned on one part of the requests and scored on the other. The second stage's placement is
taken unless another candidate (first stage, or a baseline that keeps the rules) is faster *on the
part planned on* by more than the noise; the held-out part then judges it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from basis.errors import InfeasibleError, InputError
from planner.affinity import Refined, refine
from planner.balance import BalanceResult, balance
from planner.baselines import contiguous, eplb_placement, round_robin
from planner.certificate import Certificate, certify
from planner.eplb import eplb
from planner.local_search import swap_search
from planner.options import Limits
from planner.packing import cyclic_packing, replica_counts
from planner.scoring import Facts, Score, score
from planner.slot_cost import slot_seconds
from simulator.deployment import Deployment, Workload
from simulator.placement import Placement
from traces.counts import expert_counts
from traces.routing_trace import RoutingTrace
from traces.splits import Split, split_requests

Progress = Callable[[str], None]
"""Told what begins; the front door shows it."""


@dataclass(frozen=True, kw_only=True)
class Lost:
    """A placement that was considered and not chosen."""

    name: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A deployment, its proof and its score on requests that it was not planned on."""

    split: Split
    name: str
    """Which candidate won."""
    deployment: Deployment
    certificate: Certificate
    refined: Refined
    """The second stage's figures on the part planned on."""
    predicted: Score
    baselines: dict[str, Score]
    without_redundancy: Score | None
    """The plan with no redundant experts on held-out requests; None where there are none, or the
    experts do not divide over the ranks."""
    alternatives: tuple[Lost, ...]


def make_plan(
    facts: Facts, trace: RoutingTrace, split: Split, progress: Progress = lambda _: None
) -> Plan:
    """Plan on one part of a trace, score on the other.

    Parameters
    ----------
    facts : Facts
        Model, cluster, workload and options.
    trace : RoutingTrace
        All requests.
    split : {"early_late", "interleaved"}

    Raises
    ------
    InfeasibleError
        If the experts do not fit into memory, or a limit cannot be kept.
    InputError
        If the slots do not divide over the ranks.
    """
    seen, unseen = split_requests(trace, split)
    placed = place(facts, seen, lambda text: progress(f"{split}: {text}"))
    progress(f"{split}: score on held-out requests")
    predicted = score(facts, unseen, placed.deployment)
    check_limits(facts.options.limits, facts.workload, predicted)
    plain = _without_redundancy(facts)
    return Plan(
        split=split,
        name=placed.name,
        deployment=placed.deployment,
        certificate=certify(facts, placed.deployment, placed.stage_one, _loads(seen)),
        refined=placed.refined,
        predicted=predicted,
        baselines={n: score(facts, unseen, d) for n, d in placed.baselines.items()},
        without_redundancy=None
        if plain is None
        else score(plain, unseen, place(plain, seen).deployment),
        alternatives=placed.lost,
    )


@dataclass(frozen=True, kw_only=True)
class Placed:
    """What was decided on the part planned on."""

    name: str
    deployment: Deployment
    stage_one: BalanceResult
    refined: Refined
    baselines: dict[str, Deployment]
    lost: tuple[Lost, ...]


def place(facts: Facts, seen: RoutingTrace, progress: Progress = lambda _: None) -> Placed:
    """Plan on a part of a trace: both stages, then the choice among the candidates."""
    progress("balance the ranks (first stage)")
    stage_one = _first_stage(facts, seen)
    progress("sends and stragglers (second stage)")
    refined = _second_stage(facts, seen, stage_one)
    progress("score candidates on the requests planned on")
    baselines = baseline_deployments(facts, seen)
    candidates = _candidates(facts, stage_one, refined, baselines)
    scores = {name: score(facts, seen, d) for name, d in candidates.items()}
    name = _choose(scores)
    return Placed(
        name=name,
        deployment=candidates[name],
        stage_one=stage_one,
        refined=refined,
        baselines=baselines,
        lost=_lost(name, scores, baselines, candidates),
    )


def place_by_stages(
    facts: Facts, seen: RoutingTrace, *, second: bool = True
) -> tuple[NDArray[np.int32], NDArray[np.float64] | None]:
    """Place by the stages alone, without simulating candidates: what a sweep over layouts needs.

    Parameters
    ----------
    facts : Facts
        With more than one expert-parallel rank.
    seen : RoutingTrace
        The part planned on.
    second : bool
        Whether to go on to sends and stragglers after balancing the ranks.

    Returns
    -------
    slots : int32 array [MoE layers, slots]
    slot_share : float64 array [MoE layers, slots] or None
        For dispatch ``shares``.
    """
    stage_one = _first_stage(facts, seen)
    if not second:
        return stage_one.slots, stage_one.slot_share
    refined = _second_stage(facts, seen, stage_one)
    return refined.slots, refined.slot_share


def _choose(scores: dict[str, Score]) -> str:
    """Return the fastest candidate, or the first unless that is faster by more than the noise."""
    first = next(iter(scores))
    fastest = min(scores, key=lambda n: float(scores[n].step_times.mean()))
    gain, noise = scores[fastest].gain_over(scores[first])
    return fastest if gain > noise else first


def _without_redundancy(facts: Facts) -> Facts | None:
    """Return the same question with one slot per expert, where that divides over the ranks."""
    options = facts.options
    if not options.redundant_experts or facts.model.num_experts % facts.layout.ep:
        return None
    return replace(facts, options=options.model_copy(update={"redundant_experts": 0}))


def baseline_deployments(facts: Facts, seen: RoutingTrace) -> dict[str, Deployment]:
    """Return what engines would do by themselves, by name.

    ``contiguous`` and ``round_robin`` have no redundant slots where the experts divide over the
    ranks (the engines' default); ``eplb`` has as many slots as the plan.
    """
    experts, ranks = facts.model.num_experts, facts.layout.ep
    slots = experts + facts.options.redundant_experts
    plain = experts if experts % ranks == 0 else slots
    layers = facts.model.num_moe_layers
    placements = {
        "contiguous": contiguous(layers, experts, plain, ranks),
        "round_robin": round_robin(layers, experts, plain, ranks),
        "eplb": eplb_placement(
            _loads(seen),
            slots,
            ranks,
            num_nodes=len(np.unique(facts.expert_nodes)),
            num_groups=facts.model.num_expert_groups,
        ),
    }
    rule = "even" if facts.options.dispatch == "shares" else facts.options.dispatch
    layout = facts.parallelism
    return {n: Deployment.of(p, rule, parallelism=layout) for n, p in placements.items()}


def _loads(part: RoutingTrace) -> NDArray[np.float64]:
    return expert_counts(part.experts, part.meta.num_experts).astype(np.float64)


def _first_stage(facts: Facts, seen: RoutingTrace) -> BalanceResult:
    options = facts.options
    return balance(
        _loads(seen),
        facts.model.num_experts + options.redundant_experts,
        facts.layout.ep,
        dispatch="shares" if options.dispatch == "shares" else "even",
        time_limit=options.time_limit,
        gap=options.gap,
        seed=options.seed,
        backend=options.solver,
    )


def _second_stage(facts: Facts, seen: RoutingTrace, stage_one: BalanceResult) -> Refined:
    options = facts.options
    return refine(
        stage_one,
        seen,
        facts.expert_nodes,
        batch=facts.expert_tokens,
        tolerance=options.tolerance,
        dispatch=options.dispatch,
        seed=options.seed,
        time_limit=options.time_limit,
        cost=slot_seconds(
            facts.model,
            facts.cluster,
            facts.expert_tokens,
            stage_one.slots.shape[1],
            facts.layout,
        ),
        also=[_hottest_replicated(_loads(seen), stage_one, facts)],
    )


def _hottest_replicated(
    loads: NDArray[np.float64], stage_one: BalanceResult, facts: Facts
) -> NDArray[np.int64]:
    """EPLB's replica counts, packed better: hot experts need fewer tiles if they are split.

    The first stage replicates whatever packs most evenly, which may leave a hot expert whole.
    """
    ranks, slots = facts.layout.ep, stage_one.slots.shape[1]
    counts = replica_counts(eplb(loads, slots, 1, 1, ranks), loads.shape[1])
    return swap_search(loads, cyclic_packing(loads, counts, ranks), ranks)[0]


def _candidates(
    facts: Facts,
    stage_one: BalanceResult,
    refined: Refined,
    baselines: dict[str, Deployment],
) -> dict[str, Deployment]:
    experts, ranks = facts.model.num_experts, facts.layout.ep
    options = facts.options

    def deploy(slots: NDArray[np.int32], share: NDArray[np.float64] | None) -> Deployment:
        place = Placement(slots=slots, num_experts=experts, num_ranks=ranks)
        return Deployment.of(place, options.dispatch, share, facts.parallelism)

    own = {"second stage": deploy(refined.slots, refined.slot_share)}
    own["first stage"] = deploy(stage_one.slots, stage_one.slot_share)
    if options.dispatch == "shares":
        return own
    slots = experts + options.redundant_experts
    return own | {n: d for n, d in baselines.items() if keeps_the_rules(d, slots, facts)}


def keeps_the_rules(deployment: Deployment, slots: int, facts: Facts) -> bool:
    """Whether a placement has the plan's slots and never two replicas of an expert on a rank."""
    place = deployment.placement_for(facts.model, facts.cluster)
    return place.num_slots == slots and int(place.hosts.max()) == 1


def _lost(
    winner: str,
    scores: dict[str, Score],
    baselines: dict[str, Deployment],
    candidates: dict[str, Deployment],
) -> tuple[Lost, ...]:
    lost = []
    for name, its in scores.items():
        if name == winner:
            continue
        if candidates[name] == candidates[winner]:
            lost.append(Lost(name=name, why="the same placement"))
            continue
        gain, noise = scores[winner].gain_over(its)
        why = f"{gain:.2%} fewer tokens/s on the requests planned on (noise {noise:.2%})"
        lost.append(Lost(name=name, why=why))
    for name in baselines.keys() - scores.keys():
        lost.append(
            Lost(
                name=name,
                why="a baseline only: other slots, or two replicas of one expert on a rank",
            )
        )
    return tuple(lost)


def check_limits(limits: Limits, workload: Workload, predicted: Score) -> None:
    """Check that a prediction keeps the limits.

    Raises
    ------
    InputError
        If a limit is not of this kind of work.
    InfeasibleError
        If one is broken.
    """
    if limits.tpot_p99 is None:
        return
    if workload.phase != "decode":
        raise InputError("plan.limits.tpot_p99 with a prefill workload -- it needs decode_batch")
    p99 = float(np.percentile(predicted.step_times, 99))
    if p99 > limits.tpot_p99:
        raise InfeasibleError(
            f"tpot_p99 is {p99 * 1e3:.3g} ms, the limit {limits.tpot_p99 * 1e3:.3g} ms",
            levers=("a smaller decode_batch", "more GPUs", "a faster GPU (moeplan compare)"),
        )
