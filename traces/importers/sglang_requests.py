"""Requests pieced together from SGLang's forward passes, which record positions but no ids.

A prefill pass holds segments of requests. Its first segment continues the last segment of the
prefill pass before if its positions do (a prompt in chunks: SGLang chunks one request at a time,
and puts it first in the next pass); every other segment is a new request. A decode pass holds one
row of each running request, in an order that stays: finished ones leave, new ones join at the end.
A row goes to the first running request that expects its position. Where fewer rows than running
requests have a position, which of these went on is a guess; such rows are counted. Positions are
tokens.
"""

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError

Ints = NDArray[np.int64]


class Requests:
    """Requests seen so far, and which of them are running."""

    def __init__(self) -> None:
        self.total = 0
        """Requests so far; ids are 0, 1, ..."""
        self.guessed = 0
        """Decode rows that several running requests could have had."""
        self.late = 0
        """Requests whose first row is not position 0: cached, or begun before the recording."""
        self._ids: list[int] = []  # of running requests, in the engine's order
        self._next: list[int] = []  # the position that each expects
        self._open: int | None = None  # last of the last prefill pass: its prompt may go on

    def extend(
        self, position: Ints, lengths: Ints, *, mixed: bool
    ) -> tuple[Ints, NDArray[np.bool_]]:
        """Take a prefill pass, or one that is mixed: segments first, then rows of running requests.

        Parameters
        ----------
        position
            ``[T]``.
        lengths
            ``[N]`` rows of each segment, T together, each at least 1.

        Returns
        -------
        request
            ``[T]``.
        decode
            ``[T]`` whether a row is of a running request.
        """
        goes_on = self._open is not None and self._expects(self._open) == position[0]
        tail = self._running_rows(position, lengths, goes_on) if mixed else 0
        head = len(position) - tail
        request = np.empty(len(position), np.int64)
        running: tuple[list[int], list[int]] = [], []
        if tail:
            prompt: tuple[list[int], list[int]] = self._take_open() if goes_on else ([], [])
            wanted = position[head:].tolist()
            running = self._match(wanted), [each + 1 for each in wanted]
            request[head:] = running[0]
            self._ids, self._next = prompt  # whoever has no row here is finished
        if head:
            segments = lengths[: len(lengths) - tail]
            request[:head] = self._prefill(position[:head], segments)
        self._ids, self._next = self._ids + running[0], self._next + running[1]
        return request, np.arange(len(position)) >= head

    def decode(self, position: Ints) -> Ints:
        """Return the request of each row of a decode pass, positions ``[T]``."""
        wanted = position.tolist()
        found = self._ids if wanted == self._next else self._match(wanted)
        self._open = None  # whatever was prefilled last is running now, or finished
        self._ids, self._next = found, [each + 1 for each in wanted]
        return np.array(found, np.int64)

    def _prefill(self, position: Ints, lengths: Ints) -> Ints:
        first = np.cumsum(lengths) - lengths
        start, stop = position[first].tolist(), (position[first + lengths - 1] + 1).tolist()
        ids = list(range(self.total, self.total + len(lengths)))
        if self._open is not None and self._expects(self._open) == start[0]:
            self._take_open()
            ids = [self._open, *ids[:-1]]
            start = start[1:]
        self.total += len(start)
        self.late += sum(each > 0 for each in start)
        self._ids, self._next = self._ids + ids, self._next + stop
        self._open = ids[-1]
        return np.repeat(np.array(ids, np.int64), lengths)

    def _take_open(self) -> tuple[list[int], list[int]]:
        """Remove and return the request whose prompt may go on, with its position."""
        if self._open is None or self._open not in self._ids:
            return [], []
        place = self._ids.index(self._open)
        return [self._ids.pop(place)], [self._next.pop(place)]

    def _expects(self, request: int) -> int | None:
        return self._next[self._ids.index(request)] if request in self._ids else None

    def _running_rows(self, position: Ints, lengths: Ints, goes_on: bool) -> int:
        """Return how many of the last segments are one row that a running request expects."""
        free = Counter(self._next)
        free[int(position[0])] -= goes_on  # that one is still being prefilled
        rows = 0
        for length, each in zip(lengths[::-1].tolist(), position[::-1].tolist(), strict=False):
            if length != 1 or free[each] <= 0:
                break
            free[each] -= 1
            rows += 1
        return rows

    def _match(self, wanted: list[int]) -> list[int]:
        """Return the request of each row, a new one where none expects its position."""
        free: dict[int, list[int]] = {}  # requests by the position that they expect, first one last
        for request, each in zip(reversed(self._ids), reversed(self._next), strict=True):
            free.setdefault(each, []).append(request)
        for each, rows in Counter(wanted).items():
            self.guessed += rows if rows < len(free.get(each, ())) else 0
        found = []
        for each in wanted:
            if free.get(each):
                found.append(free[each].pop())
            else:
                found.append(self.total)
                self.total += 1
                self.late += each > 0
        return found


def segment_lengths(position: Ints, stated: Ints | None, where: str) -> Ints:
    """Return the rows of each segment of a prefill pass.

    Parameters
    ----------
    position
        ``[T]``.
    stated
        ``[N]`` as the engine says, possibly zeros, T together; None: a segment ends where positions
        do not go on.

    Raises
    ------
    InputError
        If the stated ones do not fit the positions.
    """
    breaks = np.flatnonzero(np.diff(position) != 1) + 1
    if stated is None:
        return np.diff(np.concatenate([[0], breaks, [len(position)]]))
    if (stated < 0).any() or not np.isin(breaks, np.cumsum(stated)).all():
        raise InputError(
            f"{where}: extend_seq_lens {stated[:8].tolist()} do not fit the positions -- positions "
            "ascend by 1 in each segment -- damaged; record it again"
        )
    return stated[stated > 0]
