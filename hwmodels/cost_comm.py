"""What moving bytes between ranks takes: fixed times plus what the busiest port's bytes take.

Every rank has one port into its node and one into the network, each with a one-way bandwidth
that counts sends and receives apart; a collective is done when the busiest port is. Each link's
cost model prices its own load (`hwmodels.kernels.collective`). Seconds.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from basis import InputError
from basis.evidence import Evidence, weakest
from hwmodels.cost_compute import peaks
from hwmodels.figures import Figure, TransferCost
from hwmodels.kernels.base import Limits
from hwmodels.kernels.collective import (
    CollectiveCost,
    CommOp,
    Load,
    RingOp,
    busiest_port,
    exchange_load,
    ring_load,
)
from hwmodels.link import Link, Transfer
from hwmodels.ops import AllGather, AllReduce, AllToAll, Floats, Group, ReduceScatter
from hwmodels.prices import Price, priced
from hwmodels.topology import Cluster

__all__ = ["CommOp", "RingOp", "busiest_port", "price_comm"]

Rows = slice | NDArray[np.int64]
Level = tuple[Link, Load]
"""A link and what it carries."""
_Joined = Callable[[Floats, Floats], Floats]


def price_comm(op: CommOp, cluster: Cluster) -> Price:
    """Price each row of a communication column.

    Raises
    ------
    InputError
        Traffic of another number of ranks, or a rank that the cluster lacks.
    """
    if op.ranks is None:
        if op.traffic.shape[1] != cluster.num_ranks:
            raise InputError(
                f"AllToAll.traffic is for {op.traffic.shape[1]} ranks -- {cluster.name} has "
                f"{cluster.num_ranks}"
            )
        return _ranks_price(op, slice(None), cluster.node_of, cluster)
    groups = [g for g in op.ranks if isinstance(g, tuple)]
    return _by_group(op, groups, cluster)


def _by_group(op: CommOp, groups: list[Group], cluster: Cluster) -> Price:
    """Price the rows of each group by themselves and put them back in turn."""
    outside = max(max(group) for group in groups)
    if outside >= cluster.num_ranks:
        raise InputError(
            f"{type(op).__name__}.ranks: {outside} -- {cluster.name} has ranks 0 to "
            f"{cluster.num_ranks - 1}"
        )
    of_node: dict[tuple[int, ...], list[int]] = {}
    for number, group in enumerate(groups):
        nodes = cluster.node_of[list(group)]
        of_node.setdefault(tuple((nodes - nodes[0]).tolist()), []).append(number)
    rows = np.arange(len(op)).reshape(-1, len(groups))
    parts = []
    for shape, numbers in of_node.items():  # groups that lie alike on nodes cost alike
        chosen = rows[:, numbers].ravel()
        parts.append((chosen, _ranks_price(op, chosen, np.array(shape), cluster)))
    if len(parts) == 1:
        return parts[0][1]
    return _joined(parts, len(op))


def _ranks_price(op: CommOp, rows: Rows, node_of: NDArray[np.int64], cluster: Cluster) -> Price:
    match op:
        case AllToAll():
            traffic = np.asarray(op.traffic, dtype=np.float64)[rows]
            if len(node_of) == 1:
                return _free(len(traffic))
            levels = _exchange_levels(op, rows, traffic, node_of, cluster)
            return _price(op.phase or "all_to_all", levels, np.maximum, cluster)
        case AllReduce() | AllGather() | ReduceScatter():
            tensor = np.asarray(op.bytes, dtype=np.float64)[rows]
            if len(node_of) == 1:
                return _free(len(tensor))
            levels = _ring_levels(op, tensor, node_of, cluster)
            return _price(_name(op), levels, np.add, cluster)


def _name(op: RingOp) -> Transfer:
    match op:
        case AllReduce():
            return "all_reduce"
        case AllGather():
            return "all_gather"
        case ReduceScatter():
            return "reduce_scatter"


def _exchange_levels(
    op: AllToAll, rows: Rows, traffic: Floats, node_of: NDArray[np.int64], cluster: Cluster
) -> list[Level]:
    """Busiest ports of the links that ranks on these nodes use, innermost first."""
    inside, across = busiest_port(traffic, node_of)
    nodes, per_node = np.unique(node_of, return_counts=True)
    levels: list[Level] = []
    if per_node.max() > 1:
        most = int(per_node.max())
        levels.append((cluster.intra, exchange_load(op, rows, inside, most)))
    if len(nodes) > 1 and cluster.network is not None:
        levels.append((cluster.network, exchange_load(op, rows, across, len(nodes))))
    return levels


def _ring_levels(
    op: RingOp, tensor: Floats, node_of: NDArray[np.int64], cluster: Cluster
) -> list[Level]:
    """Ring inside each node, and across nodes on each rank's share, innermost first.

    ``(l-1)/l B`` bytes per port inside a node of l ranks, ``(N-1)/N B/l`` across N nodes; an
    all-reduce passes twice, there and back (Patarasuk and Yuan 2009, applied per level).
    """
    nodes, per_node = np.unique(node_of, return_counts=True)
    levels: list[Level] = []
    if per_node.max() > 1:
        levels.append((cluster.intra, ring_load(op, tensor, int(per_node.max()))))
    if len(nodes) > 1 and cluster.network is not None:
        share = tensor / int(per_node.min())
        levels.append((cluster.network, ring_load(op, share, len(nodes))))
    return levels


def _price(name: Transfer, levels: list[Level], joined: _Joined, cluster: Cluster) -> Price:
    """Largest fixed time + the levels' bytes, beside each other (maximum) or in turn (sum).

    The outermost link's interval and the weakest evidence.
    """
    fixed, moving = (np.zeros(len(levels[0][1].port)) for _ in range(2))
    evidence: list[Evidence] = []
    for link, load in levels:
        start, bytes_ = _split(link, name, load, cluster)
        fixed, moving = np.maximum(fixed, start), joined(moving, bytes_)
        evidence += [link.cost(name).evidence, *peaks(link.bandwidth)]
    return priced(fixed + moving, levels[-1][0].cost(name), weakest(evidence))


def _split(link: Link, name: Transfer, load: Load, cluster: Cluster) -> tuple[Floats, Floats]:
    """Return the fixed seconds and those of the bytes over one link."""
    cost = link.cost(name)
    rate = link.bandwidth.value
    if isinstance(cost, TransferCost):
        moving = load.port / (cost.efficiency * rate)
        return np.full_like(moving, cost.startup), moving
    assert isinstance(cost, CollectiveCost)
    limits = link_limits(rate, cluster.device.processor.compute_units)
    return cost.split(cost.numbers(), cost.features(load, limits))


def link_limits(rate: float, units: Figure[int] | None) -> Limits:
    """Return what a collective's cost model is told of the machine.

    Parameters
    ----------
    rate : float
        One-way rate of a port, bytes/s.
    units : Figure, optional
        Units of the processor that runs the kernel.
    """
    return Limits(flops=0.0, bandwidth=rate, units=0.0 if units is None else float(units.value))


def _joined(parts: list[tuple[NDArray[np.int64], Price]], rows: int) -> Price:
    """Put prices of some rows each together; the weakest evidence."""
    seconds, low, high = (np.empty(rows) for _ in range(3))
    for chosen, price in parts:
        seconds[chosen], low[chosen], high[chosen] = price.seconds, price.low, price.high
    evidence = weakest([price.evidence for _, price in parts])
    return Price(seconds=seconds, low=low, high=high, evidence=evidence)


def _free(n: int) -> Price:
    zero = np.zeros(n)
    return Price(seconds=zero, low=zero, high=zero, evidence="measured")
