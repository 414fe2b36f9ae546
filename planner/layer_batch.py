"""The layers being planned, with the best placement and the best bound known so far.

Loads are token counts of any scale; B layers, E experts, P slots.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_ROUNDING = 1e-7  # relative


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerBatch:
    """A batch of layers; every change makes a new value."""

    loads: Floats
    """Load of each expert, [B, E]."""
    slots: Ints
    """Logical expert of each slot, [B, P]."""
    busiest: Floats
    """Busiest rank's load under `slots` and the dispatch planned for, [B]."""
    bound: Floats
    """Proved lower bound, [B]."""
    rival: Floats
    """Busiest rank's load of the baseline that must not be lost to, [B]."""
    num_ranks: int
    """Ranks."""
    cut: bool = False
    """Whether the clock, not the search itself, ended the last work on some layer."""

    def goal(self, gap: float) -> Floats:
        """Busiest load that is good enough, [B]: within the gap, and the baseline's at most."""
        return np.asarray(np.minimum(self.bound / (1 - gap), self.rival))

    def open(self, gap: float) -> NDArray[np.int64]:
        """Find the layers that miss their goal, none if their sum is within the gap.

        A layer that loses to the baseline is always open, unless the bound proves that it must
        (the baseline may host an expert twice on a rank, and then solves another problem).
        """
        lost = (self.busiest > self.rival * (1 + _ROUNDING)) & (self.bound <= self.rival)
        if self.busiest.sum() * (1 - gap) <= self.bound.sum() * (1 + _ROUNDING):
            return np.flatnonzero(lost)
        return np.flatnonzero(lost | (self.busiest * (1 - gap) > self.bound * (1 + _ROUNDING)))

    def pick(self, index: NDArray[np.int64]) -> "LayerBatch":
        """Take some of the layers."""
        return replace(
            self,
            loads=self.loads[index],
            slots=self.slots[index],
            busiest=self.busiest[index],
            bound=self.bound[index],
            rival=self.rival[index],
        )

    def better(self, other: "LayerBatch") -> "LayerBatch":
        """Take the placements of `other`, of the same layers, where its busiest load is lower."""
        take = other.busiest < self.busiest
        return replace(
            self,
            slots=np.where(take[:, None], other.slots, self.slots),
            busiest=np.where(take, other.busiest, self.busiest),
        )

    def update(self, index: NDArray[np.int64], other: "LayerBatch") -> "LayerBatch":
        """Put back layers that were picked, with what was found for them."""
        fields: dict[str, Any] = {"cut": self.cut or other.cut}
        for name in ("slots", "busiest", "bound"):
            values = getattr(self, name).copy()
            values[index] = getattr(other, name)
            fields[name] = values
        return replace(self, **fields)
