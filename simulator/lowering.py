"""One step of a Mixture-of-Experts transformer as operations, layer by layer.

Attention is data parallel: a rank works on its own requests with a full copy of everything but the
routed experts, which are spread over the ranks. docs/background/step-model.md says what a step
contains and what is left out.
"""

import numpy as np
from numpy.typing import NDArray

from hwmodels.ops import AllToAll, Gemm, GroupedGemm, Op, Permute, Route, Stage
from simulator.attention import attention
from simulator.loads import StepLoads
from simulator.program import Stream
from simulator.work import Rows, Work
from traces.model_spec import ModelSpec


def lower(model: ModelSpec, loads: StepLoads) -> list[Work]:
    """Write the steps as work, in the order that it has within a layer.

    Parameters
    ----------
    model : ModelSpec
    loads : StepLoads
        What each step asks of each rank.

    Returns
    -------
    list of Work
        With one rank there is no dispatch and no combine.
    """
    rows = Rows(model, loads)
    return [
        rows.stream("embedding", Stage.EMBED, 2 * model.hidden_size, (-1,)),
        *attention(rows),
        *_dense_ffn(rows),
        *_experts(rows),
        *_head(rows),
    ]


def _head(r: Rows) -> list[Work]:
    end = (r.model.num_layers,)
    head = Gemm(
        m=r.loads.sequences.ravel(),
        n=r.model.vocab_size,
        k=r.model.hidden_size,
        weight_dtype=r.dtype,  # the head is not quantised
        activation_dtype=r.dtype,
    )
    return [r.norm("final norm", end), r.work("lm head", Stage.HEAD, head, end)]


def _dense_ffn(r: Rows) -> list[Work]:
    layers = r.dense_layers
    if not layers:
        return []
    width = r.model.dense_width
    return [r.norm("ffn norm", layers), *r.ffn("ffn", Stage.DENSE_FFN, width, layers)]


def _experts(r: Rows) -> list[Work]:
    model, loads, moe = r.model, r.loads, r.moe_layers
    shape = (loads.num_steps, len(moe), loads.num_ranks)
    per_slot = loads.per_slot.reshape(np.prod(shape), -1)  # a rank's slots lie together

    def each(name: str, stage: Stage, op: Op) -> Work:
        return Work(name=name, stage=stage, op=op, shape=shape, layers=moe)

    route = Route(
        tokens=r.tokens,
        hidden=model.hidden_size,
        experts=model.num_experts,
        top_k=model.top_k,
        activation_dtype=r.dtype,
    )
    moved = Permute(rows=per_slot.sum(axis=1), row_bytes=np.array([model.comm_size * r.element]))
    grouped = GroupedGemm(
        tokens_per_expert=per_slot,
        hidden=model.comm_size,
        width=model.expert_width,
        gated=model.gated,
        weight_dtype=model.expert_dtype,
        activation_dtype=r.dtype,
    )
    works = [r.norm("moe norm", moe), r.work("router", Stage.ROUTER, route, moe)]
    if model.shared_expert_width:
        width = model.shared_expert_width
        works += r.ffn("shared experts", Stage.SHARED_EXPERTS, width, moe)
    return [
        *works,
        *_exchange("dispatch", Stage.DISPATCH, loads.sent, shape, moe),
        each("permute", Stage.EXPERTS, moved),
        each("experts", Stage.EXPERTS, grouped),
        each("unpermute", Stage.EXPERTS, moved),
        *_exchange("combine", Stage.COMBINE, loads.sent.swapaxes(-1, -2), shape, moe),
    ]


def _exchange(
    name: str,
    stage: Stage,
    sent: NDArray[np.float64],
    shape: tuple[int, int, int],
    layers: tuple[int, ...],
) -> list[Work]:
    steps, count, ranks = shape
    if ranks == 1:
        return []
    op = AllToAll(traffic=sent.reshape(steps * count, ranks, ranks))
    return [
        Work(
            name=name,
            stage=stage,
            op=op,
            shape=(steps, count, 1),
            layers=layers,
            stream=Stream.COMMUNICATION,
            groups=(0,) * ranks,
        )
    ]
