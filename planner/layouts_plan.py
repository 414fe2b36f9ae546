"""Which parallel layout to deploy: enumerate, bound, place, simulate, choose, and say why.

Experts are placed on one part of the requests and layouts compared on the other. Throughput is
generated tokens/s of all ranks, TPOT the step time in seconds; see docs/guides/choose-a-layout.md.
"""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from basis.errors import InfeasibleError
from planner.layouts import RULES, Candidate, enumerate_layouts
from planner.layouts_bound import BoundMaker
from planner.layouts_measured import Measured, Simulator
from planner.layouts_memory import Fitting, Rejected, fitting
from planner.layouts_question import Question, Sweep, ask, at_lengths, effort, final_seeds
from planner.layouts_search import Proof, Search
from planner.layouts_words import is_tie, why_lost
from planner.plan import Progress
from planner.scoring import Facts
from simulator.batches import compose
from simulator.deployment import Workload
from traces.model_spec import ModelSpec
from traces.routing_trace import RoutingTrace
from traces.splits import Split, split_requests

_PLACEMENT_SHARE = 0.03  # of the time limit for one second stage


@dataclass(frozen=True, kw_only=True)
class LayoutPlan:
    """The layout to deploy, the front that it is on, and what the others lack."""

    split: Split
    question: Question
    chosen: Measured
    """Most tokens/s of all ranks under the limit."""
    runner_up: Measured | None
    """The next best layout; None where only one fits."""
    why_lost: str
    """Of the runner-up; empty without one."""
    tie: bool
    """Whether the two differ by no more than the noise."""
    front: tuple[Measured, ...]
    """Points that none beats in both tokens/s and TPOT, by ascending TPOT."""
    proof: Proof
    enumerated: int
    """Layouts that divide the ranks and the model."""
    alternatives: tuple[Rejected, ...]
    """Layouts that fit and lost, each with why."""
    rejected: tuple[Rejected, ...]
    """Layouts that do not fit at the smallest batch size."""
    remarks: tuple[str, ...]
    """What the planner decided by itself."""
    seconds: float
    """Wall time, s."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data; units are in the names."""
        runner = None
        if self.runner_up is not None:
            runner = {**self.runner_up.to_dict(), "why_lost": self.why_lost, "tie": self.tie}
        return {
            "split": self.split,
            "question": self.question.statement,
            "rules": list(RULES),
            "remarks": list(self.remarks),
            "layouts": {
                "enumerated": self.enumerated,
                "fit": self.enumerated - len(self.rejected),
                "points": self.proof.points,
                "simulated": self.proof.simulated,
            },
            "chosen": self.chosen.to_dict(),
            "runner_up": runner,
            "front": [point.to_dict() for point in self.front],
            "proof": {**vars(self.proof), "statement": self.proof.statement},
            "alternatives": [vars(lost) for lost in self.alternatives],
            "rejected": [vars(lost) for lost in self.rejected],
            "seconds": self.seconds,
        }


def plan_layouts(
    facts: Facts,
    trace: RoutingTrace,
    split: Split,
    progress: Progress = lambda _: None,
    *,
    sweep: Sweep | None = None,
) -> LayoutPlan:
    """Choose a parallel layout.

    Parameters
    ----------
    facts : Facts
        Model, cluster, workload and options; its own parallelism is not looked at.
    trace : RoutingTrace
        All requests.
    split : {"early_late", "interleaved"}
        Placements are planned on the first part, layouts compared on the second.
    progress : callable
        Told what begins.
    sweep : Sweep, optional
        Ask for request lengths and several batch sizes; without it the workload's decode batch.

    Raises
    ------
    InfeasibleError
        If no layout fits into memory, or none keeps the limit on TPOT.
    InputError
        For a prefill workload.
    """
    start = time.monotonic()
    question = ask(facts, trace, sweep)
    candidates = _candidates(facts)
    fit = fitting(facts.model, facts.cluster, candidates, question)
    seen, unseen = split_requests(trace, split)
    if sweep is not None:
        unseen = at_lengths(unseen, sweep)
    progress(f"{split}: bounds of {len(fit.candidates)} layouts")
    limit = facts.options.layouts_time_limit
    search = Search(
        simulator=Simulator(
            facts=facts,
            seen=seen,
            unseen=unseen,
            second_stage_time=_PLACEMENT_SHARE * limit,
        ),
        candidates=fit.candidates,
        sizes=question.sizes,
        bounds=_bounds(facts, unseen, fit, question),
        limit=facts.options.limits.tpot_p99 or np.inf,
        start=start,
        seconds=limit,
        progress=lambda text: progress(f"{split}: {text}"),
    )
    search.run()
    return _conclude(facts, search, fit, question, split, len(candidates), start)


