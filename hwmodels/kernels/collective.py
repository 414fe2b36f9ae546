"""What one link carries of a collective, and what all cost models of collectives share.

A collective of ranks on several nodes loads two links, the port into the node and the port into
the network; each prices its own load. A ring passes a tensor on in equal pieces, an exchange sends
what a traffic matrix says, and the busiest port decides. Bytes one way, seconds.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from hwmodels.kernels.base import Features, Limits, Numbers, PhysicalCost
from hwmodels.ops import AllGather, AllReduce, AllToAll, Floats, ReduceScatter

RingOp = AllReduce | AllGather | ReduceScatter
CommOp = AllToAll | RingOp
_SHARP = 4.0  # exponent of the smooth maximum of two times that overlap


@dataclass(frozen=True, kw_only=True)
class RingLoad:
    """A tensor that ``ranks`` members of one link sum or gather."""

    ranks: Floats
    """[n] members on this link: ranks of a node, or nodes."""
    tensor: Floats
    """[n] bytes of the whole tensor among them."""
    passes: int = 1
    """2 for an all-reduce: there and back."""

    @property
    def port(self) -> Floats:
        """[n] bytes through each port in a ring: ``passes (r - 1) / r tensor``."""
        return self.passes * (self.ranks - 1) / self.ranks * self.tensor

    @property
    def least(self) -> Floats:
        """[n] bytes that no way of doing it avoids, a switch that adds up included."""
        return (self.ranks - 1) / self.ranks * self.tensor


@dataclass(frozen=True, kw_only=True)
class ExchangeLoad:
    """Rows of tokens that members of one link send one another."""

    ranks: Floats
    """[n] members on this link."""
    port: Floats
    """[n] bytes through the busiest port, sent or received."""
    tokens: Floats
    """[n] tokens of the rank with most; 0: not stated."""
    experts: Floats
    """[n] experts over all ranks; 0: not stated."""
    row: Floats
    """[n] bytes of one token's row; 0: not stated."""
    units: Floats
    """[n] processor's units given to the call; 0: what the cost model states."""
    copies: Floats
    """[n] (token, expert) pairs per row in ``port``."""

    @property
    def least(self) -> Floats:
        """[n] bytes that cannot be avoided."""
        return self.port


Load = RingLoad | ExchangeLoad


class CollectiveCost(PhysicalCost):
    """A cost model of a collective over one link (a base class).

    ``limits.bandwidth`` is the link's one-way rate of a port, ``limits.units`` the units of the
    processor that runs the kernel.
    """

    RATES: ClassVar[tuple[str, ...]] = ()
    """Fields in bytes/s that are no share of the link's rate."""

    @abstractmethod
    def features(self, op: Load | CommOp, limits: Limits) -> Features:
        """Return what the time depends on; an operation counts as one on a single link."""

    @staticmethod
    @abstractmethod
    def split(numbers: Numbers, features: Features) -> tuple[Floats, Floats]:
        """Return the fixed seconds and those that bytes and tokens take, [n] each."""

    def with_rates(self, factor: float) -> Self:
        """Return a copy with the processor's own rates multiplied."""
        return self.model_copy(update={n: getattr(self, n) * factor for n in self.RATES})


def load_of(op: CommOp) -> Load:
    """Return the load of a collective whose ranks share one link.

    Parameters
    ----------
    op : CommOp
        A column; several groups of equal size are each on a link of their own.
    """
    if isinstance(op, AllToAll):
        inside, _ = busiest_port(op.traffic, np.zeros(op.traffic.shape[1], dtype=np.int64))
        return exchange_load(op, slice(None), inside, op.traffic.shape[1])
    first = op.ranks[0]
    members = len(first) if isinstance(first, tuple) else len(op.ranks)
    size = np.asarray(op.bytes, dtype=np.float64)
    return ring_load(op, size, members)


def ring_load(op: RingOp, tensor: Floats, ranks: int) -> RingLoad:
    """Return the load of rows of a ring operation with so many bytes among so many members."""
    passes = 2 if isinstance(op, AllReduce) else 1
    return RingLoad(ranks=np.full(len(tensor), float(ranks)), tensor=tensor, passes=passes)


def exchange_load(
    op: AllToAll, rows: slice | NDArray[np.int64], port: Floats, ranks: int
) -> ExchangeLoad:
    """Return the load of some rows of an all-to-all, given their busiest port's bytes."""
    ones = np.ones(len(port))
    return ExchangeLoad(
        ranks=ranks * ones,
        port=port,
        tokens=np.asarray(op.tokens, dtype=np.float64)[rows],
        experts=op.experts * ones,
        row=op.row_bytes * ones,
        units=0 * ones,
        copies=np.asarray(op.copies, dtype=np.float64)[rows],
    )


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


def overlapped(a: Floats, b: Floats, sharp: float = _SHARP) -> Floats:
    """Return a smooth maximum of two times that run beside each other, never below either."""
    top = np.maximum(a, b)
    scale = np.where(top > 0, top, 1.0)
    return np.asarray(top * ((a / scale) ** sharp + (b / scale) ** sharp) ** (1 / sharp)) * (
        top > 0
    )


def either(a: Floats, b: Floats, sharp: float = _SHARP) -> Floats:
    """Return a smooth minimum of two ways to do the same, never above either."""
    top = overlapped(a, b, sharp)
    return np.asarray(a * np.divide(b, top, out=np.zeros_like(top), where=top > 0))


def filled(seconds: Floats, fill: float) -> Floats:
    """Return a transfer's seconds with the filling of its pipeline.

    In p chunks over a pipeline that takes f to fill per chunk in time, ``(T / p + f) (p + 1)`` is
    least at ``p = sqrt(T / f)``: ``T + 2 sqrt(f T) + f``; the last term belongs to the launch.
    """
    return np.asarray(seconds + 2 * np.sqrt(fill * seconds))
