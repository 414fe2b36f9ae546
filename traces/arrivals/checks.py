"""How bad requests are told: one message that lists the first few and counts the rest."""

from dataclasses import dataclass, field

import numpy as np

from basis.errors import InputError

MOST_TOKENS = 2**31 - 1
"""Tokens of one prompt or answer, at most: no sum of them over a file overflows."""
_LISTED = 5
_ALLOWED = (
    f"times are finite and ascend from 0, tokens whole numbers from 1 to {MOST_TOKENS}; correct "
    "or remove these"
)


@dataclass(kw_only=True)
class Problems:
    """Problems found so far; only the first few are kept."""

    where: str
    """File or object that they are in."""
    unit: str
    """What is numbered: line, request, row."""
    allowed: str = _ALLOWED
    """What would be right and what to do; the unit follows."""
    count: int = 0
    listed: list[str] = field(default_factory=list)

    def add(self, number: int, text: str) -> None:
        """Note one problem."""
        self.count += 1
        if len(self.listed) < _LISTED:
            self.listed.append(f"{self.unit} {number}: {text}")

    def refuse(self) -> None:
        """Raise an error if there were problems.

        Raises
        ------
        InputError
            With the first problems and the count of the rest.
        """
        if not self.count:
            return
        plural = "s" if self.count > 1 else ""
        more = self.count - len(self.listed)
        rest = [f"and {more} more"] if more else []
        head = f"{self.where}: {self.count} bad {self.unit}{plural}"
        lines = "\n  ".join([head, *self.listed, *rest])
        raise InputError(f"{lines}\n  -- {self.allowed} {self.unit}s")


def check_count(count: int) -> None:
    """Refuse fewer than one request."""
    if count < 1:
        raise InputError(f"{count} requests -- must be at least 1")


def check_rate(rate: float) -> None:
    """Refuse a rate that no requests can have."""
    if not (rate > 0 and np.isfinite(rate)):
        raise InputError(f"rate {rate} requests/s -- must be positive and finite")