def confirm_layouts(
    facts: Facts, trace: RoutingTrace, split: Split, plan: LayoutPlan, *, sweep: Sweep | None = None
) -> str:
    """Place and compare the choice and its runner-up on another split of the requests.

    Returns
    -------
    str
        A sentence: whether the order holds.
    """
    seen, unseen = split_requests(trace, split)
    simulator = Simulator(
        facts=facts,
        seen=seen,
        unseen=unseen if sweep is None else at_lengths(unseen, sweep),
        second_stage_time=_PLACEMENT_SHARE * facts.options.layouts_time_limit,
    )
    both = [
        simulator.measure(m.candidate, m.size, m.bound, full=True, seeds=len(m.throughput_by_seed))
        for m in (plan.chosen, plan.runner_up)
        if m is not None
    ]
    chosen = both[0]
    text = f"{split}: {chosen.tokens_per_second:,.0f} tokens/s"
    if len(both) == 1:
        return text
    gain, noise = chosen.gain_over(both[1])
    verdict = "a tie" if abs(gain) <= noise else "confirmed" if gain > 0 else "the order turns"
    return f"{text}, {gain:+.1%} over the runner-up (noise {noise:.1%}): {verdict}"


def _candidates(facts: Facts) -> tuple[Candidate, ...]:
    """List the layouts inside nodes, or across them where no other is left."""
    redundant = facts.options.redundant_experts
    inside = enumerate_layouts(facts.model, facts.cluster, redundant=redundant)
    return inside or enumerate_layouts(
        facts.model, facts.cluster, redundant=redundant, across_nodes=True
    )


def _bounds(
    facts: Facts, trace: RoutingTrace, fit: Fitting, question: Question
) -> NDArray[np.float64]:
    """Lower bounds of step times, s, [layouts, sizes]; infinite where a layout does not fit."""
    most = max(fit.sizes)
    compositions = []
    for size in question.sizes[:most]:
        options = effort(facts.options, facts.model, facts.cluster.num_ranks, size)
        work = Workload(decode_batch=size)
        seeds = range(options.seed, options.seed + options.seeds)
        compositions.append(
            [compose(trace, work, 1, steps=options.steps, seed=seed) for seed in seeds]
        )
    maker = BoundMaker(facts.model, trace, facts.cluster, compositions)
    bounds = np.full((len(fit.candidates), len(question.sizes)), np.inf)
    for row, (candidate, count) in enumerate(zip(fit.candidates, fit.sizes, strict=True)):
        bounds[row, :count] = maker.seconds(
            candidate.layout, candidate.redundant_experts, range(count)
        )
    return bounds


def _conclude(
    facts: Facts,
    search: Search,
    fit: Fitting,
    question: Question,
    split: Split,
    enumerated: int,
    start: float,
) -> LayoutPlan:
    finalists = _finalists(search, facts)
    if not finalists:
        raise _too_slow(search)
    chosen, *rest = finalists
    runner = rest[0] if rest else None
    return LayoutPlan(
        split=split,
        question=question,
        chosen=chosen,
        runner_up=runner,
        why_lost=why_lost(runner, chosen) if runner else "",
        tie=runner is not None and is_tie(chosen, runner),
        front=tuple(search.front()),
        proof=search.proof(chosen),
        enumerated=enumerated,
        alternatives=_alternatives(search, chosen),
        rejected=fit.rejected,
        remarks=tuple(_remarks(facts.model, chosen)),
        seconds=time.monotonic() - start,
    )


