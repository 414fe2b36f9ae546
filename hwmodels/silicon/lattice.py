"""Measured rows of one kernel as curves over what was swept, found again from an operation.

An operation says which shape it is (its weights, heads, slots) and where it lies on the curves
(tokens, context). GEMM: seconds over rows, partly padded to the kernel's tile. Attention: a
surface over sequences and length. Experts: see `hwmodels.silicon.expert_lattice`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hwmodels.ops import AttentionDecode, AttentionPrefill, Floats, Gemm, GroupedGemm
from hwmodels.silicon.interpolate import Curves, Ints, Kind, Surfaces

Mask = NDArray[np.bool_]
TILES = (1, 64, 128, 256)
"""Tiles of a GEMM's rows that are tried, the one with the least leave-one-out error is taken."""
_OWN = 0.25  # share of a tile's step that goes with the rows themselves (they are read and written)


class Lattice(Protocol):
    """Curves or surfaces that an operation can be looked up in."""

    @property
    def shapes(self) -> "Shapes":
        """The shapes that are known."""
        ...

    def at(self, op: Any) -> Floats:
        """Return seconds [n], NaN where the shape is unknown or outside what was measured."""
        ...

    def left_out(self) -> Floats:
        """Return what a point's neighbours say of it over what was measured, where they do."""
        ...

    def span(self, shape: int) -> str:
        """Return the range measured of one shape, for people."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Shapes:
    """Distinct shapes as rows of whole numbers."""

    names: tuple[str, ...]
    keys: Ints
    """[s, names], ascending."""

    def number(self, keys: Ints) -> Ints:
        """Return the number of each shape [n], -1 where it is unknown."""
        base = self.keys.max(axis=0) + 1
        weight = np.cumprod(np.r_[1, base[:0:-1]])[::-1]
        known = self.keys @ weight  # ascending, as the shapes are
        code = np.where((keys < base).all(axis=1), keys @ weight, -1)
        found = np.minimum(np.searchsorted(known, code), len(known) - 1)
        return np.where(known[found] == code, found, -1)

    def nearest(self, key: Ints) -> int:
        """Return the number of the known shape nearest to one, in ratios."""
        return int(np.abs(np.log1p(self.keys) - np.log1p(key)).sum(axis=1).argmin())

    def text(self, key: Ints) -> str:
        """Return a shape for people."""
        return ", ".join(f"{n} {k}" for n, k in zip(self.names, key.tolist(), strict=True))


@dataclass(frozen=True, kw_only=True, eq=False)
class GemmLattice:
    """Curves over the rows of a GEMM, one for each weight matrix."""

    shapes: Shapes
    curves: Curves
    tile: int
    places: tuple[Ints, Floats]
    """Shape and rows of each point."""

    @classmethod
    def of(cls, parts: Sequence[Gemm], seconds: Floats, kept: Mask) -> "GemmLattice":
        """Return the curves through the kept rows of a table."""
        key, m = (np.concatenate(columns)[kept] for columns in zip(*map(_gemm, parts), strict=True))
        keys, number = np.unique(key, axis=0, return_inverse=True)
        number, seconds = number.ravel(), seconds[kept]
        tried = {t: Curves.through(number, _padded(m, t), seconds) for t in TILES}
        tile = min(TILES, key=lambda t: np.nan_to_num(tried[t].error(), nan=1.0))
        return cls(
            shapes=Shapes(names=("n", "k"), keys=keys), curves=tried[tile], tile=tile,
            places=(number, m),
        )  # fmt: skip

    def at(self, op: Gemm) -> Floats:
        """Return seconds [n]."""
        key, m = _gemm(op)
        return self.curves.at(self.shapes.number(key), _padded(m, self.tile))

    def left_out(self) -> Floats:
        """Return [m] predicted over measured of inner points."""
        return ratios(self.curves)

    def span(self, shape: int) -> str:
        """Return the range measured of one shape."""
        return span("rows", self.places[1][self.places[0] == shape])


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionLattice:
    """Surfaces over sequences and their length, one for each geometry of heads."""

    shapes: Shapes
    surfaces: Surfaces
    formats: tuple[str, str]
    """Of the cache and of the products."""
    decode: bool
    places: tuple[Ints, Floats, Floats]
    """Shape, sequences and length of each point."""

    @classmethod
    def of(
        cls, parts: Sequence[AttentionDecode | AttentionPrefill], seconds: Floats, kept: Mask
    ) -> "AttentionLattice":
        """Return the surfaces through the kept rows of a table."""
        keys = np.unique(np.array([_heads(p) for p in parts], dtype=np.int64), axis=0)
        shapes = Shapes(names=_HEADS, keys=keys)
        number = np.concatenate([np.full(len(p), shapes.number(_heads_key(p))[0]) for p in parts])
        places = [_sequences(p) for p in parts]
        batch, length = (np.concatenate(columns)[kept] for columns in zip(*places, strict=True))
        decode = isinstance(parts[0], AttentionDecode)
        # a decode step reads its cache once: linear; a prompt's work grows with its square
        kinds: tuple[Kind, Kind] = ("linear", "linear" if decode else "monotone")
        return cls(
            shapes=shapes,
            surfaces=Surfaces.through(number[kept], batch, length, seconds[kept], kinds),
            formats=(parts[0].kv_dtype, parts[0].activation_dtype),
            decode=decode,
            places=(number[kept], batch, length),
        )

    def at(self, op: AttentionDecode | AttentionPrefill) -> Floats:
        """Return seconds [n]."""
        fits = isinstance(op, AttentionDecode) == self.decode
        if not fits or (op.kv_dtype, op.activation_dtype) != self.formats:
            return np.full(len(op), np.nan)
        number = np.broadcast_to(self.shapes.number(_heads_key(op)), len(op))
        return self.surfaces.at(number, *_sequences(op))

    def left_out(self) -> Floats:
        """Return predicted over measured of inner points, by the better of the two ways."""
        better = int(np.argmax(self.surfaces.weights))
        return ratios(self.surfaces.ways[better].curves)

    def span(self, shape: int) -> str:
        """Return the range measured of one shape; not every pair in it was."""
        of = self.places[0] == shape
        return f"{span('sequences', self.places[1][of])}, {span('length', self.places[2][of])}"


_HEADS = ("num_heads", "num_kv_heads", "head_dim", "v_head_dim", "kv_elements", "window")
SLOTS = ("hidden", "width", "matrices", "slots")


def shape_key(op: Any) -> Ints:
    """Return the shape of an operation's rows, [n, names] or [1, names]."""
    match op:
        case Gemm():
            return _gemm(op)[0]
        case GroupedGemm():
            return np.array([slots(op)])
    return _heads_key(op)


