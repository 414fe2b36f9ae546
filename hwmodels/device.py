"""One accelerator: its memories, its processors, and the cost models of their kernels.

Capacities in bytes, bandwidths in bytes per second, rates in FLOP per second, always *dense*.
A processor names the memory that it works on, so that several processors may share one memory
(a GPU and the PIM in its stacks) and one device may hold several; a CPU beside the devices is
a processor of the node.
"""

from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from basis import (
    DTYPES,
    Bytes,
    BytesPerSecond,
    DollarsPerHour,
    Evidence,
    FlopPerSecond,
    Hertz,
    Strict,
    Watts,
)
from basis.evidence import weakest
from hwmodels.figures import CostModel, Figure, KernelCost
from hwmodels.kernels.base import Limits
from hwmodels.kernels.models import KernelModel
from hwmodels.pim.catalog import load_pim
from hwmodels.pim.description import Pim
from hwmodels.pim.processor import processor_fields

Kernel = Literal[
    "gemm",
    "grouped_gemm",
    "attention_decode",
    "attention_prefill",
    "mla_decode",
    "mla_prefill",
    "route",
    "permute",
    "unpermute",
    "stream",
    "norm",
    "rope",
    "activation",
    "embedding",
]
"""``permute`` gathers and scatters rows; ``stream`` is elementwise work, in order. Optional are the
``mla`` kernels (else ``attention`` ones), ``unpermute`` (else ``permute``) and the kinds of
elementwise work from ``norm`` on (else ``stream``)."""
FlopFormat = Literal["fp32", "tf32", "bf16", "fp8", "fp4", "int8"]

_ASSUMED = KernelCost(
    launch="5 us",
    compute_efficiency=0.6,
    memory_efficiency=0.7,
    source="round figures for hardware that nobody has fitted",
)
_ROUND: tuple[tuple[Kernel, float, int], ...] = (
    ("gemm", 5e-6, 64),
    ("grouped_gemm", 20e-6, 64),
    ("attention_decode", 8e-6, 1),
    ("attention_prefill", 10e-6, 1),
    ("route", 8e-6, 1),
    ("permute", 3e-6, 1),
    ("stream", 3e-6, 1),
)
DEFAULT_KERNELS: dict[Kernel, dict[str, KernelModel]] = {
    name: {"bf16": _ASSUMED.model_copy(update={"launch": launch, "tile_rows": tile})}
    for name, launch, tile in _ROUND
}
"""Cost models of a device whose file gives none: evidence assumed, a factor of two either way."""


class Memory(Strict):
    """One memory: HBM of a GPU, DRAM of a host."""

    kind: str
    """Technology, for people: HBM3, GDDR6X, DDR5."""
    capacity: Figure[Bytes]
    """Bytes that can be allocated on the whole memory, before anything runs."""
    bandwidth: Figure[BytesPerSecond]
    """Peak bandwidth, reads plus writes, bytes per second."""
    stacks: int | None = Field(default=None, gt=0)
    """Stacks, chips or channels, each with a bus of its own (for the cross-checks)."""
    stack_capacity: Bytes | None = None
    """Nominal bytes of one stack; memory parts come in binary sizes (16 GiB)."""
    bus_bits: int | None = Field(default=None, gt=0)
    """Width of the bus of one stack, bits."""
    pin_rate: BytesPerSecond | None = None
    """Rate of one pin, bytes per second (written in Gbit/s)."""
    numa: int | None = Field(default=None, gt=0)
    """NUMA domains that share the channels evenly; what a processor of one domain reads from its
    own is the bandwidth over this many (sockets are devices of their own, joined by a link)."""

    def scaled(self, rates: float) -> Self:
        """Return a copy with the bandwidth times ``rates``."""
        return self.model_copy(update={"bandwidth": self.bandwidth.times(rates)})


