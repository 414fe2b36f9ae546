"""A step as operations against the model's own parameter count and hand-counted contexts."""

from collections.abc import Callable

import numpy as np
import pytest

from basis import bytes_of
from hwmodels import (
    AttentionDecode,
    AttentionPrefill,
    Elementwise,
    Gemm,
    GroupedGemm,
    Permute,
    Route,
)
from simulator.batches import Composition, StepBatch
from simulator.dispatch import Dispatcher
from simulator.loads import StepLoads, count_loads
from simulator.lowering import lower
from simulator.memory import memory_need
from simulator.placement import Placement
from simulator.work import Work
from traces import Attention, ModelSpec, RoutingTrace

ModelOf = Callable[..., ModelSpec]
TraceOf = Callable[..., RoutingTrace]
PlacementOf = Callable[[ModelSpec, int], Placement]

MLA = {
    "kind": "mla",
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 48,
    "v_head_dim": 32,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
}
ATTENTIONS = {
    "gqa": Attention(
        kind="gqa", num_heads=8, num_kv_heads=2, head_dim=64, v_head_dim=32, windows=(None,) * 3
    ),
    "mla": Attention.model_validate(MLA | {"q_lora_rank": 96, "windows": (None,) * 3}),
    "mla, queries not compressed": Attention.model_validate(MLA | {"windows": (None,) * 3}),
}


def _loads(
    model: ModelSpec,
    trace: RoutingTrace,
    placement: Placement,
    *,
    decode: bool,
    context: list[int] | None = None,
) -> StepLoads:
    batch = _batch(trace, placement.num_ranks, context)
    steps = Composition(batches=(batch,), decode=decode, statement="", stand_in=False)
    node_of = np.zeros(placement.num_ranks, dtype=np.int64)
    dispatcher = Dispatcher(placement=placement, dispatch="even", node_of=node_of)
    return count_loads(model, trace, steps, dispatcher)


def _batch(trace: RoutingTrace, ranks: int, context: list[int] | None = None) -> StepBatch:
    tokens = trace.num_tokens
    return StepBatch(
        rows=np.arange(tokens),
        context=np.ones(tokens, dtype=np.int64) if context is None else np.array(context),
        home=np.arange(tokens) % ranks,
        last=np.ones(tokens, dtype=np.bool_),
    )


def _total(works: list[Work], kinds: tuple[type, ...], what: str) -> float:
    """Sum over rows, counting those that serve several layers for each."""
    return sum(
        getattr(work.op, what)().sum() * len(work.layers) / work.shape[1]
        for work in works
        if isinstance(work.op, kinds)
    )


