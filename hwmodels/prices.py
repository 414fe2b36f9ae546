"""A price: seconds for each row of a column of operations, an interval, and what it rests on."""

from dataclasses import dataclass

from basis.evidence import Evidence
from hwmodels.figures import KernelCost, TransferCost
from hwmodels.ops import Floats


@dataclass(frozen=True, kw_only=True)
class Price:
    """Time of each row of an operation column."""

    seconds: Floats
    """[n] predicted time, s."""
    low: Floats
    """[n] lower end of the interval, s."""
    high: Floats
    """[n] upper end of the interval, s."""
    evidence: Evidence
    """The weakest of what the price rests on."""


def priced(seconds: Floats, cost: KernelCost | TransferCost, evidence: Evidence) -> Price:
    """Return a price with the interval that the cost model states."""
    return Price(
        seconds=seconds, low=seconds * cost.low, high=seconds * cost.high, evidence=evidence
    )
