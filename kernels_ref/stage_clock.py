"""Where the seconds of a real step go: one lap per kernel, summed by stage and by kernel name.

A lap ends at each kernel boundary and takes in all that ran since the lap before, Python included,
so that the laps of a step add up to it. The names are those that the simulator gives its works
("qkv", "attention", "router", "experts", ...): predicted and measured stand side by side.
"""

from dataclasses import dataclass
from time import perf_counter_ns

import torch

from hwmodels.ops import Stage


@dataclass(frozen=True, kw_only=True)
class StepSeconds:
    """What one step took, s."""

    total_s: float
    """From the start of the step to its end."""
    stage_s: dict[Stage, float]
    """By stage; empty where the clock takes the total only."""
    kernel_s: dict[str, float]
    """By kernel name, over all layers; empty where the clock takes the total only."""


class StageClock:
    """Stop watch of one step at a time: ``start``, a ``lap`` after each kernel, ``stop``.

    Parameters
    ----------
    device
        Where the kernels run. On CUDA a mark is an event in the current stream, and only
        `seconds` waits for the device.
    laps
        False: laps cost nothing and only the total is taken.
    """

    def __init__(self, device: torch.device | str = "cpu", *, laps: bool = True) -> None:
        self.laps = laps
        self._cuda = torch.device(device).type == "cuda"
        self._names: list[tuple[Stage, str]] = []
        self._times: list[int] = []
        self._events: list[torch.cuda.Event] = []
        self._ran: bool = False

    def start(self) -> None:
        """Begin a step; the marks of the one before are dropped."""
        self._names.clear()
        self._times.clear()
        self._ran = False
        self._mark()

    def lap(self, stage: Stage, kernel: str) -> None:
        """Everything since the last mark was this kernel."""
        if self.laps:
            self._names.append((stage, kernel))
            self._mark()

    def stop(self) -> None:
        """End the step."""
        self._mark()
        self._ran = True

    def seconds(self) -> StepSeconds:
        """Return what the last step took.

        Raises
        ------
        ValueError
            If no step has ended.
        """
        if not self._ran:
            raise ValueError("the clock has no step -- one that was started and stopped -- run one")
        marks = self._marks_s()
        stage_s: dict[Stage, float] = {}
        kernel_s: dict[str, float] = {}
        for (stage, kernel), begin, end in zip(self._names, marks[:-2], marks[1:-1], strict=True):
            stage_s[stage] = stage_s.get(stage, 0.0) + end - begin
            kernel_s[kernel] = kernel_s.get(kernel, 0.0) + end - begin
        return StepSeconds(total_s=marks[-1] - marks[0], stage_s=stage_s, kernel_s=kernel_s)

    def laps_s(self) -> tuple[tuple[str, float], ...]:
        """Return kernel and seconds of each lap of the last step, in order."""
        ends = self._marks_s()
        pairs = zip(self._names, ends[:-2], ends[1:-1], strict=True)
        return tuple((kernel, end - begin) for (_, kernel), begin, end in pairs)

    def _mark(self) -> None:
        if not self._cuda:
            self._times.append(perf_counter_ns())
            return
        if len(self._events) == len(self._times):  # events are made once and used again
            self._events.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
        self._events[len(self._times)].record()
        self._times.append(0)

    def _marks_s(self) -> list[float]:
        """Seconds of each mark since the first."""
        if not self._cuda:
            return [(time - self._times[0]) * 1e-9 for time in self._times]
        events = self._events[: len(self._times)]
        events[-1].synchronize()
        return [events[0].elapsed_time(event) * 1e-3 for event in events]
