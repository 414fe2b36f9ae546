"""Measured expert layers as curves, found again from the tokens that each expert gets.

For each layout (experts, k, ranks) and measured kind of load there is a curve of seconds over the
tokens shown to the rank, and one of the work that those loads make. Loads of any kind are priced
between the measured kinds, by their work.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hwmodels.kernels.base import Limits
from hwmodels.ops import Floats, GroupedGemm
from hwmodels.silicon.interpolate import Curves, Ints
from hwmodels.silicon.lattice import SLOTS, Mask, Shapes, ratios, slots, span

TILE = 64
"""Rows to which an expert's tokens are padded when the work of two loads is compared."""
_CHUNK = 1 << 16
_BEYOND = 1.1  # loads may make so many times the work of measured draws, or less


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertLattice:
    """Curves over the tokens shown to a rank, one for each layout and measured kind of load.

    What is assumed: two loads of one layout and as many tokens that make the same work (weights
    of active experts, rows padded to tiles) take the same time; in between, time is linear in it.
    """

    shapes: Shapes
    layout: Ints
    """[l] shape of each layout: several layouts (experts, k, ranks) may leave a rank like slots."""
    rate: Floats
    """[l] (token, expert) pairs of a rank over tokens shown, in the median."""
    kinds: int
    seconds: Curves
    work: Curves
    reach: tuple[Curves, Curves]
    """Least and most work of a single draw."""
    limits: Limits
    weight_dtype: str
    gated: bool

    @classmethod
    def of(
        cls,
        draws: Sequence[Sequence[GroupedGemm]],
        layout_key: NDArray[Any],
        kind: Ints,
        seconds: Floats,
        limits: Limits,
        kept: Mask,
    ) -> "ExpertLattice":
        """Return the curves through the kept rows of a table.

        Parameters
        ----------
        draws : sequence of sequences of GroupedGemm
            For each part of the table the draws of its loads; rows count with their mean.
        layout_key, kind, seconds, kept : ndarray [m]
            Layout (any label), kind of load, seconds, rows used.
        limits : Limits
            In which the work of two loads is compared.
        """
        first = [d[0] for d in draws]
        shape_keys = np.array([slots(op) for op in first], dtype=np.int64)
        shapes = Shapes(names=SLOTS, keys=np.unique(shape_keys, axis=0))
        shape = np.concatenate(
            [np.full(len(op), n) for op, n in zip(first, shapes.number(shape_keys), strict=True)]
        )
        tokens = np.concatenate([op.shown() for op in first])
        rate = np.concatenate([op.rows() for op in first]) / np.maximum(tokens, 1)
        each = [np.stack([_work(op, limits) for op in d]) for d in draws]
        work, least, most = (
            np.concatenate([how(w, axis=0) for w in each])[kept]
            for how in (np.mean, np.min, np.max)
        )
        _, start, layout = np.unique(layout_key[kept], return_index=True, return_inverse=True)
        kinds = int(kind.max()) + 1
        curve = layout * kinds + kind[kept]
        return cls(
            shapes=shapes,
            layout=shape[kept][start],
            rate=pd.Series(rate[kept]).groupby(layout).median().to_numpy(),
            kinds=kinds,
            seconds=Curves.through(curve, tokens[kept], seconds[kept]),
            work=Curves.through(curve, tokens[kept], work),
            reach=(
                Curves.through(curve, tokens[kept], least),
                Curves.through(curve, tokens[kept], most),
            ),
            limits=limits,
            weight_dtype=first[0].weight_dtype,
            gated=first[0].gated,
        )

    def at(self, op: GroupedGemm) -> Floats:
        """Return seconds [n], the mean of the layouts that may leave a rank such loads."""
        number = int(self.shapes.number(np.array([slots(op)]))[0])
        layouts = np.flatnonzero(self.layout == number)
        if number < 0 or not len(layouts) or op.weight_dtype != self.weight_dtype:
            return np.full(len(op), np.nan)
        if op.tokens is None:  # nothing passes by: the layout that keeps most of what it is shown
            layouts = layouts[[self.rate[layouts].argmax()]]
        wanted = _work(op, self.limits)
        found = [
            self._of_layout(
                int(i), op.rows() / self.rate[i] if op.tokens is None else op.shown(), wanted
            )
            for i in layouts
        ]
        return _mean_known(np.stack(found))

    def _of_layout(self, layout: int, tokens: Floats, wanted: Floats) -> Floats:
        curve = np.tile(layout * self.kinds + np.arange(self.kinds), len(tokens))
        across = np.repeat(tokens, self.kinds)
        seconds, work, least, most = (
            c.at(curve, across).reshape(-1, self.kinds)
            for c in (self.seconds, self.work, *self.reach)
        )
        known = ~np.isnan(work)
        least = np.where(known, least, np.inf).min(axis=1) / _BEYOND
        most = np.where(known, most, -np.inf).max(axis=1) * _BEYOND
        out = _between(work, seconds, wanted)
        return np.where((wanted >= least) & (wanted <= most), out, np.nan)

    def left_out(self) -> Floats:
        """Return predicted over measured of inner points, along their own curves."""
        return ratios(self.seconds)

    def span(self, shape: int) -> str:
        """Return the range measured of one shape."""
        of = np.isin(self.seconds.curve // self.kinds, np.flatnonzero(self.layout == shape))
        loads = f"loads that make the work of those measured ({self.kinds} kinds)"
        return f"{span('tokens', self.seconds.x[of])}, {loads}"


def _work(op: GroupedGemm, limits: Limits) -> Floats:
    """Return the time at the peaks of reading what moves and of multiplying padded rows, s."""
    flops = _tiles(op.tokens_per_expert) * (TILE * op.flops_per_row())
    return np.asarray(op.bytes_moved() / limits.bandwidth + flops / limits.flops)


def _tiles(counts: NDArray[Any]) -> Floats:
    """Return the tiles [n] of loads [n, slots], some rows at a time so that they stay in cache."""
    out = np.empty(len(counts))
    step = max(_CHUNK // max(counts.shape[1], 1), 1)
    for start in range(0, len(counts), step):
        part = -(-counts[start : start + step] // TILE)
        out[start : start + step] = part.sum(axis=1)
    return out


def _between(work: Floats, seconds: Floats, wanted: Floats) -> Floats:
    """Return seconds at the wanted work [n] from a few kinds of load [n, kinds], linearly."""
    order = np.argsort(np.where(np.isnan(work), np.inf, work), axis=1)
    work = np.take_along_axis(work, order, axis=1)
    seconds = np.take_along_axis(seconds, order, axis=1)
    known = (~np.isnan(work)).sum(axis=1)
    last = np.maximum(known - 1, 0)[:, None]
    low = work[:, 0]
    out = np.where(wanted <= low, seconds[:, 0], np.take_along_axis(seconds, last, axis=1)[:, 0])
    for i in range(work.shape[1] - 1):
        inside = (wanted >= work[:, i]) & (wanted < work[:, i + 1])
        width = np.where(inside & (work[:, i + 1] > work[:, i]), work[:, i + 1] - work[:, i], 1.0)
        share = (wanted - work[:, i]) / width
        line = seconds[:, i] + share * (seconds[:, i + 1] - seconds[:, i])
        out = np.where(inside, line, out)
    return np.where(known > 0, out, np.nan)


def _mean_known(values: Floats) -> Floats:
    """Return the mean [n] over rows [l, n] of what is not NaN; NaN where nothing is."""
    known = ~np.isnan(values)
    number = known.sum(axis=0)
    total = np.where(known, values, 0.0).sum(axis=0)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)
