"""How fast units read the open rows of their banks: timings, rows, refresh, power.

A row of C columns is read at one column per interval; then the banks turn to their next row, in
sight of the units or behind the reading of others. Refresh of all banks stops everything; a limit
of power stretches the interval. Intervals and row cycles in clocks, rates in bytes per second.
"""

import math
from bisect import bisect_left

from hwmodels.pim.description import PLACEMENTS, Pim, Placement


def path_energy(pim: Pim, to: Placement | None = None) -> float:
    """Energy of one bit from the open row to a place, J per bit, without the activation.

    Parameters
    ----------
    pim : Pim
        Memory and units.
    to : Placement, optional
        The place; none: where the units stand.
    """
    energies = pim.memory.energies
    steps = (
        energies.cell,
        energies.bank_group,
        energies.die + energies.stack,
        energies.interface,
    )
    return sum(steps[: PLACEMENTS.index(to or pim.units.placement) + 1])


def row_energy(pim: Pim, to: Placement | None = None) -> float:
    """Energy of opening one row of one bank and reading it to a place, J."""
    bits = 8 * pim.memory.organisation.row_bytes
    return pim.memory.energies.activate + bits * path_energy(pim, to)


def timed_interval(pim: Pim) -> int:
    """Clocks between columns that timings allow: tCCD_S over bank groups, tCCD_L in one bank.

    Several streams read in lock step, so each of their banks gives a column every tCCD_L; one
    stream alternates between bank groups.
    """
    timings = pim.memory.timings
    return timings.ccd_short if pim.units.streams == 1 else timings.ccd_long


def row_cycle(pim: Pim, interval: float, banks: int | None = None) -> float:
    """Clocks from one row to the next in the same unit.

    ``max(C i, need / s, (tRAS + tRP) / s, window)``: C columns at the interval i; need = opening +
    tRCD + (C - 1) i + tRTP + tRP of one set of banks; s sets of banks take turns (1 where rows are
    not opened ahead, and then C i is in the need).

    Parameters
    ----------
    pim : Pim
        Memory and units.
    interval : float
        Clocks between columns.
    banks : int, optional
        Banks of a channel that the units may use; none: all.
    """
    t, columns = pim.memory.timings, pim.memory.organisation.columns
    sets = 1
    if pim.units.overlapped:
        sets = (pim.memory.organisation.banks if banks is None else banks) // pim.units.streams
    opening, window = _activation(pim)
    need = opening + t.rcd + (columns - 1) * interval + t.rtp + t.rp
    return max(columns * interval, need / sets, (t.ras + t.rp) / sets, window)


def _activation(pim: Pim) -> tuple[float, float]:
    """Clocks until the last row of a set is opened, and least clocks between two sets.

    A rank may open so many rows in a window of tFAW; the rows of a set lie on all ranks evenly.
    """
    allowed = pim.units.activations_per_window
    if allowed is None:
        return 0.0, 0.0
    rows = math.ceil(pim.units.streams / pim.memory.organisation.ranks)
    faw = pim.memory.timings.faw
    return (math.ceil(rows / allowed) - 1) * faw, rows / allowed * faw


def streaming_power(pim: Pim, interval: float) -> float:
    """Power of cells and data paths of one stack while its units stream, W."""
    organisation = pim.memory.organisation
    rows = organisation.channels * pim.units.streams
    return rows * row_energy(pim) * organisation.clock / row_cycle(pim, interval)


def command_interval(pim: Pim) -> int:
    """Clocks between columns: as timings allow, or more where the limit of power asks for it.

    The least whole number of clocks at which the power of `streaming_power` is within the limit.
    """
    limit, least = pim.memory.power_limit, timed_interval(pim)
    if limit is None:
        return least
    o = pim.memory.organisation
    needed = o.channels * pim.units.streams * row_energy(pim) * o.clock / limit.value
    slower = range(least, max(least, math.ceil(needed)) + 1)
    return slower[bisect_left(slower, needed, key=lambda clocks: row_cycle(pim, clocks))]


def interleaved_read_power(pim: Pim) -> float:
    """Power of one stack in the busiest pattern of an ordinary memory, W.

    Every rank opens four rows in each tFAW (JEDEC's window) and every channel reads a column each
    tCCD_S to the host: what IDD7 measures. A supply that bears it gives units this much.
    """
    o, t, e = pim.memory.organisation, pim.memory.timings, pim.memory.energies
    activations = o.channels * o.ranks * 4 / (t.faw / o.clock)
    bits = 8 * o.channels * o.column_bytes / (t.ccd_short / o.clock)
    return activations * e.activate + bits * path_energy(pim, "controller")


def available(pim: Pim) -> float:
    """Share of the time that is not refresh: 1 - tRFC / tREFI."""
    return 1 - pim.memory.timings.rfc / pim.memory.timings.refi


def peak_bandwidth(pim: Pim) -> float:
    """Bytes per second of all units while rows are open: streams x column / interval of timings."""
    return _rate(pim, timed_interval(pim))


def host_bandwidth(pim: Pim) -> float:
    """Bytes per second of the ordinary interface of all stacks: a column per channel and tCCD_S."""
    o = pim.memory.organisation
    return pim.channels * o.column_bytes * o.clock / pim.memory.timings.ccd_short


def sustained_bandwidth(pim: Pim, banks: int | None = None) -> float:
    """Bytes per second over many rows, with their turns, refresh and the limit of power.

    Parameters
    ----------
    pim : Pim
        Memory and units.
    banks : int, optional
        Banks of a channel that the units may use; none: all.
    """
    interval = command_interval(pim)
    read = pim.memory.organisation.columns * interval / row_cycle(pim, interval, banks)
    return _rate(pim, interval) * read * available(pim)


def _rate(pim: Pim, interval: float) -> float:
    o = pim.memory.organisation
    return pim.channels * pim.units.streams * o.column_bytes * o.clock / interval


def peak_flops(pim: Pim) -> float:
    """Dense FLOP per second of all units, two per multiply-accumulate."""
    return 2 * pim.channels * pim.units.streams * pim.units.lanes * pim.units.clock
