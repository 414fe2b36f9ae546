"""Best-first search over layouts and batch sizes, with a bound that says when to stop.

Points are simulated in the order of what they could be at best. When the next one could not beat
the best found, the choice is proved: no other layout wins within the model. What is compared is
tokens/s under the limit on TPOT; then, for the front, the step time at each batch size.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from basis.errors import InfeasibleError
from planner.layouts import Candidate
from planner.layouts_measured import Measured, Simulator

SHORTLIST = 5
"""Layouts whose experts are placed fully from the start."""
_BEST_SHARE = 0.6  # of the time for the best point, before the front has its turn
_PROMOTE = 0.05  # of the best's tokens/s: a layout this close is placed fully too

Point = tuple[int, int]
"""Indices of layout and batch size."""


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What the search has shown."""

    proved: bool
    """No layout that was not simulated could beat the choice, even by its bound."""
    points: int
    """Pairs of a layout and a batch size that fit."""
    simulated: int
    open_points: int
    """Not simulated, with a bound better than the choice."""
    open_gain: float
    """What the best of those could gain in tokens/s at most, relative to the choice."""
    sizes_proved: int
    """Batch sizes at which no layout can be faster than the fastest simulated one (or none is on
    the front)."""
    sizes: int

    @property
    def statement(self) -> str:
        """The proof in a sentence."""
        done = f"{self.simulated} of {self.points} points simulated"
        front = f"the front is proved at {self.sizes_proved} of {self.sizes} batch sizes"
        if self.proved:
            return (
                "optimal within the model: the bound of every other layout and batch size is "
                f"below the choice ({done}; {front})"
            )
        return (
            f"not proved: {self.open_points} points that were not simulated could by their bound "
            f"gain up to {self.open_gain:.1%} ({done}; {front})"
        )


@dataclass(kw_only=True)
class Search:
    """State of one search."""

    simulator: Simulator
    candidates: Sequence[Candidate]
    sizes: Sequence[int]
    bounds: NDArray[np.float64]
    """Lower bound of the mean step time, s, [layouts, sizes]; infinite where it does not fit."""
    limit: float
    """Most seconds of TPOT; infinite = no limit."""
    start: float
    """Of `time.monotonic`."""
    seconds: float
    """Wall time to spend from there."""
    progress: Callable[[str], None]
    measured: dict[Point, Measured] = field(default_factory=dict)
    failed: dict[Point, str] = field(default_factory=dict)
    """Points that did not fit after all, and why."""

    def run(self) -> None:
        """Simulate the shortlist, then what could beat it, then the rest of the front."""
        for layout, size in self._shortlist():
            self._simulate((layout, size), full=True)
        self._prove_best(_BEST_SHARE)
        self._prove_front()
        self._prove_best(1.0)

    @property
    def optimistic(self) -> NDArray[np.float64]:
        """Most tokens/s that each point can reach under the limit, [layouts, sizes]."""
        reach = np.asarray(self.sizes) / self.bounds
        return np.where(self.bounds <= self.limit, reach, 0.0)

    def ranking(self) -> list[Measured]:
        """Best simulated point of each layout that keeps the limit, best layout first."""
        best: dict[str, Measured] = {}
        for found in self.measured.values():
            name = found.candidate.name
            rival = best.get(name)
            better = rival is None or found.tokens_per_second > rival.tokens_per_second
            if found.tpot_p99 <= self.limit and better:
                best[name] = found
        return sorted(best.values(), key=lambda m: -m.tokens_per_second)

    def front(self) -> list[Measured]:
        """Return the simulated points that none beats in tokens/s and TPOT, by ascending TPOT."""
        kept: list[Measured] = []
        for found in sorted(self.measured.values(), key=lambda m: (m.step_time, -m.size)):
            if not kept or found.tokens_per_second > kept[-1].tokens_per_second:
                kept.append(found)
        return kept

    def settle(self, found: Measured, again: Measured) -> None:
        """Put a better simulation of a point in the place of an earlier one."""
        point = next(point for point, m in self.measured.items() if m is found)
        self.measured[point] = again

    def proof(self, choice: Measured) -> Proof:
        """Say what is shown about a choice."""
        best = choice.tokens_per_second
        reach = self.optimistic
        for point in [*self.measured, *self.failed]:
            reach[point] = 0.0
        return Proof(
            proved=bool(reach.max() <= best),
            points=int(np.isfinite(self.bounds).sum()),
            simulated=len(self.measured),
            open_points=int((reach > best).sum()),
            open_gain=float(max(reach.max() / best - 1, 0.0)),
            sizes_proved=sum(self._next_at(size) is None for size in range(len(self.sizes))),
            sizes=len(self.sizes),
        )

    def _shortlist(self) -> list[Point]:
        """Best layouts by their bound, each at the batch size where it could be best."""
        reach = self.optimistic
        order = np.argsort(-reach.max(axis=1), kind="stable")[:SHORTLIST]
        return [(int(n), int(reach[n].argmax())) for n in order if reach[n].max() > 0]

    def _prove_best(self, share: float) -> None:
        """Simulate from the best bound on, until no other can be even the runner-up.

        Stops when a share of the time is spent.
        """
        for point in self._by_reach():
            ranking = self.ranking()
            rival = ranking[1].tokens_per_second if len(ranking) > 1 else 0.0
            if self.optimistic[point] <= rival or self._late(share):
                return
            self._simulate(point)

    def _by_reach(self) -> Iterator[Point]:
        reach = self.optimistic
        for flat in np.argsort(-reach, axis=None, kind="stable"):
            layout, size = np.unravel_index(flat, reach.shape)
            if reach[layout, size] > 0:
                yield int(layout), int(size)

    def _prove_front(self) -> None:
        """Simulate at each batch size in turn what could be fastest there."""
        left = set(range(len(self.sizes)))
        while left and not self._late():
            for size in sorted(left):
                point = self._next_at(size)
                if point is None:
                    left.discard(size)
                elif not self._late():
                    self._simulate(point)

    def _next_at(self, size: int) -> Point | None:
        """Return the layout that could be fastest at a batch size; None if that is settled."""
        done = [n for n, s in [*self.measured, *self.failed] if s == size]
        bounds = self.bounds[:, size].copy()
        bounds[done] = np.inf
        layout = int(bounds.argmin())
        bound = bounds[layout]
        reach = self.sizes[size] / bound
        settled = any(
            m.step_time <= bound and m.tokens_per_second >= reach for m in self.measured.values()
        )
        return None if settled or not np.isfinite(bound) else (layout, size)

    def _simulate(self, point: Point, full: bool = False) -> None:
        """Measure a point once; place its experts fully if it comes near the best."""
        if point in self.measured or point in self.failed:
            return
        candidate, size = self.candidates[point[0]], self.sizes[point[1]]
        self.progress(f"{candidate.name} at {size} requests")
        bound = float(self.bounds[point])
        try:
            found = self.simulator.measure(candidate, size, bound, full=full)
            if not found.full and found.step_time <= (1 + _PROMOTE) * self._fastest(point[1]):
                found = self.simulator.measure(candidate, size, bound, full=True)
        except InfeasibleError as error:
            self.failed[point] = str(error)
            return
        self.measured[point] = found

    def _fastest(self, size: int) -> float:
        """Least step time simulated at a batch size; infinite where none was."""
        times = [m.step_time for (_, s), m in self.measured.items() if s == size]
        return min(times, default=np.inf)

    def _late(self, share: float = 1.0) -> bool:
        return time.monotonic() >= self.start + share * self.seconds
