"""What causal attention of whole prompts or chunks takes: tiles of queries over their keys.

A kernel cuts each head's queries into tiles of fixed rows; a tile walks over the keys that its
last query sees, in blocks, at the pace of the products and the exponentials. Many tiles share the
units evenly, few last as long as the longest.
"""

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from basis import Seconds
from basis.dtypes import bytes_of
from hwmodels.kernels.base import Features, Limits, Numbers, Parameter, PhysicalCost
from hwmodels.ops import AttentionPrefill, Floats

_KEYS = 128  # keys of a block
_SPLIT_FILLED = 0.8  # share of the units at which tiles no longer split their keys
_SPLIT_KEYS = 512  # keys up to which they never do
_SHARPNESS = 8.0  # of the fall of cache hits once the bytes exceed what stays resident


class AttentionPrefillCost(PhysicalCost):
    """Prefill attention, grouped heads or latent (expanded or absorbed), whole or windowed.

    ``t = launch + t_tiles + query_passes x t_queries + key_passes x t_keys + tokens x token``:
    ``t_tiles`` from tiles of ``item`` seconds each and padded pairs at the pace of products and
    exponentials, no less than a cached prefix takes to read; ``t_queries`` (with results) and
    ``t_keys`` (new ones, with values) are one transfer at peak bandwidth, over ``cache_speed``
    as far as both stay in the last-level cache.
    """

    model: Literal["attention_prefill"] = "attention_prefill"
    FIXED: ClassVar[tuple[str, ...]] = ("launch", "item", "token")
    width: int = Field(default=0, ge=0)
    """Head width that the kernel is compiled for; 0: any."""
    tile: int = Field(default=128, ge=1)
    """Rows of a tile."""
    packed: bool = False
    """Whether the query heads of a group fill the rows of a tile together."""
    split: bool = False
    """Whether tiles that are too few for the units share out their keys."""
    launch: Seconds
    """Time of a call with next to no work, s."""
    item: Seconds
    """Fixed time of a tile: first keys, softmax of its end, s."""
    compute_share: float = Field(gt=0, le=2)
    """Share of the bf16 peak that products of padded tiles reach by themselves; up to 2 in fp8."""
    exponentials: float = Field(gt=0)
    """Scores per second and unit that softmax gets through beside the products."""
    query_passes: float = Field(ge=0)
    """Transfers of queries and results that the products do not hide, rotary embedding included."""
    key_passes: float = Field(ge=0)
    """Transfers of new keys and values that the products do not hide: cache writes, casts."""
    cache_share: float = Field(gt=0)
    """Share of the last-level cache within which bytes of the last call are still there."""
    cache_speed: float = Field(ge=1)
    """Bandwidth of the last-level cache over that of the memory."""
    token: Seconds
    """Time that one new token adds whatever its width, s: its place in the paged cache."""
    tail: float = Field(ge=0, le=1)
    """Share of a last wave's idle units that is paid for."""

    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        Parameter(name="launch", low=1e-6, high=6e-5, start=1e-5),
        Parameter(name="item", low=1e-7, high=3e-5, start=2e-6),
        Parameter(name="compute_share", low=0.02, high=2.0, start=0.7),
        Parameter(name="exponentials", low=1e9, high=1e13, start=1e11),
        Parameter(name="query_passes", low=1e-2, high=20.0, start=1.0),
        Parameter(name="key_passes", low=1e-2, high=40.0, start=2.0),
        Parameter(name="cache_share", low=0.3, high=1.2, start=0.8),
        Parameter(name="cache_speed", low=1.0, high=8.0, start=1.5),
        Parameter(name="token", low=1e-12, high=1e-7, start=5e-10),
        Parameter(name="tail", low=0.0, high=1.0, start=0.3, scale="linear"),
    )

    def features(self, op: AttentionPrefill, limits: Limits) -> Features:
        """Return tiles, padded pairs and bytes of each row, [n].

        Sequences of a row are taken to be equally long and to start at once; a row with more
        pairs than that allows is one sequence with cached tokens before its chunk.
        """
        tokens = np.maximum(np.asarray(op.tokens, dtype=np.float64), 1e-9)
        pairs = np.asarray(op.pairs, dtype=np.float64)
        queries, before = prompt(tokens, pairs, op.window)
        sequences = tokens / queries
        group = op.num_heads // op.num_kv_heads if self.packed else 1
        rows = queries * group
        tiles = np.ceil(rows / self.tile)
        span = self.tile / group  # queries of a tile
        keys = _keys_of_tiles(tiles, span, before, queries, op.window)
        longest = np.ceil((before + queries) / _KEYS) * _KEYS
        if op.window:
            longest = np.minimum(longest, np.ceil((op.window + span) / _KEYS) * _KEYS)
        heads = sequences * op.num_heads / group
        items = heads * tiles
        split = self.split & (items < _SPLIT_FILLED * limits.units) & (longest > _SPLIT_KEYS)
        width = op.head_dim + op.v_head_dim
        queries_bytes = tokens * bytes_of(op.activation_dtype, op.num_heads * width)
        keys_bytes = tokens * bytes_of(op.activation_dtype, op.num_kv_heads * width)
        filled = (queries_bytes + keys_bytes) / max(limits.cache, 1.0)
        return {
            "work": pairs,
            "ratio": np.maximum(items / limits.units, 1.0),
            "waves": np.ceil(items / limits.units),
            "share": heads * keys * self.tile / limits.units,
            "longest": np.where(split, _KEYS, longest) * self.tile,
            "rounds": np.where(split, 3.0, 1.0),
            "pair_seconds": np.full_like(tokens, 2 * width * limits.units / limits.flops),
            "queries": queries_bytes / limits.bandwidth,
            "keys": keys_bytes / limits.bandwidth,
            "filled": filled if limits.cache else np.full_like(tokens, np.inf),
            "tokens": tokens,
            "prefix": sequences * before * bytes_of(op.kv_dtype, op.kv_elements) / limits.bandwidth,
        }

    @staticmethod
    def time(numbers: Numbers, features: Features) -> Floats:
        """Return seconds [n]."""
        ratio = features["ratio"]
        pair = features["pair_seconds"] / numbers["compute_share"] + 1 / numbers["exponentials"]
        waves = ratio + numbers["tail"] * (features["waves"] - ratio)
        # split tiles write partial results, which a second kernel reads and adds up
        item = features["rounds"] * numbers["item"]
        even = waves * item + features["share"] * waves / ratio * pair
        longest = item + features["longest"] * pair
        hits = 1 / (1 + (features["filled"] / numbers["cache_share"]) ** _SHARPNESS)
        moved = numbers["query_passes"] * features["queries"]
        moved = moved + numbers["key_passes"] * features["keys"]
        moved = moved * (1 - hits + hits / numbers["cache_speed"])
        moved = moved + numbers["token"] * features["tokens"]
        tiles = np.maximum(np.maximum(even, longest), features["prefix"])
        return np.asarray(numbers["launch"] + tiles + moved)


