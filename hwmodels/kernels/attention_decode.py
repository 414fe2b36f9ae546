"""What attention of one new token per sequence takes: items of a grid, waves, a cache's bytes.

A kernel cuts (sequence, head group) into items, and into splits of the keys where these are too
few to fill the processor; an item has a fixed time and a rate. All items together draw the cache
from memory, or from the last-level cache where it fits and is still there.
"""

import math
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from basis import Seconds
from basis.dtypes import bytes_of
from hwmodels.kernels.base import Features, Limits, Numbers, Parameter, PhysicalCost
from hwmodels.ops import AttentionDecode, Floats

_FILLED = 0.8  # share of the aimed-at items from which a kernel no longer splits
_SHARPNESS = 8.0  # of the fall of cache hits once the bytes exceed what stays resident
_FP32 = 4  # bytes of a partial result


class AttentionDecodeCost(PhysicalCost):
    """Decode attention, grouped heads or absorbed latent, with split keys.

    ``t = launch + edge [if a window is full] + combine x log2(splits) + (t_items^overlap +
    t_bytes^overlap)^(1/overlap)``:
    ``t_items`` = waves of items x (``item`` + the slower of keys at ``item_rate`` and products at
    ``compute_share``), ``t_bytes`` = bytes / (``memory_share`` x bandwidth), over ``cache_speed``
    as far as they stay in the last-level cache. Of ``item_rate`` and ``compute_share`` only the
    slower is determined where the rows of a product never vary.
    """

    model: Literal["attention_decode"] = "attention_decode"
    FIXED: ClassVar[tuple[str, ...]] = ("launch", "item", "combine", "edge")
    width: int = Field(default=0, ge=0)
    """Head width that the kernel is compiled for; 0: any."""
    shared: bool = True
    """Of two kernels of an engine the one for heads that share keys; see `AttentionKernels`."""
    head_tile: int = Field(default=64, ge=1)
    """Query heads that share keys in one item (M rows of a product); 1: each reads for itself."""
    row_step: int = Field(default=64, ge=1)
    """Granule of the rows that are multiplied, up to ``head_tile``."""
    resident: int = Field(default=1, ge=1)
    """Items that a unit works on at once."""
    split_keys: int = Field(default=128, ge=1)
    """Fewest keys of a split."""
    fill: int = Field(default=1, ge=1)
    """Items of each unit that splitting aims at."""
    most_splits: int = Field(default=128, ge=1)
    """Splits that a sequence has at most."""
    block_keys: int = Field(default=128, ge=1)
    """Keys that an item loads and multiplies at once; the last block counts whole."""
    launch: Seconds
    """Time of a call with next to no work, s."""
    item: Seconds
    """Fixed time of an item: queries in, first keys, softmax, result out, s."""
    item_rate: float = Field(gt=0)
    """Rate at which one item draws keys and values, bytes/s."""
    compute_share: float = Field(gt=0, le=2)
    """Share of a unit's bf16 peak that its items reach on padded rows; up to 2 in fp8."""
    memory_share: float = Field(gt=0, le=1)
    """Share of the peak bandwidth that many items reach."""
    cache_share: float = Field(gt=0)
    """Share of the last-level cache within which bytes of the last call are still there."""
    cache_speed: float = Field(ge=1)
    """Bandwidth of the last-level cache over that of the memory."""
    combine: Seconds
    """Time of adding up splits in pairs, s for each doubling of their number."""
    overlap: float = Field(ge=1)
    """How well items and bytes overlap: 1 not at all, many: wholly."""
    edge: Seconds = 0.0
    """Time that a full window adds: its mask, and splits made for keys that it then skips, s."""
    tail: float = Field(ge=0, le=1)
    """Share of a last wave's idle places that is paid for."""

    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        Parameter(name="launch", low=1e-6, high=6e-5, start=8e-6),
        Parameter(name="item", low=1e-7, high=3e-5, start=3e-6),
        Parameter(name="item_rate", low=1e9, high=1e12, start=3e10),
        Parameter(name="compute_share", low=0.001, high=2.0, start=0.4),
        Parameter(name="memory_share", low=0.05, high=1.0, start=0.9),
        Parameter(name="cache_share", low=0.3, high=1.2, start=0.8),
        Parameter(name="cache_speed", low=1.0, high=8.0, start=2.0),
        Parameter(name="combine", low=1e-8, high=1e-5, start=8e-7),
        Parameter(name="overlap", low=1.0, high=12.0, start=2.0),
        Parameter(name="edge", low=1e-9, high=2e-5, start=1e-6),
        Parameter(name="tail", low=0.0, high=1.0, start=0.5, scale="linear"),
    )

    def features(self, op: AttentionDecode, limits: Limits) -> Features:
        """Return items, waves and bytes of each row, [n].

        Sequences of a row are taken to be equally long: only sums are known. A row of mixed
        lengths has a longest item that this does not see.
        """
        tokens = np.maximum(np.asarray(op.tokens, dtype=np.float64), 1e-9)
        keys = np.asarray(op.context, dtype=np.float64) / tokens
        full = (keys >= op.window) & (op.window > 0)
        keys = keys + full * self.block_keys / 2  # a full window begins inside a block
        group = op.num_heads / op.num_kv_heads
        places = limits.units * self.resident
        whole = tokens * op.num_kv_heads * np.ceil(group / self.head_tile)
        splits = self._splits(whole, keys, limits.units * self.fill)
        block = np.ceil(keys / splits / self.block_keys) * self.block_keys
        rows = min(self.head_tile, math.ceil(group / self.row_step) * self.row_step)
        width = op.head_dim + op.v_head_dim
        per_key = bytes_of(op.kv_dtype, op.kv_elements) / op.num_kv_heads
        partial = tokens * op.num_heads * op.v_head_dim * splits * 2 * _FP32
        ones = np.ones_like(tokens)
        return {
            "work": np.asarray(op.context, dtype=np.float64),
            "ratio": np.maximum(whole * splits / places, 1.0),
            "waves": np.ceil(whole * splits / places),
            "item_bytes": block * per_key,
            "item_seconds": 2 * rows * block * width * places / limits.flops,
            "steps": np.log2(splits),
            "full": full.astype(np.float64),
            "partial": np.where(splits > 1, partial, 0.0) / limits.bandwidth,
            "memory": op.bytes_moved() / limits.bandwidth,
            "filled": op.bytes_moved() / limits.cache if limits.cache else np.inf * ones,
        }

    def _splits(self, items: Floats, keys: Floats, aim: float) -> Floats:
        """Return splits that bring the items up to the aim, each of ``split_keys`` at least."""
        most = np.clip(np.floor(keys / self.split_keys), 1, self.most_splits)
        wanted = np.clip(np.floor(aim / items), 1, most)
        return np.where(items >= _FILLED * aim, 1.0, wanted)

    @staticmethod
    def time(numbers: Numbers, features: Features) -> Floats:
        """Return seconds [n]."""
        ratio, overlap = features["ratio"], numbers["overlap"]
        waves = ratio + numbers["tail"] * (features["waves"] - ratio)
        keys = features["item_bytes"] / numbers["item_rate"]
        products = features["item_seconds"] / numbers["compute_share"]
        items = waves * (numbers["item"] + np.maximum(keys, products))
        hits = 1 / (1 + (features["filled"] / numbers["cache_share"]) ** _SHARPNESS)
        slowness = 1 - hits + hits / numbers["cache_speed"]
        memory = features["memory"] * slowness / numbers["memory_share"]
        combine = features["steps"] * numbers["combine"]
        combine += features["partial"] / (numbers["memory_share"] * numbers["cache_speed"])
        both = (items**overlap + memory**overlap) ** (1 / overlap)
        return np.asarray(numbers["launch"] + features["full"] * numbers["edge"] + combine + both)
