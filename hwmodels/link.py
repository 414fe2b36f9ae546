"""A link: what one rank (or one memory) can send over it, in one direction, and at what cost.

Bandwidth in bytes per second *one way per rank*, as NVLink's 450 GB/s of an H100 (the data
sheet's 900 GB/s is the sum of both ways); fixed times in seconds.
"""

from typing import Literal, Self, get_args

from pydantic import Field, model_validator

from basis import BytesPerSecond, Strict
from basis.evidence import weakest
from hwmodels.figures import Figure, TransferCost
from hwmodels.kernels.collective import CollectiveCost
from hwmodels.kernels.copies import CopyCost
from hwmodels.kernels.rings import DirectCost
from hwmodels.kernels.transfers import TransferModel, model_name

Transfer = Literal[
    "all_to_all", "dispatch", "combine", "all_reduce", "all_gather", "reduce_scatter", "copy"
]
"""Ways of using a link; ``dispatch`` and ``combine`` are the halves of an expert layer's
all-to-all."""
_ASSUMED = TransferCost(
    startup="15 us",
    efficiency=0.6,
    source="round figures for a link that nobody has fitted",
)
_EXCHANGES = ("transfer", "peers", "tokens", "channels", "by_tokens")
_MODELS: dict[Transfer, tuple[str, ...]] = {
    "all_to_all": _EXCHANGES,
    "dispatch": _EXCHANGES,
    "combine": _EXCHANGES,
    "all_reduce": ("transfer", "ring", "direct"),
    "all_gather": ("transfer", "ring"),
    "reduce_scatter": ("transfer", "ring"),
    "copy": ("transfer", "copy"),
}
_INSTEAD: dict[Transfer, Transfer] = {
    "all_gather": "all_reduce",
    "reduce_scatter": "all_reduce",
    "dispatch": "all_to_all",
    "combine": "all_to_all",
}