def _gemm(op: Gemm) -> tuple[Ints, Floats]:
    key = np.stack([np.asarray(op.n), np.asarray(op.k)], axis=1).astype(np.int64)
    return key, np.asarray(op.m, dtype=np.float64)


def _padded(rows: Floats, tile: int) -> Floats:
    """Return rows, partly rounded up to tiles: powers of two up to the tile, then its multiples."""
    if tile == 1:
        return rows
    small = np.maximum(2.0 ** np.ceil(np.log2(np.maximum(rows, 1))), 16)
    whole = np.where(rows <= tile, np.minimum(small, tile), np.ceil(rows / tile) * tile)
    return np.where(rows > 0, (1 - _OWN) * whole + _OWN * rows, 0.0)


def _heads(op: AttentionDecode | AttentionPrefill) -> list[int]:
    return [int(getattr(op, name)) for name in _HEADS]


def _heads_key(op: AttentionDecode | AttentionPrefill) -> Ints:
    return np.array([_heads(op)], dtype=np.int64)


def _sequences(op: AttentionDecode | AttentionPrefill) -> tuple[Floats, Floats]:
    """Return how many sequences of which length make the row, were they equal.

    A prompt of length l has l (l + 1) / 2 pairs, one longer than a window w l w - w (w - 1) / 2.
    Rows with cached prefixes count as the prompts with as many tokens and pairs. Of a decode step
    only what the window leaves is known: contexts beyond it count as one.
    """
    tokens = np.asarray(op.tokens, dtype=np.float64)
    some = np.maximum(tokens, 1)
    if isinstance(op, AttentionDecode):
        return tokens, np.asarray(op.context, dtype=np.float64) / some
    mean = np.asarray(op.pairs, dtype=np.float64) / some
    length = np.maximum(2 * mean - 1, 1)
    if op.window:
        masked = length > op.window
        room = np.where(masked, np.maximum(op.window - mean, 1e-9), 1.0)
        length = np.where(masked, _whole(op.window * (op.window - 1) / 2 / room), length)
    return _whole(tokens / length), length


def _whole(values: Floats) -> Floats:
    """Return values without the rounding errors of whole numbers."""
    nearest = np.rint(values)
    return np.where(np.abs(values - nearest) <= 1e-6 * nearest, nearest, values)


def slots(op: GroupedGemm) -> list[int]:
    """Return the shape of an expert layer on one rank."""
    return [op.hidden, op.width, op.matrices, op.tokens_per_expert.shape[1]]


def span(name: str, values: Floats) -> str:
    """Return a range for people."""
    return f"{name} {values.min():.0f} to {values.max():.0f}"


def ratios(curves: Curves) -> Floats:
    """Return predicted over measured of inner points left out."""
    ratio = curves.left_out() / curves.y
    return ratio[~np.isnan(ratio)]
