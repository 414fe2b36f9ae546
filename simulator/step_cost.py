"""What a step of a server takes: seconds of mixed batches of decode tokens and prefill chunks.

`ClusterStepCost` counts the real routing of the steps, writes them as work with the lowering of
`simulator.lowering`, prices that with `hwmodels.price`, and plays it. A program whose items all
wait for the one before them, with collectives of all ranks, has a closed form for its longest path:
between two collectives the slowest rank's sum, plus the collectives. Anything else is played by
`simulator.program.play`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from hwmodels.cluster import Cluster
from hwmodels.cost import price
from hwmodels.ops import AttentionDecode, AttentionPrefill
from simulator.attention import attention
from simulator.batches import Composition
from simulator.deployment import Deployment
from simulator.evidence import EvidenceItem, list_evidence
from simulator.loads import StepLoads
from simulator.lowering import lower
from simulator.pricing import price_step
from simulator.program import play
from simulator.result import by_cause
from simulator.serving_loads import MixedLoads, ServingCounter
from simulator.serving_scheduler import ServingStep
from simulator.work import Rows, Work
from traces.model_spec import ModelSpec
from traces.request_source import RequestSource
from traces.routing_trace import RoutingTrace

Floats = NDArray[np.float64]
Estimate = Literal["seconds", "low", "high"]
"""Best estimate of every price, or one end of its interval."""


class StepCost(Protocol):
    """Anything that says how long steps take."""

    def seconds(self, steps: Sequence[ServingStep]) -> Floats:
        """Seconds of each of several steps that would follow one another, [S].

        Some of them may never come (an arrival changes the plan), so the answer for a step must
        not depend on the others.
        """
        ...


class ClusterStepCost:
    """Steps of a deployment on a cluster, routed as the requests' rows of the trace say.

    Parameters
    ----------
    model, trace, cluster, deployment : ModelSpec, RoutingTrace, Cluster, Deployment
        As for `simulator.simulate`.
    source : RequestSource
        Rows of the trace for each served request.
    inputs : int64 array [N]
        Prompt tokens of each request.
    seed : int
        Of the replica rotation.
    estimate : {"seconds", "low", "high"}
        Which price of every operation is taken.
    """

    def __init__(
        self,
        model: ModelSpec,
        trace: RoutingTrace,
        cluster: Cluster,
        deployment: Deployment,
        source: RequestSource,
        inputs: NDArray[np.int64],
        *,
        seed: int = 0,
        estimate: Estimate = "seconds",
    ) -> None:
        self.model, self.trace, self.cluster = model, trace, cluster
        self.estimate: Estimate = estimate
        layout = deployment.layout_for(model, cluster)
        _check_served(deployment)
        counter = ServingCounter(
            model,
            trace,
            source,
            inputs,
            deployment.dispatcher_for(model, cluster),
            layout,
            np.asarray(cluster.node_of, dtype=np.int64),
            seed=seed,
        )
        self.count = counter.count
        """Counts steps; see `simulator.serving_loads.ServingCounter`."""
        self._runs: dict[tuple[object, ...], _Runs] = {}
        self._ranks = layout.num_ranks

    @property
    def kernels_per_step(self) -> int:
        """Kernels and collectives on all ranks, of the smallest step priced so far."""
        return min((runs.items for runs in self._runs.values()), default=0) * self._ranks

    def at(self, estimate: Estimate) -> "ClusterStepCost":
        """Return the same with another price of every operation."""
        other = object.__new__(ClusterStepCost)
        other.__dict__ = self.__dict__ | {"estimate": estimate}
        return other

    def seconds(self, steps: Sequence[ServingStep]) -> Floats:
        """Seconds of each step, [S]."""
        loads = self.count(steps)
        works = lower_mixed(self.model, loads)
        runs = self._runs_of(works)
        if not runs.chain:
            priced = price_step(works, loads.total, self.cluster)
            return play(priced.items, getattr(priced, self.estimate)).step_times
        return self._longest(works, runs, loads.total)

    def explain(
        self, steps: Sequence[ServingStep], statement: str
    ) -> tuple[dict[str, float], tuple[EvidenceItem, ...]]:
        """Say what steps are made of.

        Returns
        -------
        seconds_by_cause : dict
            As in `simulator.Result`.
        evidence : tuple of EvidenceItem
            What their times rest on.
        """
        loads = self.count(steps)
        works = lower_mixed(self.model, loads)
        priced = price_step(works, loads.total, self.cluster)
        composition = Composition(batches=(), decode=True, statement=statement, stand_in=False)
        evidence = list_evidence(self.trace, composition, works, priced, self.cluster)
        return by_cause(play(priced.items, priced.seconds)), evidence

    def _runs_of(self, works: Sequence[Work]) -> "_Runs":
        shape = tuple((w.name, w.layers, w.groups, w.after, w.resource) for w in works)
        if shape not in self._runs:
            self._runs[shape] = _Runs(works)
        return self._runs[shape]

    def _longest(self, works: Sequence[Work], runs: "_Runs", loads: StepLoads) -> Floats:
        """Sum over runs of the slowest rank's time."""
        table = np.zeros((loads.num_steps, runs.count, loads.num_ranks))
        for work, share in zip(works, runs.shares, strict=True):
            priced = price(work.op, self.cluster, on=work.on)
            took = np.reshape(getattr(priced, self.estimate), work.shape)
            if isinstance(share, slice):
                table[:, share] += took
            elif took.shape[1] == 1:
                table += took * share.sum(axis=1)[:, None]
            else:
                table += np.einsum("slg,rl->srg", took, share)
        return np.asarray(table.max(axis=2).sum(axis=1))


