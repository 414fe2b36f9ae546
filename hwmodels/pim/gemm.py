"""What products with few rows take on units in a memory: time and energy from columns and rows.

The weights lie striped over all units, so every unit reads its share in lock step with the others;
inputs are sent to every channel, results come back. Seconds and joules per row of a `Gemm` column.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from basis import bytes_of
from hwmodels.ops import Floats, Gemm
from hwmodels.pim.description import Pim
from hwmodels.pim.streaming import (
    available,
    command_interval,
    host_bandwidth,
    path_energy,
    row_cycle,
)


@dataclass(frozen=True, kw_only=True)
class _Reads:
    """Commands of one pass over the weights of each row of a column, [n]."""

    columns: Floats
    """Column commands of one channel."""
    rows: Floats
    """Rows that each unit opens."""


def column_clocks(pim: Pim, weight_dtype: str) -> float:
    """Clocks of the memory in which a unit multiplies one column with one vector."""
    o, units = pim.memory.organisation, pim.units
    return o.column_bytes / bytes_of(weight_dtype, 1) / units.lanes * o.clock / units.clock


def gemm_seconds(pim: Pim, op: Gemm) -> Floats:
    """Time of each row, s.

    A pass over the weights takes ``columns x i + rows x (row cycle - C i)`` clocks, i the interval
    or, where that is longer, what the units need to multiply a column with the vectors that they
    hold. Units with a fixed number of vectors pass once for each such group; units with a memory
    of their own pass once, and multiply beside it.

    Parameters
    ----------
    pim : Pim
        Memory, units, stacks.
    op : Gemm
        m vectors of length k times n x k weights.

    Returns
    -------
    ndarray [n]
        Seconds; rows without vectors cost nothing.
    """
    reads, m = _reads(pim, op), np.asarray(op.m, dtype=np.float64)
    held = pim.units.vectors
    if held is None:
        multiply = m * reads.columns * column_clocks(pim, op.weight_dtype)
        stream = np.maximum(
            _pass_seconds(pim, reads, command_interval(pim)),
            multiply / pim.memory.organisation.clock,
        )
    else:
        stream = m // held * _group_seconds(pim, op, reads, held)
        for rest in np.unique(m % held):
            last = _group_seconds(pim, op, reads, rest)
            stream = stream + np.where(m % held == rest, last, 0.0) * (rest > 0)
    moved = _operand_seconds(pim, op)
    beside = pim.units.operands == "concurrent"
    total = np.maximum(stream, moved) if beside else stream + moved
    return np.where(_work(op), pim.units.launch.value + total, 0.0)


def gemm_joules(pim: Pim, op: Gemm) -> Floats:
    """Dynamic energy of each row, J: rows opened, bits moved, products; no standby power.

    Opened rows count whole; each pass over the weights opens them again.
    """
    reads, energies = _reads(pim, op), pim.memory.energies
    m, n, k = (np.asarray(x, dtype=np.float64) for x in (op.m, op.n, op.k))
    passes = np.ones_like(m) if pim.units.vectors is None else np.ceil(m / pim.units.vectors)
    banks = pim.channels * pim.units.streams
    opened = passes * reads.rows * banks * energies.activate
    read = passes * op.weight_bytes() * 8 * path_energy(pim)
    outside = path_energy(pim, "controller") - path_energy(pim)
    sent = _operand_bytes(pim, op) * 8 * outside
    return np.where(_work(op), opened + read + sent + m * n * k * energies.mac, 0.0)


def _work(op: Gemm) -> NDArray[np.bool_]:
    return np.asarray(op.flops() > 0)


def _reads(pim: Pim, op: Gemm) -> _Reads:
    o = pim.memory.organisation
    stripe = pim.channels * pim.units.streams * o.column_bytes
    columns = np.ceil(op.weight_bytes() / stripe)
    return _Reads(columns=columns, rows=np.ceil(columns / o.columns))


def _group_seconds(pim: Pim, op: Gemm, reads: _Reads, vectors: float) -> Floats:
    """One pass with so many vectors in lock step."""
    multiply = vectors * column_clocks(pim, op.weight_dtype)
    return _pass_seconds(pim, reads, max(float(command_interval(pim)), multiply))


def _pass_seconds(pim: Pim, reads: _Reads, interval: float) -> Floats:
    o = pim.memory.organisation
    turn = row_cycle(pim, interval) - o.columns * interval
    clocks = reads.columns * interval + reads.rows * turn
    return np.asarray(clocks / o.clock / available(pim))


def _pieces(pim: Pim, op: Gemm) -> Floats:
    """How many times partial sums are read out: the parts of the input that are held in turn."""
    k = np.asarray(op.k, dtype=np.float64)
    held = pim.units.operand_bytes
    return np.ones_like(k) if held is None else np.ceil(k * _size(op) / held)


def _operand_bytes(pim: Pim, op: Gemm) -> Floats:
    """Bytes to and from all channels: every input to every channel, every sum once per piece."""
    m, n, k = (np.asarray(x, dtype=np.float64) for x in (op.m, op.n, op.k))
    return m * (k * pim.channels + n * _pieces(pim, op)) * _size(op)


def _operand_seconds(pim: Pim, op: Gemm) -> Floats:
    return np.asarray(_operand_bytes(pim, op) / host_bandwidth(pim))


def _size(op: Gemm) -> float:
    return bytes_of(op.activation_dtype, 1)
