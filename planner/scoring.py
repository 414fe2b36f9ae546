"""How good a deployment is on one part of a trace: simulated over several batch compositions.

The same seeds compose the same batches for every deployment, so two scores compare like with
like, and the spread of their ratio over seeds is the noise that a gain must exceed.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hwmodels.cluster import Cluster
from planner.options import PlanOptions
from simulator.deployment import Deployment, Workload
from simulator.layout import Layout
from simulator.parallelism import AttentionLayout, ExpertLayout, Parallelism
from simulator.result import Result
from simulator.simulate import simulate
from traces.model_spec import ModelSpec
from traces.routing_trace import RoutingTrace


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a deployment is scored on; only the trace differs between parts."""

    model: ModelSpec
    cluster: Cluster
    workload: Workload
    options: PlanOptions
    parallelism: Parallelism | None = None
    """Parallel layout; None: attention DP = EP = all ranks."""

    @property
    def layout(self) -> Layout:
        """The layout on the cluster's ranks."""
        ranks = self.cluster.num_ranks
        plain = Parallelism(attention=AttentionLayout(dp=ranks), experts=ExpertLayout(ep=ranks))
        return Layout.of(self.parallelism or plain, ranks)

    @property
    def expert_nodes(self) -> NDArray[np.int64]:
        """Node of each expert-parallel rank of the first block, [ep].

        All 0 where no token goes to its experts' ranks by itself: there is nothing to send less
        of.
        """
        layout = self.layout
        if layout.exchanged == 1:
            return np.zeros(layout.ep, dtype=np.int64)
        return np.asarray(self.cluster.node_of, dtype=np.int64)[layout.exchange_groups[0]]

    @property
    def expert_tokens(self) -> int:
        """Tokens of a step (or of a pipeline's microbatch) that one block of ranks shares."""
        layout = self.layout
        return -(-self.workload.tokens // (layout.edp * layout.pp))


@dataclass(frozen=True, kw_only=True)
class Score:
    """Results of one deployment, one per seed."""

    results: tuple[Result, ...]

    @property
    def step_times(self) -> NDArray[np.float64]:
        """Step times of all seeds, seconds, [seeds * steps]."""
        return np.concatenate([r.step_times for r in self.results])

    def mean(self, name: str) -> float:
        """Mean over seeds of one entry of `simulator.result.Result.summary`."""
        return float(np.mean([r.summary()[name] for r in self.results]))

    def summary(self) -> dict[str, float]:
        """Means over seeds; step times are pooled over all steps. Units are in the names."""
        every = [result.summary() for result in self.results]
        means = {
            n: float(np.mean([its[n] for its in every]))
            for n, v in every[0].items()
            if isinstance(v, float)
        }
        p50, p99 = np.percentile(self.step_times, [50, 99])
        pooled = {
            "step_time_s": float(self.step_times.mean()),
            "step_time_s_p50": float(p50),
            "step_time_s_p99": float(p99),
        }
        return means | pooled | {"seeds": float(len(self.results))}

    def gain_over(self, other: "Score") -> tuple[float, float]:
        """Return the relative gain in throughput over ``other``, and its noise.

        The noise is twice the standard error of the mean over paired seeds.
        """
        pairs = zip(self.results, other.results, strict=True)
        gains = [mine.tokens_per_second / its.tokens_per_second - 1 for mine, its in pairs]
        return float(np.mean(gains)), float(2 * np.std(gains, ddof=1) / np.sqrt(len(gains)))


def score(facts: Facts, trace: RoutingTrace, deployment: Deployment) -> Score:
    """Simulate a deployment on a part of the trace, once per seed.

    Raises
    ------
    InfeasibleError
        If it does not fit into memory.
    """
    options = facts.options
    return Score(
        results=tuple(
            simulate(
                facts.model,
                trace,
                facts.cluster,
                deployment,
                facts.workload,
                steps=options.steps,
                seed=options.seed + number,
            )
            for number in range(options.seeds)
        )
    )
