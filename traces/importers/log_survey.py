"""The first reading of a log of cells: its layers and requests, and the engine's warm-up.

A log is read twice, so that memory holds a step of it and not the file: once for what this module
finds, once for the rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from traces.importers.log_cells import Cells, group, whole_steps
from traces.importers.log_rows import Ints

_WARM_UP_TOKENS = 16  # a step of as many equal tokens is none of a prompt


@dataclass(kw_only=True)
class Survey:
    """What the first reading tells."""

    layers: set[int] = field(default_factory=set)
    weighted: bool = True
    """Whether all cells have weights."""
    warm_up: list[int] = field(default_factory=list)
    """Steps at the start of a run in which all tokens are the same."""
    restarts: bool = False
    """Whether a request's token counter ever starts again."""
    crowded: bool = False
    """Whether steps of several tokens follow each other, as in a batch that decodes."""
    requests: int = 0


def survey(parts: Iterator[Cells], where: str) -> Survey:
    """Read all cells once."""
    found = Survey()
    warm = _WarmUp()
    last = _LastTokens()
    run, many = -1, False
    for cells in whole_steps(parts, where):
        found.layers |= set(np.unique(cells.layer).tolist())
        found.weighted &= not np.isnan(cells.weights).any()
        found.requests = max(found.requests, int(cells.request.max()) + 1)
        steps = warm.find(cells)
        found.warm_up += steps
        cells = cells.select(~np.isin(cells.step, steps))
        if not len(cells.step):
            continue
        lead = group(cells).lead
        found.restarts |= last.restarts(cells.select(lead))
        _, start, sizes = np.unique(cells.step[lead], return_index=True, return_counts=True)
        runs = cells.run[lead][start]
        several = np.concatenate([[many and runs[0] == run], sizes > 1])
        same = np.diff(runs, prepend=run) == 0
        found.crowded |= bool((several[1:] & several[:-1] & same).any())
        run, many = int(runs[-1]), bool(several[-1])
    return found


@dataclass(kw_only=True)
class _WarmUp:
    """Finds the steps at the start of a run in which an engine tried itself on dummy tokens."""

    leading: bool = True
    run: int = -1
    known: NDArray[np.int32] | None = None
    """``[L, K]`` experts of the last such step."""

    def find(self, cells: Cells) -> list[int]:
        """Return the steps of warm-up among whole steps."""
        found: list[int] = []
        edges = np.flatnonzero(np.diff(cells.step, prepend=-1))
        for start, stop in zip(edges, [*edges[1:], len(cells.step)], strict=True):
            run = int(cells.run[start])
            if run != self.run:
                self.leading, self.run, self.known = True, run, None
            elif not self.leading:
                if int(cells.run[-1]) == run:
                    break  # the rest is real
                continue
            self.leading = self._is_dummy(cells.layer[start:stop], cells.ids[start:stop])
            if self.leading:
                found.append(int(cells.step[start]))
        return found

    def _is_dummy(self, layer: Ints, ids: NDArray[np.int32]) -> bool:
        experts = np.sort(ids, axis=-1)
        layers, first, tokens = np.unique(layer, return_index=True, return_counts=True)
        chosen = experts[first]
        if (experts != chosen[np.searchsorted(layers, layer)]).any():
            return False
        again = self.known is not None and np.array_equal(chosen, self.known)
        lowest = bool((chosen == np.arange(ids.shape[1])).all()) and len(ids) > 1
        if not (again or lowest or int(tokens.max()) >= _WARM_UP_TOKENS):
            return False
        self.known = chosen
        return True


class _LastTokens:
    """Remembers the largest token number of each request."""

    def __init__(self) -> None:
        self._largest = np.full(1, -1, np.int64)

    def restarts(self, tokens: Cells) -> bool:
        """Whether, in tokens sorted by step, a request's numbers do not go on from step to step."""
        order = np.lexsort((tokens.token, tokens.step, tokens.request))
        request, step, token = (x[order] for x in (tokens.request, tokens.step, tokens.token))
        self._grow(int(request[-1]) + 1)
        same = np.diff(request, prepend=-1) == 0
        before = np.where(same, np.concatenate([[-1], token[:-1]]), self._largest[request])
        begins = ~same | (np.diff(step, prepend=-1) != 0)
        restarted = bool((token[begins] <= before[begins]).any())
        np.maximum.at(self._largest, request, token)
        return restarted

    def _grow(self, requests: int) -> None:
        if requests > len(self._largest):
            more = np.full(max(requests, 2 * len(self._largest)), -1, np.int64)
            more[: len(self._largest)] = self._largest
            self._largest = more
