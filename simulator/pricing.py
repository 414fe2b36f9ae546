"""Seconds for every kernel of a step at its place in the step, with interval and evidence."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from basis.evidence import Evidence
from hwmodels.cluster import Cluster
from hwmodels.cost import price
from hwmodels.ops import AllGather, AllReduce, AllToAll, Copy, ReduceScatter
from simulator.loads import StepLoads
from simulator.program import Item
from simulator.work import Work

Collective = AllToAll | AllReduce | AllGather | ReduceScatter


@dataclass(frozen=True, kw_only=True, eq=False)
class PricedStep:
    """The kernels of a step as a program, with their times."""

    items: tuple[Item, ...]
    seconds: NDArray[np.float64]
    """Best estimate, [steps, items, ranks]."""
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    evidence: tuple[Evidence, ...]
    """What the prices of each work rest on."""


def price_step(works: Sequence[Work], loads: StepLoads, cluster: Cluster) -> PricedStep:
    """Price every kernel and put it at its places in the step.

    Where a processor says that its fixed times fall with the bytes that a layer moves
    (`Processor.near_fixed`), they do so step by step and rank by rank.
    """
    places = list(_program(works))
    shape = (loads.num_steps, len(places), loads.num_ranks)
    estimates = {name: np.zeros(shape) for name in ("seconds", "low", "high")}
    evidence = []
    at: dict[int, list[int]] = defaultdict(list)
    for place, (number, _) in enumerate(places):
        at[number].append(place)
    near, nearer = _near(works, loads, cluster), _with_near(cluster)
    for number, work in enumerate(works):
        priced = price(work.op, cluster, on=work.on)
        evidence.append(priced.evidence)
        here = at[number]
        other = price(work.op, nearer, on=work.on) if near.any() and work.groups is None else priced
        for name, table in estimates.items():
            values = np.reshape(getattr(priced, name), work.shape)
            if other is not priced:
                values = np.where(near, np.reshape(getattr(other, name), work.shape), values)
            if work.groups is not None and work.shape[2] > 1:
                values = values[:, :, list(work.groups)]
            table[:, here, :] = values
    items = _items([(works[number], layer) for number, layer in places])
    return PricedStep(items=items, evidence=tuple(evidence), **estimates)


def _near(works: Sequence[Work], loads: StepLoads, cluster: Cluster) -> NDArray[np.bool_]:
    """Say which ranks move less in a layer than their cache holds, [steps, 1, ranks]."""
    first, moved = cluster.device.processor, np.zeros((loads.num_steps, 1, loads.num_ranks))
    if first.near_fixed is None or first.cache is None:
        return moved > 0
    layers = {layer for work in works for layer in work.layers}
    for work in works:
        if work.groups is None and work.on is None and not isinstance(work.op, Collective):
            size = work.op.bytes if isinstance(work.op, Copy) else work.op.bytes_moved()
            each = np.broadcast_to(np.asarray(size, dtype=np.float64), len(work.op))
            mean = each.reshape(work.shape).mean(axis=1, keepdims=True)
            moved = moved + mean * len(work.layers)
    return moved / len(layers) < first.cache.value


def _with_near(cluster: Cluster) -> Cluster:
    """Return the cluster whose first processor works near its cache."""
    name, first = next(iter(cluster.device.processors.items()))
    processors = cluster.device.processors | {name: first.near()}
    device = cluster.device.model_copy(update={"processors": processors})
    return cluster.model_copy(update={"device": device})


def _program(works: Sequence[Work]) -> Iterator[tuple[int, int]]:
    """Yield (index of work, layer) in the order of a step."""
    having: dict[int, list[int]] = defaultdict(list)
    for number, work in enumerate(works):
        for layer in work.layers:
            having[layer].append(number)
    for layer in sorted(having):
        yield from ((number, layer) for number in having[layer])


def _items(places: Sequence[tuple[Work, int]]) -> tuple[Item, ...]:
    """Name the earlier items that each one waits for by their place."""
    seen: dict[str, list[int]] = defaultdict(list)
    items = []
    for place, (work, layer) in enumerate(places):
        after = None
        if work.after is not None:
            after = tuple(
                seen[name][-1 - back] for name, back in work.after if back < len(seen[name])
            )
        items.append(
            Item(
                name=work.name,
                stage=work.stage,
                layer=layer,
                stream=work.stream,
                after=after,
                groups=work.groups,
                resource=work.resource,
            )
        )
        seen[work.name].append(place)
    return tuple(items)