def _matrix_params(model: ModelSpec) -> tuple[float, float]:
    """Weights that every token multiplies, and those of one expert; no embedding, no vectors."""
    dense_layers = model.num_layers - model.num_moe_layers
    ffn = (3 if model.gated else 2) * model.hidden_size
    outside = (
        model.num_layers * model.attention.matrix_parameters(model.hidden_size)
        + dense_layers * ffn * model.dense_width
        + model.num_moe_layers * ffn * model.shared_expert_width
        + model.num_moe_layers * model.num_experts * model.hidden_size
        + model.vocab_size * model.hidden_size
    )
    return outside, model.expert_matrix_params


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("kind", ATTENTIONS)
@pytest.mark.parametrize("decode", [True, False])
def test_flops_are_two_per_active_parameter_and_token(
    make_model: ModelOf,
    make_trace: TraceOf,
    contiguous: PlacementOf,
    kind: str,
    decode: bool,
    gated: bool,
) -> None:
    model = make_model(
        gated=gated,
        num_layers=3,
        moe_layer_ids=(1, 2),
        dense_width=640,
        shared_expert_width=256,
        attention=ATTENTIONS[kind],
    )
    trace = make_trace(model, requests=3, length=4)
    works = lower(model, _loads(model, trace, contiguous(model, 4), decode=decode))
    outside, expert = _matrix_params(model)
    active = outside + model.num_moe_layers * model.top_k * expert
    flops = _total(works, (Gemm, GroupedGemm, Route), "flops")
    assert flops == pytest.approx(2 * active * trace.num_tokens, rel=1e-12)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_a_full_rank_reads_every_weight_once(
    make_model: ModelOf, make_trace: TraceOf, contiguous: PlacementOf, kind: str, gated: bool
) -> None:
    """As many as the model counts, but for embedding and vectors."""
    model = make_model(
        gated=gated,
        num_layers=3,
        moe_layer_ids=(1, 2),
        dense_width=640,
        shared_expert_width=256,
        attention=ATTENTIONS[kind],
        weight_dtype="fp8",
        expert_dtype="mxfp4",
    )
    trace = make_trace(model, requests=8, length=16)  # enough tokens to touch every expert
    works = lower(model, _loads(model, trace, contiguous(model, 1), decode=True))
    outside, expert = _matrix_params(model)
    full = model.vocab_size * model.hidden_size
    router = model.num_moe_layers * model.num_experts * model.hidden_size
    read = _total(works, (Gemm, GroupedGemm), "weight_bytes")
    experts = model.num_moe_layers * model.num_experts * bytes_of("mxfp4", expert)
    expected = bytes_of("fp8", outside - full - router) + bytes_of("bf16", full) + experts
    assert read == pytest.approx(expected, rel=1e-12)
    vectors = (
        full
        + model.hidden_size
        + model.num_layers
        * (2 * model.hidden_size + model.attention.vector_parameters(model.hidden_size))
    )
    held = bytes_of("bf16", vectors + router) + bytes_of("fp8", outside - full - router)
    assert model.bytes_outside_experts == pytest.approx(held + bytes_of("bf16", full), rel=1e-12)
    need = memory_need(model, contiguous(model, 1), [_batch(trace, 1)])
    assert need.weights == pytest.approx(model.bytes_outside_experts, rel=1e-12)


def test_bytes_that_only_pass_through_equal_a_hand_count(
    make_model: ModelOf, make_trace: TraceOf, contiguous: PlacementOf
) -> None:
    model = make_model(shared_expert_width=256)
    trace = make_trace(model, requests=1, length=6)
    works = lower(model, _loads(model, trace, contiguous(model, 1), decode=True))
    per_token = {
        work.name: work.op.bytes_moved().sum() / (work.shape[1] * 6)
        for work in works
        if isinstance(work.op, (Elementwise, Permute))
    }
    hidden, heads = 1024, (8 + 2 + 2) * 128
    assert per_token == {
        "embedding": 2 * hidden * 2,
        "attention norm": 4 * hidden * 2,
        "rope and kv write": 2 * heads * 2,
        "moe norm": 4 * hidden * 2,
        "shared experts activation": (2 + 1) * 256 * 2,
        "permute": 2 * 2 * hidden * 2,  # two experts per token, read and written
        "unpermute": 2 * 2 * hidden * 2,
        "final norm": 4 * hidden * 2,
    }


def test_a_remainder_of_tokens_goes_round_the_replicas_over_the_steps(
    make_model: ModelOf, make_trace: TraceOf
) -> None:
    model = make_model()
    trace = make_trace(model, np.tile(np.array([0, 1]), (1, 2, 1)), requests=1, length=1)
    slots = np.array([[0, 2, 3, 4, 0, 5, 6, 7, 1, 0, 1, 2]] * 2)
    placement = Placement(slots=slots, num_experts=8, num_ranks=4)
    one = np.ones(1, dtype=np.int64)
    batch = StepBatch(rows=one - 1, context=one, home=one - 1, last=one == 1)
    steps = Composition(batches=(batch,) * 40, decode=True, statement="", stand_in=False)
    node_of = np.zeros(4, dtype=np.int64)
    dispatcher = Dispatcher(placement=placement, dispatch="even", node_of=node_of)
    loads = count_loads(model, trace, steps, dispatcher)
    used = loads.per_slot.sum(axis=0)[:, [0, 4, 9]]  # the three replicas of expert 0
    assert (used.sum(axis=1) == 40).all()
    assert (used > 0).all()


