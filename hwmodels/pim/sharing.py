"""What is left to the host's processor and to the units when both want the same memory.

Either they take turns, with a change of mode at each end, or they work at the same time on banks of
their own, with one power supply and, for units on the host's data path, one path. Bytes per second.
"""

from dataclasses import dataclass

from basis import InputError, format_quantity
from hwmodels.pim.description import Pim
from hwmodels.pim.streaming import (
    host_bandwidth,
    row_energy,
    sustained_bandwidth,
)


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Bandwidths of both sides."""

    host: float
    """Bytes per second of the host's processor."""
    units: float
    """Bytes per second of the units."""


def in_turns(pim: Pim, share: float, period: float, change: float) -> Shared:
    """Bandwidths where one side works while the other waits (all banks in one mode).

    Parameters
    ----------
    pim : Pim
        Memory and units.
    share : float
        Share of the time that the units have, the change to them included.
    period : float
        Time after which both had their turn, s.
    change : float
        Time of one change of mode, at the begin of each turn, s.

    Raises
    ------
    InputError
        A share outside 0 to 1, or turns that are shorter than the change.
    """
    _check_share("share", share)
    if 0 < share < 1 and min(share, 1 - share) * period < change:
        raise InputError(
            f"turns of {format_quantity(min(share, 1 - share) * period, 's')} -- a change of mode "
            f"takes {format_quantity(change, 's')} -- lengthen the period or the smaller share"
        )
    lost = change / period if 0 < share < 1 else 0.0
    return Shared(
        host=max(0.0, 1 - share - lost) * host_bandwidth(pim),
        units=max(0.0, share - lost) * sustained_bandwidth(pim),
    )


def at_once(pim: Pim, load: float, banks: int) -> Shared:
    """Bandwidths where the host's processor keeps to other banks than the units.

    The host reads at ``load`` of its bandwidth. Units on its data path (a controller's, or a
    buffer's with one stream) get what is left of that path; others read beside it. With few banks
    the turns of their rows come into sight. Both together stay within the limit of power.

    Parameters
    ----------
    pim : Pim
        Memory and units.
    load : float
        Share of the host's bandwidth in use.
    banks : int
        Banks of each channel that the units have.

    Raises
    ------
    InputError
        A load outside 0 to 1, fewer banks than the units read at the same time, or none left to a
        host that reads.
    """
    _check_share("load", load)
    least, most = pim.units.streams, pim.memory.organisation.banks
    if not least <= banks <= most:
        raise InputError(
            f"banks: {banks} of a channel -- units read {least} at the same time, a channel has "
            f"{most} -- give {least} to {most}"
        )
    if load > 0 and banks == most:
        raise InputError(
            f"banks: all {most} of a channel, and a host that reads -- leave it some -- give fewer"
        )
    host = load * host_bandwidth(pim)
    units = sustained_bandwidth(pim, banks)
    if pim.units.placement in ("buffer", "controller") and pim.units.streams == 1:
        units *= 1 - load  # both move their columns over the host's data path
    if pim.memory.power_limit is not None:
        row = pim.memory.organisation.row_bytes
        limit = pim.stacks * pim.memory.power_limit.value
        left = limit - host * row_energy(pim, "controller") / row
        units = min(units, max(0.0, left) * row / row_energy(pim))
    return Shared(host=host, units=units)


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise InputError(f"{name}: {value} -- between 0 and 1 -- give a share")
