"""Patterns: what one rank may hold, and the best pattern for given prices.

A pattern is exactly P / G slots, each a pair (expert e, replica count r) that weighs
``w_e / r`` (load under even dispatch), no expert twice. A dynamic program over experts,
slots and capacity finds, for every capacity at once, the pattern of highest value when
serving all of expert e is worth ``price[e]`` (a pair is worth ``price[e] / r``). One layer;
loads and capacity in the same unit (token counts of any scale).
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_PRICE_SUM = 2.0e8  # prices become integers summing to this: the values stay within int32
_NONE = np.int32(-(2**30))  # value of "no pattern"
_MARGIN = 1e-9  # relative to a capacity unit's count: far above float rounding


class PatternTable:
    """The dynamic program for one layer.

    Parameters
    ----------
    loads : float array [E]
    least, most : int array [E]
        Range of replica counts to allow for each expert.
    per_rank : int
        Slots of a rank.
    capacity : float
        Largest capacity of interest, divided into `units` equal units.
    rounding : {"down", "nearest"}
        How weights become units. With "down" no pattern is missed, so the values are upper
        bounds (for proofs); "nearest" has no bias (for finding good prices).
    """

    def __init__(
        self,
        loads: Floats,
        least: Ints,
        most: Ints,
        per_rank: int,
        capacity: float,
        units: int,
        rounding: Literal["down", "nearest"],
    ) -> None:
        self.per_rank = per_rank
        self.units = units
        self.unit = capacity / units
        shift = 0.5 if rounding == "nearest" else 0.0
        self._counts = [np.arange(a, b + 1) for a, b in zip(least, most, strict=True)]
        self._weights = [
            np.maximum(0, np.floor(w / r / self.unit * (1 - _MARGIN) + shift)).astype(np.int64)
            for w, r in zip(loads, self._counts, strict=True)
        ]
        self._prices: Ints = np.zeros(len(loads), dtype=np.int64)
        self._tables: list[NDArray[np.int32]] = []

    def best_values(self, prices: Floats, *, keep: bool) -> tuple[Ints, int]:
        """Value of the best pattern at capacities 0, 1, ..., `units`, and the prices' sum.

        Both are exact integers in the same scaled money: prices are rounded down to integers,
        the values of pairs are rounded up. `keep` remembers the tables for `pattern`.
        """
        scale = _PRICE_SUM / max(float(np.abs(prices).sum()), 1e-300)
        self._prices = np.floor(prices * scale).astype(np.int64)
        table = np.full((self.per_rank + 1, self.units + 1), _NONE, dtype=np.int32)
        table[0] = 0
        self._tables = [table] if keep else []
        for expert in range(len(prices)):
            table = self._with_expert(table, expert)
            if keep:
                self._tables.append(table)
        return table[self.per_rank].astype(np.int64), int(self._prices.sum())

    def pattern(self, capacity_units: int) -> list[tuple[int, int]]:
        """Pairs (expert, replica count) of the best pattern at this capacity; after `keep`.

        Returns an empty list where no pattern fits.
        """
        slots, room, chosen = self.per_rank, capacity_units, []
        if self._tables[-1][slots, room] < _NONE // 2:
            return []
        for expert in reversed(range(len(self._counts))):
            before, after = self._tables[expert], self._tables[expert + 1]
            if slots == 0 or after[slots, room] == before[slots, room]:
                continue
            for r, weight, value in self._options(expert):
                if (
                    weight <= room
                    and before[slots - 1, room - weight] + value == after[slots, room]
                ):
                    chosen.append((expert, r))
                    slots, room = slots - 1, room - weight
                    break
        return chosen

    def _with_expert(self, table: NDArray[np.int32], expert: int) -> NDArray[np.int32]:
        """Best values when the pattern may also hold this expert, once."""
        updated = table.copy()
        for _, weight, value in self._options(expert):
            if weight <= self.units:
                size = self.units + 1 - weight
                with_it = table[:-1, :size] + np.int32(value)
                np.maximum(updated[1:, weight:], with_it, out=updated[1:, weight:])
        return updated

    def _options(self, expert: int) -> list[tuple[int, int, int]]:
        """(replica count, weight in units, value) of an expert, without dominated ones.

        Of several counts with the same weight in units, only the most valuable can matter.
        """
        counts, weights = self._counts[expert], self._weights[expert]
        values = -(-self._prices[expert] // counts)
        best: dict[int, tuple[int, int, int]] = {}
        for r, weight, value in zip(counts, weights, values, strict=True):
            if weight not in best or value > best[weight][2]:
                best[int(weight)] = (int(r), int(weight), int(value))
        return list(best.values())
