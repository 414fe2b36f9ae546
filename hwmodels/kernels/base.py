"""What all physical cost models of kernels share: the limits of a processor, and one way to price.

A model has two steps, so that fitting and pricing run the same code: ``features`` turns a column
of operations into arrays once (tiles, active experts, bytes), ``time`` turns these and the
parameters into seconds. Parameters are few, named and physical; each has bounds and a start.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from hwmodels.figures import CostModel
from hwmodels.ops import Floats
from hwmodels.prices import Price

Features = dict[str, Floats]
"""Arrays [n] (or [m, n]) by name; ``work`` [n] is zero where nothing runs."""
Numbers = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the processor allows: the peaks that a kernel's shares refer to."""

    flops: float
    """Dense peak of the format that is multiplied, FLOP/s."""
    bandwidth: float
    """Peak of the processor's memory, bytes/s."""
    units: float
    """Streaming multiprocessors (compute units, cores)."""
    cache: float = 0.0
    """Bytes of the last-level cache; 0 where the device states none."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of a cost model, as the fit sees it."""

    name: str
    low: float
    """Smallest value that is physical."""
    high: float
    """Largest value that is physical."""
    start: float
    scale: Literal["log", "linear"] = "log"
    """In which coordinate the fit moves it."""


class PhysicalCost(CostModel):
    """A cost model with physical parameters (a base class; see the kernels' own)."""

    PARAMETERS: ClassVar[tuple[Parameter, ...]]
    """The fitted fields; further fields are choices (a tile, a kernel's structure)."""

    kernel: str = ""
    """The engine's own name of the kernel that was fitted."""

    @abstractmethod
    def features(self, op: Any, limits: Limits) -> Features:
        """Return what the time depends on: arrays [n]; uses choices, never fitted fields."""

    @staticmethod
    @abstractmethod
    def time(numbers: Numbers, features: Features) -> Floats:
        """Return seconds [n] for fitted fields by name."""

    def numbers(self) -> dict[str, float]:
        """Return the fitted fields by name."""
        return {p.name: float(getattr(self, p.name)) for p in self.PARAMETERS}

    def seconds(self, op: Any, limits: Limits) -> Floats:
        """Price each row of a column; rows without work cost nothing, seconds [n]."""
        features = self.features(op, limits)
        return np.where(features["work"] > 0, self.time(self.numbers(), features), 0.0)


class OwnPrice(CostModel):
    """A cost model whose interval and evidence differ from row to row."""

    FIXED: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def price(self, op: Any, limits: Limits) -> Price:
        """Price each row of a column."""
