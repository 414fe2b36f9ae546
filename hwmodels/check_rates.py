"""Guards on what a processor computes: sparse for dense, clocks, caches, FLOP/s per watt.

A dense peak is units x clock x FLOP per clock; data sheets print twice that, the rate with 2:4
sparsity, first. Where a file gives no units and clock, a rate is compared with known sparse ones
and with its neighbouring formats.
"""

from collections.abc import Iterator

from basis import format_quantity
from hwmodels.check_parts import check_fixed
from hwmodels.device import Device, Memory, Processor
from hwmodels.figures import Figure
from hwmodels.finding import Finding, error

KNOWN_SPARSE: dict[str, dict[str, float]] = {
    "bf16": {
        "A30": 330e12,
        "A100": 624e12,
        "H100 PCIe": 1513e12,
        "H100 or H200": 1979e12,
        "B200 or B300": 4500e12,
        "GB200 or GB300": 5000e12,
        "L4": 242e12,
        "L40S": 733e12,
        "RTX 4090": 330.4e12,
        "RTX 5090": 419e12,
        "MI300X or MI325X": 2614.9e12,
        "MI355X": 5033.2e12,
    },
    "fp8": {
        "H100 PCIe": 3026e12,
        "H100 or H200": 3958e12,
        "B200 or B300": 9000e12,
        "GB200 or GB300": 10000e12,
        "L4": 485e12,
        "L40S": 1466e12,
        "RTX 5090": 838e12,
        "MI300X or MI325X": 5229.8e12,
        "MI355X": 10066e12,
    },
    "fp4": {"B200 or B300": 18000e12, "GB200 or GB300": 20000e12, "RTX 5090": 3352e12},
    "tf32": {"H100 or H200": 989e12, "A100": 312e12, "B200": 2200e12},
}
"""FLOP/s with 2:4 sparsity, as data sheets print them beside (or instead of) the dense figure."""
_SAME = 0.01
_DENSE_RANGE = (0.85, 1.15)
_SPARSE_RANGE = (1.6, 2.4)
_RATIOS = (("fp8", "bf16", (0.9, 2.3)), ("fp4", "fp8", (0.9, 3.3)), ("bf16", "tf32", (0.9, 2.3)))
_CLOCK = (0.1e9, 6.5e9)
_CACHE = (0.5 * 2**20, 4 * 2**30)
_PER_WATT = (5e9, 4e12)
"""Dense bf16 FLOP/s per W: a CPU without matrix units makes 1e10, an L4 or a B200 about 2e12."""


def check_processor(where: str, processor: Processor, *, accelerator: bool) -> Iterator[Finding]:
    """Compare rates with units x clock, and those of an accelerator with known sparse ones."""
    yield from _scale(where, processor)
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
                yield error(
                    path,
                    f"{stated} is {ratio:.2f} x units x clock x FLOP per clock ({told}) "
                    "-- both must agree within 15 % -- correct the one that is wrong",
                )
        if accelerator and dtype not in proved:
            for product, sparse in KNOWN_SPARSE.get(dtype, {}).items():
                if abs(figure.value / sparse - 1) < _SAME:
                    yield _sparse(path, f"{stated} is the sparse {dtype} rate of the {product}")
                    break
    if accelerator:
        yield from _ratios(where, processor, proved)


def check_reading(where: str, processor: Processor, memory: Memory) -> Iterator[Finding]:
    """More than the memory gives to the outside takes a processor inside it, and a source."""
    own = processor.bandwidth
    if own is None or own.value <= memory.bandwidth.value or own.source != "not stated":
        return
    yield error(
        f"{where}.bandwidth",
        f"{format_quantity(own.value, 'B/s', 4)} is above the "
        f"{format_quantity(memory.bandwidth.value, 'B/s', 4)} of memory {processor.memory!r} -- "
        "only a processor inside the memory (PIM) reads faster -- lower it, or cite its source",
    )


def check_power(device: Device) -> Iterator[Finding]:
    """Silicon of this decade lies within a factor of 30 either way in FLOP/s per watt."""
    if device.power is None:
        return
    per_watt = device.flops("bf16").value / device.power.value
    if not _PER_WATT[0] <= per_watt <= _PER_WATT[1]:
        yield error(
            "power",
            f"{device.power.value:g} W is {format_quantity(per_watt, 'FLOP/s', 3)} of dense bf16 "
            f"per W -- {format_quantity(_PER_WATT[0], 'FLOP/s')} to "
            f"{format_quantity(_PER_WATT[1], 'FLOP/s')} is known of any chip -- check W against "
            "kW, and whose power it is",
        )


def _scale(where: str, processor: Processor) -> Iterator[Finding]:
    """Clocks and caches of the right order."""
    bounds = (("clock", processor.clock, "Hz", _CLOCK), ("cache", processor.cache, "B", _CACHE))
    for name, figure, unit, (least, most) in bounds:
        if isinstance(figure, Figure) and not least <= figure.value <= most:
            yield error(
                f"{where}.{name}",
                f"{format_quantity(figure.value, unit, 4)} -- {format_quantity(least, unit, 2)} to "
                f"{format_quantity(most, unit, 2)} is possible -- check the unit's prefix",
            )
    for kernel, by_dtype in processor.kernels.items():
        for dtype, cost in by_dtype.items():
            yield from check_fixed(f"{where}.kernels.{kernel}.{dtype}", cost)


def _sparse(path: str, what: str) -> Finding:
    return error(
        path,
        f"{what}: looks like the sparse figure -- dense rates only -- halve it, or prove "
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
        yield error(
            f"{where}.flops.{suspect}",
            f"{fast} is {ratio:.2f} x {slow} -- between {least} and {most} is expected of "
            f"dense rates -- {suspect} looks like the sparse figure: give the dense one",
        )
