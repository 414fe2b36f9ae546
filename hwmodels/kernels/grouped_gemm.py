"""What a fused expert layer takes on one rank, from the tokens that each expert really gets.

Two products (up and gate, then down) run as tiles over all experts' rows: an expert's last tile
is padded, tiles run in whole waves over the units, and a wave has a fixed time beside its
arithmetic. Against that stands reading the weights of the experts that have tokens. Around the
products lie launches, sorting the tokens, and passes over them that grow with tokens and rows.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from basis import Seconds
from hwmodels.kernels.base import Features, Limits, Numbers, Parameter, PhysicalCost
from hwmodels.ops import Floats, GroupedGemm

_CHUNK = 1 << 16  # loads handled at a time, so that they stay in the cache


class GroupedGemmCost(PhysicalCost):
    """Parameters of one engine's expert kernels on one processor, for one format.

    ``t = launch + slot e + step (H + W) + sort n / (n + sort_tokens) + passes + products``: e
    local experts, n tokens shown to the rank, H hidden and W inner width, r (token, expert) rows.
    ``passes`` moves ``(token_bytes n H + row_hidden_bytes r H + row_width_bytes r W)`` bytes at
    the peak bandwidth. Each product takes ``(m^p + c^p)^(1/p)``, p = ``blend``: m reads the
    weights of active experts at ``memory_efficiency`` of the peak; c is, for the best of the tile
    heights, ceil(tiles / units) waves of ``wave`` plus a tile's FLOP at ``compute_efficiency`` of
    a unit's peak. An engine tunes the height on the machine; one that does not has one height.

    Tables repeat one call, so that weights which fit into ``cache_share`` of the last-level cache
    are found there (all below three quarters of it, none above it). Between two calls of a layer
    in a model all other layers pass through the cache: `seconds` prices with an empty one.
    """

    model: Literal["grouped_gemm"] = "grouped_gemm"
    launch: Seconds
    """Fixed time of one call: launches and the gate's top-k."""
    slot: Seconds
    """Added time for each local expert: offsets, descriptors."""
    step: Seconds
    """Latency of the products' reduction loops, s for each element of their depth."""
    sort: Seconds
    """What sorting the tokens by expert adds once they are many."""
    sort_tokens: float = Field(gt=0)
    """Tokens at which half of ``sort`` is reached."""
    token_bytes: float = Field(ge=0)
    """Bytes moved for each element of a token shown: quantising it, summing its results."""
    row_hidden_bytes: float = Field(ge=0)
    """Bytes moved for each element of a row as wide as the model, in and out of the products."""
    row_width_bytes: float = Field(ge=0)
    """Bytes moved for each element of a row as wide as an expert, between the products."""
    wave: Seconds
    """Fixed time of a wave of tiles: filling the pipeline, writing out."""
    compute_efficiency: float = Field(gt=0, le=1)
    """Share of the dense peak FLOP/s in the middle of a tile."""
    memory_efficiency: float = Field(gt=0, le=1)
    """Share of the peak bandwidth at which weights are read."""
    blend: float = Field(ge=1)
    """How well reading and multiplying overlap: 1 not at all, infinite perfectly."""
    cache_share: float = Field(default=1.0, gt=0)
    """Share of the nominal cache that keeps weights from one call to the next; only for tables."""
    tile_rows: tuple[int, ...] = (16, 64, 128)
    """Tile heights (tokens) that the engine chooses from."""
    tile_columns: int = Field(default=128, ge=1)
    """Tile width (columns of the weights)."""

    FIXED: ClassVar[tuple[str, ...]] = ("launch", "slot", "step", "sort")
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        Parameter(name="launch", low=2e-6, high=3e-4, start=20e-6),
        Parameter(name="slot", low=1e-11, high=1e-5, start=1e-8),
        Parameter(name="step", low=1e-13, high=2e-8, start=5e-10),
        Parameter(name="sort", low=1e-8, high=1e-4, start=5e-6),
        Parameter(name="sort_tokens", low=1, high=5e3, start=64),
        Parameter(name="token_bytes", low=0.01, high=300, start=4),
        Parameter(name="row_hidden_bytes", low=0.01, high=200, start=10),
        Parameter(name="row_width_bytes", low=0.01, high=200, start=10),
        Parameter(name="wave", low=1e-9, high=2e-5, start=5e-7),
        Parameter(name="compute_efficiency", low=0.02, high=1, start=0.6),
        Parameter(name="memory_efficiency", low=0.2, high=1, start=0.8),
        Parameter(name="blend", low=1, high=20, start=3),
        Parameter(name="cache_share", low=0.05, high=2, start=0.7),
    )

    def features(self, op: GroupedGemm, limits: Limits) -> Features:
        """Return tiles, waves and bytes of a column.

        Parameters
        ----------
        op : GroupedGemm
            n rows; without ``tokens`` each (token, expert) pair counts as a token.
        limits : Limits
            Peaks; ``units`` may be a fraction of the processor's.

        Returns
        -------
        dict
            [n]: ``work`` rows, ``slots``, ``tokens``, ``depth`` (H + W), and seconds at peak
            bandwidth of one byte for each element ``token``, ``row_hidden``, ``row_width``;
            ``filled`` weight bytes over the cache's; of the products ``weights_up``,
            ``weights_down`` seconds at peak bandwidth, and for each tile height [tiles, n]
            ``waves_up``, ``waves_down`` and their seconds at peak FLOP/s ``tiles_up``,
            ``tiles_down``.
        """
        rows, active, tiles = _counted(np.asarray(op.tokens_per_expert), self.tile_rows)
        hidden, width = float(op.hidden), float(op.width)
        n, slots = op.tokens_per_expert.shape
        tokens = rows if op.tokens is None else np.asarray(op.tokens, dtype=np.float64)
        weights = op.bytes_per_expert() / (op.matrices * hidden * width) / limits.bandwidth
        features: Features = {
            "work": rows,
            "slots": np.full(n, float(slots)),
            "tokens": tokens,
            "depth": np.full(n, hidden + width),
            "token": tokens * (hidden / limits.bandwidth),
            "row_hidden": rows * (hidden / limits.bandwidth),
            "row_width": rows * (width / limits.bandwidth),
        }
        cached = active * op.bytes_per_expert()
        features["filled"] = cached / limits.cache if limits.cache else np.full(n, np.inf)
        heights = np.array(self.tile_rows, dtype=np.float64)[:, None]
        products = (("up", (op.matrices - 1) * width, hidden), ("down", hidden, width))
        for name, columns, depth in products:
            waves = np.ceil(tiles * np.ceil(columns / self.tile_columns) / limits.units)
            tile = 2 * heights * self.tile_columns * depth / (limits.flops / limits.units)
            features[f"weights_{name}"] = active * (columns * depth * weights)
            features[f"waves_{name}"] = waves
            features[f"tiles_{name}"] = waves * tile
        return features

    def seconds(self, op: GroupedGemm, limits: Limits) -> Floats:
        """Price each row of a column with weights that no cache holds, seconds [n]."""
        return super().seconds(op, replace(limits, cache=0.0))

    @staticmethod
    def time(numbers: Numbers, features: Features) -> Floats:
        """Return seconds [n], see the class."""
        f, q = features, numbers
        tokens = f["tokens"]
        seconds = (
            q["launch"]
            + q["slot"] * f["slots"]
            + q["step"] * f["depth"]
            + q["sort"] * (tokens / (tokens + q["sort_tokens"]))
            + q["token_bytes"] * f["token"]
            + q["row_hidden_bytes"] * f["row_hidden"]
            + q["row_width_bytes"] * f["row_width"]
        )
        missed = 1 - np.clip(4 * (1 - f["filled"] / q["cache_share"]), 0, 1)
        for name in ("up", "down"):
            tiled = q["wave"] * f[f"waves_{name}"] + f[f"tiles_{name}"] / q["compute_efficiency"]
            multiplied = tiled.min(axis=0)
            read = missed * f[f"weights_{name}"] / q["memory_efficiency"]
            seconds = seconds + _blended(read, multiplied, q["blend"])
        return np.asarray(seconds)


