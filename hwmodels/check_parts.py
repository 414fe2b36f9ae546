"""Guards on memories and links: what pins and lanes can carry, GB for GiB, one way for both.

A memory's bandwidth is stacks (or channels) x bus x pin rate, and no pin is faster than its
technology; a link's is lanes x rate, in one direction. Pin rates from the JEDEC standards and the
fastest parts that makers announced by 2026.
"""

import re
from collections.abc import Iterator

from basis import format_quantity
from hwmodels.device import Memory
from hwmodels.figures import CostModel
from hwmodels.finding import Finding, error, warning
from hwmodels.link import FULL_LANES, ONE_WAY_RATE, Link

PIN_RATE: dict[str, tuple[float, float]] = {
    "HBM2": (1.0, 2.45),
    "HBM2E": (2.4, 3.7),
    "HBM3": (3.2, 6.6),
    "HBM3E": (5.2, 9.8),
    "HBM4": (6.4, 12.8),
    "GDDR6": (10.0, 20.0),
    "GDDR6X": (18.0, 24.0),
    "GDDR7": (20.0, 36.0),
    "DDR4": (1.6, 4.0),
    "DDR5": (3.2, 9.2),
    "MRDIMM": (8.0, 12.8),
    "LPDDR5": (3.2, 6.4),
    "LPDDR5X": (5.5, 10.7),
}
"""Slowest and fastest Gbit/s of one pin by technology."""
_TECHNOLOGY = re.compile(r"(?:LP|G)?DDR\d\w?|HBM\d\w?|MRDIMM", re.IGNORECASE)
_HALF_GIB = 2**29
_LONGEST_CALL = 2e-3


def check_memory(where: str, memory: Memory) -> Iterator[Finding]:
    """Check one memory: binary sizes, bandwidth against pins, pins against their technology.

    ``where`` is the path of the memory in its file with a dot at the end, or empty.
    """
    yield from _size(where, memory)
    yield from _pins(where, memory)
    if memory.numa and memory.stacks and memory.stacks % memory.numa:
        yield error(
            f"{where}numa",
            f"{memory.numa} domains over {memory.stacks} channels -- they share the channels "
            "evenly -- correct one of them",
        )


def check_link(link: Link, where: str = "link") -> list[Finding]:
    """Check one link: one direction only, bits against bytes, and lanes times rate."""
    found = list(_standard(where, link))
    if link.lanes and link.lane_rate:
        lanes = link.lanes * link.lane_rate
        if not 0.95 <= link.bandwidth.value / lanes <= 1.05:
            found.append(
                error(
                    f"{where}.bandwidth",
                    f"{format_quantity(link.bandwidth.value, 'B/s', 4)} is "
                    f"{link.bandwidth.value / lanes:.2f} x lanes x rate per lane "
                    f"({format_quantity(lanes, 'B/s', 4)}) -- both must agree within 5 % -- "
                    "count one direction, and bits against bytes",
                )
            )
    for name, cost in link.costs.items():
        found += check_fixed(f"{where}.costs.{name}", cost)
    return found


def check_fixed(where: str, cost: CostModel) -> Iterator[Finding]:
    """Check the fixed times of one call of a kernel or a transfer."""
    for name in cost.FIXED:
        if (fixed := getattr(cost, name)) > _LONGEST_CALL:
            yield warning(
                f"{where}.{name}",
                f"{format_quantity(fixed, 's')} for one call -- 1 to 300 us is usual -- "
                "check ms against us",
            )


