"""Guards against the mistakes that data sheets invite.

Sparse FLOP/s taken for dense (twice too fast), both directions of a link added up, GB for GiB,
a bandwidth that the pins cannot carry, a drive faster than its lanes. Each check compares a
figure with what its parts give and answers with findings; an ``error`` stops the loading of a
file, a ``warning`` is only told.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel

from basis import format_quantity
from hwmodels.device import Device, Memory, Processor
from hwmodels.link import FULL_LANES, ONE_WAY_RATE, Link
from hwmodels.topology import Cluster, Node

KNOWN_SPARSE: dict[str, dict[str, float]] = {
    "bf16": {
        "A100": 624e12,
        "H100 PCIe": 1513e12,
        "H100 or H200": 1979e12,
        "B200": 4500e12,
        "GB200": 5000e12,
        "L40S": 733e12,
        "RTX 4090": 330.4e12,
        "MI300X": 2614.9e12,
    },
    "fp8": {
        "H100 PCIe": 3026e12,
        "H100 or H200": 3958e12,
        "B200": 9000e12,
        "GB200": 10000e12,
        "L40S": 1466e12,
        "MI300X": 5229.8e12,
    },
    "fp4": {"B200": 18000e12, "GB200": 20000e12},
    "tf32": {"H100 or H200": 989e12, "A100": 312e12, "B200": 2200e12},
}
"""FLOP/s with 2:4 sparsity, as data sheets print them beside (or instead of) the dense figure."""
_SAME = 0.01
_DENSE_RANGE = (0.85, 1.15)
_SPARSE_RANGE = (1.6, 2.4)
_RATIOS = (("fp8", "bf16", (0.9, 2.3)), ("fp4", "fp8", (0.9, 3.3)), ("bf16", "tf32", (0.9, 2.3)))


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that a check found."""

    level: Literal["error", "warning"]
    where: str
    """Path of the figure in the file."""
    message: str
    """What is wrong (value) -- what is allowed -- what to do."""


def check_device(device: Device) -> list[Finding]:
    """Check one device: dense rates, memory sizes and bandwidths, source keys."""
    found = [f for n, m in device.memories.items() for f in _memory(f"memories.{n}", m)]
    for name, processor in device.processors.items():
        where = f"processors.{name}"
        found += _flops(where, processor, accelerator=True)
        found += _reading(where, processor, device.memories[processor.memory])
    return found + [f for name in type(device).model_fields for f in _cited(device, name)]


def check_link(link: Link, where: str = "link") -> list[Finding]:
    """Check one link: one direction only, and lanes times rate."""
    return list(_link(where, link))


def check_cluster(cluster: Cluster) -> list[Finding]:
    """Check a cluster: its device, its links, the memories and processors of its node."""
    found = check_device(cluster.device)
    node = cluster.node
    links = {f"node.links.{n}": link for n, link in node.links.items()}
    if node.interconnect is not None:
        links["node.interconnect"] = node.interconnect
    if cluster.network is not None:
        links["network"] = cluster.network
    found += [f for where, link in links.items() for f in check_link(link, where)]
    for name, memory in node.memories.items():
        found += _memory(f"node.memories.{name}", memory)
        found += _reached(name, memory, node)
    for name, processor in node.processors.items():
        where = f"node.processors.{name}"
        found += _flops(where, processor, accelerator=False)
        found += _reading(where, processor, node.memories[processor.memory])
    return found + [f for name in ("node", "network") for f in _cited(cluster, name)]


