"""Scores of predicted serving runs: errors, rank correlation, and the order of layouts.

An error is |predicted / measured - 1|. Layouts are compared in pairs that used equally many GPUs
for the same checkpoint, system, engine version, lengths and concurrency.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.stats import beta, spearmanr

from hwmodels.silicon.served_rows import ServedRow
from moeplan.served import Prediction
from moeplan.served_models import formats_of

QUANTITIES = ("tpot", "latency", "ttft")
_CONTRADICTION = 1.5
_WITNESSES = 2


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Errors of one quantity over some runs."""

    median: float
    mean: float
    ratio: float
    """Median of predicted / measured: the bias."""
    rank: float
    """Spearman's rank correlation of predicted and measured; nan below three runs."""
    runs: int


def errors(predictions: Sequence[Prediction], quantity: str) -> Errors:
    """Score one of `QUANTITIES`."""
    predicted = np.array([getattr(p, quantity) for p in predictions])
    measured = np.array([getattr(p.row, quantity) for p in predictions])
    ratio = predicted / measured
    several = len(ratio) > 2
    return Errors(
        median=float(np.median(abs(ratio - 1))),
        mean=float(np.mean(abs(ratio - 1))),
        ratio=float(np.median(ratio)),
        rank=float(spearmanr(predicted, measured).statistic) if several else float("nan"),
        runs=len(ratio),
    )


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two layouts of equally many GPUs: the ratio of their times, measured and predicted."""

    measured: float
    predicted: float
    key: tuple[object, ...]

    @property
    def right(self) -> bool:
        """Whether the faster one was predicted to be the faster one."""
        return (self.measured > 1) == (self.predicted > 1)


def pairs(predictions: Iterable[Prediction], quantity: str = "tpot") -> list[Pair]:
    """Return every pair of layouts that differ in nothing else; repeated runs are averaged."""
    groups: dict[tuple[object, ...], dict[object, list[Prediction]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for p in predictions:
        r = p.row
        formats = formats_of(r.family, r.precision, r.system)["expert_dtype"]
        same = (r.cell, formats, r.version, r.inputs, r.outputs, r.concurrency, r.drafts > 0)
        groups[(*same, r.ranks.gpus)][r.ranks].append(p)
    found = []
    for key, layouts in groups.items():
        times = [
            (
                float(np.exp(np.mean([np.log(getattr(p.row, quantity)) for p in runs]))),
                float(np.exp(np.mean([np.log(getattr(p, quantity)) for p in runs]))),
            )
            for runs in layouts.values()
        ]
        for one, other in combinations(times, 2):
            found.append(Pair(measured=one[0] / other[0], predicted=one[1] / other[1], key=key))
    return found


def interval(right: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """Return the Clopper-Pearson interval of a share."""
    if not count:
        return 0.0, 1.0
    tail = (1 - level) / 2
    low = beta.ppf(tail, right, count - right + 1) if right else 0.0
    high = beta.ppf(1 - tail, right + 1, count - right) if right < count else 1.0
    return float(low), float(high)


def contradicted(rows: Iterable[ServedRow]) -> set[str]:
    """Return the names of runs that measurement itself contradicts.

    By Little's law ``concurrency x (latency - TTFT) / latency`` requests decode on average. A run
    is contradicted where at least two others of its checkpoint, system, engine, layout and lengths
    had fewer decoding, yet took over 1.5 times as long per token: more work in less time.
    """
    alike: dict[tuple[object, ...], list[ServedRow]] = defaultdict(list)
    for r in rows:
        alike[r.cell, r.precision, r.inputs, r.outputs, r.ranks, r.drafts].append(r)
    found = set()
    for group in alike.values():
        decoding = [r.concurrency * (1 - r.ttft / r.latency) for r in group]
        for row, many in zip(group, decoding, strict=True):
            slower = [
                other.tpot > _CONTRADICTION * row.tpot and few < many
                for other, few in zip(group, decoding, strict=True)
            ]
            if sum(slower) >= _WITNESSES:
                found.add(row.name)
    return found