def _size(where: str, memory: Memory) -> Iterator[Finding]:
    size, stack = memory.capacity.value, memory.stack_capacity
    if stack and stack % _HALF_GIB:
        yield error(
            f"{where}stack_capacity",
            f"{format_quantity(stack, 'B', 4)} is {stack / 2**30:.4g} GiB -- DRAM stacks, chips "
            "and modules come in halves of a GiB -- write GiB (2^30)",
        )
    elif memory.stacks and stack:
        nominal = memory.stacks * stack
        if not 0.9 <= size / nominal <= 1.001:
            yield error(
                f"{where}capacity",
                f"{format_quantity(size, 'B', 4)} is {size / nominal:.3f} of the stacks' "
                f"{format_quantity(nominal, 'B', 4)} -- 0.9 to 1 is left to use -- "
                "check GB (10^9) against GiB (2^30)",
            )
        elif abs(size / 1e9 - nominal / 2**30) < 0.05:
            yield warning(
                f"{where}capacity",
                f"{size / 1e9:.0f} GB are the stacks' {nominal / 2**30:.0f} GiB with the wrong "
                "unit, 7 % less -- give what the driver reports, or GiB",
            )
    elif size % 1e9 == 0 and size < 1e12:
        yield warning(
            f"{where}capacity",
            f"{size / 1e9:.0f} GB is a round decimal figure -- memory parts come in "
            f"binary sizes ({size / 1e9:.0f} GiB is 7.4 % more) -- give what the driver reports",
        )


def _pins(where: str, memory: Memory) -> Iterator[Finding]:
    stated = memory.bandwidth.value
    if memory.pin_rate:
        yield from _technology(f"{where}pin_rate", memory.kind, memory.pin_rate)
    if memory.stacks and memory.bus_bits and memory.pin_rate:
        pins = memory.stacks * memory.bus_bits * memory.pin_rate
        if not 0.9 <= stated / pins <= 1.03:
            yield error(
                f"{where}bandwidth",
                f"{format_quantity(stated, 'B/s', 4)} is {stated / pins:.2f} x stacks x "
                f"bus x pin rate ({format_quantity(pins, 'B/s', 4)}) -- 0.9 to 1.03 is possible "
                "-- correct the one that is wrong",
            )


def _technology(path: str, kind: str, pin_rate: float) -> Iterator[Finding]:
    match = _TECHNOLOGY.search(kind)
    bounds = PIN_RATE.get(match[0].upper()) if match else None
    if match is None or bounds is None or bounds[0] <= pin_rate * 8e-9 <= bounds[1]:
        return
    told = f"{pin_rate * 8e-9:.4g} Gbit/s -- a pin of {match[0]} carries {bounds[0]} to {bounds[1]}"
    if pin_rate * 8e-9 > bounds[1]:
        yield error(path, f"{told} -- bandwidth above physics: correct the rate or the kind")
    else:
        yield warning(path, f"{told} -- data rates are twice the clock (DDR) -- give transfers")


def _standard(where: str, link: Link) -> Iterator[Finding]:
    """Compare with what the standard's port carries one way, over the lanes that are used."""
    stated, path = link.bandwidth.value, f"{where}.bandwidth"
    told = format_quantity(stated, "B/s", 4)
    full = ONE_WAY_RATE.get(link.standard)
    if full is None:
        return
    if link.lanes and link.standard in FULL_LANES:
        full *= link.lanes / FULL_LANES[link.standard]
    if abs(stated / (2 * full) - 1) < 0.05:
        yield error(
            path,
            f"{told} is the sum of both directions of {link.standard} -- one direction of "
            f"one rank is expected -- write {format_quantity(stated / 2, 'B/s', 4)}",
        )
    elif abs(stated / (8 * full) - 1) < 0.05:
        yield error(
            path,
            f"{told} is eight times what {link.standard} carries -- bits taken for bytes -- "
            f"write {format_quantity(stated, 'bit/s', 4)}",
        )
    elif stated > 1.05 * full:
        yield error(
            path,
            f"{told} -- {link.standard}{_lanes(link)} carries at most "
            f"{format_quantity(full, 'B/s', 4)} one way per rank -- correct the bandwidth, or use "
            "standard: other",
        )
    elif abs(stated * 8 / full - 1) < 0.05:
        yield warning(
            path,
            f"{told} is an eighth of what {link.standard} carries -- bytes taken for bits? -- "
            f"write {format_quantity(full, 'B/s', 4)} if it is a whole port",
        )


def _lanes(link: Link) -> str:
    """Say how many lanes where they are not a full port's."""
    full = FULL_LANES.get(link.standard)
    return f" x{link.lanes}" if link.lanes and full and link.lanes != full else ""
