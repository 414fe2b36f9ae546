"""The measured mode: a table prices operations of known shapes between its measured points.

Nothing is extrapolated: an operation of another shape, or beyond what was swept, is refused with
the nearest shape and the range (`Interpolated.seconds`) or left to another model (`covers`,
`price_measured`). A price is as good as the table is dense: its interval and error are what the
others say of each measured point.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import PrivateAttr

from basis import InputError
from basis.evidence import weakest
from hwmodels.fitting.fit import interval, score
from hwmodels.kernels.base import Features, Limits, Numbers, Parameter, PhysicalCost
from hwmodels.ops import AttentionDecode, AttentionPrefill, Floats, Gemm, GroupedGemm
from hwmodels.prices import Price
from hwmodels.silicon.expert_lattice import ExpertLattice
from hwmodels.silicon.lattice import AttentionLattice, GemmLattice, Lattice, Mask, shape_key
from hwmodels.silicon.table import Table, shape_hash

LEFT_OUT = 5
"""One inner point in so many is held out, by a hash of its shape and swept values."""
_SAME = 1e-6  # relative difference of limits that rounding explains


class Interpolated(PhysicalCost):
    """A measured table as a cost model; without parameters, and of one device as it is."""

    PARAMETERS: ClassVar[tuple[Parameter, ...]] = ()
    FIXED: ClassVar[tuple[str, ...]] = ()
    model: Literal["interpolated"] = "interpolated"
    table: str
    """Where the rows come from."""
    _lattice: Lattice = PrivateAttr()
    _limits: Limits = PrivateAttr()

    @classmethod
    def of(cls, table: Table, limits: Limits) -> Self:
        """Return the model of all rows; interval and error are of points left out singly.

        Parameters
        ----------
        table : Table
            Measured rows.
        limits : Limits
            Of the device and format; the model refuses to price for any others.

        Raises
        ------
        InputError
            Operations that have no interpolation, or a table without rows.
        """
        lattice = _lattice(table, limits, np.ones(len(table.frame), dtype=bool))
        found: dict[str, Any] = {"table": _title(table), "kernel": table.kernel}
        ratio = lattice.left_out()
        if len(ratio):
            one = np.ones_like(ratio)
            found["low"], found["high"] = interval(ratio, one)
            found["held_out"] = score(ratio, one)
        cost = cls(evidence="measured", source=table.source.package, **found)
        cost._lattice, cost._limits = lattice, limits
        return cost

    def covers(self, op: Any) -> Mask:
        """Return [n] whether each row is of a known shape and between measured points."""
        return ~np.isnan(self._known(op))

    def where_known(self, op: Any, limits: Limits) -> Floats:
        """Return seconds [n], NaN where the table does not cover a row.

        Raises
        ------
        InputError
            Limits of another device.
        """
        self._check(limits)
        return self._known(op)

    def features(self, op: Any, limits: Limits) -> Features:
        """Return the interpolated seconds; see `of` for what the limits must be.

        Raises
        ------
        InputError
            A row that the table does not cover, or limits of another device.
        """
        seconds = self.where_known(op, limits)
        missing = np.flatnonzero(np.isnan(seconds))
        if len(missing):
            raise InputError(self._refusal(op, int(missing[0]), len(missing)))
        return {"work": (seconds > 0).astype(np.float64), "seconds": seconds}

    def _known(self, op: Any) -> Floats:
        return np.where(_works(op), self._lattice.at(op), 0.0)

    @staticmethod
    def time(numbers: Numbers, features: Features) -> Floats:
        """Return the interpolated seconds."""
        return features["seconds"]

    def _check(self, limits: Limits) -> None:
        for name in ("flops", "bandwidth"):
            given, own = getattr(limits, name), getattr(self._limits, name)
            if abs(given / own - 1) > _SAME:
                raise InputError(
                    f"{self.table}: {name} {given:.4g} asked for, measured at {own:.4g} -- "
                    "measured times hold for the device as it is -- price with fitted parameters"
                )

    def _refusal(self, op: Any, row: int, rows: int) -> str:
        shapes = self._lattice.shapes
        keys = shape_key(op)
        key = keys[min(row, len(keys) - 1)]
        where, number = shapes.text(key), int(shapes.number(key[None, :])[0])
        if number >= 0:
            problem = f"row {row} lies outside what was measured for {where}"
            known = self._lattice.span(number)
        else:
            problem = f"no rows of {where}"
            nearest = shapes.nearest(key)
            known = f"{shapes.text(shapes.keys[nearest])}, {self._lattice.span(nearest)}"
        return (
            f"{self.table}: {problem} ({rows} of {len(op)} rows) -- measured: {known} "
            "-- price with fitted parameters"
        )


def price_measured(
    op: Any, limits: Limits, tables: Sequence[Interpolated], otherwise: Price | None
) -> Price:
    """Price each row by the fastest table that covers it, the others by another model.

    Parameters
    ----------
    op : Op
        The column.
    limits : Limits
        Of the processor.
    tables : sequence of Interpolated
        The kernels that an engine chooses among.
    otherwise : Price, optional
        Of all rows, by other means; None: rows that no table covers are refused.

    Raises
    ------
    InputError
        If a row is not covered and there is no other price.
    """
    n = len(op)
    seconds, low, high = np.full(n, np.inf), np.zeros(n), np.zeros(n)
    for cost in tables:
        own = cost.where_known(op, limits)
        rows = np.flatnonzero(own < seconds)  # NaN is not
        seconds[rows], low[rows], high[rows] = (
            own[rows],
            own[rows] * cost.low,
            own[rows] * cost.high,
        )
    missing = np.isinf(seconds)
    if not missing.any():
        return Price(seconds=seconds, low=low, high=high, evidence="measured")
    if otherwise is None:
        if not tables:
            raise InputError("measured prices: no table of this kernel -- price with fitted ones")
        tables[0].seconds(take(op, np.flatnonzero(missing)), limits)  # says which and why
        raise InputError("measured prices: no single table covers every row")
    for mine, other in ((seconds, otherwise.seconds), (low, otherwise.low), (high, otherwise.high)):
        mine[missing] = other[missing]
    evidence = otherwise.evidence if missing.all() else weakest(["measured", otherwise.evidence])
    return Price(seconds=seconds, low=low, high=high, evidence=evidence)


def held_out_seconds(table: Table, limits: Limits) -> tuple[Floats, Mask]:
    """Price token counts of known shapes that the interpolation does not see.

    Returns
    -------
    tuple
        Seconds of the rows held out (NaN where the others do not reach), and which [n] these are.
    """
    held = left_out(table)
    if not held.any():
        return np.zeros(0), held
    lattice = _lattice(table, limits, ~held)
    seconds = []
    first = 0
    for draws in _draws(table):
        rows = np.flatnonzero(held[first : first + len(draws[0])])
        first += len(draws[0])
        if len(rows):
            seconds.append(np.mean([lattice.at(take(op, rows)) for op in draws], axis=0))
    return np.concatenate(seconds), held


def left_out(table: Table) -> Mask:
    """Return [n] the rows that `held_out_seconds` predicts: never at an end of what was swept."""
    usable = _usable(table)
    frame = table.frame[usable]
    swept = [c for c in table.swept if c != "step" and frame[c].nunique() > 1]
    shape = [*table.shape, *_kinds(frame)]
    held = shape_hash(frame, [*shape, *swept]) % LEFT_OUT == 0
    for column in swept:
        others = [*shape, *(c for c in swept if c != column)]
        values = frame.groupby(others, sort=False)[column]
        held &= (frame[column] > values.transform("min")).to_numpy()
        held &= (frame[column] < values.transform("max")).to_numpy()
    out = np.zeros(len(usable), dtype=bool)
    out[usable] = held
    return out


def scatter(table: Table, limits: Limits) -> float:
    """Return the median relative scatter of single measurements, from how neighbours disagree.

    Three neighbouring points on a line leave a second difference with 1.5 times the variance of
    one; steps and curvature count as scatter too, so this is an upper bound of it.
    """
    ratio = _lattice(table, limits, np.ones(len(table.frame), dtype=bool)).left_out()
    return float(np.median(np.abs(ratio - 1)) / np.sqrt(1.5)) if len(ratio) else float("nan")


def take(op: Any, rows: NDArray[np.int64]) -> Any:
    """Return some rows of a column of operations."""
    size = len(op)
    columns = {
        f.name: value[rows]
        for f in dataclasses.fields(op)
        if isinstance(value := getattr(op, f.name), np.ndarray) and len(value) == size
    }
    return dataclasses.replace(op, **columns)


def _lattice(table: Table, limits: Limits, kept: Mask) -> Lattice:
    kept = kept & _usable(table)
    if not kept.any():
        raise InputError(f"{_title(table)}: no rows to interpolate between -- another table")
    first = table.parts[0]
    seconds = table.seconds
    if isinstance(first, Gemm):
        return GemmLattice.of(table.parts, seconds, kept)  # type: ignore[arg-type]
    if isinstance(first, AttentionDecode | AttentionPrefill):
        return AttentionLattice.of(table.parts, seconds, kept)  # type: ignore[arg-type]
    if not isinstance(first, GroupedGemm):
        raise InputError(
            f"{_title(table)}: {type(first).__name__} has no interpolation -- Gemm, GroupedGemm, "
            "AttentionDecode and AttentionPrefill have -- price with fitted parameters"
        )
    frame = table.frame
    kind = pd.factorize(_labels(frame, _kinds(frame)))[0]
    layout = _labels(frame, table.shape)
    return ExpertLattice.of(_draws(table), layout, kind, seconds, limits, kept)


def _kinds(frame: pd.DataFrame) -> list[str]:
    """Return the columns that tell kinds of load apart."""
    return [c for c in ("distribution", "eplb") if c in frame]


def _labels(frame: pd.DataFrame, columns: Sequence[str]) -> NDArray[Any]:
    text = pd.Series("", index=frame.index)
    for column in columns:
        text = text + "|" + frame[column].astype(str)
    return text.to_numpy(dtype=object)


def _usable(table: Table) -> Mask:
    """Leave out rows that an operation cannot name: cached prefixes of prompts."""
    frame, kept = table.frame, np.ones(len(table.frame), dtype=bool)
    if "step" in frame and isinstance(table.parts[0], AttentionPrefill):
        kept &= (frame["step"] == 0).to_numpy()
    return kept


def _draws(table: Table) -> list[list[Any]]:
    """Return the operations of each part, and further draws of its loads where a table has any."""
    more = getattr(table, "more", None) or [()] * len(table.parts)
    return [[first, *others] for first, others in zip(table.parts, more, strict=True)]


def _works(op: Any) -> Mask:
    return np.asarray(op.bytes_moved() > 0)


def _title(table: Table) -> str:
    s = table.source
    return f"{s.device} {s.engine} {s.version} {table.op} {table.dtype} {table.kernel}"