class PimPart(Strict):
    """Units of a memory that computes, from which a processor's figures follow."""

    memory: str
    """Name in catalog/pim, or the path of a description."""
    units: str
    """Name of its units."""
    stacks: int = Field(default=1, gt=0)
    """Stacks (or chips) that work on the same matrix."""


class Processor(Strict):
    """A processor that works on one memory.

    Two processors on one memory are priced one at a time, each as if alone; who uses which part
    when is the schedule's.
    """

    memory: str
    """Name of the memory in the ``memories`` of the same device or node."""
    bandwidth: Figure[BytesPerSecond] | None = None
    """What this processor reads from its memory: above the memory's own bandwidth for one inside
    the stacks (PIM), below it for cores that cannot draw it all; none: the memory's."""
    flops: dict[FlopFormat, Figure[FlopPerSecond]]
    """Dense peak by format, FLOP per second. ``bf16`` must be there."""
    compute_units: Figure[int] | None = None
    """Streaming multiprocessors, compute units or cores."""
    cache: Figure[Bytes] | None = None
    """Last-level cache between the units and the memory (L2 of an NVIDIA GPU, Infinity Cache,
    L3 of a CPU), bytes over all units."""
    cache_bandwidth: Figure[BytesPerSecond] | None = None
    """What the units read from this cache, bytes per second; none: as from the memory."""
    near_fixed: Figure[float] | None = None
    """Share of the fixed times that is left in steps whose layers move less than the cache holds:
    code and tables of a kernel are then still there at its next call; none: all of them."""
    clock: Figure[Hertz] | None = None
    """Clock at which the peak is stated (boost), Hz."""
    flops_per_clock_per_unit: dict[FlopFormat, float] = Field(default_factory=dict)
    """Dense FLOP per clock and unit by format: with units and clock, the physical peak."""
    kernels: dict[Kernel, dict[str, KernelModel]] = DEFAULT_KERNELS
    """Cost models by kernel and weight format (KV format for attention); ``bf16`` is required."""
    pim: PimPart | None = None
    """Units in its memory: what the file does not state of the processor is derived from them."""

    @model_validator(mode="before")
    @classmethod
    def _derived(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("pim"), dict):
            return data
        try:
            part = PimPart.model_validate(data["pim"])
        except ValidationError:  # the field's own validation says what is wrong, and where
            return data
        pim = Pim(load_pim(part.memory), part.units, part.stacks)
        return processor_fields(pim, f"derived from catalog/pim/{part.memory}") | data

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if "bf16" not in self.flops:
            raise ValueError("flops: bf16 is missing -- give the dense bf16 (or fp16) rate")
        for name, by_dtype in self.kernels.items():
            if "bf16" not in by_dtype:
                raise ValueError(f"kernels.{name}: bf16 is missing -- every kernel needs it")
            if unknown := sorted(set(by_dtype) - set(DTYPES)):
                raise ValueError(
                    f"kernels.{name}: unknown dtype {unknown[0]!r} -- known are {', '.join(DTYPES)}"
                )
        missing = {k: v for k, v in DEFAULT_KERNELS.items() if k not in self.kernels}
        object.__setattr__(self, "kernels", self.kernels | missing)
        return self

    def flops_for(self, dtype: str) -> Figure[float]:
        """Dense peak for weights stored as ``dtype``, FLOP/s.

        A processor without that format multiplies in bf16 after conversion; fp32 without tensor
        cores for it (tf32) multiplies in fp32.
        """
        table: dict[Any, Figure[float]] = dict(self.flops)
        return table.get(DTYPES[dtype].compute, table.get(dtype, table["bf16"]))

    def limits(self, dtype: str, bandwidth: float) -> Limits:
        """Peaks that a kernel's shares refer to, multiplying as for weights stored as ``dtype``.

        Parameters
        ----------
        dtype : str
            Format of the weights; attention: of the activations.
        bandwidth : float
            Of this processor's memory, bytes/s.
        """
        return Limits(
            flops=self.flops_for(dtype).value,
            bandwidth=bandwidth,
            units=1.0 if self.compute_units is None else float(self.compute_units.value),
            cache=0.0 if self.cache is None else self.cache.value,
        )

    def kernel(self, name: Kernel, dtype: str) -> tuple[CostModel, Evidence]:
        """Parameters of a kernel for a weight format, and what they rest on.

        A format without parameters of its own takes those of bf16, as a transfer.
        """
        by_dtype = self.kernels[name]
        if dtype in by_dtype:
            return by_dtype[dtype], by_dtype[dtype].evidence
        return by_dtype["bf16"], weakest([by_dtype["bf16"].evidence, "transfer"])

    def near(self) -> Self:
        """Return the processor in steps whose layers move less than its cache holds."""
        return self if self.near_fixed is None else self.scaled(fixed=self.near_fixed.value)

    def scaled(self, *, rates: float = 1.0, fixed: float = 1.0) -> Self:
        """Return a copy with bandwidth and FLOP/s times ``rates``, launches times ``fixed``."""
        kernels = {
            name: {dtype: cost.with_fixed(fixed) for dtype, cost in by_dtype.items()}
            for name, by_dtype in self.kernels.items()
        }
        flops = {dtype: figure.times(rates) for dtype, figure in self.flops.items()}
        reads = {
            name: None if figure is None else figure.times(rates)
            for name, figure in (
                ("bandwidth", self.bandwidth),
                ("cache_bandwidth", self.cache_bandwidth),
            )
        }
        return self.model_copy(update={"flops": flops, "kernels": kernels, **reads})


