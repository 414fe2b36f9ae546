"""What an expert of a layer costs where it may run: kept fast, fetched, or computed aside.

A group of experts takes ``launch + max(sum compute, sum memory)`` seconds, both sums linear in the
experts that are in it (the roofline of `hwmodels.cost_compute`); so the times of a layer are
tables by the number of tokens, and a residency is priced without the simulator.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from basis.dtypes import bytes_of
from basis.errors import InputError
from hwmodels.cluster import Cluster
from hwmodels.cost import price
from hwmodels.cost_compute import price_compute
from hwmodels.ops import Copy, GroupedGemm
from simulator.offload_works import Route
from traces.model_spec import ModelSpec

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupTimes:
    """One processor's grouped expert kernel, seconds."""

    launch: float
    """Of a call with any token."""
    parts: Floats
    """What an expert adds to the sum of compute (row 0) and of memory (row 1), by its tokens,
    [2, tokens + 1]; 0 without tokens."""

    @property
    def alone(self) -> Floats:
        """An expert in a call of its own, by its tokens, [tokens + 1]."""
        return np.where(self.parts.any(axis=0), self.launch + self.parts.max(axis=0), 0.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertTimes:
    """Costs of the routed experts of one layer, seconds; every expert has the same size.

    Times count from the moment when the fast processor may begin with the experts.
    """

    fast: GroupTimes
    """On the processor that runs the model."""
    side: GroupTimes | None
    """On the processor where experts live; None where there is none."""
    transfer: float
    """Startups of sending activations to that processor and back."""
    per_token: float
    """What each token that is sent and returned adds to them."""
    fetch: float
    """From one copied expert to the next: the slowest hop of its way."""
    lead: float
    """End of the k-th copy = ``k fetch + lead``: the other hop, less the head start of copies."""
    top_k: int
    """Experts of one token."""


def expert_times(
    model: ModelSpec,
    cluster: Cluster,
    home: str,
    processor: str | None,
    max_tokens: int,
    head_start: float = 0.0,
) -> ExpertTimes:
    """Price the experts of a layer on a cluster.

    Parameters
    ----------
    home : str
        Memory that holds the experts that are not kept fast.
    processor : str, optional
        Processor that computes there; None: every expert is fetched.
    max_tokens : int
        Most tokens of one expert in a step.
    head_start : float
        Seconds from the moment when a layer's experts are known (copies begin) to the moment when
        the fast processor may begin with them.

    Raises
    ------
    InputError
        If the cluster lacks the memory, the processor, or a path from ``home``; or if the
        processor works on another memory than ``home``.
    """
    fast = cluster.device.processor.memory
    _check_side(cluster, home, processor)
    route = Route.of(cluster, home)
    hops = [
        _seconds(cluster, model.bytes_per_expert, *hop)
        for hop in (route.storage, route.fetch)
        if hop is not None
    ]
    row = bytes_of(model.activation_dtype, model.comm_size)
    ways = [(fast, home), (home, fast)] if processor is not None and home != fast else []
    one, two = (sum(_seconds(cluster, n * row, *way) for way in ways) for n in (1, 2))
    every = _experts(model, np.arange(max_tokens + 1)[:, None])
    return ExpertTimes(
        fast=_group_times(every, cluster, None),
        side=None if processor is None else _group_times(every, cluster, processor),
        transfer=2 * one - two,
        per_token=two - one,
        fetch=max(hops, default=0.0),
        lead=sum(hops) - max(hops, default=0.0) - head_start,
        top_k=model.top_k,
    )


def _check_side(cluster: Cluster, home: str, processor: str | None) -> None:
    if processor is None:
        return
    memory = cluster.processor(processor).memory
    if memory != home:
        known = {**cluster.device.processors, **cluster.node.processors}
        fitting = [name for name, its in known.items() if its.memory == home]
        raise InputError(
            f"offload: processor {processor!r} works on {memory!r}, the experts live in {home!r} "
            f"-- name one that works there ({', '.join(fitting) or 'there is none'}), another "
            "home, or no processor to fetch every expert"
        )


def _seconds(cluster: Cluster, size: float, source: str, target: str) -> float:
    copy = Copy(bytes=np.array([size]), source=source, target=target)
    return float(price(copy, cluster).seconds[0])


def _experts(model: ModelSpec, tokens_per_expert: NDArray[np.int64]) -> GroupedGemm:
    return GroupedGemm(
        tokens_per_expert=tokens_per_expert,
        hidden=model.comm_size,
        width=model.expert_width,
        gated=model.gated,
        weight_dtype=model.expert_dtype,
        activation_dtype=model.activation_dtype,
    )


def _group_times(op: GroupedGemm, cluster: Cluster, name: str | None) -> GroupTimes:
    """Split the price of single experts into its three terms, by making each of them free."""
    processor, bandwidth = cluster.processor(name), cluster.bandwidth(name)
    endless = {form: peak.times(np.inf) for form, peak in processor.flops.items()}
    multiplies_free = processor.model_copy(update={"flops": endless})
    reads_free = bandwidth.times(np.inf)
    launch = price_compute(op, multiplies_free, reads_free).seconds
    compute = price_compute(op, processor, reads_free).seconds
    memory = price_compute(op, multiplies_free, bandwidth).seconds
    return GroupTimes(launch=float(launch[-1]), parts=np.stack([compute, memory]) - launch)
