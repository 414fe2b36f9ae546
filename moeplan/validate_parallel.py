"""Expert parallel on this machine: placements predicted, run for real, and put in order.

Two pinned processes (or more) run the same decode steps under several placements in turn; a step
takes from the last rank's begin to the last rank's end. The prediction is the simulator's: count,
lower, price, play. A pair of placements is decided where their predicted gap is above three times
the measured spread; then the faster one must be measured faster too. For other pairs the answer is
"equal". Seconds; gaps are relative to the mean of the two.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from hwmodels.cluster import Cluster
from moeplan.reference import import_kernels
from moeplan.validate_parallel_cases import (
    LOADS,
    ParallelCase,
    ParallelCases,
    ParallelLoad,
    make_parallel_cases,
)
from moeplan.validate_verdict import BOUND, NOISY, Row, Summary, Verdict, measured
from simulator.deployment import Deployment
from simulator.loads import count_loads
from simulator.lowering import lower
from simulator.playing import play_steps
from simulator.pricing import PricedStep, price_step
from traces.model_spec import ModelSpec
from traces.routing_trace import RoutingTrace

if TYPE_CHECKING:
    from kernels_ref.parallel_steps import PlacedSteps

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
DECIDED = 3.0
"""A predicted gap of so many measured spreads decides a pair."""
PairVerdict = Literal["ok", "off", "equal", "undecidable"]
"""``equal``: the gap is too small to say; it is neither right nor wrong."""
ROUNDS = 7
"""Interleaved rounds."""


@dataclass(frozen=True, kw_only=True)
class ParallelRow(Row):
    """Step time of one placement."""

    load: str
    batch: int
    placement: str


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two placements on the same steps."""

    first: ParallelRow
    second: ParallelRow

    @property
    def predicted_gap(self) -> float:
        """How much slower the second is predicted, relative."""
        return _gap(self.first.predicted_s, self.second.predicted_s)

    @property
    def measured_gap(self) -> float:
        """How much slower the second was measured, relative."""
        return _gap(self.first.measured_s, self.second.measured_s)

    @property
    def spread(self) -> float:
        """Larger floor of the two."""
        return max(self.first.floor, self.second.floor)

    @property
    def decided(self) -> bool:
        """Whether the prediction claims an order, on a measurement that can tell."""
        return self.spread <= NOISY and abs(self.predicted_gap) > DECIDED * self.spread

    @property
    def answer(self) -> str:
        """What the prediction says: the faster placement, or ``equal``."""
        if abs(self.predicted_gap) <= DECIDED * self.spread:
            return "equal"
        return (self.first if self.predicted_gap > 0 else self.second).placement

    @property
    def verdict(self) -> PairVerdict:
        """Whether that is what was measured."""
        if self.spread > NOISY:
            return "undecidable"
        if not self.decided:
            return "equal"
        return "ok" if self.predicted_gap * self.measured_gap > 0 else "off"

    def to_dict(self) -> dict[str, Any]:
        """Return both placements, gaps, spread, answer and verdict as plain JSON data."""
        return {
            "load": self.first.load,
            "batch": self.first.batch,
            "first": self.first.placement,
            "second": self.second.placement,
            "predicted_gap": self.predicted_gap,
            "measured_gap": self.measured_gap,
            "spread": self.spread,
            "answer": self.answer,
            "verdict": self.verdict,
        }


@dataclass(frozen=True, kw_only=True)
class ParallelFound:
    """What comparing placements found."""

    ranks: int
    rounds: int
    bound: float
    rows: tuple[ParallelRow, ...]
    planned_as: dict[str, str]
    """By load, which of the planner's candidates ``planned`` is."""

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """All pairs of placements on the same steps."""
        steps: dict[tuple[str, int], list[ParallelRow]] = {}
        for row in self.rows:
            steps.setdefault((row.load, row.batch), []).append(row)
        return tuple(
            Pair(first=first, second=second)
            for rows in steps.values()
            for first, second in combinations(rows, 2)
        )

    @property
    def summary(self) -> Summary:
        """Errors of the step times."""
        return Summary.of("expert parallel step times", self.rows)

    @property
    def order(self) -> Verdict:
        """Whether all decided pairs are in the measured order; undecidable where there is none."""
        verdicts = {pair.verdict for pair in self.pairs}
        if "off" in verdicts:
            return "off"
        return "ok" if "ok" in verdicts else "undecidable"

    @property
    def passed(self) -> bool:
        """Whether times are within the bounds and all decided pairs are ordered rightly."""
        return self.order == "ok" and self.summary.passed(self.bound)

    def count(self, verdict: PairVerdict) -> int:
        """Pairs with a verdict."""
        return sum(pair.verdict == verdict for pair in self.pairs)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON data."""
        return {
            "ranks": self.ranks,
            "rounds": self.rounds,
            "planned_as": self.planned_as,
            "steps": [row.to_dict() for row in self.rows],
            "summary": self.summary.to_dict() | {"verdict": self.summary.verdict(self.bound)},
            "pairs": [pair.to_dict() for pair in self.pairs],
            "order": self.order,
        }


def validate_parallel(
    model: ModelSpec,
    trace: RoutingTrace,
    cluster: Cluster,
    *,
    batches: Sequence[int] = (64, 256),
    loads: Sequence[ParallelLoad] = LOADS,
    windows: int = 2,
    rounds: int = ROUNDS,
    threads: int = 1,
    bound: float = BOUND,
    seed: int = 0,
    crowded: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> ParallelFound:
    """Predict and measure decode steps under several placements of the experts.

    Parameters
    ----------
    model
        Geometry that the reference decoder runs, in fp32.
    trace
        All requests; placements are made on the earlier half, steps taken from the later one.
    cluster
        This machine, as many ranks as processes.
    batches, loads, windows, seed
        See `make_parallel_cases`.
    rounds
        Samples of each step, at least 5.
    threads
        Cores of each process.
    bound
        Largest |error| of a step time that passes.
    crowded
        Let processes share a core: a check that it runs, no measurement.
    tell
        Told what begins.

    Raises
    ------
    InputError
        Without torch or without enough cores, for a model in other formats, and as
        `make_parallel_cases`.
    """
    kernels = import_kernels()
    ranks = cluster.num_ranks
    if (note := kernels.crowding(ranks, threads)) and not crowded:
        raise InputError(f"expert parallel: {note} -- give fewer ranks or threads")
    _check_formats(model)
    cases = make_parallel_cases(
        model, cluster, trace, batches=batches, loads=loads, windows=windows, seed=seed, tell=tell
    )
    tell(f"run {len(loads)} loads under {len(cases.deployments[loads[0]])} placements in turn")
    samples = _measure(
        model, cluster, cases, threads=threads, rounds=rounds, seed=seed, crowded=crowded
    )
    rows = [
        _row(case, name, predict_parallel(model, cluster, case, deployment), taken, bound)
        for (case, name, deployment), taken in zip(each_case(cases), samples, strict=True)
    ]
    planned_as = {str(load): name for load, name in cases.planned_as.items()}
    return ParallelFound(
        ranks=ranks, rounds=rounds, bound=bound, rows=tuple(rows), planned_as=planned_as
    )


def predict_parallel(
    model: ModelSpec, cluster: Cluster, case: ParallelCase, deployment: Deployment
) -> Floats:
    """Return the simulator's step times of a case under one placement, [windows]."""
    layout = deployment.layout_for(model, cluster)
    priced = price_parallel(model, cluster, case, deployment)
    played = play_steps(priced.items, priced.seconds, layout, model.num_layers, decode=True)
    return played.step_times