def _blended(a: Floats, b: Floats, power: float) -> Floats:
    """Return ``(a^p + b^p)^(1/p)`` without overflow."""
    larger = np.maximum(np.maximum(a, b), 1e-30)
    smaller = np.minimum(a, b) / larger
    return np.asarray(larger * (1 + smaller**power) ** (1 / power))


def _counted(
    counts: NDArray[Any], heights: tuple[int, ...]
) -> tuple[Floats, Floats, NDArray[np.float64]]:
    """Return of loads [n, slots] the rows [n], the active slots [n] and the tiles [heights, n]."""
    n = len(counts)
    rows, active, tiles = np.zeros(n), np.zeros(n), np.zeros((len(heights), n))
    for part, chunk in _chunks(counts):
        rows[part] = chunk.sum(axis=1)
        active[part] = np.count_nonzero(chunk, axis=1)
        for i, height in enumerate(heights):
            tiles[i, part] = _whole_tiles(chunk, height).sum(axis=1)
    return rows, active, tiles


def _whole_tiles(counts: NDArray[Any], height: int) -> NDArray[Any]:
    if np.issubdtype(counts.dtype, np.integer):
        return -(-counts // height)
    return np.asarray(np.ceil(counts / height))


def _chunks(counts: NDArray[Any]) -> Iterator[tuple[slice, NDArray[Any]]]:
    step = max(_CHUNK // max(counts.shape[1], 1), 1)
    whole = np.issubdtype(counts.dtype, np.integer)
    for start in range(0, len(counts), step):
        part = slice(start, start + step)
        yield part, counts[part].astype(np.int32 if whole else np.float64, copy=False)