def _finalists(search: Search, facts: Facts) -> list[Measured]:
    """Best two layouts, simulated again with more seeds and both stages of the placement.

    A point that then breaks the limit makes way for the next.
    """
    kept: dict[str, Measured] = {}
    while len(kept) < 2:
        left = [found for found in search.ranking() if found.candidate.name not in kept]
        if not left:
            break
        again = _again(search, left[0], facts)
        search.settle(left[0], again)
        if again.tpot_p99 <= search.limit:
            kept[again.candidate.name] = again
    return sorted(kept.values(), key=lambda found: -found.tokens_per_second)


def _again(search: Search, found: Measured, facts: Facts) -> Measured:
    """Simulate with all that a finalist gets; nothing where it had that already."""
    seeds = final_seeds(facts.options, facts.model, found.size)
    if found.full and len(found.throughput_by_seed) >= seeds:
        return found
    return search.simulator.measure(
        found.candidate, found.size, found.bound, full=True, seeds=seeds
    )


def _too_slow(search: Search) -> InfeasibleError:
    best = min(search.measured.values(), key=lambda m: m.tpot_p99, default=None)
    least = float(search.bounds.min())
    reached = (
        f"the bound of every layout is at least {least * 1e3:.3g} ms"
        if best is None
        else f"the least is {best.tpot_p99 * 1e3:.3g} ms, by {best.candidate.name} with "
        f"{best.size} running requests"
    )
    return InfeasibleError(
        f"no layout keeps tpot_p99 at {search.limit * 1e3:.3g} ms: {reached}",
        levers=("a smaller batch", "more GPUs", "a faster GPU (moeplan compare)"),
    )


def _alternatives(search: Search, chosen: Measured) -> tuple[Rejected, ...]:
    """Every other layout that fits, with what it reaches or can reach at most."""
    best = {m.candidate.name: m for m in reversed(search.ranking())}
    slow = {m.candidate.name: m for m in search.measured.values()}
    reach = search.optimistic.max(axis=1)
    lost = []
    for number, candidate in enumerate(search.candidates):
        name = candidate.name
        if name == chosen.candidate.name:
            continue
        if name in best:
            why = why_lost(best[name], chosen)
        elif name in slow:
            why = f"TPOT p99 {slow[name].tpot_p99 * 1e3:.1f} ms is above the limit"
        elif reach[number] == 0:
            why = f"TPOT at least {search.bounds[number].min() * 1e3:.1f} ms is above the limit"
        elif reach[number] <= chosen.tokens_per_second:
            short = 1 - reach[number] / chosen.tokens_per_second
            why = f"dominated by its bound: at least {short:.1%} fewer tokens/s"
        else:
            more = reach[number] / chosen.tokens_per_second - 1
            why = f"not simulated in time; its bound allows {more:.1%} more tokens/s"
        lost.append(Rejected(name=name, why=why))
    return tuple(lost)


def _remarks(model: ModelSpec, chosen: Measured) -> list[str]:
    layout, slots = chosen.candidate.layout, model.num_experts + chosen.candidate.redundant_experts
    said = []
    if model.num_experts % layout.ep:
        said.append(
            f"{model.num_experts} experts do not divide over {layout.ep} ranks: "
            f"{slots - model.num_experts} redundant experts make {slots} slots, "
            f"{slots // layout.ep} on each"
        )
    if model.attention.kind == "mla" and layout.tp > 1:
        said.append(
            "the KV cache of MLA is one latent for all heads: each of the "
            f"{layout.tp} tensor-parallel ranks holds all of it"
        )
    if layout.pp > 1:
        said.append("pipeline: TPOT is the time of a steady round of microbatches")
    return said