def price_parallel(
    model: ModelSpec, cluster: Cluster, case: ParallelCase, deployment: Deployment
) -> PricedStep:
    """Return the seconds of every kernel of a case under one placement, [windows, items, ranks]."""
    loads = count_loads(
        model,
        case.trace,
        case.composition,
        deployment.dispatcher_for(model, cluster),
        layout=deployment.layout_for(model, cluster),
        node_of=cluster.node_of,
    )
    return price_step(lower(model, loads), loads, cluster)


def each_case(cases: ParallelCases) -> list[tuple[ParallelCase, str, Deployment]]:
    """Return every case under every placement made for its load, and the placement's name."""
    return [
        (case, name, deployment)
        for case in cases.cases
        for name, deployment in cases.deployments[case.load].items()
    ]


def _measure(
    model: ModelSpec,
    cluster: Cluster,
    cases: ParallelCases,
    *,
    threads: int,
    rounds: int,
    seed: int,
    crowded: bool,
) -> list[Floats]:
    """Run every case under every placement; [rounds, windows] s, as `each_case` has them."""
    from kernels_ref.parallel_steps import time_parallel_steps

    lengths = [(own - 1).tolist() for own in cases.contexts]
    together: dict[tuple[ParallelLoad, str], list[int]] = {}
    for at, (case, name, _) in enumerate(each_case(cases)):
        together.setdefault((case.load, name), []).append(at)  # one change of placement for all
    placed = [place_steps(model, cluster, cases, members) for members in together.values()]
    taken = time_parallel_steps(
        model, placed, lengths, threads=threads, rounds=rounds, seed=seed, crowded=crowded
    )
    found: dict[int, Floats] = {}
    for members, seconds in zip(together.values(), taken, strict=True):
        found |= zip(members, np.split(seconds, len(members), axis=1), strict=True)
    return [found[at] for at in range(len(found))]


def place_steps(
    model: ModelSpec, cluster: Cluster, cases: ParallelCases, members: Sequence[int]
) -> "PlacedSteps":
    """Return the steps of all cases under one placement, as plain slots."""
    from kernels_ref.parallel_steps import PlacedSteps

    each = each_case(cases)
    dispatcher = each[members[0]][2].dispatcher_for(model, cluster)
    steps = []
    for at in members:
        case = each[at][0]
        for number, batch in enumerate(case.composition.batches):
            slots = dispatcher.assign(case.trace.experts[batch.rows], batch.home, number)
            steps.append(
                tuple(
                    slots[batch.home == rank].swapaxes(0, 1).astype(np.int64)
                    for rank in range(cluster.num_ranks)
                )
            )
    slot_map = dispatcher.placement.slots.astype(np.int64)
    return PlacedSteps(slot_map_LS=slot_map, steps=tuple(steps))


def _row(
    case: ParallelCase, placement: str, predicted: Floats, taken: Floats, bound: float
) -> ParallelRow:
    time, floor = measured(taken)
    return ParallelRow(
        label=f"decode {case.batch}, {case.load}: {placement}",
        predicted_s=float(predicted.mean()),
        measured_s=time,
        floor=floor,
        bound=bound,
        load=case.load,
        batch=case.batch,
        placement=placement,
    )


def _gap(first: float, second: float) -> float:
    return 2 * (second - first) / (first + second)


def _check_formats(model: ModelSpec) -> None:
    formats = {model.weight_dtype, model.expert_dtype, model.activation_dtype, model.kv_dtype}
    if formats != {"fp32"}:
        raise InputError(
            f"{model.name} has numbers in {', '.join(sorted(formats))} -- processes run fp32 -- "
            "set torch_dtype to float32, and no quantisation"
        )