class Device(Strict):
    """One accelerator as one rank sees it."""

    name: str
    """Short name, as in the catalog."""
    title: str = ""
    """Full product name."""
    sources: dict[str, str] = Field(default_factory=dict)
    """Citations by the short key that the figures use."""
    memories: dict[str, Memory]
    """Memories by name; ``hbm`` by custom for a GPU's own."""
    processors: dict[str, Processor]
    """Processors by name; the first is the one that runs the model."""
    power: Figure[Watts] | None = None
    """Power limit of the whole device, W."""
    price: Figure[DollarsPerHour] | None = None
    """Rent of one device with its share of the host, US dollars per hour; the source names the
    provider and the date, for such prices move by half within a year."""

    @model_validator(mode="after")
    def _attached(self) -> Self:
        if not self.processors or not self.memories:
            raise ValueError("a device has at least one processor and one memory")
        for name, processor in self.processors.items():
            if processor.memory not in self.memories:
                raise ValueError(
                    f"processors.{name}.memory: {processor.memory!r} is not a memory of this "
                    f"device -- memories are {', '.join(self.memories)}"
                )
        return self

    @property
    def processor(self) -> Processor:
        """The processor that runs the model: the first."""
        return next(iter(self.processors.values()))

    @property
    def memory(self) -> Memory:
        """The memory that this processor works on."""
        return self.memories[self.processor.memory]

    def limits(self, dtype: str) -> Limits:
        """Peaks of the first processor on its memory; see `Processor.limits`."""
        return self.processor.limits(
            dtype, (self.processor.bandwidth or self.memory.bandwidth).value
        )

    def flops(self, dtype: str) -> Figure[float]:
        """Dense peak of the first processor for weights stored as ``dtype``, FLOP/s."""
        return self.processor.flops_for(dtype)

    def kernel(self, name: Kernel, dtype: str) -> tuple[CostModel, Evidence]:
        """Parameters of a kernel of the first processor, and what they rest on."""
        return self.processor.kernel(name, dtype)

    def scaled(self, *, rates: float = 1.0, fixed: float = 1.0) -> Self:
        """Return a copy with bandwidths and FLOP/s times ``rates``, launches times ``fixed``."""
        memories = {n: m.scaled(rates) for n, m in self.memories.items()}
        processors = {n: p.scaled(rates=rates, fixed=fixed) for n, p in self.processors.items()}
        return self.model_copy(update={"memories": memories, "processors": processors})
