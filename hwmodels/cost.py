"""One question for every operation: how long, between what bounds, resting on what."""

from basis import InputError
from hwmodels.cost_comm import price_comm
from hwmodels.cost_compute import price_compute
from hwmodels.cost_copy import price_copy
from hwmodels.ops import AllGather, AllReduce, AllToAll, Copy, Op, ReduceScatter
from hwmodels.prices import Price
from hwmodels.topology import Cluster

__all__ = ["Price", "price"]


def price(ops: Op, cluster: Cluster, on: str | None = None) -> Price:
    """Price a column of operations on a cluster.

    Parameters
    ----------
    ops : Op
        One column; a compute row runs on one rank, a collective on all of its ranks.
    cluster : Cluster
        The hardware.
    on : str, optional
        Name of the processor that computes, with its own kernels, peaks and bandwidth; None: the
        device's first. Copies and collectives have none.

    Returns
    -------
    Price
        Seconds [n] with interval and evidence.

    Raises
    ------
    InputError
        If the column names ranks or memories that the cluster lacks, if no processor has the name,
        or if a copy or collective is given one.
    """
    match ops:
        case AllToAll() | AllReduce() | AllGather() | ReduceScatter() | Copy() if on is not None:
            raise InputError(
                f"{type(ops).__name__} on {on!r} -- only compute operations name a processor -- "
                "leave it out"
            )
        case AllToAll() | AllReduce() | AllGather() | ReduceScatter():
            return price_comm(ops, cluster)
        case Copy():
            return price_copy(ops, cluster)
        case _:
            return price_compute(ops, cluster.processor(on), cluster.bandwidth(on))
