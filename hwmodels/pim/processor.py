"""The figures of an ordinary processor that a memory's units amount to.

Bandwidth and FLOP/s are peaks while rows are open; what row turns, refresh, the limit of power and
the registers take of them is in the efficiencies and in the tile, so that the roofline of
`hwmodels.cost_compute` prices a large product as `hwmodels.pim.gemm` does.
"""

from dataclasses import dataclass
from typing import Any

import yaml

from basis import Evidence, format_quantity, weakest
from hwmodels.figures import Figure, KernelCost
from hwmodels.pim.description import Pim
from hwmodels.pim.gemm import column_clocks
from hwmodels.pim.streaming import (
    available,
    command_interval,
    peak_bandwidth,
    peak_flops,
    row_cycle,
    row_energy,
    sustained_bandwidth,
)

KERNELS = ("gemm", "grouped_gemm", "attention_decode")
"""What units in a memory compute."""
LOW, HIGH = 0.9, 1.5
"""Interval of a price, as ratios: AttAcc's simulator is within 4 % of the model where products fill
the time; with few heads, whose moves and softmax show, it takes up to half more."""


@dataclass(frozen=True, kw_only=True)
class PimFigures:
    """What a device or cluster file states of a processor, with energies beside it."""

    bandwidth: Figure[float]
    """Peak bytes per second."""
    flops: Figure[float]
    """Dense peak of 16-bit formats, FLOP per second."""
    compute_units: Figure[int]
    """Units: one per stream."""
    clock: Figure[float]
    """Clock of the units, Hz."""
    flops_per_clock_per_unit: float
    kernel: KernelCost
    """Cost model of every one of `KERNELS`."""
    joules_per_byte: Figure[float]
    """Energy of a weight byte, from opening its row to the unit, J."""
    joules_per_flop: Figure[float]
    """Energy of the arithmetic, J per FLOP."""


def pim_processor(pim: Pim) -> PimFigures:
    """Derive a processor's figures from DRAM organisation, units and placement.

    Parameters
    ----------
    pim : Pim
        Memory, units, stacks.

    Returns
    -------
    PimFigures
        With the weakest evidence of the blocks that each rests on; 16-bit weights.
    """
    units, organisation = pim.units, pim.memory.organisation
    source, evidence = f"hwmodels.pim: {pim.memory.name}, {pim.unit}", pim.evidence
    per_byte = row_energy(pim) / organisation.row_bytes
    energy: Evidence = pim.memory.energies.evidence
    losses = (units.launch, pim.memory.power_limit)
    return PimFigures(
        bandwidth=Figure(value=peak_bandwidth(pim), evidence=evidence, source=source),
        flops=Figure(value=peak_flops(pim), evidence=evidence, source=source),
        compute_units=Figure(value=pim.channels * units.streams, evidence=evidence, source=source),
        clock=Figure(value=units.clock, evidence=evidence, source=source),
        flops_per_clock_per_unit=2 * units.lanes,
        kernel=KernelCost(
            launch=f"{units.launch.value!r} s",
            compute_efficiency=compute_efficiency(pim),
            memory_efficiency=sustained_bandwidth(pim) / peak_bandwidth(pim),
            tile_rows=units.vectors or 1,
            low=LOW,
            high=HIGH,
            evidence=weakest([evidence, *(f.evidence for f in losses if f is not None)]),
            source=source,
        ),
        joules_per_byte=Figure(value=per_byte, evidence=energy, source=source),
        joules_per_flop=Figure(value=pim.memory.energies.mac / 2, evidence=energy, source=source),
    )


def compute_efficiency(pim: Pim, dtype: str = "bf16") -> float:
    """Share of the peak FLOP/s at which units multiply, when they hold all vectors that they can.

    Units with a memory of their own reach the peak. Others multiply in lock step with the rows:
    C columns of their vectors' products in one row cycle, less refresh.
    """
    held = pim.units.vectors
    if held is None:
        return 1.0
    multiply = held * column_clocks(pim, dtype)
    interval = max(float(command_interval(pim)), multiply)
    cycle = row_cycle(pim, interval)
    return pim.memory.organisation.columns * multiply / cycle * available(pim)


def processor_fields(pim: Pim, source: str, digits: int = 17) -> dict[str, Any]:
    """Write the figures as the fields of a processor in a device or cluster file.

    Parameters
    ----------
    pim : Pim
        Memory, units, stacks.
    source : str
        Key of the file's ``sources``, or a citation.
    digits : int
        Significant digits; all of them by default.
    """
    f = pim_processor(pim)

    def figure(found: Figure[float], unit: str) -> dict[str, Any]:
        value = format_quantity(found.value, unit, digits)
        return {"value": value, "evidence": found.evidence, "source": source}

    cost = f.kernel.model_dump(include={"tile_rows", "low", "high", "evidence"})
    shares = {
        name: float(f"{getattr(f.kernel, name):.{digits}g}")
        for name in ("compute_efficiency", "memory_efficiency")
    }
    launch = format_quantity(f.kernel.launch, "s", digits)
    kernel = {"bf16": {"launch": launch, **shares, **cost, "source": source}}
    return {
        "bandwidth": figure(f.bandwidth, "B/s"),
        "compute_units": f.compute_units.model_dump() | {"source": source},
        "clock": figure(f.clock, "Hz"),
        "flops_per_clock_per_unit": {"bf16": f.flops_per_clock_per_unit},
        "flops": {"bf16": figure(f.flops, "FLOP/s")},
        "kernels": dict.fromkeys(KERNELS, kernel),
    }


def processor_yaml(pim: Pim, name: str, memory: str) -> str:
    """Write the entry of ``processors`` in a device or cluster file whose source ``pim`` it cites.

    Parameters
    ----------
    pim : Pim
        Memory, units, stacks.
    name : str
        Name of the processor in that file.
    memory : str
        Name of its memory there.
    """
    entry = {name: {"memory": memory, **processor_fields(pim, "pim", 5)}}
    text: str = yaml.safe_dump(entry, sort_keys=False, default_flow_style=None, width=200)
    return text
