"""What moving bytes through a kernel takes, where nothing is multiplied: norms, casts, gathers.

What the kernel before has just written is still in the last-level cache, up to about its size;
beyond it every byte comes from memory.
"""

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from basis import Seconds
from hwmodels.kernels.base import Features, Limits, Numbers, Parameter, PhysicalCost
from hwmodels.ops import Elementwise, Floats, Permute

CLIFF = 8
"""Exponent of how fast the cache loses a buffer larger than itself: passing through it again and
again in order evicts each line before its next use."""


class StreamCost(PhysicalCost):
    """Launch, then bytes at the rate of the cache or of memory."""

    model: Literal["stream"] = "stream"
    launch: Seconds
    """Fixed time of one call, s."""
    memory_efficiency: float = Field(gt=0, le=1)
    """Share of the peak memory bandwidth."""
    cache_speed: float = Field(gt=0)
    """Rate of bytes that are in the cache, over the peak memory bandwidth."""
    kept: float = Field(gt=0)
    """Largest buffer that stays in the cache, over the cache's size."""

    FIXED: ClassVar[tuple[str, ...]] = ("launch",)
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        Parameter(name="launch", low=2e-7, high=4e-5, start=2e-6),
        Parameter(name="memory_efficiency", low=0.1, high=1.0, start=0.85),
        Parameter(name="cache_speed", low=0.2, high=20.0, start=1.5),
        Parameter(name="kept", low=0.1, high=3.0, start=0.8),
    )

    def features(self, op: Elementwise | Permute, limits: Limits) -> Features:
        """Return ``memory``, the time of the bytes at the peak, and how often they fit, [n]."""
        moved = op.bytes_moved()
        return {
            "work": moved,
            "memory": moved / limits.bandwidth,
            "fits": limits.cache / np.maximum(moved, 1.0),
        }

    @staticmethod
    def time(numbers: Numbers, features: Features) -> Floats:
        """Return seconds [n]."""
        cached = np.minimum(numbers["kept"] * features["fits"], 1.0) ** CLIFF
        pace = (1 - cached) / numbers["memory_efficiency"] + cached / numbers["cache_speed"]
        return np.asarray(numbers["launch"] + features["memory"] * pace)
