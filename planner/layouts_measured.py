"""Layouts priced in the simulator: experts placed, steps played, and what is kept of the result.

Placements are shared by layouts whose expert-parallel ranks are alike. Times in seconds, memory in
bytes of the fullest rank.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.baselines import contiguous
from planner.layouts import Candidate
from planner.layouts_memory import by_rank
from planner.layouts_question import at_size
from planner.plan import place_by_stages
from planner.scoring import Facts, Score, score
from simulator.deployment import Deployment
from simulator.placement import Placement
from traces.routing_trace import RoutingTrace

Placed = tuple[NDArray[np.int32], NDArray[np.float64] | None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """One layout at one batch size, simulated on held-out requests."""

    candidate: Candidate
    size: int
    """Running requests over all ranks."""
    ranks: int
    bound: float
    """Lower bound of the mean step time, s."""
    full: bool
    """Whether the experts went through both stages of the placement (or there is one EP rank)."""
    deployment: Deployment
    throughput_by_seed: NDArray[np.float64]
    """Tokens/s, [seeds]."""
    step_times: NDArray[np.float64]
    """Of all seeds, s."""
    seconds_by_cause: dict[str, float]
    """Per step, mean over ranks, steps and seeds."""
    memory: dict[str, float]
    """Terms of the fullest rank."""

    @property
    def step_time(self) -> float:
        """Mean step time = time per output token (TPOT), s."""
        return float(self.step_times.mean())

    @property
    def tpot_p99(self) -> float:
        """99th percentile of the step time, s."""
        return float(np.percentile(self.step_times, 99))

    @property
    def tokens_per_second(self) -> float:
        """Running requests / mean step time."""
        return self.size / self.step_time

    def gain_over(self, other: "Measured") -> tuple[float, float]:
        """Relative gain in tokens/s and its noise, as `planner.scoring.Score.gain_over`.

        The noise of a single composition is not known: nan.
        """
        count = min(len(self.throughput_by_seed), len(other.throughput_by_seed))
        gains = self.throughput_by_seed[:count] / other.throughput_by_seed[:count] - 1
        noise = float(2 * gains.std(ddof=1) / np.sqrt(count)) if count > 1 else math.nan
        return float(gains.mean()), noise

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data; units are in the names."""
        return {
            "layout": self.candidate.name,
            "parallelism": self.candidate.parallelism.model_dump(mode="json"),
            "redundant_experts": self.candidate.redundant_experts,
            "running_requests": self.size,
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_second_per_gpu": self.tokens_per_second / self.ranks,
            "tpot_s": self.step_time,
            "tpot_s_p99": self.tpot_p99,
            "bound_tpot_s": self.bound,
            "placement": "both stages" if self.full else "first stage",
            "seconds_by_cause": self.seconds_by_cause,
            "memory_bytes": self.memory,
        }


@dataclass(kw_only=True)
class Simulator:
    """Places and scores layouts; remembers placements."""

    facts: Facts
    seen: RoutingTrace
    """Planned on."""
    unseen: RoutingTrace
    """Scored on."""
    second_stage_time: float
    """Wall time of one second stage, s."""
    _placed: dict[tuple[object, ...], Placed] = field(default_factory=dict)

    def measure(
        self,
        candidate: Candidate,
        size: int,
        bound: float,
        *,
        full: bool,
        seeds: int | None = None,
    ) -> Measured:
        """Place and simulate.

        Parameters
        ----------
        candidate, size : Candidate, int
            Layout and running requests.
        bound : float
            Of its step time, s; kept beside the result.
        full : bool
            Both stages of the placement, or the first alone.
        seeds : int, optional
            More (or fewer) compositions than a point of a sweep gets.

        Raises
        ------
        InfeasibleError
            If the fullest rank's own requests do not fit.
        """
        facts = at_size(
            self.facts,
            size,
            redundant=candidate.redundant_experts,
            parallelism=candidate.parallelism,
        )
        full = full or self._key(facts, True) in self._placed or candidate.layout.ep == 1
        deployment = self._deployment(facts, candidate, full)
        if seeds is not None:
            options = facts.options.model_copy(update={"seeds": seeds})
            facts = replace(facts, options=options)
        found = score(facts, self.unseen, deployment)
        return Measured(
            candidate=candidate,
            size=size,
            ranks=facts.cluster.num_ranks,
            bound=bound,
            full=full,
            deployment=deployment,
            throughput_by_seed=np.array([r.tokens_per_second for r in found.results]),
            step_times=found.step_times,
            seconds_by_cause=_causes(found),
            memory=by_rank(found.results[0].memory, facts.cluster),
        )

    def _deployment(self, facts: Facts, candidate: Candidate, full: bool) -> Deployment:
        experts, layers = facts.model.num_experts, facts.model.num_moe_layers
        ep = candidate.layout.ep
        if ep == 1:
            plain = contiguous(layers, experts, experts, 1)
            return Deployment.of(plain, parallelism=candidate.parallelism)
        key = self._key(facts, full)
        if key not in self._placed:
            self._placed[key] = place_by_stages(self._limited(facts), self.seen, second=full)
        slots, share = self._placed[key]
        place = Placement(slots=slots, num_experts=experts, num_ranks=ep)
        return Deployment.of(place, facts.options.dispatch, share, candidate.parallelism)

    def _limited(self, facts: Facts) -> Facts:
        limit = min(facts.options.time_limit, self.second_stage_time)
        return replace(facts, options=facts.options.model_copy(update={"time_limit": limit}))

    def _key(self, facts: Facts, full: bool) -> tuple[object, ...]:
        """Return what a placement depends on, besides the batch size of its first use."""
        layout = facts.layout
        nodes = tuple(facts.expert_nodes.tolist()) if layout.exchanged > 1 and full else ()
        slots = facts.model.num_experts + facts.options.redundant_experts
        return full, layout.ep, slots, nodes, layout.etp if full else 0


def _causes(found: Score) -> dict[str, float]:
    names = found.results[0].seconds_by_cause
    return {n: float(np.mean([r.seconds_by_cause[n] for r in found.results])) for n in names}
