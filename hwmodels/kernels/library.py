"""What kernels take that are loops over library calls, as frameworks run them on a CPU.

A dense product of a BLAS first packs its weights into blocks and then multiplies from the cache,
one after the other; a single row skips the packing. Experts are such products one after the other,
attention a few calls for each sequence (and tile of queries). What a call costs beside its work,
launch and allocation of the framework, counts for as many calls as there are.
"""

from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from basis import Seconds, bytes_of
from hwmodels.kernels.attention_prefill import prompt
from hwmodels.kernels.base import Features, Limits, Numbers, Parameter, PhysicalCost
from hwmodels.kernels.stream import StreamCost
from hwmodels.ops import (
    AttentionDecode,
    AttentionPrefill,
    Elementwise,
    Floats,
    Gemm,
    GroupedGemm,
    Permute,
    Route,
)

_TILE = 64  # queries of a prefill tile
_HEAP = 64  # scores for each choice up to which torch's top-k keeps a heap
_LAUNCH = Parameter(name="launch", low=2e-7, high=1e-3, start=5e-6)
_CALL = Parameter(name="call", low=1e-7, high=1e-3, start=1e-5)
_COMPUTE = Parameter(name="compute_efficiency", low=0.02, high=1.0, start=0.8)
_MEMORY = Parameter(name="memory_efficiency", low=0.02, high=1.0, start=0.8)
_PACKING = Parameter(name="packing", low=1e-3, high=20.0, start=1.0)
_ROWS = Parameter(name="rows", low=1e-3, high=50.0, start=1.0)


class LibraryGemmCost(PhysicalCost):
    """``t = launch + weights / (memory_efficiency W) (1 + packing [m > 1]) + rows + products``.

    ``products`` are FLOP at ``compute_efficiency`` of the peak; ``rows`` moves activations and
    results at the peak bandwidth, so many times. The terms add: packing and multiplying take turns.
    """

    model: Literal["library_gemm"] = "library_gemm"
    launch: Seconds
    """Fixed time of one call, s."""
    compute_efficiency: float = Field(gt=0, le=1)
    """Share of the dense peak in the multiplying phase."""
    memory_efficiency: float = Field(gt=0, le=1)
    """Share of the peak bandwidth at which weights are read."""
    packing: float = Field(ge=0)
    """Time of packing the weights, over that of reading them; none for a single row."""
    rows: float = Field(ge=0)
    """Passes over activations and results at the peak bandwidth."""

    FIXED: ClassVar[tuple[str, ...]] = ("launch",)
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (_LAUNCH, _COMPUTE, _MEMORY, _PACKING, _ROWS)

    def features(self, op: Gemm, limits: Limits) -> Features:
        """Return ideal seconds [n] of products, weights (packed ones apart) and rows."""
        m = np.asarray(op.m, dtype=np.float64)
        weights = op.weight_bytes() / limits.bandwidth
        return {
            "work": op.flops(),
            "products": op.flops() / limits.flops,
            "weights": weights,
            "packed": weights * (m > 1),
            "rows": op.activation_bytes() / limits.bandwidth,
        }

    @staticmethod
    def time(numbers: Numbers, features: Features) -> Floats:
        """Return seconds [n]."""
        return np.asarray(numbers["launch"] + _product(numbers, features))


