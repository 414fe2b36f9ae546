"""The configuration bound: a lower bound on the busiest rank's load by column generation.

If all ranks stay within T, a placement is G patterns (see `planner.patterns`) that serve every
expert once. Relaxing "G patterns" to fractions gives a linear program with one column per
pattern. By Farkas' lemma any prices u prove T impossible when ``sum u > G V(T, u)``, with
V the best pattern's value at capacity T. Column generation only looks for good prices; the
proof is one exact dynamic program, whatever the prices are. One layer, even dispatch.
"""

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.bounds import ROUNDING, replica_range
from planner.patterns import PatternTable
from planner.solver import ColumnMaster

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_SEARCH_UNITS = 1500  # capacity units when looking for prices
_PROOF_UNITS = 20_000  # most capacity units in a proof
_LEAST_GAP = 2e-4  # finer than this the capacity grids cannot see
_LIGHT = 0.25  # of the busiest load: experts with at most two replicas in the search
_TABLE_ELEMENTS = 60_000_000  # of the remembered tables (int32): 240 MB


def price_bound(
    loads: Floats, num_slots: int, num_ranks: int, *, upper: float, prices: Floats, units: int
) -> float:
    """Largest T that the prices prove: no placement has a busiest rank below it.

    Parameters
    ----------
    loads, prices : float array [E]
        Any prices are valid; those from `configuration_bound` are good.
    upper : float
        Load of a known placement. The result is the minimum of `upper` and the proved bound.
    units : int
        Capacity units between 0 and `upper`; weights are rounded down to units, so a finer
        grid gives a tighter bound.
    """
    least, most = replica_range(loads, num_slots, num_ranks, upper)
    table = PatternTable(loads, least, most, num_slots // num_ranks, upper, units, rounding="down")
    values, total = table.best_values(prices, keep=False)
    possible = np.flatnonzero(num_ranks * values >= total)
    # A load below k units has at most k - 1 whole units, and k - 1 is impossible.
    smallest = int(possible[0]) if len(possible) else units
    return smallest * table.unit * (1 - ROUNDING)


@dataclass(frozen=True, kw_only=True, eq=False)
class ConfigurationBound:
    """A proved bound, and what column generation learned on the way."""

    bound: float
    """No placement has a busiest rank below it."""
    prices: Floats | None
    """Prices that prove it, in order of descending load; None if the bound was not raised."""
    counts: Ints | None
    """Replica counts of the relaxed solution at the lowest possible capacity, rounded, [E]."""


def configuration_bound(
    loads: Floats,
    slots: NDArray[np.integer],
    num_ranks: int,
    *,
    lower: float,
    upper: float,
    gap: float,
    deadline: float,
    hint: Floats | None = None,
) -> "ConfigurationBound":
    """Raise the proved bound `lower` towards `upper` by column generation.

    Tries to prove ``upper (1 - gap)``; where the linear program says that this is possible,
    it bisects downwards to the strongest bound that the program can give.

    Parameters
    ----------
    loads : float array [E]
    slots : int array [P]
        The known placement; its lighter ranks are the first columns.
    lower, upper : float
        Proved bound and load of `slots`.
    gap : float
        Relative gap that is good enough.
    deadline : float
        `time.monotonic` value at which to stop.
    hint : float array [E], optional
        Prices that were good for a similar layer, in order of descending load; tried first.
    """
    gap = max(gap, _LEAST_GAP)
    search = _Search(loads, slots, num_ranks, upper, gap, deadline)
    order = np.argsort(-loads, kind="stable")
    if hint is not None:
        search.try_prices(hint[np.argsort(order, kind="stable")])
    possible, target = upper, upper * (1 - gap / 2)
    impossible = max(lower, search.bound)
    while impossible < upper * (1 - gap) and possible - impossible > upper * gap / 4:
        search.rule_out(target)
        if time.monotonic() >= deadline:
            break
        if search.bound < target - upper * gap / 16:
            possible = target  # not proved: taken as possible, so that the interval shrinks
        impossible = max(lower, search.bound)
        target = (impossible + possible) / 2
    raised = search.prices is not None and search.bound > lower
    return ConfigurationBound(
        bound=min(search.bound, upper) if raised else lower,
        prices=search.prices[order] if raised and search.prices is not None else None,
        counts=search.counts,
    )


class _Search:
    """Column generation for one layer; keeps its columns from one capacity to the next."""

    def __init__(
        self,
        loads: Floats,
        slots: NDArray[np.integer],
        num_ranks: int,
        upper: float,
        gap: float,
        deadline: float,
    ) -> None:
        self.loads = loads
        self.num_slots = len(slots)
        self.num_ranks = num_ranks
        self.upper = upper
        self.deadline = deadline
        self.bound = 0.0
        self.prices: Floats | None = None
        self.counts: Ints | None = None
        per_rank = self.num_slots // num_ranks
        least, most = replica_range(loads, self.num_slots, num_ranks, upper)
        size = (len(loads) + 1) * (per_rank + 1)
        units = max(200, min(_SEARCH_UNITS, _TABLE_ELEMENTS // size))
        # Splitting light experts often is never what a good pattern needs; the proof allows it.
        most = np.where(loads < _LIGHT * upper, np.minimum(most, least + 1), most)
        self.table = PatternTable(loads, least, most, per_rank, upper, units, rounding="nearest")
        self.proof_units = min(_PROOF_UNITS, max(units, int(2 * per_rank / gap)))
        counts = np.bincount(slots, minlength=len(loads))
        self.columns = [
            [(int(e), int(counts[e])) for e in rank] for rank in slots.reshape(num_ranks, -1)
        ]

    def try_prices(self, prices: Floats) -> None:
        """Prove what these prices prove, and remember them if that is the best bound yet."""
        bound = price_bound(
            self.loads,
            self.num_slots,
            self.num_ranks,
            upper=self.upper,
            prices=prices,
            units=self.proof_units,
        )
        if bound > self.bound:
            self.bound, self.prices = bound, prices

    def rule_out(self, capacity: float) -> None:
        """Look for prices that rule out `capacity` until there are some, or can be none."""
        master = ColumnMaster(self.loads + 0.05 * self.loads.mean(), self.num_ranks)
        inside = [c for c in self.columns if self._load(c) <= capacity]
        for column in inside:
            master.add(column)
        room = int(capacity / self.table.unit)
        while time.monotonic() < self.deadline:
            violation, prices = master.solve()
            if violation <= 1e-7 * self.loads.sum():
                # The relaxation reaches this capacity: nothing to prove, but to learn from.
                self.counts = self._rounded(inside, master.fractions())
                return
            values, total = self.table.best_values(prices, keep=True)
            if total > self.num_ranks * values[room]:
                return self.try_prices(prices)
            found = [self.table.pattern(k) for k in (room, int(0.98 * room))]
            fresh = [c for c in found if c and c not in self.columns]
            if not fresh:
                return  # rounding hides the rest
            for column in fresh:
                self.columns.append(column)
                inside.append(column)
                master.add(column)

    def _load(self, column: list[tuple[int, int]]) -> float:
        return sum(float(self.loads[e]) / r for e, r in column)

    def _rounded(self, columns: list[list[tuple[int, int]]], fractions: Floats) -> Ints:
        """Round the expected replicas of each expert to integers that fill the slots."""
        expected = np.zeros(len(self.loads))
        for column, fraction in zip(columns, fractions, strict=True):
            expected[[e for e, _ in column]] += fraction
        counts = np.clip(np.floor(expected + 1e-6), 1, self.num_ranks).astype(np.int64)
        while counts.sum() != self.num_slots:
            step = int(np.sign(self.num_slots - counts.sum()))
            allowed = (counts < self.num_ranks) if step > 0 else (counts > 1)
            counts[np.where(allowed, step * (expected - counts), -np.inf).argmax()] += step
        return counts
