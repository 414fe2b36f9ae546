"""A price: seconds for each row of a column of operations, an interval, and what it rests on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from basis.evidence import Evidence, weakest
from hwmodels.figures import CostModel
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


def priced(seconds: Floats, cost: CostModel, evidence: Evidence) -> Price:
    """Return a price with the interval that the cost model states."""
    return Price(
        seconds=seconds, low=seconds * cost.low, high=seconds * cost.high, evidence=evidence
    )


def fastest(prices: Sequence[Price]) -> Price:
    """Return row by row the price with the least seconds, with its interval."""
    stacked = np.stack([price.seconds for price in prices])
    chosen = stacked.argmin(axis=0), np.arange(stacked.shape[1])
    return Price(
        seconds=stacked[chosen],
        low=np.stack([price.low for price in prices])[chosen],
        high=np.stack([price.high for price in prices])[chosen],
        evidence=weakest([price.evidence for price in prices]),
    )
