"""Steps predicted and measured, side by side: end to end, by batch, load, stage and kernel.

End to end decides; the rest says where an error comes from. Kernels are set apart by what limits
them according to their price, so that a wrong bandwidth, peak or fixed time shows where it acts.
Errors are predicted / measured - 1, times in seconds.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from hwmodels.cluster import Cluster
from moeplan.validate_blame import Suspect, suspects
from moeplan.validate_cases import Case, Cases
from moeplan.validate_predict import LIMITS, Floats, Predicted, predict_steps
from moeplan.validate_steps import LAP_ROUNDS, ROUNDS, Measured, measure_steps
from moeplan.validate_verdict import BOUND, Row, Summary, measured, summaries
from traces.model_spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class StepRow(Row):
    """A step of a case, or a part of it."""

    phase: str
    """``decode`` or ``prefill``."""
    tokens: int
    load: str
    part: str = ""
    """Stage or kernel; empty: the whole step."""
    limit: str = ""
    """What most of a kernel's predicted time answers to; empty: not a kernel."""

    @property
    def group(self) -> str:
        """Phase and size: ``decode 64``."""
        return f"{self.phase} {self.tokens}"


@dataclass(frozen=True, kw_only=True)
class Blame:
    """A kernel's part in the error of all cases together."""

    name: str
    seconds: float
    """Predicted minus measured, summed over the cases."""
    relative: float
    """Over what was measured of it."""