def _flops(where: str, processor: Processor, *, accelerator: bool) -> Iterator[Finding]:
    """Compare rates with units x clock, and those of an accelerator with known sparse ones."""
    proved: set[str] = set()
    for dtype, figure in processor.flops.items():
        per_clock = processor.flops_per_clock_per_unit.get(dtype)
        stated = format_quantity(figure.value, "FLOP/s", 4)
        path = f"{where}.flops.{dtype}"
        if per_clock and processor.compute_units and processor.clock:
            physical = processor.compute_units.value * processor.clock.value * per_clock
            ratio = figure.value / physical
            told = format_quantity(physical, "FLOP/s", 4)
            if _DENSE_RANGE[0] <= ratio <= _DENSE_RANGE[1]:
                proved.add(dtype)
            elif accelerator and _SPARSE_RANGE[0] <= ratio <= _SPARSE_RANGE[1]:
                yield _sparse(path, f"{stated} is {ratio:.2f} x what the units do dense ({told})")
                proved.add(dtype)
            else:
                yield Finding(
                    level="error",
                    where=path,
                    message=f"{stated} is {ratio:.2f} x units x clock x FLOP per clock ({told}) "
                    "-- both must agree within 15 % -- correct the one that is wrong",
                )
        if accelerator and dtype not in proved:
            for product, sparse in KNOWN_SPARSE.get(dtype, {}).items():
                if abs(figure.value / sparse - 1) < _SAME:
                    yield _sparse(path, f"{stated} is the sparse {dtype} rate of the {product}")
                    break
    if accelerator:
        yield from _ratios(where, processor, proved)


def _sparse(path: str, what: str) -> Finding:
    return Finding(
        level="error",
        where=path,
        message=f"{what}: looks like the sparse figure -- dense rates only -- halve it, or prove "
        "it dense with compute_units, clock and flops_per_clock_per_unit",
    )


def _ratios(where: str, processor: Processor, proved: set[str]) -> Iterator[Finding]:
    """Neighbouring formats differ by about two, unless one of them is sparse."""
    for fast, slow, (least, most) in _RATIOS:
        figures = [processor.flops.get(name) for name in (fast, slow)]  # type: ignore[call-overload]
        if figures[0] is None or figures[1] is None or {fast, slow} <= proved:
            continue
        ratio = figures[0].value / figures[1].value
        if least <= ratio <= most:
            continue
        suspect = fast if ratio > most else slow
        yield Finding(
            level="error",
            where=f"{where}.flops.{suspect}",
            message=f"{fast} is {ratio:.2f} x {slow} -- between {least} and {most} is expected of "
            f"dense rates -- {suspect} looks like the sparse figure: give the dense one",
        )


def _reading(where: str, processor: Processor, memory: Memory) -> Iterator[Finding]:
    """More than the memory gives to the outside takes a processor inside it, and a source."""
    own = processor.bandwidth
    if own is None or own.value <= memory.bandwidth.value or own.source != "not stated":
        return
    yield Finding(
        level="error",
        where=f"{where}.bandwidth",
        message=f"{format_quantity(own.value, 'B/s', 4)} is above the "
        f"{format_quantity(memory.bandwidth.value, 'B/s', 4)} of memory {processor.memory!r} -- "
        "only a processor inside the memory (PIM) reads faster -- lower it, or cite its source",
    )


def _reached(name: str, memory: Memory, node: Node) -> Iterator[Finding]:
    """Each memory of a node has a link, and a drive is no faster than its lanes."""
    rates = [k.bandwidth.value for k in node.links.values() if name in (k.ends or ())]
    if not rates:
        yield Finding(
            level="warning",
            where=f"node.memories.{name}",
            message="no link reaches it -- nothing can be copied from or to it -- add a link "
            "with it among its ends under node.links",
        )
    elif memory.kind.lower().startswith("nvme") and memory.bandwidth.value > 1.05 * sum(rates):
        yield Finding(
            level="error",
            where=f"node.memories.{name}.bandwidth",
            message=f"{format_quantity(memory.bandwidth.value, 'B/s', 4)} -- its lanes carry "
            f"{format_quantity(sum(rates), 'B/s', 4)} -- give the drive's sequential read, and "
            "the lanes that it has",
        )