ONE_WAY_RATE: dict[str, float] = {
    "nvlink3": 300e9,
    "nvlink4": 450e9,
    "nvlink5": 900e9,
    "nvlink-c2c": 450e9,
    "pcie3": 15.75e9,
    "pcie4": 31.5e9,
    "pcie5": 63.0e9,
    "pcie6": 126e9,
    "cxl2": 63.0e9,
    "xgmi3": 448e9,
    "xgmi4": 537.6e9,
    "xgmi-socket": 256e9,
    "infiniband-hdr": 25e9,
    "infiniband-ndr": 50e9,
    "infiniband-xdr": 100e9,
    "ethernet-100g": 12.5e9,
    "ethernet-200g": 25e9,
    "ethernet-400g": 50e9,
    "ethernet-800g": 100e9,
    "thunderbolt5": 10e9,
}
"""One-way bytes per second of a device's full port."""
FULL_LANES: dict[str, int] = {
    "nvlink3": 12,
    "nvlink4": 18,
    "nvlink5": 18,
    "pcie3": 16,
    "pcie4": 16,
    "pcie5": 16,
    "pcie6": 16,
    "cxl2": 16,
    "xgmi3": 7,
    "xgmi4": 7,
    "xgmi-socket": 4,
}
"""Lanes or links of these ports; fewer lanes carry proportionally less."""
RATE_SOURCE: dict[str, str] = {
    "nvlink3": "NVIDIA A100 whitepaper: 12 links of 25 GB/s each way (600 GB/s both ways)",
    "nvlink4": "NVIDIA H100 whitepaper: 18 links of 25 GB/s each way (900 GB/s both ways)",
    "nvlink5": "NVIDIA Blackwell brief: 18 links of 50 GB/s each way (1.8 TB/s both ways)",
    "nvlink-c2c": "NVIDIA Grace Hopper whitepaper: 900 GB/s both ways",
    "pcie3": "PCI-SIG: 8 GT/s a lane, 128b/130b, 16 lanes",
    "pcie4": "PCI-SIG: 16 GT/s a lane, 128b/130b, 16 lanes",
    "pcie5": "PCI-SIG: 32 GT/s a lane, 128b/130b, 16 lanes",
    "pcie6": "PCI-SIG: 64 GT/s a lane, 16 lanes, less 1.6 % for framing as the generations before",
    "cxl2": "CXL 2.0 on PCIe 5: 32 GT/s a lane, 128b/130b, 16 lanes",
    "xgmi3": "AMD MI300X platform data sheet: 7 links of 64 GB/s each way (128 GB/s both ways)",
    "xgmi4": "AMD MI355X data sheet: 7 links of 76.8 GB/s each way (153.6 GB/s both ways)",
    "xgmi-socket": "AMD EPYC 9004 overview: 4 links of 16 lanes at 32 Gbit/s between two sockets",
    "infiniband-hdr": "NVIDIA ConnectX-6: one port of 200 Gbit/s each way",
    "infiniband-ndr": "NVIDIA ConnectX-7: one port of 400 Gbit/s each way",
    "infiniband-xdr": "NVIDIA ConnectX-8: one port of 800 Gbit/s each way",
    "ethernet-100g": "IEEE 802.3: 100 Gbit/s each way (also RoCE)",
    "ethernet-200g": "IEEE 802.3: 200 Gbit/s each way (also RoCE)",
    "ethernet-400g": "IEEE 802.3: 400 Gbit/s each way (also RoCE)",
    "ethernet-800g": "IEEE 802.3: 800 Gbit/s each way (also RoCE)",
    "thunderbolt5": "Intel Thunderbolt 5: 80 Gbit/s each way",
}
"""Where each rate comes from; they count payload lanes, not packet headers."""
Standard = Literal[
    "nvlink3",
    "nvlink4",
    "nvlink5",
    "nvlink-c2c",
    "pcie3",
    "pcie4",
    "pcie5",
    "pcie6",
    "cxl2",
    "xgmi3",
    "xgmi4",
    "xgmi-socket",
    "infiniband-hdr",
    "infiniband-ndr",
    "infiniband-xdr",
    "ethernet-100g",
    "ethernet-200g",
    "ethernet-400g",
    "ethernet-800g",
    "thunderbolt5",
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
    costs: dict[Transfer, TransferModel] = Field(default_factory=dict)
    """How collectives and copies use the link; without it, assumed round figures."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if self.ends is not None and self.ends[0] == self.ends[1]:
            raise ValueError(f"ends: {self.ends} -- an edge joins two different memories")
        for name, cost in self.costs.items():
            if model_name(cost) not in _MODELS[name]:
                raise ValueError(
                    f"costs.{name}: model {model_name(cost)!r} prices something else -- "
                    f"allowed are {', '.join(_MODELS[name])}"
                )
        return self

    def cost(self, name: Transfer) -> TransferModel:
        """Parameters of one way of using the link.

        Without their own, all-gather and reduce-scatter take those of all-reduce, which is the one
        after the other, as a transfer; dispatch and combine are an all-to-all.
        """
        if name in self.costs or name not in _INSTEAD:
            return self.costs.get(name, _ASSUMED)
        cost = self.cost(_INSTEAD[name])
        if isinstance(cost, DirectCost):  # says nothing of half an all-reduce
            return _ASSUMED
        if name in ("dispatch", "combine"):
            return cost
        return cost.model_copy(update={"evidence": weakest([cost.evidence, "transfer"])})

    def copy_cost(self) -> TransferCost:
        """Parameters of copies between the two memories that the link joins."""
        cost = self.cost("copy")
        assert isinstance(cost, TransferCost)
        return cost

    def scaled(self, *, rates: float = 1.0, fixed: float = 1.0) -> Self:
        """Return a copy with the bandwidth times ``rates``, startup times times ``fixed``."""
        costs = {n: self.cost(n).with_fixed(fixed) for n in get_args(Transfer)}
        costs |= {
            n: cost.with_rates(rates)
            for n, cost in costs.items()
            if isinstance(cost, (CollectiveCost, CopyCost))
        }
        return self.model_copy(update={"bandwidth": self.bandwidth.times(rates), "costs": costs})
