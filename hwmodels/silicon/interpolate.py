"""Many measured curves at once: seconds over tokens or lengths, between measured points only.

Kernels take a fixed time plus work that grows with the tokens, so seconds are taken as linear in
them between two neighbouring points (three-figure errors come from steps, not from curvature);
where the work grows with the square of a length, a monotone cubic follows the curvature. All
curves lie behind each other in flat arrays, so that a column of look-ups is a few array passes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from hwmodels.ops import Floats

Ints = NDArray[np.int64]
Kind = Literal["linear", "monotone"]
_PASSES = 5  # a knot's slopes depend on two neighbours either side: so many can go at once


@dataclass(frozen=True, kw_only=True, eq=False)
class Curves:
    """Curves through measured points, none of them continued beyond its ends."""

    curve: Ints
    """[m] curve of each point, ascending."""
    x: Floats
    """[m] coordinate, ascending and distinct within a curve."""
    y: Floats
    """[m] value, above zero."""
    kind: Kind
    _slope: Floats
    _key: Floats
    _span: float

    @classmethod
    def through(cls, curve: Ints, x: Floats, y: Floats, kind: Kind = "linear") -> Self:
        """Return the curves through points in any order; repeated points count with their median.

        Parameters
        ----------
        curve : ndarray [m]
            Curve of each point, from 0.
        x, y : ndarray [m]
            Coordinate (at least 0) and value.
        kind : str
            ``linear`` between points, or a ``monotone`` cubic (Fritsch and Butland 1984).
        """
        curve, x, y = _distinct(curve, np.asarray(x, float), np.asarray(y, float))
        span = 2.0 * (x.max(initial=0.0) + 1.0)
        slope = _slopes(curve, x, y) if kind == "monotone" else np.zeros_like(x)
        key = curve * span + x
        return cls(curve=curve, x=x, y=y, kind=kind, _slope=slope, _key=key, _span=span)

    def _left(self, curve: Ints, x: Floats) -> tuple[Ints, NDArray[np.bool_]]:
        """Return the point at or before each query, and whether its curve reaches the query."""
        if not len(self.x):
            return np.zeros(len(x), np.int64), np.zeros(len(x), bool)
        inside = (x >= 0) & (x < self._span) & (curve >= 0)
        key = np.where(inside, curve * self._span + x, -1.0)
        left = np.searchsorted(self._key, key, side="right") - 1
        inside &= left >= 0
        left = np.maximum(left, 0)
        inside &= self.curve[left] == curve
        right = np.minimum(left + 1, len(self.x) - 1)
        inside &= (self.x[left] == x) | ((self.curve[right] == curve) & (right > left))
        return left, inside

    def covers(self, curve: Ints, x: Floats) -> NDArray[np.bool_]:
        """Return whether each query [n] lies between points of its curve."""
        return self._left(curve, x)[1]

    def at(self, curve: Ints, x: Floats) -> Floats:
        """Return the value at each query [n]; NaN where its curve does not reach."""
        left, inside = self._left(curve, x)
        if not inside.any():
            return np.full(len(x), np.nan)
        right = np.minimum(left + 1, len(self.x) - 1)
        right = np.where(self.curve[right] == self.curve[left], right, left)
        width = np.where(right > left, self.x[right] - self.x[left], 1.0)
        t = (x - self.x[left]) / width
        y0, y1 = self.y[left], self.y[right]
        value = y0 + t * (y1 - y0)
        if self.kind == "monotone":
            # cubic Hermite: the line plus what the end slopes add
            d0 = width * self._slope[left] - (y1 - y0)
            d1 = width * self._slope[right] - (y1 - y0)
            value = value + t * (1 - t) * (d0 * (1 - t) - d1 * t)
        return np.where(inside, np.where(right > left, value, y0), np.nan)

    def inner(self) -> NDArray[np.bool_]:
        """Return [m] whether a point has neighbours on both sides."""
        same = np.diff(self.curve) == 0
        return np.r_[False, same] & np.r_[same, False]

    def left_out(self) -> Floats:
        """Return [m] what the other points say of each inner one; NaN at the ends."""
        inner = self.inner()
        out = np.full(len(self.x), np.nan)
        for number in range(_PASSES):
            gone = inner & (np.arange(len(self.x)) % _PASSES == number)
            if gone.any():
                kept = self.through(self.curve[~gone], self.x[~gone], self.y[~gone], self.kind)
                out[gone] = kept.at(self.curve[gone], self.x[gone])
        return out

    def error(self) -> float:
        """Return the median absolute relative error of inner points left out; NaN without any."""
        ratio = self.left_out() / self.y
        ratio = ratio[~np.isnan(ratio)]
        return float(np.median(np.abs(ratio - 1))) if len(ratio) else float("nan")


@dataclass(frozen=True, kw_only=True, eq=False)
class Surfaces:
    """Surfaces through points of a grid that need not be complete: two ways, weighted.

    Along rows first: each row of the grid is a curve over the second coordinate, and neighbouring
    rows are joined linearly in the first; along columns the other way round. Each way counts with
    the inverse square of its own leave-one-out error; where only one reaches, it counts alone.
    """

    ways: tuple["_Rows", "_Rows"]
    weights: tuple[float, float]

    @classmethod
    def through(
        cls, surface: Ints, first: Floats, second: Floats, y: Floats, kinds: Sequence[Kind]
    ) -> Self:
        """Return the surfaces through points in any order.

        Parameters
        ----------
        surface : ndarray [m]
            Surface of each point, from 0.
        first, second, y : ndarray [m]
            Coordinates and value.
        kinds : two of Kind
            How the value runs along the first and along the second coordinate.
        """
        ways = (
            _Rows.through(surface, first, second, y, kinds[1]),
            _Rows.through(surface, second, first, y, kinds[0]),
        )
        errors = np.array([way.curves.error() for way in ways])
        errors = np.where(np.isnan(errors), np.inf, np.maximum(errors, 1e-3))
        weights = np.where(np.isinf(errors), 0.0, errors**-2.0)
        weights = weights / weights.sum() if weights.any() else np.array([0.5, 0.5])
        return cls(ways=ways, weights=(float(weights[0]), float(weights[1])))

    def at(self, surface: Ints, first: Floats, second: Floats) -> Floats:
        """Return the value at each query [n]; NaN where neither way reaches."""
        rows = self.ways[0].at(surface, first, second)
        columns = self.ways[1].at(surface, second, first)
        both = self.weights[0] * rows + self.weights[1] * columns
        return np.where(np.isnan(rows), columns, np.where(np.isnan(columns), rows, both))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Rows:
    """The rows of grids as curves, joined linearly across."""

    of: Curves
    """For each surface the curve numbers over the row coordinate."""
    curves: Curves

    @classmethod
    def through(cls, surface: Ints, row: Floats, x: Floats, y: Floats, kind: Kind) -> Self:
        span = 2.0 * (row.max(initial=0.0) + 1.0)
        keys, curve = np.unique(surface * span + row, return_inverse=True)
        owner = np.floor(keys / span).astype(np.int64)
        of = Curves.through(owner, keys - owner * span, np.arange(len(keys), dtype=float) + 1)
        return cls(of=of, curves=Curves.through(curve, x, y, kind))

    def at(self, surface: Ints, row: Floats, x: Floats) -> Floats:
        place = self.of.at(surface, row) - 1  # NaN where no row lies on both sides
        known = ~np.isnan(place)
        lower = np.where(known, place, -1).astype(np.int64)
        share = np.where(known, place - lower, 0.0)
        low = self.curves.at(lower, x)
        high = self.curves.at(np.where(share > 0, lower + 1, -1), x)
        return np.where(share > 0, low + share * (high - low), low)


def _distinct(curve: Ints, x: Floats, y: Floats) -> tuple[Ints, Floats, Floats]:
    order = np.lexsort((y, x, curve))
    curve, x, y = curve[order].astype(np.int64), x[order], y[order]
    new = np.r_[True, (np.diff(curve) != 0) | (np.diff(x) != 0)][: len(x)]
    first = np.flatnonzero(new)
    size = np.diff(np.r_[first, len(x)])
    middle = (y[first + (size - 1) // 2] + y[first + size // 2]) / 2  # y ascends among equals
    return curve[first], x[first], middle


def _slopes(curve: Ints, x: Floats, y: Floats) -> Floats:
    """Return slopes [m] that keep each curve monotone between its points, level at a turn."""
    slope = np.zeros_like(y)
    if len(x) < 2:
        return slope
    same = np.diff(curve) == 0
    h = np.where(same, np.diff(x), 1.0)
    secant = np.where(same, np.diff(y) / h, 0.0)
    before, after = np.r_[0.0, secant], np.r_[secant, 0.0]
    h0, h1 = np.r_[1.0, h], np.r_[h, 1.0]
    has_before, has_after = np.r_[False, same], np.r_[same, False]
    turn = before * after <= 0
    mean = (2 * h1 + h0) / np.where(turn, 1, before) + (h1 + 2 * h0) / np.where(turn, 1, after)
    slope = np.where(turn, 0.0, 3 * (h0 + h1) / np.where(turn, 1, mean))
    slope = np.where(has_before & ~has_after, before, slope)
    return np.where(has_after & ~has_before, after, slope)
