"""What a guard found in a device or cluster file: how bad, where, and what to do."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that a check found."""

    level: Literal["error", "warning"]
    """An error stops the loading of a file; a warning is only told."""
    where: str
    """Path of the figure in the file."""
    message: str
    """What is wrong (value) -- what is allowed -- what to do."""


def error(where: str, message: str) -> Finding:
    """Return a finding that stops the loading of the file."""
    return Finding(level="error", where=where, message=message)


def warning(where: str, message: str) -> Finding:
    """Return a finding that is only told."""
    return Finding(level="warning", where=where, message=message)
