"""A memory with processors of its own, as DRAM organisation and units: the declarative part.

A stack (or chip) has independent channels of banks; units read the open rows of some banks at the
same time, from a place between the cells and the host's controller. Sizes in bytes, timings in
whole clocks of the memory, energies in joules; every block states what it rests on.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self, get_args

from pydantic import Field, model_validator

from basis import (
    Bytes,
    Evidence,
    Hertz,
    InputError,
    Joules,
    Seconds,
    Strict,
    Watts,
    weakest,
)
from hwmodels.figures import Figure

Placement = Literal["bank", "bank_group", "buffer", "controller"]
"""Where units stand, from the cells outwards: at the banks, at the multiplexer of a bank group, on
the logic die under a stack, or behind the interface of ordinary memory chips."""
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)


class Sourced(Strict):
    """A block of figures that rest on the same ground."""

    evidence: Evidence = "assumed"
    """What all figures of the block rest on."""
    source: str = "not stated"
    """Key of the file's ``sources``, or a citation."""


class Organisation(Sourced):
    """What one stack (or chip) consists of."""

    channels: int = Field(gt=0)
    """Independent channels; of HBM the pseudo-channels."""
    ranks: int = Field(default=1, gt=0)
    """Ranks (stack identifiers) that share a channel."""
    bank_groups: int = Field(gt=0)
    """Bank groups of one rank of a channel."""
    banks_per_group: int = Field(gt=0)
    """Banks of one bank group."""
    row_bytes: Bytes
    """Bytes of one bank's open row."""
    column_bytes: Bytes
    """Bytes that one column command reads from one bank."""
    clock: Hertz
    """Clock in which the timings are counted, Hz."""

    @model_validator(mode="after")
    def _whole_columns(self) -> Self:
        if self.row_bytes % self.column_bytes:
            raise ValueError(
                f"row_bytes: {self.row_bytes:g} -- a multiple of column_bytes "
                f"({self.column_bytes:g}) is expected"
            )
        return self

    @property
    def banks(self) -> int:
        """Banks of one channel."""
        return self.ranks * self.bank_groups * self.banks_per_group

    @property
    def columns(self) -> int:
        """Column commands that read one row."""
        return int(self.row_bytes // self.column_bytes)


class Timings(Sourced):
    """Least distances between commands, in clocks (JEDEC's names in brackets)."""

    ccd_short: int = Field(gt=0)
    """Column to column, another bank group (tCCD_S)."""
    ccd_long: int = Field(gt=0)
    """Column to column, the same bank group (tCCD_L): how often one bank gives a column."""
    rcd: int = Field(gt=0)
    """Activation to column command (tRCD)."""
    rp: int = Field(gt=0)
    """Precharge to activation (tRP)."""
    ras: int = Field(gt=0)
    """Activation to precharge (tRAS)."""
    rtp: int = Field(gt=0)
    """Read to precharge (tRTP)."""
    faw: int = Field(gt=0)
    """Window in which one rank may activate a limited number of rows (tFAW; four in JEDEC's)."""
    rfc: int = Field(ge=0)
    """Time of one refresh of all banks (tRFC)."""
    refi: int = Field(gt=0)
    """Time between refreshes (tREFI)."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for low, high in (("ccd_short", "ccd_long"), ("rfc", "refi")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(
                    f"{low}: {getattr(self, low)} -- at most {high} ({getattr(self, high)})"
                )
        return self


class Energies(Sourced):
    """Dynamic energy, from the cell outwards; each step is paid in addition to those before it."""

    activate: Joules
    """One row of one bank, activated and precharged, J."""
    cell: Joules
    """Reading one bit out of the open row to the bank's edge, J per bit."""
    bank_group: Joules
    """On to the multiplexer of the bank group, J per bit."""
    die: Joules
    """On to the input and output circuits of the die, J per bit."""
    stack: Joules
    """Through the stack to the logic die, J per bit; 0 without a stack."""
    interface: Joules
    """Over the interface to the host's controller, J per bit."""
    mac: Joules
    """One multiply-accumulate of a unit, J."""


class Units(Sourced):
    """The processors of one channel, and how they take the banks' data."""

    title: str = ""
    """For people."""
    placement: Placement
    """Where they stand."""
    streams: int = Field(gt=0)
    """Banks of one channel that are read at the same time."""
    lanes: int = Field(gt=0)
    """Multiply-accumulates per clock behind one stream."""
    clock: Hertz
    """Clock of the units, Hz."""
    vectors: int | None = Field(gt=0)
    """Input vectors that registers hold while weights stream past, each column used for all of
    them in lock step; none: a memory of the unit's own holds as many as are wanted, and feeds it
    while the rows turn."""
    overlapped: bool
    """Rows of the next banks are opened while these are read (needs more banks than streams)."""
    activations_per_window: int | None = Field(default=4, gt=0)
    """Rows that a rank may open in tFAW; none: one command opens a row in all banks read, and the
    supply is made for it."""
    operand_bytes: Bytes | None = None
    """Input of one channel that is held at a time: longer inputs leave partial sums, which are
    read out piece by piece; none: no limit."""
    operands: Literal["concurrent", "serial"]
    """Inputs and results move beside the weights' stream, or stop it."""
    launch: Figure[Seconds]
    """Fixed time of one call: commands, programs, the change of mode and back, s."""


class PimMemory(Strict):
    """One stack (or chip) with the units that may stand in it (one of them at a time)."""

    name: str
    """Short name, as in the catalog."""
    title: str = ""
    """For people."""
    sources: dict[str, str] = Field(default_factory=dict)
    """Citations by the short key that the blocks use."""
    organisation: Organisation
    timings: Timings
    energies: Energies
    power_limit: Figure[Watts] | None = None
    """Dynamic power of cells and data paths that one stack may draw while units stream, W; none:
    no limit is stated."""
    units: dict[str, Units]
    """Alternatives by name."""

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        for name, units in self.units.items():
            if units.streams > self.organisation.banks:
                raise ValueError(
                    f"units.{name}.streams: {units.streams} -- a channel has "
                    f"{self.organisation.banks} banks -- read at most so many at a time"
                )
            if units.placement == "controller" and units.streams > 1:
                raise ValueError(
                    f"units.{name}.streams: {units.streams} -- a controller reads one bank of a "
                    "channel at a time -- write 1, or place the units inside the memory"
                )
        return self


@dataclass(frozen=True)
class Pim:
    """So many stacks of a memory with one kind of units: what the functions of this package take.

    Raises
    ------
    InputError
        Units that the memory does not have, or no stack.
    """

    memory: PimMemory
    unit: str
    """Name of the units in the memory's ``units``."""
    stacks: int = 1
    """Stacks (or chips) that work on the same matrix."""

    def __post_init__(self) -> None:
        if self.unit not in self.memory.units:
            known = ", ".join(self.memory.units)
            raise InputError(f"{self.memory.name}: no units {self.unit!r} -- known are {known}")
        if self.stacks < 1:
            raise InputError(f"{self.memory.name}: {self.stacks} stacks -- at least 1 is needed")

    @cached_property
    def units(self) -> Units:
        """The units that work."""
        return self.memory.units[self.unit]

    @property
    def channels(self) -> int:
        """Channels of all stacks."""
        return self.stacks * self.memory.organisation.channels

    @property
    def evidence(self) -> Evidence:
        """The weakest of what its peaks rest on."""
        memory = self.memory
        return weakest(b.evidence for b in (memory.organisation, memory.timings, self.units))
