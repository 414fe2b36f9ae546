"""The steps that an offload plan is made on: tokens per expert, and all that experts leave as is.

A reference simulation gives, for every composition of steps, the time outside the expert part of
the layers; with the expert times of `planner.offload_layer` it adds up to the simulated step time.
Seconds.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from hwmodels.cluster import Cluster
from planner.offload_costs import Floats, expert_times
from planner.offload_layer import Layer
from planner.offload_options import OffloadOptions
from planner.scoring import Score
from simulator.deployment import Deployment, Workload
from simulator.offload import Offload, Site
from simulator.offload_result import OffloadResult
from simulator.offload_simulate import simulate_offload
from simulator.placement import Placement
from traces.model_spec import ModelSpec
from traces.routing_trace import RoutingTrace

_TOKENS = 1024  # of a sample, where the options do not say its size


@dataclass(frozen=True, kw_only=True)
class OffloadFacts:
    """What an offload plan is made for; only the trace differs between parts."""

    model: ModelSpec
    cluster: Cluster
    workload: Workload
    options: OffloadOptions

    @property
    def processor(self) -> str | None:
        """The processor that computes at home."""
        name = self.options.processor
        if name != "auto":
            return name
        everyone = {**self.cluster.device.processors, **self.cluster.node.processors}
        there = [name for name, its in everyone.items() if its.memory == self.options.home]
        return there[0] if there else None

    @property
    def planning_seeds(self) -> int:
        """Compositions that the integer programme sees."""
        per_seed = self.options.planning_steps * self.workload.tokens
        return self.options.planning_seeds or int(np.clip(_TOKENS // per_seed, 32, 192))

    def check(self) -> None:
        """Refuse a cluster of several ranks.

        Raises
        ------
        InputError
        """
        if self.cluster.num_ranks != 1:
            raise InputError(
                f"plan.offload on {self.cluster.num_ranks} ranks of {self.cluster.name} -- an "
                "offload plan is for one rank: set gpus: 1, or plan the placement over the ranks"
            )

    def deploy(self, offload: Offload) -> Deployment:
        """Return one rank with every expert once, and these tiers."""
        experts, layers = self.model.num_experts, self.model.num_moe_layers
        slots = np.tile(np.arange(experts, dtype=np.int32), (layers, 1))
        place = Placement(slots=slots, num_experts=experts, num_ranks=1)
        return Deployment.of(place).model_copy(update={"offload": offload})

    def simulate(
        self, trace: RoutingTrace, deployment: Deployment, *, steps: int, seed: int, warmup: int = 0
    ) -> OffloadResult:
        """Simulate a deployment of these facts, after ``warmup`` steps that fill a cache."""
        return simulate_offload(
            self.model,
            trace,
            self.cluster,
            deployment,
            self.workload,
            steps=steps,
            seed=seed,
            warmup=warmup,
        )

    def score(self, trace: RoutingTrace, deployment: Deployment) -> Score:
        """Simulate once per seed.

        The same seeds compose the same steps for every deployment: all of them skip the steps
        that a cache needs to fill, so that differences are not those of the steps.
        """
        o = self.options
        return Score(
            results=tuple(
                self.simulate(trace, deployment, steps=o.steps, seed=seed, warmup=o.steps)
                for seed in range(o.seed, o.seed + o.seeds)
            )
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """Steps to plan on; S steps, L MoE layers, E experts."""

    layers: tuple[Layer, ...]
    outside: float
    """Mean time of a step outside its expert parts, s."""
    counts: NDArray[Any]
    """Tokens of each expert, [S, L, E]."""
    fixed_bytes: float
    """Fast memory that weights outside experts, KV cache and buffers take."""
    limit: float
    """Bytes of the fast memory that may be taken."""


def sample_steps(facts: OffloadFacts, part: RoutingTrace) -> Sample:
    """Compose the steps to plan on and price what experts cost in them."""
    o = facts.options
    name = "fetch" if facts.processor is None else "home"
    reference = facts.deploy(Offload(home=o.home, site=Site(name=name, processor=facts.processor)))
    seeds = range(o.seed, o.seed + facts.planning_seeds)
    results = [facts.simulate(part, reference, steps=o.planning_steps, seed=seed) for seed in seeds]
    counts = np.concatenate([r.decisions.tokens[:, :, 0] for r in results])
    parts = [expert_parts(r) for r in results]
    outside = [
        r.step_times - inside.sum(axis=1) for r, (inside, _) in zip(results, parts, strict=True)
    ]
    times = expert_times(
        facts.model,
        facts.cluster,
        o.home,
        facts.processor,
        int(counts.max()),
        float(np.mean([head for _, head in parts])),
    )
    tiers = [next(iter(r.tiers.values())) for r in results]
    experts = {"resident experts", "landing buffers", "expert cache"}
    fixed = [sum(v for k, v in t.terms.items() if k not in experts) for t in tiers]
    return Sample(
        layers=tuple(Layer.of(counts[:, layer], times) for layer in range(counts.shape[1])),
        outside=float(np.mean(np.concatenate(outside))),
        counts=counts,
        fixed_bytes=max(fixed),
        limit=tiers[0].limit,
    )


def expert_parts(result: OffloadResult) -> tuple[Floats, float]:
    """Split a simulated step.

    Returns
    -------
    (expert time of each step and layer [S, L]: from the end of the permutation to the start of
    its inverse; mean head start of copies: from the router's end to the permutation's)
    """
    played = result.played
    names = np.array([item.name for item in played.items])
    routed, began, ended = (
        np.flatnonzero(names == name) for name in ("router", "permute", "unpermute")
    )
    begin = played.end[:, began, 0]
    return (
        np.asarray(played.start[:, ended, 0] - begin),
        float((begin - played.end[:, routed, 0]).mean()),
    )
