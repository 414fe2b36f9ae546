"""Copies between memories: what a link gives a transfer that keeps few bytes under way.

Large pinned copies reach a share of the link. Little's law bounds what is left: a reader that
keeps ``in_flight`` bytes under way at a latency gets no more than one over the other (drives with
short queues, cores that load from CXL). Pageable memory is copied once more by the host.
"""

from typing import Literal, Self

from pydantic import model_validator

from basis import Bytes, BytesPerSecond, Seconds
from hwmodels.figures import TransferCost


class CopyCost(TransferCost):
    """``t = startup + bytes / min(efficiency W, in_flight / latency, staging if pageable)``.

    The price is of one copy alone on the link; copies that share it are the schedule's, which
    gives a link to one copy at a time.
    """

    model: Literal["copy"] = "copy"
    in_flight: Bytes | None = None
    """Bytes that are under way at once: requests times their size; none: enough for the link."""
    latency: Seconds = 0.0
    """Time from a request to its bytes, s."""
    pinned: bool = True
    """Whether the host's side is locked in memory, so that the device reads it by itself."""
    staging: BytesPerSecond | None = None
    """Rate at which the host copies pageable memory to a pinned buffer, while the buffer before
    is sent, bytes per second."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.in_flight is None) != (self.latency == 0):
            raise ValueError(
                f"in_flight {self.in_flight}, latency {self.latency} -- both or neither: their "
                "ratio is the rate"
            )
        if not self.pinned and self.staging is None:
            raise ValueError("pinned: false -- state staging, the rate at which the host copies")
        return self

    def with_rates(self, factor: float) -> Self:
        """Return a copy whose own rates are multiplied (the link's is not part of it)."""
        staging = None if self.staging is None else self.staging * factor
        return self.model_copy(update={"latency": self.latency / factor, "staging": staging})


def copy_rate(cost: TransferCost, bandwidth: float) -> float:
    """Return the bytes per second of a long copy over a link of so many."""
    rates = [cost.efficiency * bandwidth]
    if isinstance(cost, CopyCost):
        if cost.in_flight is not None and cost.latency > 0:
            rates.append(cost.in_flight / cost.latency)
        if not cost.pinned and cost.staging is not None:
            rates.append(cost.staging)
    return min(rates)
