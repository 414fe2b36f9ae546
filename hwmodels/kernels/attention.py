"""An engine's attention in one cache format: several compiled kernels, and which one a call takes.

Attention kernels are compiled for a head width, each with tiles of its own, so each is a kernel
of its own here; a head takes the narrowest that holds it. TensorRT-LLM has two more kinds before
Blackwell: one in which a group of query heads shares its keys, one in which each reads alone.
"""

from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from hwmodels.kernels.attention_decode import AttentionDecodeCost
from hwmodels.kernels.attention_prefill import AttentionPrefillCost
from hwmodels.kernels.base import Limits, OwnPrice
from hwmodels.ops import AttentionDecode, AttentionPrefill, Floats
from hwmodels.prices import Price, priced

Rule = Literal["width", "grouped", "filled", "latency"]
"""``width``: one kernel for each head width. ``grouped``: the sharing kernel for groups of 2 to 32
query heads. ``filled``: for these, and only where its blocks fill a quarter of the units.
``latency``: the sharing kernel for more than 32 heads where work is plenty (latent decode)."""
AttentionCost = Annotated[AttentionDecodeCost | AttentionPrefillCost, Field(discriminator="model")]

_WIDEST_GROUP = 32
_LATENCY_HEADS = 16  # query heads of a block of the low-latency kernel
_LATENCY_KEYS = 256  # fewest keys of its splits
_LATENCY_MOST = 1024  # keys of a split up to which it is taken for more than 32 heads
_BLOCK_KEYS = 128  # kMinHistoryTokensPerBlock of TensorRT-LLM's decoderXQAConstants.h
_BLOCK_FACTOR = 4  # kEnableMinBlockFactor, ibid.


class AttentionKernels(OwnPrice):
    """The kernels of one engine for one cache format."""

    model: Literal["attention_kernels"] = "attention_kernels"
    kernel: str = ""
    """The engine's own name of the kernel that was fitted."""
    rule: Rule = "width"
    """How the engine chooses among them, beside the head's width."""
    warm: bool = True
    """Whether what the last call read may still be in the last-level cache, as when one call is
    measured again and again; False in service, where all other layers are read in between."""
    of: list[AttentionCost] = Field(min_length=1)

    def in_service(self) -> Self:
        """Return a copy that finds nothing of its last call in the last-level cache."""
        return self.model_copy(update={"warm": False})

    def with_fixed(self, factor: float) -> Self:
        """Return a copy with the fixed times of each kernel multiplied."""
        return self.model_copy(update={"of": [cost.with_fixed(factor) for cost in self.of]})

    def price(self, op: Any, limits: Limits) -> Price:
        """Price each row of a column, with the interval over all kernels."""
        return priced(self.seconds(op, limits), self, self.evidence)

    def seconds(self, op: Any, limits: Limits) -> Floats:
        """Return seconds [n]; rows without work cost nothing."""
        if not self.warm:
            limits = Limits(flops=limits.flops, bandwidth=limits.bandwidth, units=limits.units)
        chosen = self.chosen(op, limits)
        seconds = np.zeros(len(op))
        for number in np.unique(chosen):
            rows = chosen == number
            seconds[rows] = self.of[number].seconds(op, limits)[rows]
        return seconds

    def chosen(self, op: AttentionDecode | AttentionPrefill, limits: Limits) -> NDArray[np.int64]:
        """Return which of the kernels each row takes, [n]."""
        shared = shares_keys(self.rule, op, limits)
        picks = np.array([self._narrowest(op.head_dim, kind) for kind in (False, True)])
        return np.asarray(picks[shared.astype(np.int64)])

    def _narrowest(self, width: int, shared: bool) -> int:
        """Return the narrowest kernel of a kind that holds a head, else the widest."""
        kinds = [getattr(cost, "shared", True) for cost in self.of]
        fitting = [n for n, kind in enumerate(kinds) if kind == shared] or list(range(len(kinds)))
        holding = [n for n in fitting if self.of[n].width >= width]
        if holding:
            return min(holding, key=lambda n: self.of[n].width)
        return max(fitting, key=lambda n: self.of[n].width)


def shares_keys(
    rule: Rule, op: AttentionDecode | AttentionPrefill, limits: Limits
) -> NDArray[np.bool_]:
    """Return which rows go to the kernel whose query heads share keys, [n].

    Under ``filled`` as TensorRT-LLM decides (``mayHavePerfGain`` of its XQA runner): sequences x
    KV heads x whole blocks of 128 keys, four times, are at least the units. Of a windowed row only
    the keys in the window are known. Under ``latency`` as it decides for latent attention on
    Blackwell (``selectMlaGenerationKernel`` of its generated kernels, FlashInfer's too).
    """
    if rule == "width" or isinstance(op, AttentionPrefill):
        return np.ones(len(op), dtype=bool)
    if rule == "latency":
        return _plenty(op, limits)
    grouped = 1 < op.num_heads / op.num_kv_heads <= _WIDEST_GROUP
    if rule == "grouped" or not grouped:
        return np.full(len(op), grouped)
    tokens = np.asarray(op.tokens, dtype=np.float64)
    keys = np.asarray(op.context, dtype=np.float64) / np.maximum(tokens, 1e-9)
    blocks = tokens * op.num_kv_heads * np.maximum(1, np.floor(keys / _BLOCK_KEYS))
    return np.asarray(blocks * _BLOCK_FACTOR >= limits.units)


def _plenty(op: AttentionDecode, limits: Limits) -> NDArray[np.bool_]:
    """Return where blocks of 16 heads outnumber the units or have long splits, [n]."""
    group = op.num_heads // op.num_kv_heads
    tokens = np.maximum(np.asarray(op.tokens, dtype=np.float64), 1e-9)
    keys = np.asarray(op.context, dtype=np.float64) / tokens
    blocks = tokens * np.ceil(group / _LATENCY_HEADS)
    splits = np.minimum(np.ceil(keys / _LATENCY_KEYS), np.maximum(1, limits.units // blocks))
    low = (np.ceil(keys / np.maximum(splits, 1)) <= _LATENCY_MOST) & (blocks <= limits.units)
    return np.asarray(~low & (group > _WIDEST_GROUP))
