"""What the simulator says of the very steps that are measured: total, by stage, and by kernel.

The path is that of `simulator.simulate`: count, lower, price, play. What limits a kernel is asked
of its price: the share of its time that answers to the memory's bandwidth, to the peak FLOP/s, and
to the fixed times of its cost model, from prices with each of these made 1 % better. Seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from hwmodels.cluster import Cluster
from moeplan.served_routing import in_order
from moeplan.validate_cases import Case, Cases
from simulator.batches import Composition
from simulator.loads import count_loads
from simulator.lowering import lower
from simulator.parallelism import Parallelism
from simulator.playing import play_steps
from simulator.pricing import PricedStep, price_step
from simulator.result import causes_of
from traces.model_spec import ModelSpec

Floats = NDArray[np.float64]
Limit = Literal["bandwidth", "FLOP/s", "fixed time"]
LIMITS: tuple[Limit, ...] = get_args(Limit)
_BETTER = 1.01


@dataclass(frozen=True, kw_only=True, eq=False)
class Predicted:
    """The windows of one case, each array [windows]."""

    total_s: Floats
    stage_s: dict[str, Floats]
    """By stage of the step; they sum to the total, for a single rank waits for nobody."""
    kernel_s: dict[str, Floats]
    """By kernel name, over all layers; they sum to the total."""
    limit_s: dict[str, dict[Limit, Floats]]
    """Seconds of each kernel that answer to each limit; they sum to about the kernel's."""


def predict_steps(model: ModelSpec, cluster: Cluster, cases: Cases) -> tuple[Predicted, ...]:
    """Predict every window of every case on the first rank.

    Parameters
    ----------
    model
    cluster
        With one rank (``gpus=1``).
    cases

    Returns
    -------
    tuple of Predicted
        In the order of ``cases.all``.

    Raises
    ------
    InputError
        If the cluster has more ranks.
    """
    if cluster.num_ranks != 1:
        raise InputError(
            f"{cluster.name} has {cluster.num_ranks} ranks -- these steps run on one -- load it "
            "with gpus=1"
        )
    found: dict[Case, Predicted] = {}
    for phase in ("decode", "prefill"):
        if mine := [case for case in cases.all if case.phase == phase]:
            found |= zip(mine, _predict(model, cluster, cases, mine), strict=True)
    return tuple(found[case] for case in cases.all)


def _predict(
    model: ModelSpec, cluster: Cluster, cases: Cases, mine: Sequence[Case]
) -> list[Predicted]:
    """Predict the cases of one phase, all their windows as the steps of one composition."""
    deployment = in_order(model, Parallelism.dp_ep(1))
    layout = deployment.layout_for(model, cluster)
    composition = Composition(
        batches=tuple(window.batch for case in mine for window in case.windows),
        decode=mine[0].phase == "decode",
        statement="steps of moeplan validate",
        stand_in=False,
    )
    dispatcher = deployment.dispatcher_for(model, cluster)
    loads = count_loads(
        model, cases.trace, composition, dispatcher, layout=layout, node_of=cluster.node_of
    )
    works = lower(model, loads)
    priced = price_step(works, loads, cluster)
    played = play_steps(priced.items, priced.seconds, layout, model.num_layers, decode=loads.decode)
    (whole,) = played.stages
    causes = [
        causes_of((whole.step(s),), played.step_times[s : s + 1]) for s in range(loads.num_steps)
    ]
    stage_s = {
        stage: np.array([step[stage] for step in causes])
        for stage in dict.fromkeys(item.stage.value for item in priced.items)
    }
    kernel_s = _by_kernel(priced)
    limit_s: dict[str, dict[Limit, Floats]] = {name: {} for name in kernel_s}
    for limit in LIMITS:
        better = _by_kernel(price_step(works, loads, with_limit(cluster, limit, _BETTER)))
        for name, seconds in kernel_s.items():
            limit_s[name][limit] = (seconds - better[name]) / (1 - 1 / _BETTER)

    def part(steps: slice) -> Predicted:
        return Predicted(
            total_s=played.step_times[steps],
            stage_s={name: s[steps] for name, s in stage_s.items()},
            kernel_s={name: s[steps] for name, s in kernel_s.items()},
            limit_s={n: {li: s[steps] for li, s in each.items()} for n, each in limit_s.items()},
        )

    ends = np.cumsum([0, *(len(case.windows) for case in mine)]).tolist()
    return [part(slice(begin, end)) for begin, end in pairwise(ends)]


def _by_kernel(priced: PricedStep) -> dict[str, Floats]:
    """Sum the seconds of the items of each name on the one rank, [steps]."""
    names = np.array([item.name for item in priced.items])
    return {
        name: priced.seconds[:, names == name, 0].sum(axis=1)
        for name in dict.fromkeys(names.tolist())
    }


def with_limit(cluster: Cluster, limit: Limit, better: float) -> Cluster:
    """Return the cluster with one limit of its device so many times better; times get shorter."""
    rate = {name: better if name == limit else 1.0 for name in LIMITS}
    device = cluster.device
    processors = {}
    for name, processor in device.processors.items():
        own = processor.bandwidth
        processors[name] = processor.scaled(
            rates=rate["FLOP/s"], fixed=1 / rate["fixed time"]
        ).model_copy(update={"bandwidth": None if own is None else own.times(rate["bandwidth"])})
    memories = {name: memory.scaled(rate["bandwidth"]) for name, memory in device.memories.items()}
    changed = device.model_copy(update={"memories": memories, "processors": processors})
    return cluster.model_copy(update={"device": changed})