def prompt(tokens: Floats, pairs: Floats, window: int = 0) -> tuple[Floats, Floats]:
    """Return the queries of one sequence and the cached tokens before them, of equal sequences.

    Whole prompts of s tokens have s (s + 1) / 2 pairs each, w s - w (w - 1) / 2 under a window
    w < s: the mean of keys per query gives s. More keys than one prompt of all tokens would see
    are those of one chunk behind a cached prefix.
    """
    seen = np.maximum(pairs / tokens, 1.0)
    length = 2 * seen - 1
    if window:
        left = np.maximum(window - seen, 0.5)
        length = np.where(length > window, window * (window - 1) / (2 * left), length)
    queries = np.minimum(np.maximum(length, 1.0), tokens)
    before = np.where(length > tokens, seen - (tokens + 1) / 2, 0.0)
    return queries, np.maximum(before, 0.0)


def _keys_of_tiles(
    tiles: Floats, span: float, before: Floats, queries: Floats, window: int
) -> Floats:
    """Keys that the tiles of one head walk over, in whole blocks: sum over the tiles.

    Tile i of n walks over the cached tokens and i spans, the last over what is there; a window
    cuts all to ``window + span``. Sums of arithmetic series; blocks add half of one each.
    """
    last = np.ceil((before + queries) / _KEYS) * _KEYS
    if not window:
        inner = tiles - 1
        series = inner * (before + _KEYS / 2 * (span % _KEYS != 0)) + span * inner * tiles / 2
        return np.asarray(series + last)
    cut = np.ceil((window + span) / _KEYS) * _KEYS
    short = np.clip(np.floor((cut - before) / span), 0, tiles)  # tiles that see less than the cut
    return np.asarray(
        np.where(
            tiles <= 1,
            np.minimum(last, cut),
            short * before + span * short * (short + 1) / 2 + (tiles - short) * cut,
        )
    )
