"""What a dense product takes: tiles in waves over the units, fed from cache and memory.

A call launches, quantises its activations where the format asks for it, then works through tiles
of the output, as many at a time as there are units. A tile's step along k takes as long as its
products, its operands' way into the unit, or a latency; then the tile is written. Against that
stands one pass of all operands through memory; the two overlap in part.
"""

from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from basis import DTYPES, BytesPerSecond, Seconds, bytes_of
from hwmodels.kernels.base import Features, Limits, Numbers, Parameter, PhysicalCost
from hwmodels.ops import Floats, Gemm

TILES = ((16, 64), (32, 64), (64, 64), (64, 128), (128, 64), (128, 128), (128, 256))
"""Rows and columns of the tiles from which the fastest is taken."""
BY_ROWS = ((64, 64, 64, 1), (128, 64, 128, 1), (np.inf, 128, 128, 2))
"""Up to so many rows: tile rows, tile columns, and row tiles of a cluster that run together (the
dispatch of vLLM's CUTLASS kernels for Hopper, csrc/quantization/w8a8/cutlass/c3x)."""
SPLIT_STEP = 256
"""Least depth along k of one part of a split product."""
LONG = 3e-4
"""Time at the peak rate beyond which a call counts as long: power limits average over about as
much, s."""
_CHUNK = 8192  # rows priced at once: their arrays stay in a core's cache


