"""One step of a Mixture-of-Experts transformer as operations, layer by layer, on a layout.

Attention, dense layers and the head are cut over the ranks of a tp group, experts over those of a
block; the layout says which collectives stand between. docs/background/step-model.md says what a
step contains and what is left out.
"""

import numpy as np

from hwmodels.ops import (
    AllGather,
    AllReduce,
    Gemm,
    GroupedGemm,
    Op,
    Permute,
    ReduceScatter,
    Route,
    Stage,
)
from simulator.attention import attention
from simulator.loads import Ints, StepLoads
from simulator.unpriced import refuse_unpriced
from simulator.work import Rows, Work
from traces.model_spec import ModelSpec

TOKEN_ID_BYTES = 4
"""Bytes of a sampled token that the last pipeline stage sends to the first."""


def lower(model: ModelSpec, loads: StepLoads) -> list[Work]:
    """Write the steps as work, in the order that it has within a layer.

    Parameters
    ----------
    model : ModelSpec
    loads : StepLoads
        What each step asks of each rank, and the layout.

    Returns
    -------
    list of Work
        Collectives of one rank are left out.

    Raises
    ------
    InputError
        If the model does something that has no operation here.
    """
    refuse_unpriced(model)
    rows = Rows(model, loads)
    return [
        *_arrive(rows),
        rows.stream("embedding", Stage.EMBED, 2 * model.hidden_size, (-1,), part="embedding"),
        *rows.over_tp(AllReduce, "embedding all-reduce", (-1,)),
        *attention(rows),
        *_dense_ffn(rows),
        *_experts(rows),
        *_head(rows),
        *_leave(rows),
    ]


def _arrive(r: Rows) -> list[Work]:
    """Gather what a stage's ranks received, each from its peer, over the tp group."""
    stages = r.layout.stage_layers(r.model.num_layers)[1:]
    firsts = tuple(layers[0] for layers in stages)
    return r.over_tp(AllGather, "stage all-gather", firsts)


def _leave(r: Rows) -> list[Work]:
    """Send activations to the next pipeline stage, and sampled tokens back to the first."""
    pp, stages = r.layout.pp, r.layout.stage_layers(r.model.num_layers)
    if pp == 1:
        return []
    hidden = r.loads.slices * np.float64(r.model.hidden_size * r.element)
    sends = [r.hand_over("send", hidden, stages[s][-1], s, s + 1) for s in range(pp - 1)]
    sampled = r.loads.slices * np.float64(TOKEN_ID_BYTES)
    back = r.hand_over("send back", sampled, r.model.num_layers, pp - 1, 0)
    return [*sends, back] if r.loads.decode else sends


def _head(r: Rows) -> list[Work]:
    end = (r.model.num_layers,)
    head = Gemm(
        m=r.loads.sequences.ravel(),
        n=r.layout.vocabulary(r.model),
        k=r.model.hidden_size,
        weight_dtype=r.dtype,  # the head is not quantised
        activation_dtype=r.dtype,
    )
    logits = r.layout.vocabulary(r.model) * r.layout.tp
    return [
        r.norm("final norm", end),
        r.work("lm head", Stage.HEAD, head, end),
        *r.over_tp(AllGather, "logits all-gather", end, logits, r.loads.sequences),
    ]


def _dense_ffn(r: Rows) -> list[Work]:
    layers = r.dense_layers
    if not layers:
        return []
    width = r.model.dense_width // r.layout.tp
    return [
        r.norm("ffn norm", layers),
        *r.ffn("ffn", Stage.DENSE_FFN, width, layers),
        *r.over_tp(AllReduce, "ffn all-reduce", layers),
    ]


def _experts(r: Rows) -> list[Work]:
    model, loads, moe = r.model, r.loads, r.moe_layers
    shape = (loads.num_steps, len(moe), loads.num_ranks)
    per_slot = loads.rows.reshape(np.prod(shape), -1)

    def each(name: str, stage: Stage, op: Op) -> Work:
        return Work(name=name, stage=stage, op=op, shape=shape, layers=moe)

    route = Route(
        tokens=r.routed,
        hidden=model.hidden_size,
        experts=model.num_experts,
        top_k=model.top_k,
        activation_dtype=r.dtype,
    )
    row_bytes = np.array([model.comm_size * r.element])
    moved, back = (
        Permute(rows=per_slot.sum(axis=1), row_bytes=row_bytes, back=back) for back in (False, True)
    )
    grouped = GroupedGemm(
        tokens_per_expert=per_slot,
        hidden=model.comm_size,
        width=r.layout.slice_width(model),
        gated=model.gated,
        weight_dtype=model.expert_dtype,
        activation_dtype=r.dtype,
        tokens=_shown(r, shape),
    )
    works = [r.norm("moe norm", moe, r.routed), r.work("router", Stage.ROUTER, route, moe)]
    if model.shared_expert_width:
        width = r.layout.shared_width(model)
        works += r.ffn("shared experts", Stage.SHARED_EXPERTS, width, moe, r.routed)
    return [
        *works,
        *_latent(r, "latent down", model.comm_size, model.hidden_size),
        *r.exchange("dispatch", Stage.DISPATCH, loads.sent, moe),
        *_gather(r, AllGather, "dispatch all-gather", Stage.DISPATCH),
        each("permute", Stage.EXPERTS, moved),
        each("experts", Stage.EXPERTS, grouped),
        each("unpermute", Stage.EXPERTS, back),
        *_gather(r, ReduceScatter, "combine reduce-scatter", Stage.COMBINE),
        *r.exchange("combine", Stage.COMBINE, loads.sent.swapaxes(-1, -2), moe),
        *_latent(r, "latent up", model.hidden_size, model.comm_size),
        *(
            r.over_tp(AllReduce, "experts all-reduce", moe)
            if r.layout.fused
            else r.over_tp(AllGather, "tokens all-gather", moe)
        ),
    ]


def _latent(r: Rows, name: str, n: int, k: int) -> list[Work]:
    """Project the routed tokens to the width of the experts, or back, where it is not hidden's."""
    return [] if n == k else [r.gemm(name, Stage.EXPERTS, n, k, r.moe_layers, r.routed)]


def _shown(r: Rows, shape: tuple[int, ...]) -> Ints | None:
    """Return the tokens that an expert layer of each rank sees; None: pairs, as they were sent."""
    if r.loads.arrived is not None:
        shown = _gathered(r)
        return np.repeat(shown, r.layout.gathered, axis=-1).ravel()
    if r.layout.exchanged > 1:
        return None
    tokens = r.routed.reshape(shape[0], 1, shape[2])
    return np.broadcast_to(tokens, shape).ravel()


def _gathered(r: Rows) -> Ints:
    """Tokens of each group of ranks that gather theirs, [S, L, groups]."""
    arrived = r.loads.arrived
    assert arrived is not None
    return np.asarray(arrived.reshape(*arrived.shape[:2], -1, r.layout.gathered).sum(axis=-1))


def _gather(
    r: Rows, kind: type[AllGather] | type[ReduceScatter], name: str, stage: Stage
) -> list[Work]:
    """Gather the tokens of the ranks that share experts' widths (or all experts), or the reverse.

    The tensor is every token on these ranks once; in a fused layout they have all of them.
    """
    if r.loads.arrived is None:
        return []
    tensor = _gathered(r) * np.float64(r.model.comm_size * r.element)
    return r.ring(kind, name, stage, r.layout.gathered, tensor, r.moe_layers)
