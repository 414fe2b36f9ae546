"""Operators on shapes that the calibration did not draw: measured here and now, and predicted.

Every kernel is timed cold on fresh random shapes, in interleaved rounds. Where predictions are off,
one figure of the machine at a time (bandwidth, peak FLOP/s, fixed times) is changed for a try, to
see which of them would explain it. Seconds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from hwmodels.cluster import Cluster
from hwmodels.cost import price
from hwmodels.ops import Op
from moeplan.reference import import_kernels
from moeplan.validate_blame import FACTORS, Suspect
from moeplan.validate_predict import LIMITS, Limit, with_limit
from moeplan.validate_verdict import BOUND, NOISY, Row, Summary, summaries
from moeplan.validate_view import conclusion, show_rows, show_summaries, suspicion

SEED = 1
"""Of the shapes; the calibration's is 0."""
SCALE = 0.25
"""Shapes, as a share of the calibration's."""
ROUNDS = 7
_WORST = 8  # operators printed one by one
_SIZES = (
    "m", "n", "k", "tokens", "context", "pairs", "rows", "row_bytes", "hidden", "width",
    "experts", "top_k", "num_heads", "num_kv_heads", "head_dim", "bytes",
)  # fmt: skip
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class OperatorRow(Row):
    """One operator."""

    kernel: str
    limit: Limit
    """What most of its predicted time answers to."""


@dataclass(frozen=True, kw_only=True)
class OperatorsFound:
    """What validating operators found."""

    rows: tuple[OperatorRow, ...]
    suspects: tuple[Suspect, ...]
    """Figures of the machine that would explain the error, best first."""
    bound: float

    @cached_property
    def summary(self) -> Summary:
        """All operators."""
        return Summary.of("operators", self.rows)

    @property
    def passed(self) -> bool:
        """Whether the errors of the decidable operators are within the bounds."""
        return self.summary.passed(self.bound)

    @property
    def by_kernel(self) -> tuple[Summary, ...]:
        """Operators by kernel."""
        return summaries(self.rows, lambda row: row.kernel)

    @property
    def by_limit(self) -> tuple[Summary, ...]:
        """Operators by what their time answers to."""
        return summaries(
            sorted(self.rows, key=lambda row: LIMITS.index(row.limit)), lambda row: row.limit
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON data."""
        return {
            "passed": self.passed,
            "bound": self.bound,
            "summary": self.summary.to_dict(),
            "by_kernel": [each.to_dict() for each in self.by_kernel],
            "by_limit": [each.to_dict() for each in self.by_limit],
            "suspects": [each.to_dict() for each in self.suspects],
            "rows": [row.to_dict() for row in self.rows],
        }


@dataclass(frozen=True, kw_only=True)
class Timed:
    """An operator with its measured time."""

    kernel: str
    op: Op
    seconds: float
    floor: float


def validate_operators(
    cluster: Cluster,
    *,
    threads: int,
    device: str = "cpu",
    dtype: str = "fp32",
    rounds: int = ROUNDS,
    bound: float = BOUND,
    tell: Callable[[str], None] = lambda text: None,
) -> OperatorsFound:
    """Measure fresh shapes and compare them with the cluster's prices.

    Parameters
    ----------
    cluster : Cluster
        What `moeplan calibrate --device` wrote.
    threads : int
        Pinned threads, as calibrated.
    device, dtype : str
        Where and in what format.
    rounds : int
        Interleaved rounds.
    bound : float
        Largest median |error| that passes.
    tell : callable
        Told what is being done.

    Raises
    ------
    InputError
        If torch is not installed.
    """
    ref = import_kernels()
    with ref.pinned(threads):
        machine = ref.this_machine(device)
        operands = ref.Operands(device=device, cache_bytes=machine.cache_bytes)
        seen = {(c.kernel, *c.shape.items()) for c in ref.draw_cases(dtype)}
        cases = [
            c
            for c in ref.draw_cases(dtype, seed=SEED, scale=SCALE)
            if (c.kernel, *c.shape.items()) not in seen
        ]
        tell(f"time {len(cases)} operators")
        samples = ref.measure_cases(cases, operands, dtype=dtype, rounds=rounds, seed=SEED)
    timed = [
        Timed(kernel=s.case.kernel, op=s.case.op, seconds=s.seconds, floor=s.floor) for s in samples
    ]
    return compare_operators(timed, cluster, bound=bound)


def compare_operators(
    timed: Sequence[Timed], cluster: Cluster, *, bound: float = BOUND
) -> OperatorsFound:
    """Set measured operators beside their prices."""
    seconds = _prices(timed, cluster)
    gains = np.array([seconds - _prices(timed, with_limit(cluster, li, 1.01)) for li in LIMITS])
    rows = tuple(
        OperatorRow(
            label=f"{each.kernel} {_words(each.op)}",
            kernel=each.kernel,
            limit=LIMITS[int(gains[:, at].argmax())],
            predicted_s=float(seconds[at]),
            measured_s=each.seconds,
            floor=each.floor,
            bound=bound,
        )
        for at, each in enumerate(timed)
    )
    return OperatorsFound(rows=rows, suspects=_suspects(timed, cluster), bound=bound)


def _suspects(timed: Sequence[Timed], cluster: Cluster) -> tuple[Suspect, ...]:
    """Try each limit; the one that explains most comes first; none without decidable rows."""
    quiet = [each for each in timed if each.floor <= NOISY]
    if not quiet:
        return ()
    real = np.array([each.seconds for each in quiet])

    def wrong(machine: Cluster) -> float:
        return float(np.abs(np.log(_prices(quiet, machine) / real)).mean())

    as_is, found = wrong(cluster), []
    for limit in LIMITS:
        left, better = min((wrong(with_limit(cluster, limit, b)), b) for b in FACTORS)
        factor = 1 / better if limit == "fixed time" else better
        found.append(Suspect(limit=limit, factor=factor, wrong=as_is, left=left))
    return tuple(sorted(found, key=lambda suspect: suspect.left))


def _prices(timed: Sequence[Timed], cluster: Cluster) -> Floats:
    return np.array([price(each.op, cluster).seconds[0] for each in timed])


def _words(op: Op) -> str:
    """Name the sizes of a single operation."""
    sizes = {f.name: getattr(op, f.name) for f in fields(op) if f.name in _SIZES}
    shown = {name: int(np.ravel(size)[0]) for name, size in sizes.items() if size is not None}
    loads = getattr(op, "tokens_per_expert", None)
    if loads is not None:
        shown |= {"rows": int(loads.sum()), "active": int((loads > 0).sum())}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def show_operators(screen: Console, found: OperatorsFound) -> None:
    """Print what validating operators found."""
    screen.print("\nOperators on shapes that the calibration did not draw", style="bold")
    show_summaries(screen, found.by_kernel, "kernel", found.bound)
    show_summaries(screen, found.by_limit, "what limits it", found.bound)
    decidable = [row for row in found.rows if row.decidable]
    worst = sorted(decidable, key=lambda row: -abs(row.error))[:_WORST]
    show_rows(screen, worst, "worst")
    remarks = [conclusion(found.summary, found.bound)]
    if not found.passed:
        remarks.append(suspicion(found.suspects))
    for remark in filter(None, remarks):
        screen.print(remark, highlight=False, markup=False)
