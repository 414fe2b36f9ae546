"""Memory of each rank in bytes on a layout: weights, expert slots, KV cache, buffers.

Weights and KV cache are counts; the rules of activations and communication buffers are stated
here and are assumptions. Ranks of a tp group share attention, dense layers and vocabulary, those
of a block the experts, pipeline stages the layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from basis.dtypes import bytes_of
from simulator.batches import StepBatch
from simulator.layout import Layout
from simulator.parallelism import Parallelism
from simulator.placement import Placement
from traces.model_spec import ModelSpec

USABLE = 0.9
"""Share of a device's memory that weights, cache and buffers may take; assumed. The rest is left
to the runtime, graphs and fragmentation, as the serving engines' default of 0.9 does."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class MemoryNeed:
    """Bytes that each rank needs at its fullest simulated step, [G] each."""

    weights: Floats
    """Everything that is not a routed expert."""
    experts: Floats
    """Expert slots of the rank's layers."""
    kv_cache: Floats
    """Cache of the sequences that run on the rank, windows respected."""
    activations: Floats
    """One layer's intermediate results, and the logits."""
    communication: Floats
    """Room to receive and to send tokens."""
    mean_context: float
    """Mean tokens in the cache per running sequence and step."""
    max_context: int
    """Most tokens in the cache of one sequence."""
    sequences: int
    """Most sequences that run at a time, over all ranks."""

    @property
    def buffers(self) -> Floats:
        """Activations and communication buffers, [G]."""
        return self.activations + self.communication

    @property
    def total(self) -> Floats:
        """Bytes of each rank, [G]."""
        return self.weights + self.experts + self.kv_cache + self.buffers


def memory_need(
    model: ModelSpec,
    placement: Placement,
    batches: Sequence[StepBatch],
    layout: Layout | None = None,
    micro_batches: Sequence[StepBatch] | None = None,
) -> MemoryNeed:
    """Count the bytes that each rank needs.

    Buffers are an upper bound for one layer at a time: room to receive and to send every token of
    the rank's block once, the rows of the rank's experts in, between and out if every token came
    to it (at most min(top_k, slots) rows each), and residual, attention input and output, and
    fp32 logits of the rank's own tokens.

    Parameters
    ----------
    model : ModelSpec
    placement : Placement
    batches : sequence of StepBatch
        The steps; the fullest one counts, for each rank by itself.
    layout : Layout, optional
        Without it attention DP = EP.
    micro_batches : sequence of StepBatch, optional
        What a pipeline stage works on at a time; without it whole steps.
    """
    on = layout or Layout.data_parallel(placement.num_ranks)
    stages = on.stage_layers(model.num_layers)
    cache = np.stack([_kv(model, batch, on, stages) for batch in batches]).max(axis=0)
    context = np.concatenate([batch.context[batch.last] for batch in batches])
    parts = micro_batches or batches
    own = np.stack([np.bincount(batch.home, minlength=on.dp) for batch in parts])
    ends = np.stack([np.bincount(b.home[b.last], minlength=on.dp) for b in parts])
    return _need(
        model,
        on,
        placement.num_slots,
        cache=cache,
        own=own,
        ends=ends,
        mean_context=float(context.mean()),
        max_context=int(context.max()),
        sequences=max(int(batch.last.sum()) for batch in batches),
    )