class GemmCost(PhysicalCost):
    """Tiles in waves against one pass through memory, with launch and quantisation before."""

    model: Literal["gemm"] = "gemm"
    tiles: Literal["fastest", "by_rows"] = "fastest"
    """Whether the engine takes the tile that is fastest (heuristics, autotuning) or one by the
    number of rows alone."""
    split_k: bool = False
    """Whether tiles too few for all units may be split along k."""
    copies: int | None = Field(default=None, gt=0)
    """Copies of the weights through which the measurement went in turn, so that small ones stayed
    in the cache; none: weights come from memory, as in a model with many layers."""
    launch: Seconds
    """Fixed time of one call, quantisation's launches included, s."""
    compute_efficiency: float = Field(gt=0, le=1.1)
    """Share of the dense peak that short calls reach; above 1 where the units clock higher than
    the data sheet's rate assumes."""
    sustained: float = Field(gt=0, le=1)
    """Share of this rate that is left on long calls (power limit, operands beyond the cache)."""
    memory_efficiency: float = Field(gt=0, le=1)
    """Share of the peak memory bandwidth."""
    feed: BytesPerSecond
    """Rate at which one unit takes operands in, bytes/s."""
    step: Seconds
    """Least time of one element of k in a tile: latency of loads and of dependent products, s."""
    store: float = Field(ge=0)
    """Share of a wave's writing at peak bandwidth that nothing overlaps."""
    sharpness: float = Field(ge=1)
    """Exponent p of (compute^p + memory^p)^(1/p): 1 adds the two, a large one overlaps them."""
    split: Seconds = 0.0
    """What splitting costs: writing, synchronising and summing the parts, s."""
    quantise: float = Field(default=0.0, ge=0)
    """Passes through memory that quantising the activations is worth."""
    quantise_row: Seconds = 0.0
    """Time of quantising one row beyond its bytes: a thread block's turn, s."""
    kept: float = Field(default=0.0, ge=0)
    """Share of the last-level cache that keeps operands from one call to the next."""
    cache_speed: float = Field(default=1.0, ge=1)
    """Rate of reading what is kept there, over that of memory."""

    FIXED: ClassVar[tuple[str, ...]] = ("launch", "split")
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        Parameter(name="launch", low=5e-7, high=4e-5, start=3e-6),
        Parameter(name="compute_efficiency", low=0.1, high=1.1, start=0.8),
        Parameter(name="sustained", low=0.2, high=1.0, start=0.8),
        Parameter(name="memory_efficiency", low=0.2, high=1.0, start=0.85),
        Parameter(name="feed", low=5e9, high=8e11, start=1e11),
        Parameter(name="step", low=1e-11, high=1e-8, start=1e-9),
        Parameter(name="store", low=1e-2, high=3.0, start=0.3),
        Parameter(name="sharpness", low=1.0, high=20.0, start=3.0),
        Parameter(name="split", low=1e-7, high=3e-5, start=3e-6),
        Parameter(name="quantise", low=0.5, high=50.0, start=2.0),
        Parameter(name="quantise_row", low=1e-12, high=1e-7, start=1e-10),
        Parameter(name="kept", low=0.02, high=2.0, start=0.3),
        Parameter(name="cache_speed", low=1.0, high=10.0, start=3.0),
    )

    def in_service(self) -> Self:
        """Return the model of a served one, whose weights come from memory at every call."""
        return self.model_copy(update={"copies": None})

    def features(self, op: Gemm, limits: Limits) -> Features:
        """Return bytes and ideal times [n], and per candidate tile waves and parts [tiles, n].

        Times are at the peaks of the limits, s: ``products`` and ``written`` of one tile (per
        element of k and per wave), ``memory`` of one pass, ``pass`` of one quantisation pass;
        ``operands`` are a tile's bytes per element of k, ``cache`` how often all copies of the
        weights fit.
        """
        m, n, k = (np.asarray(x, dtype=np.float64) for x in (op.m, op.n, op.k))
        rows, columns, tiles = _fastest(m, n) if self.tiles == "fastest" else _by_rows(m, n)
        weight = bytes_of(op.weight_dtype, 1)
        given = bytes_of(op.activation_dtype, 1)
        taken = _taken(op.weight_dtype, given)
        moved = n * k * weight + m * k * taken + m * n * given
        ideal = 2 * m * n * k / limits.flops
        shape = tiles.shape
        features = {
            "work": m * n * k,
            "rows": m,
            "depth": k,
            "long": ideal / (ideal + LONG),
            "memory": moved / limits.bandwidth,
            "pass": m * k * (given + taken) / limits.bandwidth,
            "waves": np.ceil(tiles / limits.units),
            "products": np.broadcast_to(2 * rows * columns * limits.units / limits.flops, shape),
            "operands": np.broadcast_to(rows * taken + columns * weight, shape),
            "written": np.minimum(rows, m) * np.minimum(columns, n)
            * (given * limits.units / limits.bandwidth),
        }  # fmt: skip
        if self.split_k:
            most = np.maximum(np.ceil(k / SPLIT_STEP), 1)
            features["parts"] = np.clip(np.floor(limits.units / np.maximum(tiles, 1)), 1, most)
        if self.copies is not None:
            weights = np.maximum(op.weight_bytes(), 1.0)
            features["cache"] = limits.cache / (self.copies * weights)
        return features

    @staticmethod
    def time(numbers: Numbers, features: Features) -> Floats:
        """Return seconds [n]; the fastest of the candidate tiles, split or not."""
        rate = numbers["compute_efficiency"] * (1 - features["long"] * (1 - numbers["sustained"]))
        step = features["products"] / rate
        step = np.maximum(step, features["operands"] / numbers["feed"])
        step = np.maximum(step, numbers["step"])
        depth = step * features["depth"]
        if "parts" in features:
            depth = np.minimum(depth, depth / features["parts"] + numbers["split"])
        tiles = features["waves"] * (depth + numbers["store"] * features["written"])
        compute = tiles.min(axis=0)
        memory = features["memory"] / numbers["memory_efficiency"]
        if "cache" in features:
            held = np.minimum(numbers["kept"] * features["cache"], 1.0)
            memory = memory * (1 - held + held / numbers["cache_speed"])
        longer = np.maximum(np.maximum(compute, memory), 1e-30)
        p = numbers["sharpness"]
        both = longer * (1 + (np.minimum(compute, memory) / longer) ** p) ** (1 / p)
        quantised = numbers["quantise"] * features["pass"]
        quantised = quantised + numbers["quantise_row"] * features["rows"]
        return np.asarray(numbers["launch"] + quantised + both)

    def seconds(self, op: Gemm, limits: Limits) -> Floats:
        """Price each row of a column, a few thousand at a time; seconds [n]."""
        if len(op) <= _CHUNK:
            return super().seconds(op, limits)
        found = np.empty(len(op))
        for start in range(0, len(op), _CHUNK):
            rows = slice(start, start + _CHUNK)
            m, n, k = (np.asarray(x)[rows] for x in (op.m, op.n, op.k))
            some = Gemm(
                m=m, n=n, k=k, weight_dtype=op.weight_dtype, activation_dtype=op.activation_dtype
            )
            found[rows] = super().seconds(some, limits)
        return found


def _taken(weight_dtype: str, given: float) -> float:
    """Bytes of an activation as it is multiplied, once quantised if the format asks for it."""
    quantised = {"fp8": 1.0, "int8": 1.0, "fp4": bytes_of(weight_dtype, 1)}
    return quantised.get(DTYPES[weight_dtype].compute, given)


def _fastest(m: Floats, n: Floats) -> tuple[Floats, Floats, Floats]:
    """Return rows and columns [tiles, 1] of the candidates, and how many tiles [tiles, n]."""
    rows, columns = (np.array(side, dtype=np.float64)[:, None] for side in zip(*TILES, strict=True))
    return rows, columns, np.ceil(m / rows) * np.ceil(n / columns)


def _by_rows(m: Floats, n: Floats) -> tuple[Floats, Floats, Floats]:
    """Return rows and columns [1, n] of the one candidate, and how many tiles [1, n]."""
    number = np.searchsorted([top for top, *_ in BY_ROWS], m)
    rows, columns, cluster = (
        np.array(side, dtype=np.float64)[number][None]
        for side in list(zip(*BY_ROWS, strict=True))[1:]
    )
    return rows, columns, np.ceil(m / (rows * cluster)) * cluster * np.ceil(n / columns)
