"""Which experts stay fast, which run at their home, which are fetched: a plan with its proof.

Two integer programmes are solved on steps of the part planned on; their residencies under several
site rules, caches of several sizes and the baselines are simulated on that part, the fastest is
the plan, and requests that it has not seen judge it. Seconds per step = time per output token.
"""

import time
from dataclasses import dataclass
from typing import Literal

import numpy as np

from basis.errors import InfeasibleError
from basis.units import format_quantity
from planner.offload_candidates import Menu
from planner.offload_layer import Rule
from planner.offload_residency import Residency, bound_any, solve_residency
from planner.offload_sample import OffloadFacts, Sample, sample_steps
from planner.offload_search import pool_price
from planner.plan import Lost, Progress
from planner.scoring import Score
from simulator.deployment import Deployment
from traces.routing_trace import RoutingTrace
from traces.splits import Split, split_requests

TIE = 0.005
"""Relative difference of step times below which two deployments are called equal."""
_OPTIMAL = 1e-6
_STATEMENTS: dict[Rule, str] = {
    "home": "each expert is kept in the fast memory or runs at its home",
    "planned": "each expert is kept in the fast memory, fetched at every use, or runs at its home",
    "any": "every step may run each expert wherever it ends soonest, kept, fetched or at its home",
}
_PROGRAMMES: tuple[Rule, ...] = ("home", "planned")


@dataclass(frozen=True, kw_only=True)
class OffloadCertificate:
    """Proof of one integer programme; times in seconds per step."""

    problem: str
    objective: float
    """What the residency found takes on the sampled steps, as the simulator plays it."""
    bound: float
    """No residency of the stated problem takes less."""
    status: Literal["optimal", "gap", "time_limit"]
    seconds: float
    """Wall time."""

    @property
    def gap(self) -> float:
        """``(objective - bound) / objective``."""
        return (self.objective - self.bound) / self.objective


@dataclass(frozen=True, kw_only=True)
class OffloadPlan:
    """A deployment with tiers, its proof, and its score on requests that it was not planned on."""

    split: Split
    name: str
    """Which candidate won."""
    deployment: Deployment
    slots: int
    """Experts that fit into the fast memory, over all layers."""
    fast_bytes: float
    """Bytes of the fast memory for experts."""
    certificates: dict[Rule, OffloadCertificate]
    """By rule. ``home`` and ``planned``: of the residency that the programme found, always with the
    same site for an expert. ``any``: of the plan (of the best candidate without a cache, where the
    plan has one), against every residency with every rule of sites."""
    predicted: Score
    baselines: dict[str, Score]
    engine: dict[str, Deployment]
    """What engines can load: ``experts`` (masks), ``layers`` (-ot), ``last_layers``
    (--n-cpu-moe)."""
    engine_predicted: dict[str, Score]
    planned_on: dict[str, float]
    """Step time of every candidate on the part planned on, s."""
    alternatives: tuple[Lost, ...]

    @property
    def certificate(self) -> OffloadCertificate:
        """The proof that speaks of the plan itself, as far as it has no cache."""
        own: dict[str, Rule] = {"ilp_home": "home", "ilp_planned": "planned"}
        return self.certificates[own.get(self.name, "any")]

    @property
    def ties(self) -> tuple[str, ...]:
        """Baselines that are equal within `TIE` on held-out requests."""
        own = float(self.predicted.step_times.mean())
        return tuple(
            name
            for name, its in self.baselines.items()
            if abs(float(its.step_times.mean()) / own - 1) <= TIE
        )

    def gain_over(self, baseline: str) -> tuple[float, float]:
        """Relative gain in tokens/s over a baseline on held-out requests, and its noise."""
        return self.predicted.gain_over(self.baselines[baseline])


