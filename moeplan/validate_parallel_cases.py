"""Placements of experts over ranks, and the decode steps on which they are compared.

A load is a trace in two halves: placements are made on the earlier requests, steps are taken from
the later ones. ``trace`` is the scenario's own. ``power law 1.2, neighbours`` is drawn: distinct
experts with popularity rank^-1.2 (Plackett-Luce), where hot experts tend to have neighbouring low
ids, so that ids in order load the first rank most. Contiguous and round robin are what engines do
by themselves; ``planned`` is the planner's; ``hot together`` puts the busier half of each layer's
experts on the first rank. T tokens, L MoE layers, E experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from hwmodels.cluster import Cluster
from planner import Facts, PlanOptions, place
from simulator.batches import Composition, StepBatch, compose
from simulator.deployment import Deployment, Workload
from simulator.placement import Placement
from traces.counts import expert_counts
from traces.model_spec import ModelSpec
from traces.routing_trace import RoutingTrace, TraceMeta, check_against_model
from traces.splits import split_requests

Ints = NDArray[np.int64]
ParallelLoad = Literal["trace", "power law 1.2, neighbours"]
LOADS: tuple[ParallelLoad, ...] = get_args(ParallelLoad)
PLACEMENTS = ("contiguous", "planned", "round robin", "hot together")
EXPONENT = 1.2
_SCATTER = 0.25  # of hot experts' ids around the low end, as a share of all ids
_REQUESTS, _LENGTH = 64, 64  # of the drawn trace
_CONTEXTS = (64, 128)  # keys that a token attends to
_PLAN_TIME = "10 s"  # of each of the planner's two stages
_Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class ParallelCase:
    """Decode steps of one size under one load, the same for every placement."""

    load: ParallelLoad
    batch: int
    """Tokens of a step, over all ranks."""
    trace: RoutingTrace
    """Where the rows of the steps point."""
    composition: Composition


@dataclass(frozen=True, kw_only=True, eq=False)
class ParallelCases:
    """All steps and placements."""

    cases: tuple[ParallelCase, ...]
    deployments: dict[ParallelLoad, dict[str, Deployment]]
    """Placements by name, made for the load."""
    planned_as: dict[ParallelLoad, str]
    """Which of the planner's candidates ``planned`` is."""
    contexts: tuple[Ints, ...]
    """For each rank the keys that each of its requests' new tokens attends to."""