def _check_served(deployment: Deployment) -> None:
    """Refuse what the request level does not compose steps of."""
    asked = {
        "pipeline stages": deployment.parallelism.attention.pp > 1,
        "overlap": deployment.overlap != "none",
        "offload": deployment.offload is not None,
    }
    refused = ", ".join(name for name, wanted in asked.items() if wanted)
    if refused:
        raise InputError(
            f"serving with {refused} -- requests over time are served on attention DP x TP and "
            "experts EP x TP, without the others; set attention pp 1, overlap none and no "
            "offload, or simulate steps of a fixed batch"
        )


class _Runs:
    """Stretches of a program between collectives, and where each work's layers fall."""

    def __init__(self, works: Sequence[Work]) -> None:
        self.chain = all(
            w.after is None and w.resource is None and len(set(w.groups or ())) <= 1 for w in works
        )
        run, closed = 0, True
        places: list[list[int]] = [[] for _ in works]
        for layer in sorted({n for work in works for n in work.layers}):
            for number, work in enumerate(works):
                if layer not in work.layers:
                    continue
                together = work.groups is not None
                run += (together or closed) and any(places)
                closed = together
                places[number].append(run)
        self.count = run + 1
        """Runs; a collective is one by itself."""
        self.items = sum(map(len, places))
        """Kernels and collectives of a step."""
        self.shares: list[slice | Floats] = [self._share(runs) for runs in places]
        """For each work the runs of its layers: a stretch with a constant stride, or a matrix
        [runs, layers] of ones where several layers share a run."""

    def _share(self, runs: list[int]) -> slice | Floats:
        strides = set(np.diff(runs).tolist())
        if len(runs) == 1 or (len(strides) == 1 and min(strides) > 0):
            return slice(runs[0], runs[-1] + 1, strides.pop() if strides else 1)
        share = np.zeros((self.count, len(runs)))
        share[runs, np.arange(len(runs))] = 1
        return share


def lower_mixed(model: ModelSpec, loads: MixedLoads) -> list[Work]:
    """Write steps that hold both phases as work.

    Whatever the two phases share (projections, norms, experts, collectives) works on all tokens at
    once. Scores, and what only one phase has (MLA absorbs in decode and expands in prefill), work
    on the tokens of their phase.
    """
    works = lower(model, loads.total)
    if not loads.prefill_tokens.any():
        return works
    total, decode, prefill = (
        attention(Rows(model, part))
        for part in (
            loads.total,
            replace(loads.total, tokens=loads.decode_tokens, context=loads.decode_context),
            replace(
                loads.total,
                decode=False,
                tokens=loads.prefill_tokens,
                context=loads.prefill_pairs,
            ),
        )
    )
    names = [work.name for work in total]
    at = next(i for i, work in enumerate(works) if work.name in names)
    rest = [work for work in works if work.name not in names]
    return [*rest[:at], *_merge(total, decode, prefill), *rest[at:]]


def _merge(total: list[Work], decode: list[Work], prefill: list[Work]) -> list[Work]:
    """Join the attention blocks of both phases, in an order that both have."""
    shared = {
        work.name: work
        for work in total
        if not isinstance(work.op, AttentionDecode | AttentionPrefill)
        and any(work.name == other.name for other in prefill)
    }
    merged: list[Work] = []
    taken = {work.name for work in decode} - shared.keys()
    left = [
        replace(work, name=f"prefill {work.name}") if work.name in taken else work
        for work in prefill
    ]
    for work in decode:
        if work.name in shared:
            while left[0].name != work.name:  # what only prefill has goes before
                merged.append(left.pop(0))
            left.pop(0)
            merged.append(shared[work.name])
        else:
            merged.append(work)
    return merged + left