def make_offload_plan(
    facts: OffloadFacts, trace: RoutingTrace, split: Split, progress: Progress = lambda _: None
) -> OffloadPlan:
    """Plan on one part of a trace, score on the other.

    Raises
    ------
    InputError
        If the cluster has several ranks, no such memory or processor, or no path from the home.
    InfeasibleError
        If not one expert fits into what is asked of the fast memory, or the rest does not fit.
    """
    facts.check()
    seen, unseen = split_requests(trace, split)
    progress(f"{split}: price the experts of the steps to plan on")
    sample = sample_steps(facts, seen)
    fast_bytes = _fast_bytes(facts, sample)
    slots = min(int(fast_bytes // facts.model.bytes_per_expert), sample.counts[0].size)
    solved: dict[Rule, Residency] = {}
    for rule in _PROGRAMMES:
        if rule == "planned" or facts.processor is not None:
            progress(f"{split}: residency by integer programme: {_STATEMENTS[rule]}")
            solved[rule] = _solve(facts, sample, slots, rule)
    progress(f"{split}: simulate the candidates on the requests planned on")
    menu = Menu(facts=facts, seen=seen, slots=slots, sample=sample, solved=solved)
    fitted, refused = menu.fit_all()
    if not fitted:
        raise next(iter(refused.values()))
    times = {name: float(score.step_times.mean()) for name, (_, score) in fitted.items()}
    name = min(times, key=lambda n: times[n])
    progress(f"{split}: bound of every residency under every rule of sites")
    proved = min((n for n in times if not _has_cache(fitted[n][0])), key=lambda n: times[n])
    certificates = {r: _certify(facts, sample, slots, its, r) for r, its in solved.items()}
    certificates["any"] = _certify_any(
        facts, seen, sample, slots, solved["planned"], fitted[proved][0]
    )
    progress(f"{split}: score on held-out requests")
    engine = menu.engine(fitted)
    return OffloadPlan(
        split=split,
        name=name,
        deployment=fitted[name][0],
        slots=slots,
        fast_bytes=fast_bytes,
        certificates=certificates,
        predicted=facts.score(unseen, fitted[name][0]),
        baselines={n: facts.score(unseen, fitted[n][0]) for n in menu.baselines if n in fitted},
        engine=engine,
        engine_predicted={n: facts.score(unseen, d) for n, d in engine.items()},
        planned_on=times,
        alternatives=_lost(name, times, refused),
    )


def _fast_bytes(facts: OffloadFacts, sample: Sample) -> float:
    """Bytes of the fast memory for experts: what is asked, if it is there.

    Raises
    ------
    InfeasibleError
    """
    room, one = sample.limit - sample.fixed_bytes, facts.model.bytes_per_expert
    asked = facts.options.fast_memory
    wanted = room if asked is None else asked
    if wanted < one or wanted > room:
        name = facts.cluster.device.processor.memory
        raise InfeasibleError(
            f"{facts.model.name} on {facts.cluster.name}: {_gb(wanted)} of {name} for experts -- "
            f"one expert takes {_gb(one)}, and weights outside experts, KV cache and buffers "
            f"leave {_gb(room)} of {_gb(sample.limit)}",
            levers=(
                f"fast_memory between {_gb(one)} and {_gb(room)}",
                "a smaller decode_batch",
                "a device with more memory",
            )[0 if room >= one else 1 :],
        )
    return wanted


def _gb(value: float) -> str:
    return format_quantity(float(value), "B")


def _solve(facts: OffloadFacts, sample: Sample, slots: int, rule: Rule) -> Residency:
    o = facts.options
    return solve_residency(
        sample.layers,
        slots,
        rule,
        gap=o.gap,
        time_limit=o.time_limit,
        backend=o.solver,
        workers=o.workers,
    )


def _certify(
    facts: OffloadFacts, sample: Sample, slots: int, solved: Residency, rule: Rule
) -> OffloadCertificate:
    return _certificate(
        _problem(facts, sample, slots, rule, ", always the same"),
        solved.objective + sample.outside,
        solved.bound + sample.outside,
        solved.timed_out,
        solved.seconds,
    )


def _certify_any(
    facts: OffloadFacts,
    seen: RoutingTrace,
    sample: Sample,
    slots: int,
    solved: Residency,
    deployment: Deployment,
) -> OffloadCertificate:
    """Measure a deployment without a cache against the bound of all of them."""
    begin, o = time.monotonic(), facts.options
    bound = bound_any(
        sample.layers,
        slots,
        pool_price(solved.search.pools, slots),
        gap=o.gap,
        time_limit=o.time_limit / 2,
        backend=o.solver,
        workers=o.workers,
    )
    steps = [
        facts.simulate(seen, deployment, steps=o.planning_steps, seed=seed).step_times
        for seed in range(o.seed, o.seed + facts.planning_seeds)
    ]
    objective = float(np.mean(np.concatenate(steps)))
    bound = min(bound + sample.outside, objective)
    problem = _problem(facts, sample, slots, "any", "")
    return _certificate(problem, objective, bound, False, time.monotonic() - begin)


def _certificate(
    problem: str, objective: float, bound: float, late: bool, seconds: float
) -> OffloadCertificate:
    tight = objective - bound <= _OPTIMAL * objective
    return OffloadCertificate(
        problem=problem,
        objective=objective,
        bound=bound,
        status="optimal" if tight else "time_limit" if late else "gap",
        seconds=seconds,
    )


def _problem(facts: OffloadFacts, sample: Sample, slots: int, rule: Rule, how: str) -> str:
    return (
        f"mean time of {len(sample.counts)} sampled steps of {facts.workload.tokens} tokens of the "
        f"requests planned on, where {_STATEMENTS[rule]}{how}, and at most {slots} experts are "
        "kept all the time"
    )


def _has_cache(deployment: Deployment) -> bool:
    return deployment.offload is not None and deployment.offload.cache is not None


def _lost(
    winner: str, times: dict[str, float], refused: dict[str, InfeasibleError]
) -> tuple[Lost, ...]:
    best = times[winner]
    lost = []
    for name, took in sorted(times.items(), key=lambda pair: pair[1]):
        if name != winner:
            slower = took / best - 1
            why = f"{slower:.1%} more time per token on the requests planned on"
            lost.append(Lost(name=name, why=f"a tie: {why}" if slower <= TIE else why))
    lost += [Lost(name=name, why=f"does not fit: {error}") for name, error in refused.items()]
    return tuple(lost)
