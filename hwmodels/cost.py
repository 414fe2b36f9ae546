"""One question for every operation: how long, between what bounds, resting on what."""

from hwmodels.cost_comm import price_comm
from hwmodels.cost_compute import price_compute
from hwmodels.ops import AllReduce, AllToAll, Copy, Op
from hwmodels.prices import Price
from hwmodels.topology import Cluster

__all__ = ["Price", "price"]


def price(ops: Op, cluster: Cluster) -> Price:
    """Price a column of operations on a cluster.

    Parameters
    ----------
    ops : Op
        One column; a compute row runs on one rank, a collective on all of its ranks.
    cluster : Cluster
        The hardware.

    Returns
    -------
    Price
        Seconds [n] with interval and evidence.

    Raises
    ------
    InputError
        If the column names ranks or memories that the cluster lacks.
    """
    match ops:
        case AllToAll() | AllReduce() | Copy():
            return price_comm(ops, cluster)
        case _:
            return price_compute(ops, cluster.device)
