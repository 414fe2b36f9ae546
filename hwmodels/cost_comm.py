"""What moving bytes between ranks takes: startup plus the busiest port's bytes.

Every rank has one port into its node and one into the network, each with a one-way bandwidth
that counts sends and receives apart; a collective is done when the busiest port is. Seconds.
"""

import numpy as np
from numpy.typing import NDArray

from basis import InputError
from basis.evidence import Evidence, weakest
from hwmodels.cost_compute import peaks
from hwmodels.link import Link, Transfer
from hwmodels.ops import AllGather, AllReduce, AllToAll, Floats, Group, ReduceScatter
from hwmodels.prices import Price, priced
from hwmodels.topology import Cluster

RingOp = AllReduce | AllGather | ReduceScatter
CommOp = AllToAll | RingOp


def price_comm(op: CommOp, cluster: Cluster) -> Price:
    """Price each row of a communication column.

    Raises
    ------
    InputError
        Traffic of another number of ranks, or a rank that the cluster lacks.
    """
    columns = np.asarray(op.traffic if isinstance(op, AllToAll) else op.bytes, dtype=np.float64)
    if op.ranks is None:
        if columns.shape[1] != cluster.num_ranks:
            raise InputError(
                f"AllToAll.traffic is for {columns.shape[1]} ranks -- {cluster.name} has "
                f"{cluster.num_ranks}"
            )
        return _ranks_price(op, columns, cluster.node_of, cluster)
    groups = [g for g in op.ranks if isinstance(g, tuple)]
    return _by_group(op, groups, columns, cluster)


def _by_group(op: CommOp, groups: list[Group], columns: Floats, cluster: Cluster) -> Price:
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
    rows = np.arange(len(columns)).reshape(-1, len(groups))
    parts = []
    for shape, numbers in of_node.items():  # groups that lie alike on nodes cost alike
        chosen = rows[:, numbers].ravel()
        node_of = np.array(shape)
        column = columns[chosen]
        parts.append((chosen, _ranks_price(op, column, node_of, cluster)))
    if len(parts) == 1:
        return parts[0][1]
    return _joined(parts, len(columns))


def _ranks_price(op: CommOp, column: Floats, node_of: NDArray[np.int64], cluster: Cluster) -> Price:
    if len(node_of) == 1:
        return _free(len(column))
    match op:
        case AllToAll():
            return _all_to_all(column, node_of, cluster)
        case AllReduce():
            return _ring(2 * column, node_of, cluster, "all_reduce")
        case AllGather():
            return _ring(column, node_of, cluster, "all_gather")
        case ReduceScatter():
            return _ring(column, node_of, cluster, "reduce_scatter")


def _joined(parts: list[tuple[NDArray[np.int64], Price]], rows: int) -> Price:
    """Put prices of some rows each together; the weakest evidence."""
    seconds, low, high = (np.empty(rows) for _ in range(3))
    for chosen, price in parts:
        seconds[chosen], low[chosen], high[chosen] = price.seconds, price.low, price.high
    evidence = weakest([price.evidence for _, price in parts])
    return Price(seconds=seconds, low=low, high=high, evidence=evidence)


def busiest_port(traffic: NDArray[np.number], node_of: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Bytes through the busiest port of a rank into its node, and into the network.

    Parameters
    ----------
    traffic : ndarray [n, G, G]
        Bytes from row to column; the diagonal is ignored.
    node_of : ndarray [G]
        Node of each rank.

    Returns
    -------
    tuple of ndarray [n]
        For each matrix the largest of all ranks' bytes sent or received, inside nodes and across.
    """
    same = node_of[:, None] == node_of[None, :]
    other_rank = ~np.eye(len(node_of), dtype=bool)
    return _busiest(traffic, same & other_rank), _busiest(traffic, ~same)


def _busiest(traffic: NDArray[np.number], mask: NDArray[np.bool_]) -> Floats:
    chosen = np.where(mask, traffic, 0).astype(np.float64)
    ports: Floats = np.maximum(chosen.sum(axis=2), chosen.sum(axis=1))
    return np.asarray(ports.max(axis=1, initial=0.0))


def _all_to_all(traffic: Floats, node_of: NDArray[np.int64], cluster: Cluster) -> Price:
    """Startup of the widest network spanned + the slower of the two busiest ports."""
    inside, across = busiest_port(traffic, node_of)
    seconds = np.zeros(len(traffic))
    links = _spanned(cluster, node_of)
    if cluster.node.interconnect is not None:
        seconds = _transfer(inside, cluster.intra, "all_to_all")
    if len(np.unique(node_of)) > 1 and cluster.network is not None:
        seconds = np.maximum(seconds, _transfer(across, cluster.network, "all_to_all"))
    return _with_startup(seconds, links, "all_to_all")


def _ring(size: Floats, node_of: NDArray[np.int64], cluster: Cluster, name: Transfer) -> Price:
    """Ring inside each node, and across nodes on each rank's share.

    ``(l-1)/l B`` bytes per port inside a node of l ranks, ``(N-1)/N B/l`` across N nodes; an
    all-reduce passes twice, there and back (Patarasuk and Yuan 2009, applied per level).
    """
    nodes, per_node = np.unique(node_of, return_counts=True)
    seconds = np.zeros(len(size))
    local = int(per_node.min())
    if per_node.max() > 1:
        share = (per_node.max() - 1) / per_node.max()
        seconds = _transfer(share * size, cluster.intra, name)
    if len(nodes) > 1 and cluster.network is not None:
        share = (len(nodes) - 1) / len(nodes) / local
        seconds = seconds + _transfer(share * size, cluster.network, name)
    return _with_startup(seconds, _spanned(cluster, node_of), name)


def _transfer(size: Floats, link: Link, name: Transfer) -> Floats:
    return np.asarray(size / (link.cost(name).efficiency * link.bandwidth.value))


def _spanned(cluster: Cluster, node_of: NDArray[np.int64]) -> list[Link]:
    """Links that a collective over ranks on these nodes uses, innermost first."""
    links = []
    if len(node_of) > len(np.unique(node_of)):
        links.append(cluster.intra)
    if len(np.unique(node_of)) > 1 and cluster.network is not None:
        links.append(cluster.network)
    return links


def _with_startup(seconds: Floats, links: list[Link], name: Transfer) -> Price:
    """Add the largest startup; take the outermost link's interval and the weakest evidence."""
    startup = max(link.cost(name).startup for link in links)
    evidence: list[Evidence] = [link.cost(name).evidence for link in links]
    for link in links:
        evidence += peaks(link.bandwidth)
    return priced(seconds + startup, links[-1].cost(name), weakest(evidence))


def _free(n: int) -> Price:
    zero = np.zeros(n)
    return Price(seconds=zero, low=zero, high=zero, evidence="measured")
