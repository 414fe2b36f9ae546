"""Evidence classes: what a number rests on, from a measurement down to an assumption."""

from collections.abc import Iterable
from typing import Literal, get_args

Evidence = Literal["measured", "fitted", "transfer", "datasheet", "assumed"]
"""Strongest first; ``transfer`` is a fit made on other devices."""

_ORDER: tuple[str, ...] = get_args(Evidence)


def weakest(classes: Iterable[Evidence]) -> Evidence:
    """Return the weakest class: a result is only as good as its worst part.

    Raises
    ------
    ValueError
        If ``classes`` is empty.
    """
    return max(classes, key=_ORDER.index)