def memory_of(
    model: ModelSpec,
    parallelism: Parallelism,
    num_slots: int,
    *,
    tokens: int,
    mean_context: float,
    sequences: int,
) -> MemoryNeed:
    """Count the bytes of a layout without a trace, tokens and sequences spread evenly.

    The terms are those of `memory_need`; they are equal where the batch divides evenly and all
    sequences have the mean context.

    Parameters
    ----------
    model : ModelSpec
    parallelism : Parallelism
        Its ranks are ``dp x tp x pp``.
    num_slots : int
        Expert slots per layer, redundant ones included.
    tokens : int
        Of a step, over all ranks.
    mean_context : float
        Tokens in the cache of each sequence.
    sequences : int
        That run at a time, over all ranks.

    Raises
    ------
    InputError
        If the layout does not divide its ranks, the model or the slots.
    """
    a = parallelism.attention
    on = Layout.of(parallelism, a.dp * a.tp * a.pp)
    on.check(model, num_slots)
    stages = on.stage_layers(model.num_layers)
    per_group = -(-sequences // on.dp)
    cache = [per_group * _kv_sequence(model, on, layers, mean_context) for layers in stages]
    return _need(
        model,
        on,
        num_slots,
        cache=np.repeat(np.array(cache)[:, None], on.dp, axis=1),
        own=np.full((1, on.dp), -(-tokens // (on.dp * on.pp))),
        ends=np.full((1, on.dp), -(-sequences // (on.dp * on.pp))),
        mean_context=mean_context,
        max_context=int(np.ceil(mean_context)),
        sequences=sequences,
    )


def weights_outside_experts(model: ModelSpec, layout: Layout) -> Floats:
    """Bytes of everything that is not a routed expert on a rank of each stage, [pp].

    Matrices of attention and dense layers and the vocabulary are cut over the tp group (shared
    experts only in a fused layout); routers, norms and an MLA latent's projections are whole.
    """
    hidden, a = model.hidden_size, layout.attention(model)
    vocabulary = layout.vocabulary(model) * hidden
    gate = hidden if model.shared_expert_gate else 0
    router = model.num_experts * (hidden + model.router_bias) + gate
    sizes = []
    for number, layers in enumerate(layout.stage_layers(model.num_layers)):
        moe = len(set(layers) & set(model.moe_layer_ids))
        dense = (len(layers) - moe) * (model.dense_width // layout.tp)
        ffn = model.ffn_matrices * hidden * (dense + moe * layout.shared_width(model))
        matrices = len(layers) * a.matrix_parameters(hidden) + ffn + moe * model.latent_params
        vectors = len(layers) * (model.norm_vectors * hidden + a.vector_parameters(hidden))
        vectors += moe * router + _part_vectors(model, layers)
        first, last = number == 0, number == layout.pp - 1
        tied = model.tie_embeddings and first
        vectors += (first + (last and not tied)) * vocabulary + last * hidden
        vectors += last * sum(p.vector_params for p in model.parts if not p.layers)
        sizes.append(
            bytes_of(model.weight_dtype, matrices) + bytes_of(model.activation_dtype, vectors)
        )
    return np.array(sizes)


def _part_vectors(model: ModelSpec, layers: Sequence[int]) -> int:
    """Parameters of scales, norms and biases that only some families have, in some layers."""
    return sum(len(set(layers) & set(p.layers)) * p.vector_params for p in model.parts)


def expert_slot_bytes(model: ModelSpec, layout: Layout) -> float:
    """Bytes of one expert slot of one layer on one rank: its slice of the width."""
    width, hidden = layout.slice_width(model), model.comm_size
    inner = (2 if model.gated else 1) * width
    biases = inner + hidden if model.expert_bias else 0
    matrices = bytes_of(model.expert_dtype, hidden * (inner + width))
    return matrices + bytes_of(model.activation_dtype, biases)


def _need(
    model: ModelSpec,
    on: Layout,
    num_slots: int,
    *,
    cache: Floats,
    own: Ints,
    ends: Ints,
    mean_context: float,
    max_context: int,
    sequences: int,
) -> MemoryNeed:
    """Put the terms together; cache [pp, dp], tokens and new tokens per microbatch [n, dp]."""
    slots = num_slots // on.ep
    moe = np.array(
        [
            len(set(layers) & set(model.moe_layer_ids))
            for layers in on.stage_layers(model.num_layers)
        ]
    )
    index = np.arange(on.tp)
    slices = -(-(index + 1) * own[..., None] // on.tp) - -(-index * own[..., None] // on.tp)
    in_block = slices.reshape(len(own), on.edp, -1).sum(axis=-1).max(axis=0)[on.edp_index]
    own_tokens = own.max(axis=0)[on.dp_index]
    new_tokens = np.where(on.stage == on.pp - 1, ends.max(axis=0)[on.dp_index], 0)
    twice = 2 if on.gathered > 1 and on.exchanged > 1 else 1  # gathered after the all-to-all
    received = own_tokens * (model.hidden_size if on.pp > 1 else 0)
    return MemoryNeed(
        weights=weights_outside_experts(model, on)[on.stage],
        experts=slots * moe[on.stage] * expert_slot_bytes(model, on),
        kv_cache=cache[on.stage, on.dp_index],
        activations=_per_block_token(model, on, slots) * in_block
        + _per_own_token(model, on) * own_tokens
        + 4.0 * model.vocab_size * new_tokens,
        communication=bytes_of(model.activation_dtype, 1)
        * (2.0 * twice * model.comm_size * in_block + received),
        mean_context=mean_context,
        max_context=max_context,
        sequences=sequences,
    )


def _kv(model: ModelSpec, batch: StepBatch, on: Layout, stages: Sequence[Sequence[int]]) -> Floats:
    """Cache bytes of the sequences of one step, [pp, dp]."""
    context, home = batch.context[batch.last], batch.home[batch.last]
    sizes = [_kv_sequence(model, on, layers, context) for layers in stages]
    return np.stack([np.bincount(home, weights=size, minlength=on.dp) for size in sizes])


def _kv_sequence(
    model: ModelSpec, on: Layout, layers: Sequence[int], context: Ints | float
) -> Floats:
    """Cache bytes of sequences of so many tokens in some layers, on one rank."""
    windows = [model.attention.windows[layer] for layer in layers]
    kept = sum(np.minimum(context, window or np.inf) for window in windows)
    per_token = bytes_of(model.kv_dtype, on.attention(model).kv_elements_per_token)
    return np.asarray(kept * per_token, dtype=np.float64)


def _per_block_token(model: ModelSpec, on: Layout, slots: int) -> float:
    """Bytes of the rows of one token in the rank's experts: in, between and out."""
    rows = min(model.top_k, slots)
    inner = (2 if model.gated else 1) * on.slice_width(model)
    return bytes_of(model.activation_dtype, rows * (2 * model.comm_size + inner))


def _per_own_token(model: ModelSpec, on: Layout) -> float:
    """Bytes per token whose attention runs on the rank."""
    a = on.attention(model)
    width = a.num_heads * (a.head_dim + a.v_head_dim) + a.kv_elements_per_token
    inner = max(model.dense_width // on.tp, on.shared_width(model)) * (model.ffn_matrices - 1)
    return bytes_of(model.activation_dtype, 3 * model.hidden_size + width + inner)