class LibraryRouteCost(PhysicalCost):
    """A router: such a product, then softmax and selection over tokens x experts scores.

    Selection is torch's: a heap over the scores where 64 k <= E, else quickselect over all of them
    and a sort of the chosen (``topk_impl_loop`` of aten/src/ATen/native/TopKImpl.h).
    """

    model: Literal["library_route"] = "library_route"
    launch: Seconds
    """Fixed time of all its calls, s."""
    score: Seconds
    """Time that a score (token x expert) adds, s."""
    select: Seconds
    """Time that a score adds besides where quickselect goes over it, s."""
    choice: Seconds
    """Time that a choice (token x k) adds, s."""
    compute_efficiency: float = Field(gt=0, le=1)
    """As in `LibraryGemmCost`."""
    memory_efficiency: float = Field(gt=0, le=1)
    """As in `LibraryGemmCost`."""
    packing: float = Field(ge=0)
    """As in `LibraryGemmCost`."""
    rows: float = Field(ge=0)
    """As in `LibraryGemmCost`."""

    FIXED: ClassVar[tuple[str, ...]] = ("launch", "score", "select", "choice")
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        _LAUNCH,
        Parameter(name="score", low=1e-11, high=1e-6, start=2e-9),
        Parameter(name="select", low=1e-11, high=1e-6, start=5e-9),
        Parameter(name="choice", low=1e-11, high=1e-6, start=2e-8),
        _COMPUTE,
        _MEMORY,
        _PACKING,
        _ROWS,
    )

    def features(self, op: Route, limits: Limits) -> Features:
        """Return the product's ideal seconds, scores and choices, [n]."""
        tokens = np.asarray(op.tokens, dtype=np.float64)
        size = bytes_of(op.activation_dtype, 1)
        weights = np.full(len(op), op.hidden * op.experts * size / limits.bandwidth)
        scores = tokens * op.experts
        return {
            "work": tokens,
            "scores": scores,
            "selected": scores * (op.top_k * _HEAP > op.experts),
            "choices": tokens * op.top_k,
            "products": op.flops() / limits.flops,
            "weights": weights,
            "packed": weights * (tokens > 1),
            "rows": tokens * (op.hidden + op.experts) * (size / limits.bandwidth),
        }

    @staticmethod
    def time(numbers: Numbers, features: Features) -> Floats:
        """Return seconds [n]."""
        selection = (
            numbers["score"] * features["scores"]
            + numbers["select"] * features["selected"]
            + numbers["choice"] * features["choices"]
        )
        return np.asarray(numbers["launch"] + selection + _product(numbers, features))


class LibraryRowsCost(PhysicalCost):
    """Rows moved or worked on one by one: ``t = launch + row x rows + bytes``.

    Bytes take the rate of the last-level cache as far as they fit, else of memory (as in
    `StreamCost`); a row costs its index, a place in a table or cache that nothing has touched.
    """

    model: Literal["library_rows"] = "library_rows"
    launch: Seconds
    """Fixed time of one call, s."""
    row: Seconds
    """Time of a row (a token's, or a (token, expert) pair's) beside its bytes, s."""
    memory_efficiency: float = Field(gt=0, le=1)
    """Share of the peak memory bandwidth."""
    cache_speed: float = Field(gt=0)
    """Rate of bytes that are in the cache, over the peak memory bandwidth."""
    kept: float = Field(gt=0)
    """Largest buffer that stays in the cache, over the cache's size."""

    FIXED: ClassVar[tuple[str, ...]] = ("launch", "row")
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        _LAUNCH,
        Parameter(name="row", low=1e-10, high=1e-5, start=1e-8),
        Parameter(name="memory_efficiency", low=0.005, high=1.0, start=0.5),
        Parameter(name="cache_speed", low=0.005, high=20.0, start=1.0),
        Parameter(name="kept", low=0.01, high=3.0, start=0.8),
    )

    def features(self, op: Permute | Elementwise, limits: Limits) -> Features:
        """Return rows, the time of the bytes at the peak, and how often they fit, [n]."""
        rows = op.rows if isinstance(op, Permute) else op.tokens
        moved = op.bytes_moved()
        return {
            "work": moved,
            "count": np.asarray(rows, dtype=np.float64),
            "memory": moved / limits.bandwidth,
            "fits": limits.cache / np.maximum(moved, 1.0),
        }

    @staticmethod
    def time(numbers: Numbers, features: Features) -> Floats:
        """Return seconds [n]."""
        return StreamCost.time(numbers, features) + numbers["row"] * features["count"]


class LoopedExpertsCost(PhysicalCost):
    """Experts in turn: ``t = launch + call x active experts + their products + rows``."""

    model: Literal["looped_experts"] = "looped_experts"
    launch: Seconds
    """Fixed time of the loop, s."""
    call: Seconds
    """Time of an expert's calls beside their work, s."""
    compute_efficiency: float = Field(gt=0, le=1)
    """As in `LibraryGemmCost`."""
    memory_efficiency: float = Field(gt=0, le=1)
    """As in `LibraryGemmCost`."""
    packing: float = Field(ge=0)
    """As in `LibraryGemmCost`."""
    rows: float = Field(ge=0)
    """Passes over the activations of all rows, the ones between the products included."""

    FIXED: ClassVar[tuple[str, ...]] = ("launch", "call")
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        _LAUNCH,
        _CALL,
        _COMPUTE,
        _MEMORY,
        _PACKING,
        _ROWS,
    )

    def features(self, op: GroupedGemm, limits: Limits) -> Features:
        """Return active experts and ideal seconds [n]; experts with one row are not packed."""
        several = np.count_nonzero(np.asarray(op.tokens_per_expert) > 1, axis=1)
        each = op.bytes_per_expert() / limits.bandwidth
        return {
            "work": op.rows(),
            "calls": op.active(),
            "products": op.flops() / limits.flops,
            "weights": op.active() * each,
            "packed": several * each,
            "rows": op.activation_bytes() / limits.bandwidth,
        }

    @staticmethod
    def time(numbers: Numbers, features: Features) -> Floats:
        """Return seconds [n]."""
        calls = numbers["call"] * features["calls"]
        return np.asarray(numbers["launch"] + calls + _product(numbers, features))


