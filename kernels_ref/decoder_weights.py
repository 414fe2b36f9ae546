"""Random weights of a decoder of given geometry, for running and timing it.

Matrices are uniform with variance ``1 / inputs``, so that activations stay of order one through
any number of layers. An expert's weights depend on (seed, layer, expert) alone: every placement,
and every memory that holds them, computes the same function. One expert is one record of numbers,
``[W1; W3]`` and then ``W2``, which a single copy brings into a slot.
Shape suffixes: V vocabulary, D model width, Q rows of the fused query/key/value projection, O
channels of all heads together, G rows of gate over up, F inner width, E experts, P slots, N
elements of a record, L MoE layers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from traces.model_spec import ModelSpec

Ids = NDArray[np.integer]
_EXPERT, _OUTER = 0, 1  # first word of a random stream


@dataclass(frozen=True, kw_only=True, eq=False)
class FfnWeights:
    """A gated feed-forward network: dense, or the shared experts."""

    w13_GD: Tensor
    w2_DF: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerWeights:
    """One layer, without its routed experts."""

    attention_norm_D: Tensor
    qkv_QD: Tensor
    """Queries over keys over values."""
    o_DO: Tensor
    ffn_norm_D: Tensor
    router_ED: Tensor | None = None
    """Of an MoE layer."""
    ffn: FfnWeights | None = None
    """Of a dense layer, or the shared experts of an MoE layer."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SlotWeights:
    """The routed experts that a process holds in one MoE layer, slot by slot."""

    records_PN: Tensor
    w13_PGD: Tensor
    """View of the records."""
    w2_PDF: Tensor
    """View of the records."""

    @classmethod
    def empty(
        cls, model: ModelSpec, slots: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> "SlotWeights":
        """Reserve slots whose content is still undefined."""
        size = model.expert_matrix_params
        return cls.of(model, torch.empty(slots, size, dtype=dtype, device=device))

    @classmethod
    def of(cls, model: ModelSpec, records_PN: Tensor) -> "SlotWeights":
        """View records as the two matrices of each expert, without a copy."""
        hidden, width = model.hidden_size, model.expert_width
        up = 2 * width * hidden
        return cls(
            records_PN=records_PN,
            w13_PGD=records_PN[:, :up].view(-1, 2 * width, hidden),
            w2_PDF=records_PN[:, up:].view(-1, hidden, width),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Weights:
    """All weights of a decoder but its routed experts."""

    embedding_VD: Tensor
    head_VD: Tensor
    final_norm_D: Tensor
    layers: tuple[LayerWeights, ...]

    @classmethod
    def random(
        cls,
        model: ModelSpec,
        *,
        dtype: torch.dtype,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> "Weights":
        """Draw everything outside the routed experts (those: `expert_slots`).

        Parameters
        ----------
        model
            Geometry; grouped-query attention, gated networks, no biases.
        dtype
            Of every weight; the geometry's own formats are not looked at.
        seed
            The same seed gives the same numbers on every device.
        device

        Raises
        ------
        ValueError
            If the geometry has parts that the decoder does not run; all of them are named.
        """
        check_runs(model)
        hidden, vocabulary = model.hidden_size, model.vocab_size
        draw = _Draw(seed, dtype, device)
        embedding_VD = draw.matrix(vocabulary, hidden, -1, 0) * sqrt(hidden)
        head_VD = embedding_VD if model.tie_embeddings else draw.matrix(vocabulary, hidden, -1, 1)
        return cls(
            embedding_VD=embedding_VD,
            head_VD=head_VD,
            final_norm_D=draw.gains(hidden, -1),
            layers=tuple(_layer(model, layer, draw) for layer in range(model.num_layers)),
        )


def check_runs(model: ModelSpec) -> None:
    """Check that the decoder computes every part of a geometry.

    Raises
    ------
    ValueError
        If not; all parts that it does not run are named.
    """
    a = model.attention
    wrong = {
        f"attention {a.kind}": a.kind != "gqa",
        f"key heads of {a.head_dim} and value heads of {a.v_head_dim} elements": a.head_dim
        != a.v_head_dim,
        f"an odd head of {a.head_dim} elements": a.head_dim % 2 == 1,
        f"attention bias {a.bias}": a.bias != "none",
        f"qk_norm {a.qk_norm}": a.qk_norm != "none",
        "attention sinks": a.sinks,
        "plain (not gated) networks": not model.gated,
        "expert biases": model.expert_bias,
        "a router bias": model.router_bias,
        "a shared expert gate": model.shared_expert_gate,
        f"norms of {model.norm_vectors} vectors in a layer": model.norm_vectors != 2,
        ", ".join(part.name for part in model.parts): bool(model.parts),
        "; ".join(model.unpriced): bool(model.unpriced),
        f"comm_size {model.comm_size} beside hidden_size {model.hidden_size}": model.comm_size
        != model.hidden_size,
    }
    if found := [what for what, has in wrong.items() if has]:
        raise ValueError(
            f"{model.name} has {', '.join(found)} -- the decoder runs grouped-query attention with "
            "equal even heads, gated networks and no biases -- change the geometry"
        )


def expert_slots(
    model: ModelSpec,
    slot_map_LP: Ids,
    *,
    dtype: torch.dtype,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[SlotWeights, ...]:
    """Draw the experts that a process holds.

    Parameters
    ----------
    model
    slot_map_LP
        Logical expert of each local slot in each MoE layer.
    dtype, seed, device
        As `Weights.random`.

    Returns
    -------
    tuple of SlotWeights, one per MoE layer.

    Raises
    ------
    ValueError
        If the map has not one row per MoE layer, or an id is not below the experts.
    """
    check_slot_map(model, slot_map_LP)
    layers = []
    for layer, experts in enumerate(slot_map_LP.tolist()):
        slots = SlotWeights.empty(model, len(experts), dtype, device)
        for slot, expert in enumerate(experts):
            slots.records_PN[slot].copy_(expert_record(model, layer, expert, dtype, seed))
        layers.append(slots)
    return tuple(layers)


def expert_record(
    model: ModelSpec, layer: int, expert: int, dtype: torch.dtype, seed: int = 0
) -> Tensor:
    """Draw one expert: ``[W1; W3]`` and then ``W2`` in one row of N elements, on the CPU.

    Parameters
    ----------
    model
    layer
        MoE layer, from 0 (dense layers left out).
    expert
        Logical expert.
    dtype, seed
        As `Weights.random`.
    """
    record_N = _uniform(model.expert_matrix_params, _EXPERT, seed, layer, expert)
    up = 2 * model.expert_width * model.hidden_size
    record_N[:up] *= sqrt(3 / model.hidden_size)
    record_N[up:] *= sqrt(3 / model.expert_width)
    return record_N.to(dtype)


def expert_records(model: ModelSpec, dtype: torch.dtype, seed: int = 0) -> Iterator[Tensor]:
    """Draw every expert, layer after layer, one at a time: what `write_expert_file` takes."""
    for layer in range(model.num_moe_layers):
        for expert in range(model.num_experts):
            yield expert_record(model, layer, expert, dtype, seed)


def check_slot_map(model: ModelSpec, slot_map_LP: Ids) -> None:
    """Check the shape and the ids of a map from slots to logical experts; errors as above."""
    shape, layers = slot_map_LP.shape, model.num_moe_layers
    if len(shape) != 2 or shape[0] != layers or not shape[1]:
        raise ValueError(
            f"slot map of shape {list(shape)} -- [{layers} MoE layers, slots] -- give every layer "
            "the same number of slots"
        )
    if slot_map_LP.min() < 0 or slot_map_LP.max() >= model.num_experts:
        raise ValueError(
            f"slot map with experts {slot_map_LP.min()} to {slot_map_LP.max()} -- {model.name} has "
            f"0 to {model.num_experts - 1} -- name a logical expert for each slot"
        )


def _uniform(elements: int, *words: int) -> Tensor:
    """Numbers in [-1, 1) from the random stream that the words name, float32 on the CPU."""
    state = np.random.SeedSequence([word + 1 for word in words]).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))
    return torch.empty(elements).uniform_(-1, 1, generator=generator)


class _Draw:
    """Makes matrices; each has a random stream of its own."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self._seed, self._dtype, self._device = seed, dtype, device

    def matrix(self, rows: int, inputs: int, layer: int, part: int) -> Tensor:
        flat = _uniform(rows * inputs, _OUTER, self._seed, layer, part) * sqrt(3 / inputs)
        return flat.view(rows, inputs).to(self._device, self._dtype)

    def gains(self, width: int, layer: int, part: int = 9) -> Tensor:
        gains = 1 + 0.1 * _uniform(width, _OUTER, self._seed, layer, part)
        return gains.to(self._device, self._dtype)

    def ffn(self, hidden: int, width: int, layer: int) -> FfnWeights:
        return FfnWeights(
            w13_GD=self.matrix(2 * width, hidden, layer, 3),
            w2_DF=self.matrix(hidden, width, layer, 4),
        )


def _layer(model: ModelSpec, layer: int, draw: _Draw) -> LayerWeights:
    a, hidden = model.attention, model.hidden_size
    queries, values = a.num_heads * a.head_dim, a.num_heads * a.v_head_dim
    moe = layer in model.moe_layer_ids
    width = model.shared_expert_width if moe else model.dense_width
    return LayerWeights(
        attention_norm_D=draw.gains(hidden, layer, 5),
        qkv_QD=draw.matrix(queries + a.kv_elements_per_token, hidden, layer, 0),
        o_DO=draw.matrix(hidden, values, layer, 1),
        ffn_norm_D=draw.gains(hidden, layer, 6),
        router_ED=draw.matrix(model.num_experts, hidden, layer, 2) if moe else None,
        ffn=draw.ffn(hidden, width, layer) if width else None,
    )
