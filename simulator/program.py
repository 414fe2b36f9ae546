"""A step as a program: kernels, copies and collectives on the streams of every rank, and its times.

Every rank has one stream of each kind and works it off in program order; an item waits besides
for the earlier items that it names. Because program order is a topological order, one pass over
the items gives the longest path of all steps at once. Times in seconds from a step's start.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Self

import numpy as np
from numpy.typing import NDArray

from hwmodels.ops import Stage
from simulator.engine import Schedule, run


class Stream(IntEnum):
    """Queues of one rank; each works in order, all at the same time."""

    COMPUTE = 0
    """The processor that runs the model."""
    COMMUNICATION = 1
    """Collectives between ranks."""
    FETCH = 2
    """Copies of weights into the fast memory."""
    ACTIVATIONS = 3
    """Copies of activations to and from another processor."""
    SIDE = 4
    """The other processor: CPU, PIM, near-data."""
    STORAGE = 5
    """Copies of weights from storage into the host's memory."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A kernel, copy or collective at its place in the program."""

    name: str
    stage: Stage
    layer: int
    """Layer of the model; -1 is before the first, the number of layers after the last."""
    stream: int = Stream.COMPUTE
    """Queue of the rank that it is in: a `Stream`, or a pipeline stage's number one level up."""
    after: tuple[int, ...] | None = None
    """Earlier items that must have ended on the same rank; None = the item before this one."""
    groups: tuple[int, ...] | None = None
    """Of a collective, the number of the group that each rank takes part in, [G]: the ranks of a
    group begin when the last of them is ready and take as long as the slowest. None = each rank
    by itself."""
    resource: str | None = None
    """What the ranks share and use one at a time, first come first served; None = nothing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Played:
    """A program in time; S steps, I items, G ranks, seconds from each step's start."""

    items: tuple[Item, ...]
    ready: NDArray[np.float64]
    """When the rank could have begun, [S, I, G]."""
    start: NDArray[np.float64]
    end: NDArray[np.float64]

    @property
    def num_ranks(self) -> int:
        """G."""
        return int(self.end.shape[2])

    @property
    def step_times(self) -> NDArray[np.float64]:
        """Seconds until the last rank has ended, [S]."""
        return np.asarray(self.end.max(axis=(1, 2)))

    @property
    def busy(self) -> NDArray[np.float64]:
        """Seconds that each item keeps its stream at work, [S, I, G]."""
        return np.asarray(self.end - self.start)

    @property
    def idle(self) -> NDArray[np.float64]:
        """Seconds in which no stream of the rank works, until the last rank ends, [S, G]."""
        order = np.argsort(self.start, axis=1, kind="stable")
        start = np.take_along_axis(self.start, order, axis=1)
        end = np.maximum.accumulate(np.take_along_axis(self.end, order, axis=1), axis=1)
        gaps = np.maximum(start[:, 1:] - end[:, :-1], 0).sum(axis=1) + start[:, 0]
        return np.asarray(gaps + self.step_times[:, None] - end[:, -1])

    def step(self, number: int) -> Self:
        """One step by itself, as S = 1."""
        one = slice(number, number + 1)
        return type(self)(
            items=self.items, ready=self.ready[one], start=self.start[one], end=self.end[one]
        )


def play(items: Sequence[Item], seconds: NDArray[np.float64]) -> Played:
    """Give every item its times.

    Parameters
    ----------
    items : sequence of Item
        A program.
    seconds : float64 array [S, I, G]
        What each item takes; an item that a rank does not have takes 0.

    Returns
    -------
    Played
        From `evaluate`, or from the event engine where an item uses a shared resource.
    """
    shared = any(item.resource is not None for item in items)
    return simulate_events(items, seconds) if shared else evaluate(items, seconds)


def evaluate(items: Sequence[Item], seconds: NDArray[np.float64]) -> Played:
    """Longest path through a program without shared resources, all steps at once.

    ``start_i = max(end of the stream's item before i, ends of what i is after)``, in a collective
    the latest of the group; ``end_i = start_i + seconds_i``.
    """
    steps, count, ranks = seconds.shape
    ready, start, end = (np.zeros((count, steps, ranks)) for _ in range(3))
    free = np.zeros((1 + max((item.stream for item in items), default=0), steps, ranks))
    for i, item in enumerate(items):
        now = free[item.stream]
        for earlier in _after(item, i):
            now = np.maximum(now, end[earlier])
        ready[i] = now
        took = seconds[:, i]
        if item.groups is not None:
            now, took = _latest(now, item.groups), _latest(took, item.groups)
        start[i] = now
        end[i] = free[item.stream] = now + took
    return Played(
        items=tuple(items),
        ready=_steps_first(ready),
        start=_steps_first(start),
        end=_steps_first(end),
    )


def simulate_events(items: Sequence[Item], seconds: NDArray[np.float64]) -> Played:
    """Play a program on the event engine, step after step."""
    schedule = schedule_of(items, seconds.shape[2])
    times = [run(schedule, step.ravel()) for step in seconds]
    shape = seconds.shape[1:]

    def stack(name: str) -> NDArray[np.float64]:
        return np.stack([getattr(t, name).reshape(shape) for t in times])

    return Played(items=tuple(items), ready=stack("ready"), start=stack("start"), end=stack("end"))


def schedule_of(items: Sequence[Item], num_ranks: int) -> Schedule:
    """Return the program's rows for the event engine; row ``item * num_ranks + rank``."""
    count, ranks = len(items), np.arange(num_ranks)
    after = tuple(
        tuple(earlier * num_ranks + rank for earlier in _after(item, i))
        for i, item in enumerate(items)
        for rank in range(num_ranks)
    )
    together = np.full((count, num_ranks), -1, dtype=np.int64)
    for i, item in enumerate(items):
        if item.groups is not None:
            together[i] = i * num_ranks + np.asarray(item.groups)
    names = sorted({item.resource for item in items if item.resource is not None})
    number = {name: i for i, name in enumerate(names)} | {None: -1}
    return Schedule(
        rank=np.tile(ranks, count),
        stream=np.repeat([int(item.stream) for item in items], num_ranks),
        after=after,
        collective=together.ravel(),
        resource=np.repeat([number[item.resource] for item in items], num_ranks),
    )


def _after(item: Item, index: int) -> tuple[int, ...]:
    if item.after is not None:
        return item.after
    return (index - 1,) if index else ()


def _latest(values: NDArray[np.float64], groups: tuple[int, ...]) -> NDArray[np.float64]:
    """Maximum over each group of ranks, at each of its ranks; [S, G]."""
    if len(set(groups)) == 1:
        return np.broadcast_to(values.max(axis=1, keepdims=True), values.shape)
    result = np.empty_like(values)
    for group in set(groups):
        members = [rank for rank, its in enumerate(groups) if its == group]
        result[:, members] = values[:, members].max(axis=1, keepdims=True)
    return result


def _steps_first(times: NDArray[np.float64]) -> NDArray[np.float64]:
    return times.swapaxes(0, 1)
