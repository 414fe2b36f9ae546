"""What a serving engine adds to the kernels of a step, and how that is fitted on other models.

A step takes ``share x kernels + (gap + eager in steps with prompts) x number of kernels
+ sequence x sequences`` seconds, the kernels of steps with prompts times ``prompt_share`` besides;
a first token takes ``request`` more. In a closed loop TPOT and TTFT are sums of step times with
known weights, so that both are linear in what a run's steps add up to (`Sums`). Seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from basis import Strict
from moeplan.served_loop import Schedule

Floats = NDArray[np.float64]
CELL_SPREAD = 0.25
"""Standard deviation of log(predicted / measured) between cells that no overhead explains: models
whose kernels are priced too high or too low, engine versions. Two versions of an engine differ by
20 % in the median; a fit that takes such a level for overhead carries it to other models."""
RUN_SPREAD = 0.1
"""Standard deviation of log(predicted / measured) between the runs of a cell."""
FAR = 0.3
"""Weight of runs on other systems with the same engine, where there are some on the same."""
TTFT_WEIGHT = 0.3
"""Weight of TTFT beside TPOT: it depends on facts that the file does not record."""
_CELL_RUNS = 30  # a cell counts as at most so many runs


class Overhead(Strict):
    """Parameters of one engine on one system."""

    share: float = 1.0
    """Measured time of decode steps per time of the modelled kernels, without the rest: kernels
    that are not modelled, less what runs side by side or fused."""
    prompt_share: float = 1.0
    """The same of steps with prompts, relative to decode steps."""
    gap: float = 1e-7
    """Time between two kernels of a step, beyond the launch time in their prices, s."""
    eager: float = 30e-6
    """More of that in steps with prompts, which are not replayed from a graph, s."""
    sequence: float = 5e-6
    """Host work per sequence and step (scheduling, sampling, detokenising), s."""
    request: float = 20e-3
    """Front end per request up to the first token (HTTP, tokenising), s."""


PRIOR: dict[str, tuple[str, float]] = {
    "share": ("log", 0.1),
    "prompt_share": ("log", 0.2),
    "gap": ("linear", 3e-7),
    "eager": ("log", 1.0),
    "sequence": ("log", 1.0),
    "request": ("log", 0.5),
}
"""How far parameters go from their defaults: standard deviation of the logarithm, or in s (never
below zero). Launch times in kernel prices hold most of the gaps already."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sums:
    """What the steps of a run add up to, [2]: in its mean TTFT and in its mean TPOT."""

    decode: Floats
    """Kernel seconds of steps without prompts."""
    prompts: Floats
    """Kernel seconds of steps with prompts."""
    kernels: Floats
    """Kernels of all steps."""
    eager: Floats
    """Kernels of steps with prompts."""
    sequences: Floats
    """Sequences of all steps."""

    @classmethod
    def of(cls, schedule: Schedule, seconds: Floats, kernels: float) -> "Sums":
        """Weigh the steps of a schedule.

        Parameters
        ----------
        schedule : Schedule
        seconds : float64 array [N]
            Kernel seconds of a step of each of its runs.
        kernels : float
            Kernels of a step on a rank.
        """
        steps = schedule.steps
        some = steps.prompts.sum(axis=1) > 0
        sequences = (steps.decodes + steps.ends).sum(axis=1)
        weights = schedule.repeats * _weights(schedule)
        return cls(
            decode=weights @ np.where(some, 0.0, seconds),
            prompts=weights @ np.where(some, seconds, 0.0),
            kernels=kernels * weights.sum(axis=1),
            eager=kernels * (weights @ some),
            sequences=weights @ sequences,
        )

    def times(self, o: Overhead) -> tuple[float, float]:
        """Return mean TTFT and mean TPOT, s."""
        ttft, tpot = (
            o.share * (self.decode + o.prompt_share * self.prompts)
            + o.gap * self.kernels
            + o.eager * self.eager
            + o.sequence * self.sequences
        )
        return float(ttft + o.request), float(tpot)


def _weights(schedule: Schedule) -> Floats:
    """Share of the requests for which a step counts, [2, N]: towards TTFT, and per token."""
    marks = np.zeros((2, len(schedule.repeats) + 1))
    several = schedule.outputs > 1
    share = 1 / len(schedule.outputs)
    np.add.at(marks[0], schedule.arrival, share)
    np.add.at(marks[0], schedule.first, -share)
    each = 1 / (schedule.outputs[several] - 1) / max(int(np.count_nonzero(several)), 1)
    np.add.at(marks[1], schedule.first[several], each)
    np.add.at(marks[1], schedule.last[several], -each)
    return np.asarray(np.cumsum(marks, axis=1)[:, :-1])


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """A measured run, as the fit sees it."""

    sums: Sums
    ttft: float
    tpot: float
    cell: str
    """Model family, system and engine: what shares an unknown level."""
    near: bool
    """Whether it ran on the system that the fit is for."""


def fit_overhead(samples: Sequence[Sample]) -> Overhead:
    """Fit the parameters of an engine on a system.

    Least squares of log(predicted / measured) with a soft absolute loss, with a free level for
    each cell (normal, `CELL_SPREAD`) and normal priors on the parameters: few runs of few models
    move them little.
    """
    cells = sorted({s.cell for s in samples})
    at = np.array([cells.index(s.cell) for s in samples])
    near = np.array([s.near for s in samples])
    weight = np.minimum(1.0, np.sqrt(_CELL_RUNS / np.bincount(at)[at]))
    weight = weight * np.where(near | ~near.any(), 1.0, np.sqrt(FAR)) / RUN_SPREAD
    measured = np.log([[s.ttft, s.tpot] for s in samples]).T
    table = np.stack([_columns(s.sums) for s in samples], axis=2)
    each = np.array([TTFT_WEIGHT, 1.0])[:, None] * weight

    def errors(moved: Floats) -> Floats:
        o = _moved(moved[: len(PRIOR)])
        factors = [o.share, o.share * o.prompt_share, o.gap, o.eager, o.sequence]
        times = np.tensordot(np.array(factors), table, axes=1)
        times[0] += o.request
        level = CELL_SPREAD * moved[len(PRIOR) :][at]
        raw = each * (np.log(times) - measured - level)
        soft = np.sign(raw) * np.sqrt(2 * (np.sqrt(1 + raw**2) - 1))
        return np.concatenate([soft.ravel(), moved])

    found = least_squares(errors, np.zeros(len(PRIOR) + len(cells)), max_nfev=200)
    return _moved(found.x[: len(PRIOR)])


def _columns(sums: Sums) -> Floats:
    """[5, 2]."""
    return np.stack([sums.decode, sums.prompts, sums.kernels, sums.eager, sums.sequences])


def _moved(steps: Floats) -> Overhead:
    """Return the defaults moved by so many standard deviations of the prior."""
    start, values = Overhead(), {}
    for step, (name, (scale, spread)) in zip(steps.tolist(), PRIOR.items(), strict=True):
        value = getattr(start, name)
        moved = value * np.exp(spread * step) if scale == "log" else value + spread * step
        values[name] = max(float(moved), 0.0)
    return Overhead(**values)
