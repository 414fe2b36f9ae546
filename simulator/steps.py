"""Steps played on the engine: one compute and one communication stream per rank.

Between two collectives the kernels of a rank follow one another without a gap, so they are one
task of the engine; steps follow one another when every rank has ended. Times in seconds.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulator.engine import Schedule, Times, run
from simulator.pricing import Item

COMPUTE, COMMUNICATION = 0, 1
"""Streams of a rank."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StepPlan:
    """The tasks of a step: runs of kernels, each for every rank."""

    items: tuple[Item, ...]
    first: NDArray[np.int64]
    """First kernel of each run, [runs]."""
    collective: NDArray[np.bool_]
    """Whether the run is a collective, [runs]."""
    num_ranks: int
    schedule: Schedule
    """Row ``run * num_ranks + rank``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PlayedStep:
    """One step in time."""

    plan: StepPlan
    seconds: NDArray[np.float64]
    """Time of each kernel, [items, ranks]."""
    times: Times
    """Of the plan's tasks."""

    @property
    def step_time(self) -> float:
        """Seconds until the last rank has ended."""
        return float(self.times.end.max())

    @property
    def wait(self) -> NDArray[np.float64]:
        """Seconds that each rank waited, at collectives and for the end of the step, [ranks]."""
        shape = (len(self.plan.first), self.plan.num_ranks)
        waited = (self.times.start - self.times.ready).reshape(shape).sum(axis=0)
        ended = self.times.end.reshape(shape)[-1]
        return np.asarray(waited + (self.step_time - ended))


def plan_step(items: tuple[Item, ...], num_ranks: int) -> StepPlan:
    """Cut a step into runs of kernels and put them on the streams.

    Each run waits for the one before it on its rank; a collective is on the communication stream.
    """
    of_item = np.array([item.collective for item in items])
    begins = np.ones(len(items), dtype=np.bool_)
    begins[1:] = of_item[1:] | of_item[:-1]  # a collective is a run by itself
    first = np.flatnonzero(begins)
    together = of_item[first]
    count = len(first) * num_ranks
    run_of = np.repeat(np.arange(len(first)), num_ranks)
    schedule = Schedule(
        rank=np.tile(np.arange(num_ranks), len(first)),
        stream=np.where(together[run_of], COMMUNICATION, COMPUTE),
        after=tuple(() if row < num_ranks else (row - num_ranks,) for row in range(count)),
        collective=np.where(together[run_of], run_of, -1),
    )
    return StepPlan(
        items=items, first=first, collective=together, num_ranks=num_ranks, schedule=schedule
    )


def play(plan: StepPlan, seconds: NDArray[np.float64]) -> PlayedStep:
    """Play one step whose kernels take ``seconds`` [items, ranks]."""
    tasks = np.add.reduceat(seconds, plan.first, axis=0)
    return PlayedStep(plan=plan, seconds=seconds, times=run(plan.schedule, tasks.ravel()))