class LoopedAttentionCost(PhysicalCost):
    """Attention of one sequence (and tile of 64 queries) after the other.

    ``t = launch + call x calls + products + scores / exponentials + cache / (memory_efficiency W)
    + rows``: a call is a sequence in decode, a tile of a sequence's queries in prefill.
    """

    model: Literal["looped_attention"] = "looped_attention"
    launch: Seconds
    """Fixed time of the loop, s."""
    call: Seconds
    """Time of the calls for a sequence or tile beside their work, s."""
    compute_efficiency: float = Field(gt=0, le=1)
    """Share of the dense peak that both products reach."""
    exponentials: float = Field(gt=0)
    """Scores per second that masking and softmax get through."""
    memory_efficiency: float = Field(gt=0, le=1)
    """Share of the peak bandwidth at which cached keys and values are read."""
    rows: float = Field(ge=0)
    """Passes over queries and results at the peak bandwidth."""

    FIXED: ClassVar[tuple[str, ...]] = ("launch", "call")
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        _LAUNCH,
        _CALL,
        _COMPUTE,
        Parameter(name="exponentials", low=1e6, high=1e12, start=1e9),
        _MEMORY,
        _ROWS,
    )

    def features(self, op: AttentionDecode | AttentionPrefill, limits: Limits) -> Features:
        """Return calls, scores, and ideal seconds of products, cache and rows, [n].

        Sequences of a row are taken to be equally long; a prefill tile multiplies all keys that
        its last query sees.
        """
        tokens = np.asarray(op.tokens, dtype=np.float64)
        width = op.head_dim + op.v_head_dim
        if isinstance(op, AttentionDecode):
            calls, pairs, keys = tokens, np.asarray(op.context, dtype=np.float64), op.context
        else:
            calls, pairs, keys = _tiles(op)
        per_key = bytes_of(op.kv_dtype, op.kv_elements) / limits.bandwidth
        return {
            "work": pairs,
            "calls": calls,
            "products": 2 * pairs * op.num_heads * width / limits.flops,
            "scores": pairs * op.num_heads,
            "cache": np.asarray(keys, dtype=np.float64) * per_key,
            "rows": tokens * (bytes_of(op.activation_dtype, op.num_heads * width))
            / limits.bandwidth,
        }  # fmt: skip

    @staticmethod
    def time(numbers: Numbers, features: Features) -> Floats:
        """Return seconds [n]."""
        return np.asarray(
            numbers["launch"]
            + numbers["call"] * features["calls"]
            + features["products"] / numbers["compute_efficiency"]
            + features["scores"] / numbers["exponentials"]
            + features["cache"] / numbers["memory_efficiency"]
            + numbers["rows"] * features["rows"]
        )


def _product(numbers: Numbers, features: Features) -> Any:
    """Seconds of packing, multiplying and moving rows."""
    read = features["weights"] + numbers["packing"] * features["packed"]
    return (
        features["products"] / numbers["compute_efficiency"]
        + read / numbers["memory_efficiency"]
        + numbers["rows"] * features["rows"]
    )


def _tiles(op: AttentionPrefill) -> tuple[Floats, Floats, Floats]:
    """Return tiles, pairs on whole tiles, and keys that the sequences hold, [n]."""
    tokens = np.asarray(op.tokens, dtype=np.float64)
    pairs = np.asarray(op.pairs, dtype=np.float64)
    queries, before = prompt(np.maximum(tokens, 1e-9), pairs, op.window)
    sequences = tokens / queries
    tiles = np.ceil(queries / _TILE)
    height = queries / tiles
    whole = pairs + tokens * (np.minimum(height, _TILE) - 1) / 2  # above the diagonal of a tile
    return sequences * tiles, np.where(tokens > 0, whole, 0.0), sequences * (before + queries)
