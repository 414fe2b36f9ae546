"""The event engine: streams that work in order, collectives that rendezvous, shared resources.

A stream is a queue of one rank's tasks, as a CUDA stream is: tasks run one at a time in the order
given, each after the tasks that it names and not before its release. A collective is one task on
each of its ranks: it begins when the last is ready and ends for all together. A resource (a link,
a copy engine, a server) serves one task at a time, the most urgent first, then first come first
served. Times are seconds from the start.
"""

import math
from collections import defaultdict
from collections.abc import Generator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, eq=False)
class Schedule:
    """Tasks in columns; the order of rows is the order within a stream."""

    rank: NDArray[np.int64]
    """Rank that works on the task, [tasks]."""
    stream: NDArray[np.int64]
    """Stream of that rank, [tasks]; any small number."""
    after: tuple[tuple[int, ...], ...]
    """Tasks that must have ended before this one begins, by row."""
    collective: NDArray[np.int64]
    """Number of the collective that the task takes part in, [tasks]; -1 for none."""
    resource: NDArray[np.int64] | None = None
    """Number of the resource that the task needs while it runs, [tasks]; -1 for none. Not for
    tasks of a collective."""
    release: NDArray[np.float64] | None = None
    """Seconds before which the task does not begin, [tasks]; arrivals."""
    urgency: NDArray[np.int64] | None = None
    """Who goes first at a resource, [tasks]: larger before smaller; running tasks go on."""

    @cached_property
    def queues(self) -> dict[tuple[int, int], list[int]]:
        """Rows of each (rank, stream), in order."""
        queues: dict[tuple[int, int], list[int]] = defaultdict(list)
        for row, key in enumerate(zip(self.rank.tolist(), self.stream.tolist(), strict=True)):
            queues[key].append(row)
        return dict(queues)

    @cached_property
    def awaited(self) -> frozenset[int]:
        """Rows that another task waits for."""
        return frozenset(row for rows in self.after for row in rows)


@dataclass(frozen=True, kw_only=True, eq=False)
class Times:
    """When each task was ready, began and ended, seconds, [tasks] each.

    ``start - ready`` is the time a task waited for the others of a collective or for a resource.
    """

    ready: NDArray[np.float64]
    start: NDArray[np.float64]
    end: NDArray[np.float64]


class _Collective:
    """A rendezvous of as many tasks as take part."""

    def __init__(self, env: simpy.Environment) -> None:
        self.missing = 0  # tasks that have not come yet
        self.seconds = 0.0
        self.start = 0.0
        self.done = env.event()


def run(schedule: Schedule, seconds: NDArray[np.float64]) -> Times:
    """Play a schedule whose tasks take ``seconds`` [tasks].

    A collective takes the longest of its tasks' seconds.

    Raises
    ------
    ValueError
        If the tasks wait for one another in a circle; the message names how many never ran.
    """
    env = simpy.Environment()
    n = len(seconds)
    ready, start, end = [0.0] * n, [0.0] * n, [math.nan] * n
    took = seconds.tolist()
    joins = _gather(env, schedule, took)
    ended = {row: joins[row].done if row in joins else env.event() for row in schedule.awaited}
    uses = _resources(env, schedule)
    release = {} if schedule.release is None else dict(enumerate(schedule.release.tolist()))
    urgency = {} if schedule.urgency is None else dict(enumerate(schedule.urgency.tolist()))

    def stream(rows: list[int]) -> Generator[Any, Any, None]:
        for row in rows:
            for earlier in schedule.after[row]:
                if not ended[earlier].processed:
                    yield ended[earlier]
            if release.get(row, 0.0) > env.now:
                yield env.timeout(release[row] - env.now)
            ready[row] = start[row] = env.now
            if row in joins:
                yield from _join(env, joins[row])
                start[row] = joins[row].start
            elif row in uses:
                with uses[row].request(priority=-urgency.get(row, 0)) as turn:
                    yield turn
                    start[row] = env.now
                    yield env.timeout(took[row])
            else:
                yield env.timeout(took[row])
            if row in ended and row not in joins:
                ended[row].succeed()
            end[row] = env.now

    for rows in schedule.queues.values():
        env.process(stream(rows))
    env.run()
    stuck = sum(map(math.isnan, end))
    if stuck:
        raise ValueError(f"{stuck} of {n} tasks never ran -- they wait for one another in a circle")
    return Times(ready=np.array(ready), start=np.array(start), end=np.array(end))


def _gather(
    env: simpy.Environment, schedule: Schedule, took: list[float]
) -> dict[int, _Collective]:
    """Return the collective of each row that takes part in one."""
    collectives: dict[int, _Collective] = defaultdict(lambda: _Collective(env))
    joins = {}
    for row, number in enumerate(schedule.collective.tolist()):
        if number >= 0:
            joins[row] = collective = collectives[number]
            collective.missing += 1
            collective.seconds = max(collective.seconds, took[row])
    return joins


def _resources(env: simpy.Environment, schedule: Schedule) -> dict[int, simpy.PriorityResource]:
    """Return the resource of each row that needs one."""
    if schedule.resource is None:
        return {}
    numbers = schedule.resource.tolist()
    made = {n: simpy.PriorityResource(env) for n in sorted(set(numbers)) if n >= 0}
    return {row: made[n] for row, n in enumerate(numbers) if n >= 0}


def _join(env: simpy.Environment, collective: _Collective) -> Generator[Any, Any, None]:
    collective.missing -= 1
    if collective.missing:
        yield collective.done
        return
    collective.start = env.now
    yield env.timeout(collective.seconds)
    collective.done.succeed()
