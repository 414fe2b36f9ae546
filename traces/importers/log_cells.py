"""Logs of (token, layer) cells, one a record, layer after layer in each forward step.

Their token counters restart in every step, so steps are recovered from the order: a step ends
where the layers begin again, or a token number comes again in the same layer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from traces.importers.log_rows import Ints

_MOST_CELLS = 2**22


@dataclass(frozen=True, kw_only=True, eq=False)
class Cells:
    """N cells in the order of the file."""

    record: Ints
    """``[N]``, number of the record in the file, from 1."""
    run: Ints
    """``[N]``, how often the recorder was started before."""
    request: Ints
    """``[N]``, requests numbered from 0 by first appearance."""
    domain: Ints
    token: Ints
    """``[N]``, the log's token counter."""
    layer: Ints
    step: Ints
    """``[N]``, forward step, from 0."""
    ids: NDArray[np.int32]
    """``[N, K]``."""
    weights: NDArray[np.float32]
    """``[N, K]``, NaN where the log has none."""

    def select(self, rows: Any) -> Self:
        """Return some of the cells."""
        return type(self)(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    @classmethod
    def join(cls, parts: Sequence["Cells"]) -> "Cells":
        """Return the cells of all parts."""
        return cls(
            **{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)}
        )


@dataclass(kw_only=True)
class StepFinder:
    """Numbers the forward steps of cells that come block by block."""

    own_counters: bool
    """Whether each request counts its own tokens; else the rows of a step are counted."""
    step: int = 0
    last: tuple[int, int, int, int] | None = None
    """Run, request, layer and token of the cell before."""

    def number(self, run: Ints, request: Ints, layer: Ints, token: Ints) -> Ints:
        """Return ``[N]`` the step of each cell."""
        if not len(run):
            return run
        first = self.last or (int(run[0]), -1, -1, -1)
        before = [
            np.concatenate([[was], now[:-1]])
            for was, now in zip(first, (run, request, layer, token), strict=True)
        ]
        again = (layer == before[2]) & (token <= before[3])
        if self.own_counters:
            again &= request == before[1]
        begins = (layer < before[2]) | again | (run != before[0])
        steps = self.step + np.cumsum(begins)
        self.step = int(steps[-1])
        self.last = (int(run[-1]), int(request[-1]), int(layer[-1]), int(token[-1]))
        return steps


def whole_steps(parts: Iterator[Cells], where: str) -> Iterator[Cells]:
    """Regroup cells so that no step is cut.

    Raises
    ------
    InputError
        If a step of several layers has more than 4 million cells.
    """
    held: list[Cells] = []
    for part in parts:
        held.append(part)
        cells = Cells.join(held)
        end = int(np.searchsorted(cells.step, cells.step[-1]))
        if not end and len(cells.step) > _MOST_CELLS:
            if (cells.layer != cells.layer[0]).any():
                raise InputError(
                    f"{where}: a step of more than {_MOST_CELLS} cells at record "
                    f"{int(cells.record[0])} -- layers must come in order within a step"
                )
            end = len(cells.step)  # one layer, and a counter that never restarts: no need to wait
        if end:
            yield cells.select(slice(0, end))
        held = [cells.select(slice(end, None))] if end < len(cells.step) else []
    yield from held


@dataclass(frozen=True, kw_only=True, eq=False)
class Groups:
    """Cells of each token."""

    order: Ints
    """``[N]`` sorts the cells by token and layer."""
    token_of: Ints
    """``[N]`` token of each sorted cell."""
    first: Ints
    """``[T]`` first sorted cell of each token."""

    @property
    def lead(self) -> Ints:
        """``[T]`` a cell of each token."""
        return self.order[self.first]


def group(cells: Cells) -> Groups:
    """Find the tokens of cells; a token is a number of a request in a step."""
    keys = (cells.layer, cells.request, cells.token, cells.step)
    order = np.lexsort(keys)
    changes = np.zeros(len(order), np.bool_)
    for key in keys[1:]:
        changes[1:] |= np.diff(key[order]) != 0
    token_of = np.cumsum(changes, dtype=np.int64)
    return Groups(
        order=order, token_of=token_of, first=np.flatnonzero(np.diff(token_of, prepend=-1))
    )