def test_windows_cut_the_context_that_is_read(
    make_model: ModelOf, make_trace: TraceOf, contiguous: PlacementOf
) -> None:
    attention = ATTENTIONS["gqa"].model_copy(update={"windows": (4, None, 2)})
    model = make_model(num_layers=3, attention=attention)
    trace = make_trace(model, requests=4, length=1)
    placement = contiguous(model, 2)  # homes 0, 1, 0, 1
    loads = _loads(model, trace, placement, decode=True, context=[1, 3, 10, 5])
    assert loads.context[0].tolist() == [[1 + 4, 3 + 4], [1 + 10, 3 + 5], [1 + 2, 2 + 2]]
    scores = [w for w in lower(model, loads) if isinstance(w.op, AttentionDecode)]
    assert sorted(w.layers for w in scores) == [(0,), (1,), (2,)]
    for work in scores:  # one for each window, which the kernel is told
        (layer,) = work.layers
        assert isinstance(work.op, AttentionDecode)
        assert work.op.window == (4, 0, 2)[layer]
        assert np.reshape(work.op.context, work.shape)[:, 0].tolist() == [
            loads.context[0, layer].tolist()
        ]


def test_prefill_counts_causal_pairs_and_one_logit_row_per_prompt(
    make_model: ModelOf, make_trace: TraceOf, contiguous: PlacementOf
) -> None:
    model = make_model()
    trace = make_trace(model, requests=1, length=7)
    context = np.arange(1, 8)
    last = context == 7
    batch = StepBatch(rows=np.arange(7), context=context, home=np.zeros(7, dtype=int), last=last)
    steps = Composition(batches=(batch,), decode=False, statement="", stand_in=False)
    dispatcher = Dispatcher(
        placement=contiguous(model, 2), dispatch="even", node_of=np.zeros(2, dtype=np.int64)
    )
    works = lower(model, count_loads(model, trace, steps, dispatcher))
    (scores,) = [w for w in works if isinstance(w.op, AttentionPrefill)]
    pairs = np.reshape(scores.op.pairs, scores.shape)  # type: ignore[union-attr]
    assert pairs[0].tolist() == [[7 * 8 // 2, 0]] * 2
    (head,) = [w for w in works if w.name == "lm head"]
    assert head.op.m.tolist() == [1, 0]  # type: ignore[union-attr]


def test_tokens_and_bytes_are_conserved(
    make_model: ModelOf, make_trace: TraceOf, contiguous: PlacementOf
) -> None:
    model = make_model()
    trace = make_trace(model)
    loads = _loads(model, trace, contiguous(model, 4), decode=True)
    assert (loads.per_slot.sum(axis=-1) == trace.num_tokens * model.top_k).all()
    assert (loads.rank_load.sum(axis=-1) == trace.num_tokens * model.top_k).all()
    # on one node every remote visit is one copy of one token
    sent = loads.sent.sum(axis=(-2, -1))
    assert sent == pytest.approx(loads.cross_rank * model.comm_size * 2)
    assert not loads.cross_node.any()


def test_the_combine_sends_back_what_the_dispatch_brought(
    make_model: ModelOf, make_trace: TraceOf, contiguous: PlacementOf
) -> None:
    model = make_model()
    loads = _loads(
        model, make_trace(model, requests=1, length=5), contiguous(model, 4), decode=True
    )
    by_name = {work.name: work for work in lower(model, loads)}
    there, back = (by_name[n].op.traffic for n in ("dispatch", "combine"))  # type: ignore[union-attr]
    assert (there != there.swapaxes(1, 2)).any()
    assert (back == there.swapaxes(1, 2)).all()
    assert by_name["dispatch"].groups == (0, 0, 0, 0)
    assert by_name["experts"].groups is None


def test_tokens_per_slot_equal_a_plain_count(
    make_model: ModelOf, make_trace: TraceOf, contiguous: PlacementOf
) -> None:
    model = make_model()
    trace = make_trace(model)
    loads = _loads(model, trace, contiguous(model, 4), decode=True)
    for layer in range(model.num_moe_layers):
        count = np.bincount(trace.experts[:, layer].ravel(), minlength=model.num_experts)
        assert loads.per_slot[0, layer].tolist() == count.tolist()