def _memory(where: str, memory: Memory) -> Iterator[Finding]:
    size, path = memory.capacity.value, f"{where}.capacity"
    if memory.stacks and memory.stack_capacity:
        nominal = memory.stacks * memory.stack_capacity
        if not 0.9 <= size / nominal <= 1.001:
            yield Finding(
                level="error",
                where=path,
                message=f"{format_quantity(size, 'B', 4)} is {size / nominal:.3f} of the stacks' "
                f"{format_quantity(nominal, 'B', 4)} -- 0.9 to 1 is left to use -- "
                "check GB (10^9) against GiB (2^30)",
            )
    elif size % 1e9 == 0 and size < 1e12:
        yield Finding(
            level="warning",
            where=path,
            message=f"{size / 1e9:.0f} GB is a round decimal figure -- memory parts come in "
            f"binary sizes ({size / 1e9:.0f} GiB is 7.4 % more) -- give what the driver reports",
        )
    if memory.stacks and memory.bus_bits and memory.pin_rate:
        pins = memory.stacks * memory.bus_bits * memory.pin_rate
        stated = memory.bandwidth.value
        if not 0.9 <= stated / pins <= 1.03:
            yield Finding(
                level="error",
                where=f"{where}.bandwidth",
                message=f"{format_quantity(stated, 'B/s', 4)} is {stated / pins:.2f} x stacks x "
                f"bus x pin rate ({format_quantity(pins, 'B/s', 4)}) -- 0.9 to 1.03 is possible "
                "-- correct the one that is wrong",
            )


def _link(where: str, link: Link) -> Iterator[Finding]:
    stated, path = link.bandwidth.value, f"{where}.bandwidth"
    told = format_quantity(stated, "B/s", 4)
    full = ONE_WAY_RATE.get(link.standard)
    if full is not None and link.lanes and link.standard in FULL_LANES:
        full *= link.lanes / FULL_LANES[link.standard]
    if full is not None and abs(stated / (2 * full) - 1) < 0.05:
        yield Finding(
            level="error",
            where=path,
            message=f"{told} is the sum of both directions of {link.standard} -- one direction of "
            f"one rank is expected -- write {format_quantity(stated / 2, 'B/s', 4)}",
        )
    elif full is not None and stated > 1.05 * full:
        yield Finding(
            level="error",
            where=path,
            message=f"{told} -- {link.standard}{_lanes(link)} carries at most "
            f"{format_quantity(full, 'B/s', 4)} one way per rank -- correct the bandwidth, or use "
            "standard: other",
        )
    if link.lanes and link.lane_rate:
        lanes = link.lanes * link.lane_rate
        if not 0.95 <= stated / lanes <= 1.05:
            yield Finding(
                level="error",
                where=path,
                message=f"{told} is {stated / lanes:.2f} x lanes x rate per lane "
                f"({format_quantity(lanes, 'B/s', 4)}) -- both must agree within 5 % -- "
                "count one direction, and bits against bytes",
            )


def _lanes(link: Link) -> str:
    """Say how many lanes where they are not a full port's."""
    full = FULL_LANES.get(link.standard)
    return f" x{link.lanes}" if link.lanes and full and link.lanes != full else ""


def _cited(owner: Device | Cluster, field: str) -> Iterator[Finding]:
    """Warn of source keys that the file's ``sources`` does not explain; a citation has blanks."""
    for where, source in _source_keys(field, getattr(owner, field)):
        if " " not in source and source not in owner.sources:
            known = ", ".join(owner.sources) or "none"
            yield Finding(
                level="warning",
                where=where,
                message=f"source {source!r} is not in sources -- there are: {known} -- add it, "
                "or cite in full",
            )


def _source_keys(where: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _source_keys(f"{where}.{key}", item)
    elif isinstance(value, BaseModel):
        source = getattr(value, "source", None)
        if isinstance(source, str):
            yield where, source
        for name in type(value).model_fields:
            yield from _source_keys(f"{where}.{name}", getattr(value, name))
