"""What moving bytes between ranks and memories takes: startup plus the busiest port's bytes.

Every rank has one port into its node and one into the network, each with a one-way bandwidth
that counts sends and receives apart; a collective is done when the busiest port is. Seconds.
"""

import numpy as np
from numpy.typing import NDArray

from basis import InputError
from basis.evidence import Evidence, weakest
from hwmodels.cost_compute import peaks
from hwmodels.link import Link, Transfer
from hwmodels.ops import AllReduce, AllToAll, Copy, Floats
from hwmodels.prices import Price, priced
from hwmodels.topology import Cluster

CommOp = AllToAll | AllReduce | Copy


def price_comm(op: CommOp, cluster: Cluster) -> Price:
    """Price each row of a communication column.

    Raises
    ------
    InputError
        Traffic of another number of ranks, a rank or a memory that the cluster lacks.
    """
    match op:
        case AllToAll():
            return _all_to_all(op, cluster)
        case AllReduce():
            return _all_reduce(op, cluster)
        case Copy():
            return _copy(op, cluster)


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


def _all_to_all(op: AllToAll, cluster: Cluster) -> Price:
    """Startup of the widest network spanned + the slower of the two busiest ports."""
    ranks = op.traffic.shape[1]
    if ranks != cluster.num_ranks:
        raise InputError(
            f"AllToAll.traffic is for {ranks} ranks -- {cluster.name} has {cluster.num_ranks}"
        )
    if ranks == 1:
        return _free(len(op))
    inside, across = busiest_port(op.traffic, cluster.node_of)
    seconds = np.zeros(len(op))
    links = _spanned(cluster, cluster.node_of)
    if cluster.node.interconnect is not None:
        seconds = _transfer(inside, cluster.intra, "all_to_all")
    if cluster.num_nodes > 1 and cluster.network is not None:
        seconds = np.maximum(seconds, _transfer(across, cluster.network, "all_to_all"))
    return _with_startup(seconds, links, "all_to_all")


def _all_reduce(op: AllReduce, cluster: Cluster) -> Price:
    """Ring inside each node, ring across nodes on each rank's share, ring back.

    ``2 (l-1)/l B`` bytes per port inside a node of l ranks, ``2 (N-1)/N B/l`` across N nodes
    (Patarasuk and Yuan 2009, applied per level).
    """
    if max(op.ranks) >= cluster.num_ranks:
        raise InputError(
            f"AllReduce.ranks: {max(op.ranks)} -- {cluster.name} has ranks 0 to "
            f"{cluster.num_ranks - 1}"
        )
    if len(op.ranks) == 1:
        return _free(len(op))
    nodes, per_node = np.unique(cluster.node_of[list(op.ranks)], return_counts=True)
    size = np.asarray(op.bytes, dtype=np.float64)
    seconds = np.zeros(len(op))
    local = int(per_node.min())
    if per_node.max() > 1:
        share = (per_node.max() - 1) / per_node.max()
        seconds = _transfer(2 * share * size, cluster.intra, "all_reduce")
    if len(nodes) > 1 and cluster.network is not None:
        share = (len(nodes) - 1) / len(nodes) / local
        seconds = seconds + _transfer(2 * share * size, cluster.network, "all_reduce")
    links = _spanned(cluster, cluster.node_of[list(op.ranks)])
    return _with_startup(seconds, links, "all_reduce")


def _copy(op: Copy, cluster: Cluster) -> Price:
    """Over the link between two memories; within one memory, a read and a write."""
    size = np.asarray(op.bytes, dtype=np.float64)
    if op.source == op.target:
        memory = cluster.memory(op.source)
        cost, evidence = cluster.device.kernel("stream", "bf16")
        seconds = 2 * size / (cost.memory_efficiency * memory.bandwidth.value)
        total = np.where(size > 0, cost.launch + seconds, 0.0)
        return priced(total, cost, weakest([evidence, *peaks(memory.bandwidth)]))
    for name in (op.source, op.target):
        cluster.memory(name)
    link = cluster.link_between(op.source, op.target)
    price = _with_startup(_transfer(size, link, "copy"), [link], "copy")
    idle = size == 0
    return Price(
        seconds=np.where(idle, 0.0, price.seconds),
        low=np.where(idle, 0.0, price.low),
        high=np.where(idle, 0.0, price.high),
        evidence=price.evidence,
    )


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
