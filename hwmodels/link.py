"""A link: what one rank (or one memory) can send over it, in one direction, and at what cost.

Bandwidth in bytes per second *one way per rank*, as NVLink's 450 GB/s of an H100 (the data
sheet's 900 GB/s is the sum of both ways); fixed times in seconds.
"""

from typing import Literal, Self, get_args

from pydantic import Field, model_validator

from basis import BytesPerSecond, Strict
from basis.evidence import weakest
from hwmodels.figures import Figure, TransferCost

Transfer = Literal["all_to_all", "all_reduce", "all_gather", "reduce_scatter", "copy"]
_ASSUMED = TransferCost(
    startup="15 us",
    efficiency=0.6,
    source="round figures for a link that nobody has fitted",
)

ONE_WAY_RATE: dict[str, float] = {
    "nvlink3": 300e9,
    "nvlink4": 450e9,
    "nvlink5": 900e9,
    "pcie3": 15.75e9,
    "pcie4": 31.5e9,
    "pcie5": 63.0e9,
    "pcie6": 126e9,
    "xgmi3": 448e9,
    "infiniband-hdr": 25e9,
    "infiniband-ndr": 50e9,
    "infiniband-xdr": 100e9,
    "ethernet-100g": 12.5e9,
    "ethernet-400g": 50e9,
    "nvlink-c2c": 450e9,
}
"""One-way bytes per second of a device's full port: 12 NVLink 3, 18 NVLink 4 or 5 links; 16 PCIe
lanes after 128b/130b encoding; 7 xGMI links of an MI300X; one network port."""
FULL_LANES: dict[str, int] = {
    "nvlink3": 12,
    "nvlink4": 18,
    "nvlink5": 18,
    "pcie3": 16,
    "pcie4": 16,
    "pcie5": 16,
    "pcie6": 16,
    "xgmi3": 7,
}
"""Lanes or links of these ports; fewer lanes carry proportionally less."""
Standard = Literal[
    "nvlink3",
    "nvlink4",
    "nvlink5",
    "pcie3",
    "pcie4",
    "pcie5",
    "pcie6",
    "xgmi3",
    "infiniband-hdr",
    "infiniband-ndr",
    "infiniband-xdr",
    "ethernet-100g",
    "ethernet-400g",
    "nvlink-c2c",
    "other",
]


class Link(Strict):
    """One rank's port into a network, or the edge between two memories."""

    standard: Standard
    """Technology and generation; ``other`` for one that this list lacks."""
    direction: Literal["one-way"]
    """States that ``bandwidth`` counts one direction."""
    bandwidth: Figure[BytesPerSecond]
    """One rank's peak bandwidth in one direction, all its lanes together, bytes per second."""
    lanes: int | None = Field(default=None, gt=0)
    """Lanes or links of one rank (for the cross-check)."""
    lane_rate: BytesPerSecond | None = None
    """One-way rate of one lane, bytes per second (for the cross-check)."""
    ends: tuple[str, str] | None = None
    """The two memories that an edge of the memory graph joins; none for a port between ranks."""
    costs: dict[Transfer, TransferCost] = Field(default_factory=dict)
    """How collectives and copies use the link; without it, assumed round figures."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if self.ends is not None and self.ends[0] == self.ends[1]:
            raise ValueError(f"ends: {self.ends} -- an edge joins two different memories")
        return self

    def cost(self, name: Transfer) -> TransferCost:
        """Parameters of one way of using the link.

        Without their own, all-gather and reduce-scatter take those of all-reduce, which is the one
        after the other, as a transfer.
        """
        if name in self.costs or name not in ("all_gather", "reduce_scatter"):
            return self.costs.get(name, _ASSUMED)
        cost = self.cost("all_reduce")
        return cost.model_copy(update={"evidence": weakest([cost.evidence, "transfer"])})

    def scaled(self, *, rates: float = 1.0, fixed: float = 1.0) -> Self:
        """Return a copy with the bandwidth times ``rates``, startup times times ``fixed``."""
        costs = {
            n: self.cost(n).model_copy(update={"startup": self.cost(n).startup * fixed})
            for n in get_args(Transfer)
        }
        return self.model_copy(update={"bandwidth": self.bandwidth.times(rates), "costs": costs})
