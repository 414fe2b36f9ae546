"""Values out of JSON that somebody else wrote: typed, checked, all complaints of a file at once.

A null and an absent key are the same: missing. Nothing is converted from text.
"""

import math
from collections.abc import Mapping
from typing import Any

_LARGEST = 2**63
_RECENT = 32  # an object has fewer problems than that


class Record:
    """One JSON object of a results file.

    Parameters
    ----------
    data : Mapping
        The object.
    where : str
        Its place in the file, for messages.
    problems : list of str
        Complaints are appended here.
    """

    def __init__(self, data: Mapping[str, Any], where: str, problems: list[str]) -> None:
        self.data, self.where, self.problems = data, where, problems

    def complain(self, text: str) -> None:
        """Note a problem of this object, once."""
        problem = f"{self.where}: {text}"
        if problem not in self.problems[-_RECENT:]:
            self.problems.append(problem)

    def text(self, key: str) -> str | None:
        """Return a text that is not empty, or None."""
        value = self.data.get(key)
        return value if isinstance(value, str) and value else None

    def number(self, key: str, scale: float = 1.0) -> float | None:
        """Return ``scale`` times a number; None if it is missing, or 0: nothing was measured."""
        value = self.data.get(key)
        if value is None:
            return None
        if not _is_number(value) or not (math.isfinite(value) and 0 <= value < _LARGEST):
            self.complain(f"{key} {_short(value)} -- a finite number, 0 or above")
            return None
        return scale * value or None

    def count(self, key: str, *, least: int = 0, needed: bool = False) -> int | None:
        """Return a whole number of at least ``least``; None if it is missing or wrong."""
        value = self.data.get(key)
        if value is None:
            if needed:
                self.complain(f"{key} is missing -- give the file as the tool wrote it")
            return None
        whole = _is_number(value) and (isinstance(value, int) or value.is_integer())
        if not whole or not least <= value < _LARGEST:
            self.complain(f"{key} {_short(value)} -- a whole number of at least {least}")
            return None
        return int(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: object) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < _LARGEST else "(huge)"
    return text if len(text) <= 60 else text[:57] + "..."