def make_parallel_cases(
    model: ModelSpec,
    cluster: Cluster,
    trace: RoutingTrace,
    *,
    batches: Sequence[int] = (64, 256),
    loads: Sequence[ParallelLoad] = LOADS,
    windows: int = 2,
    seed: int = 0,
    tell: _Tell = lambda _: None,
) -> ParallelCases:
    """Make placements and the steps to compare them on.

    Parameters
    ----------
    model
    cluster
        Its ranks share the experts; attention is data parallel over them.
    trace
        All requests.
    batches
        Tokens of a step over all ranks; plans are made for the largest.
    loads
        Which loads.
    windows
        Steps of different tokens for each batch and load.
    seed
        Of everything drawn.
    tell
        Told what begins.

    Raises
    ------
    InputError
        If trace and model disagree, a batch leaves a rank without tokens, there is one rank only
        or no steps, or the experts do not divide over the ranks.
    """
    check_against_model(trace, model)
    ranks = cluster.num_ranks
    _check(model, ranks, batches, loads, windows)
    rng = np.random.default_rng(seed)
    most = -(-max(batches) // ranks)
    contexts = tuple(rng.integers(_CONTEXTS[0], _CONTEXTS[1] + 1, size=most) for _ in range(ranks))
    cases: list[ParallelCase] = []
    deployments: dict[ParallelLoad, dict[str, Deployment]] = {}
    planned_as: dict[ParallelLoad, str] = {}
    for load in loads:
        whole = trace if load == "trace" else neighbours_trace(model, seed=seed)
        early, late = split_requests(whole, "early_late")
        tell(f"{load}: place the experts on the earlier requests")
        facts = Facts(
            model=model,
            cluster=cluster,
            workload=Workload(decode_batch=max(batches)),
            options=PlanOptions(steps=8, seeds=2, time_limit=_PLAN_TIME, seed=seed),
        )
        planned_as[load], deployments[load] = _placements(facts, early)
        for batch in batches:
            made = compose(late, Workload(decode_batch=batch), ranks, steps=windows, seed=seed)
            steps = tuple(_at_contexts(each, contexts) for each in made.batches)
            composition = Composition(
                batches=steps, decode=True, statement=made.statement, stand_in=made.stand_in
            )
            cases.append(ParallelCase(load=load, batch=batch, trace=late, composition=composition))
    return ParallelCases(
        cases=tuple(cases), deployments=deployments, planned_as=planned_as, contexts=contexts
    )


def neighbours_trace(model: ModelSpec, *, seed: int = 0) -> RoutingTrace:
    """Draw a decode trace with power-law popularity whose hot experts tend to low ids.

    In each layer experts are ranked by their id plus normal noise of a quarter of all ids.
    """
    rng = np.random.default_rng(seed)
    tokens, shape = _REQUESTS * _LENGTH, (model.num_moe_layers, model.num_experts)
    ids = np.arange(model.num_experts) + _SCATTER * model.num_experts * rng.standard_normal(shape)
    rank_LE = ids.argsort(axis=1).argsort(axis=1) + 1
    scores_TLE = rng.gumbel(size=(tokens, *shape)) - EXPONENT * np.log(rank_LE)
    chosen = np.argpartition(-scores_TLE, model.top_k - 1, axis=2)[..., : model.top_k]
    request, position = np.divmod(np.arange(tokens, dtype=np.int32), _LENGTH)
    return RoutingTrace(
        meta=TraceMeta(
            model=model.name,
            synthetic=True,
            num_experts=model.num_experts,
            top_k=model.top_k,
            moe_layer_ids=model.moe_layer_ids,
            note="independent tokens and layers; only the loads mean anything",
        ),
        request_id=request,
        position=position,
        decode=np.ones(tokens, dtype=np.bool_),
        step=position,
        domain=np.zeros(tokens, dtype=np.int16),
        domains=("drawn",),
        experts=chosen.astype(np.uint16),
    )


def _placements(facts: Facts, early: RoutingTrace) -> tuple[str, dict[str, Deployment]]:
    """Return which candidate the planner took, and the placements to compare."""
    placed = place(facts, early)
    bad = hot_together(
        expert_counts(early.experts, facts.model.num_experts), facts.cluster.num_ranks
    )
    found = (
        placed.baselines["contiguous"],
        placed.deployment,
        placed.baselines["round_robin"],
        Deployment.of(bad),
    )
    return placed.name, dict(zip(PLACEMENTS, found, strict=True))


def hot_together(loads_LE: NDArray[np.integer], ranks: int) -> Placement:
    """Place the experts by their load, the busiest on the first rank: as bad as it gets."""
    slots = np.argsort(-loads_LE.astype(np.int64), axis=1, kind="stable")
    return Placement(slots=slots.astype(np.int32), num_experts=loads_LE.shape[1], num_ranks=ranks)


def _at_contexts(batch: StepBatch, contexts: Sequence[Ints]) -> StepBatch:
    """Give each token the context of its request: a rank's tokens are its first requests'."""
    counts = np.bincount(batch.home, minlength=len(contexts))
    context = np.empty_like(batch.context)
    for rank, (count, own) in enumerate(zip(counts, contexts, strict=True)):
        context[batch.home == rank] = own[:count]
    return StepBatch(rows=batch.rows, context=context, home=batch.home, last=batch.last)


def _check(
    model: ModelSpec, ranks: int, batches: Sequence[int], loads: Sequence[str], windows: int
) -> None:
    if ranks < 2:
        raise InputError(
            "expert parallel on 1 rank -- at least 2 ranks share the experts -- give a cluster "
            "with more, which needs a core for each"
        )
    if not batches or not loads or min(batches) < ranks or windows < 1:
        raise InputError(
            f"batches {list(batches)} in {windows} windows of {len(loads)} loads on {ranks} ranks "
            "-- at least one of each, and a token for every rank -- raise them"
        )
    if unknown := sorted(set(loads) - set(LOADS)):
        raise InputError(f"load {unknown[0]!r} -- one of {', '.join(LOADS)} -- name one of these")
    if model.num_experts % ranks:
        raise InputError(
            f"{model.num_experts} experts over {ranks} ranks -- every rank holds as many -- take a "
            "number of ranks that divides them"
        )
