"""Predicted beside measured, with what the measurement itself is worth, and a verdict for each row.

A row's floor is how far repeats of the measurement spread: half the interquartile range over the
rounds, relative to the measured time. Above `NOISY` no error means anything: the row is
undecidable, never passed, and shown all the same. Errors are predicted / measured - 1.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

Verdict = Literal["ok", "off", "undecidable"]
BOUND = 0.10
"""Largest |error| that passes, unless another is asked for."""
TAIL = 2.5
"""A section also fails if the 90th percentile of |error| is so many times the bound."""
NOISY = 0.05
"""Floor above which a row is undecidable."""
_R = TypeVar("_R", bound="Row")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One time that was predicted and measured."""

    label: str
    predicted_s: float
    measured_s: float
    floor: float
    """Spread of the measurement, relative; see the module."""
    bound: float = BOUND
    """Largest |error| that passes."""

    @property
    def error(self) -> float:
        """Predicted / measured - 1."""
        return self.predicted_s / self.measured_s - 1

    @property
    def decidable(self) -> bool:
        """Whether the measurement is quiet enough to say anything."""
        return self.floor <= NOISY

    @property
    def verdict(self) -> Verdict:
        """Whether the prediction is within the bound."""
        if not self.decidable:
            return "undecidable"
        return "ok" if abs(self.error) <= self.bound else "off"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, the error and the verdict as plain JSON data."""
        return {**vars(self), "error": self.error, "verdict": self.verdict}


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Several rows in one line. Errors are of the decidable rows; NaN where there is none."""

    label: str
    predicted_s: float
    """Sum over all rows, the undecidable ones included."""
    measured_s: float
    """Likewise."""
    median: float
    """Median |error|."""
    p90: float
    """90th percentile of |error|."""
    worst: float
    """Largest |error|."""
    signed: float
    """Median error with its sign."""
    floor: float
    """Median floor of all rows."""
    decidable: int
    undecidable: int

    @classmethod
    def of(cls, label: str, rows: Sequence[Row]) -> Self:
        """Summarise rows."""
        errors = np.array([row.error for row in rows if row.decidable])
        size = np.abs(errors)
        return cls(
            label=label,
            predicted_s=sum(row.predicted_s for row in rows),
            measured_s=sum(row.measured_s for row in rows),
            median=_over(np.median, size),
            p90=_over(lambda values: np.quantile(values, 0.9), size),
            worst=_over(np.max, size),
            signed=_over(np.median, errors),
            floor=_over(np.median, np.array([row.floor for row in rows])),
            decidable=len(errors),
            undecidable=len(rows) - len(errors),
        )

    def verdict(self, bound: float = BOUND) -> Verdict:
        """Judge the median |error|; nothing decidable is undecidable."""
        if not self.decidable:
            return "undecidable"
        return "ok" if self.median <= bound else "off"

    def passed(self, bound: float = BOUND) -> bool:
        """Whether a whole section passes: its median, and its 90th percentile at `TAIL` as much."""
        return self.verdict(bound) == "ok" and self.p90 <= TAIL * bound

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON data; None where there is no number."""
        return {k: None if v != v else v for k, v in vars(self).items()}


def summaries(rows: Iterable[_R], label: Callable[[_R], str]) -> tuple[Summary, ...]:
    """Summarise rows by their label, in the order in which labels first appear."""
    groups: dict[str, list[_R]] = {}
    for row in rows:
        groups.setdefault(label(row), []).append(row)
    return tuple(Summary.of(name, group) for name, group in groups.items())


def measured(samples: NDArray[np.float64]) -> tuple[float, float]:
    """Return the time and the floor of samples [rounds, windows], s.

    A round runs every window once; windows differ in their tokens and are predicted one by one.
    The time is the mean over windows of each one's median over rounds; the floor is half the
    interquartile range, over rounds, of a round's mean, divided by the time.
    """
    time = float(np.median(samples, axis=0).mean())
    low, high = np.quantile(samples.mean(axis=1), [0.25, 0.75])
    return time, float(high - low) / 2 / time


def _over(statistic: Callable[[NDArray[np.float64]], Any], values: NDArray[np.float64]) -> float:
    return float(statistic(values)) if len(values) else float("nan")