@dataclass(frozen=True, kw_only=True)
class StepsFound:
    """What validating steps on one process found."""

    steps: tuple[StepRow, ...]
    """One for each case; they alone decide."""
    stages: tuple[StepRow, ...]
    """One for each case and stage, measured with laps."""
    kernels: tuple[StepRow, ...]
    """One for each case and kernel name, over all layers, measured with laps."""
    lap_cost: float
    """What laps add to a step, relative, median over the cases."""
    suspects: tuple[Suspect, ...]
    """Figures of the machine that would explain the error, best first; none: nothing decidable."""
    bound: float
    rounds: int
    lap_rounds: int

    @cached_property
    def summary(self) -> Summary:
        """All steps."""
        return Summary.of("end to end", self.steps)

    @property
    def passed(self) -> bool:
        """Whether the errors of the decidable steps are within the bounds."""
        return self.summary.passed(self.bound)

    @property
    def by_batch(self) -> tuple[Summary, ...]:
        """Steps by phase and size."""
        return summaries(self.steps, lambda row: row.group)

    @property
    def by_load(self) -> tuple[Summary, ...]:
        """Decode steps by load."""
        decode = [row for row in self.steps if row.phase == "decode"]
        return summaries(decode, lambda row: row.load)

    @property
    def by_stage(self) -> tuple[Summary, ...]:
        """Stages over all cases."""
        return summaries(self.stages, lambda row: row.part)

    @property
    def by_kernel(self) -> tuple[Summary, ...]:
        """Kernels over all cases."""
        return summaries(self.kernels, lambda row: row.part)

    @property
    def by_limit(self) -> tuple[Summary, ...]:
        """Kernels set apart by what limits them: ``experts: bandwidth``."""
        order = {name: at for at, name in enumerate(dict.fromkeys(r.part for r in self.kernels))}
        rows = sorted(self.kernels, key=lambda r: (order[r.part], LIMITS.index(r.limit)))
        return summaries(rows, lambda row: f"{row.part}: {row.limit}")

    @property
    def kernels_to_blame(self) -> tuple[Blame, ...]:
        """Kernels by the size of their error in all cases together, largest first."""
        found = [
            Blame(
                name=each.label,
                seconds=each.predicted_s - each.measured_s,
                relative=each.predicted_s / each.measured_s - 1,
            )
            for each in self.by_kernel
        ]
        return tuple(sorted(found, key=lambda blame: -math.fabs(blame.seconds)))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON data."""
        tables = ("by_batch", "by_load", "by_stage", "by_kernel", "by_limit")
        return {
            "passed": self.passed,
            "bound": self.bound,
            "floor": "half the interquartile range of a round's mean over windows, over the time",
            "rounds": self.rounds,
            "lap_rounds": self.lap_rounds,
            "lap_cost": self.lap_cost,
            "summary": self.summary.to_dict(),
            **{name: [each.to_dict() for each in getattr(self, name)] for name in tables},
            "kernels_to_blame": [vars(each) for each in self.kernels_to_blame],
            "suspects": [each.to_dict() for each in self.suspects],
            **{n: [r.to_dict() for r in getattr(self, n)] for n in ("steps", "stages", "kernels")},
        }


def validate_steps(
    model: ModelSpec,
    cluster: Cluster,
    cases: Cases,
    *,
    threads: int,
    device: str = "cpu",
    rounds: int = ROUNDS,
    lap_rounds: int = LAP_ROUNDS,
    bound: float = BOUND,
    seed: int = 0,
    tell: Callable[[str], None] = lambda _: None,
) -> StepsFound:
    """Predict and measure the same steps.

    Parameters
    ----------
    model, cases
        From `moeplan.validate_cases.make_cases`.
    cluster
        This machine as ``moeplan calibrate`` wrote it, one rank of it.
    bound
        Largest |error| that passes.
    threads, device, rounds, lap_rounds, seed, tell
        As `moeplan.validate_steps.measure_steps`.

    Raises
    ------
    InputError
        As `moeplan.validate_predict.predict_steps` and `measure_steps`.
    """
    predicted = predict_steps(model, cluster, cases)
    taken = measure_steps(
        model,
        cases,
        threads=threads,
        device=device,
        rounds=rounds,
        lap_rounds=lap_rounds,
        seed=seed,
        tell=tell,
    )
    blamed = suspects(model, cluster, cases, taken)
    return compare_steps(cases.all, predicted, taken, blamed, bound=bound)


def compare_steps(
    cases: Sequence[Case],
    predicted: Sequence[Predicted],
    taken: Sequence[Measured],
    blamed: Sequence[Suspect] = (),
    *,
    bound: float = BOUND,
) -> StepsFound:
    """Put predictions and measurements of the same cases together.

    Raises
    ------
    ValueError
        If stages or kernels of the two have other names: one of them runs another step.
    """
    steps: list[StepRow] = []
    stages: list[StepRow] = []
    kernels: list[StepRow] = []
    for case, ours, real in zip(cases, predicted, taken, strict=True):
        steps.append(_row(case, ours.total_s, real.total_s, bound))
        for part in _same_names(ours.stage_s, real.stage_s):
            row = _row(case, ours.stage_s[part], real.stage_s[part], bound, part=part)
            stages.append(row)
        for part in _same_names(ours.kernel_s, real.kernel_s):
            limits = ours.limit_s[part]
            limit = max(LIMITS, key=lambda name: float(limits[name].sum()))
            row = _row(
                case, ours.kernel_s[part], real.kernel_s[part], bound, part=part, limit=limit
            )
            kernels.append(row)
    return StepsFound(
        steps=tuple(steps),
        stages=tuple(stages),
        kernels=tuple(kernels),
        lap_cost=float(np.median([real.lap_cost for real in taken])),
        suspects=tuple(blamed),
        bound=bound,
        rounds=len(taken[0].total_s),
        lap_rounds=len(taken[0].lapped_s),
    )


def _row(
    case: Case, predicted: Floats, samples: Floats, bound: float, part: str = "", limit: str = ""
) -> StepRow:
    time, floor = measured(samples)
    return StepRow(
        label=f"{case.label}: {part}" if part else case.label,
        predicted_s=float(predicted.mean()),
        measured_s=time,
        floor=floor,
        bound=bound,
        phase=case.phase,
        tokens=case.tokens,
        load=case.load,
        part=part,
        limit=limit,
    )


def _same_names(predicted: Mapping[str, Floats], real: Mapping[str, Floats]) -> list[str]:
    if predicted.keys() != real.keys():
        odd = sorted(predicted.keys() ^ real.keys())
        raise ValueError(
            f"{', '.join(odd)}: only predicted or only measured -- a real step has the kernels of "
            "its prediction -- give their laps the same names"
        )
    return list(predicted)
