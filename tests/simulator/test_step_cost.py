"""Seconds of mixed steps: as `simulate` has them, as the player has them, in both phases."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from basis.errors import InputError
from hwmodels import Cluster
from hwmodels.ops import AttentionDecode, AttentionPrefill
from simulator import Deployment, Workload, simulate
from simulator.batches import StepBatch, compose
from simulator.parallelism import AttentionLayout, ExpertLayout, Parallelism
from simulator.placement import Placement
from simulator.pricing import price_step
from simulator.program import play
from simulator.serving_loads import MixedLoads
from simulator.serving_scheduler import Scheduler, ServingStep
from simulator.step_cost import ClusterStepCost, lower_mixed
from traces import Attention, ModelSpec, RoutingTrace
from traces.request_source import RequestSource, Walks, draw_requests

Make = Callable[..., ModelSpec]
MakeTrace = Callable[..., RoutingTrace]
Contiguous = Callable[[ModelSpec, int], Placement]
ClusterOf = Callable[[int], Cluster]
NONE = np.zeros(0, dtype=np.int64)

GQA = Attention(
    kind="gqa", num_heads=8, num_kv_heads=2, head_dim=128, v_head_dim=128,
    windows=(None, 16, None, 16),
)  # fmt: skip
MLA = Attention(
    kind="mla", num_heads=8, num_kv_heads=8, head_dim=192, v_head_dim=128, q_lora_rank=384,
    kv_lora_rank=256, qk_rope_head_dim=64, qk_nope_head_dim=128, windows=(None,) * 4,
)  # fmt: skip


def _model(make_model: Make, attention: Attention = GQA) -> ModelSpec:
    """Two dense layers, in front and in the middle, and two MoE layers."""
    return make_model(
        num_layers=4, moe_layer_ids=(1, 3), dense_width=2048, shared_expert_width=512,
        attention=attention,
    )  # fmt: skip


def _layout(attention: tuple[int, int], experts: tuple[int, int], **how: str) -> Parallelism:
    return Parallelism(
        attention=AttentionLayout(dp=attention[0], tp=attention[1]),
        experts=ExpertLayout(ep=experts[0], tp=experts[1], **how),  # type: ignore[arg-type]
    )


LAYOUTS = {
    "dp-ep": _layout((4, 1), (4, 1)),
    "tp": _layout((1, 4), (1, 4)),
    "dp-tp-ep": _layout((2, 2), (4, 1)),
    "ep-etp": _layout((4, 1), (2, 2)),
}


def _as_served(batch: StepBatch, number: int, first: int) -> ServingStep:
    """Write a decode step of `simulate` as one of a server; a request per token."""
    request = np.arange(first, first + len(batch.rows))
    return ServingStep(
        number=number, decode=request, decode_rank=batch.home, decode_context=batch.context,
        chunk=NONE, chunk_rank=NONE, chunk_start=NONE, chunk_stop=NONE,
        chunk_ends=np.zeros(0, dtype=np.bool_), emitting=request, nth=NONE, admitted=NONE,
        preempted=NONE, finished=NONE, kv_tokens=NONE, kv_bytes=np.zeros(1), waiting=0,
    )  # fmt: skip


def _one_row_each(rows: NDArray[np.int64]) -> RequestSource:
    one = np.ones_like(rows)
    walks = Walks(first=np.arange(len(rows)), length=one, offset=0 * one)
    return RequestSource(rows=rows, prompt=walks, answer=walks, statement="", stand_in=False)


@pytest.mark.parametrize("attention", [GQA, MLA], ids=["gqa", "mla"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("redundant", [0, 4])
def test_a_pure_decode_step_takes_what_simulate_says(
    make_model: Make,
    make_trace: MakeTrace,
    cluster_of: ClusterOf,
    attention: Attention,
    layout: Parallelism,
    redundant: int,
) -> None:
    model, cluster = _model(make_model, attention), cluster_of(4)
    trace = make_trace(model, requests=40, length=30)
    slots = np.tile(np.arange(8 + redundant) % 8, (2, 1)).astype(np.int32)
    placement = Placement(slots=slots, num_experts=8, num_ranks=layout.experts.ep)
    deployment = Deployment.of(placement, parallelism=layout)
    workload = Workload(decode_batch=24)
    wanted = simulate(model, trace, cluster, deployment, workload, steps=5, seed=3)
    batches = compose(trace, workload, layout.attention.dp, steps=5, seed=3).batches
    cost = ClusterStepCost(
        model, trace, cluster, deployment, _one_row_each(np.concatenate([b.rows for b in batches])),
        np.concatenate([b.context for b in batches]) - 1, seed=3,
    )  # fmt: skip
    steps = [_as_served(batch, i, 24 * i) for i, batch in enumerate(batches)]
    np.testing.assert_allclose(cost.seconds(steps), wanted.step_times, rtol=1e-9)
    np.testing.assert_allclose(cost.at("low").seconds(steps), wanted.step_times_low, rtol=1e-9)
    one_by_one = [cost.seconds([step])[0] for step in steps]
    np.testing.assert_allclose(one_by_one, wanted.step_times, rtol=1e-9)


def _mixed_steps() -> tuple[NDArray[np.int64], list[ServingStep]]:
    inputs, outputs = np.array([120, 9, 64, 30, 200, 7, 50]), np.array([4, 9, 2, 7, 3, 12, 6])
    rules = Scheduler(
        inputs=inputs, outputs=outputs, num_ranks=4, max_batch_tokens=48, max_running=3,
        admission="reserve", kv_bytes=lambda n: np.asarray(n, dtype=np.float64), kv_capacity=1e9,
    )  # fmt: skip
    state, steps = rules.submit(rules.start, len(inputs)), []
    while (planned := rules.plan(state)) is not None:
        steps.append(planned[0])
        state = planned[1]
    return inputs, steps


@pytest.fixture
def make_cost(
    make_model: Make, make_trace: MakeTrace, cluster_of: ClusterOf, contiguous: Contiguous
) -> Callable[[Attention, NDArray[np.int64]], ClusterStepCost]:
    def make(attention: Attention, inputs: NDArray[np.int64]) -> ClusterStepCost:
        model = _model(make_model, attention)
        trace = make_trace(model, requests=6, length=40)
        trace = replace(trace, decode=trace.position >= 20)
        return ClusterStepCost(
            model, trace, cluster_of(4), Deployment.of(contiguous(model, 4)),
            draw_requests(trace, len(inputs), seed=0), inputs,
        )  # fmt: skip

    return make


MakeCost = Callable[[Attention, NDArray[np.int64]], ClusterStepCost]


@pytest.mark.parametrize("attention", [GQA, MLA], ids=["gqa", "mla"])
def test_the_closed_form_is_the_longest_path(make_cost: MakeCost, attention: Attention) -> None:
    inputs, steps = _mixed_steps()
    cost = make_cost(attention, inputs)
    loads = cost.count(steps)
    priced = price_step(lower_mixed(cost.model, loads), loads.total, cost.cluster)
    wanted = play(priced.items, priced.seconds).step_times
    np.testing.assert_allclose(cost.seconds(steps), wanted, rtol=1e-12)
    assert cost.kernels_per_step == len(priced.items) * 4
    decodes = [step for step in steps if not len(step.chunk)]
    cost.seconds(decodes)
    assert cost.kernels_per_step < len(priced.items) * 4
    causes, evidence = cost.explain(steps, "seven requests")
    assert sum(causes.values()) == pytest.approx(wanted.mean(), rel=1e-9)
    assert sum(item.share or 0.0 for item in evidence) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("attention", "names"),
    [
        (GQA, ["qkv", "rope and kv write", "attention", "prefill attention", "o"]),
        (
            MLA,
            [
                "q and kv down", "q up", "rope and kv write", "q absorb", "attention", "v absorb",
                "kv up", "prefill attention", "o",
            ],
        ),
    ],
    ids=["gqa", "mla"],
)  # fmt: skip
def test_each_phase_has_its_own_scores(
    make_cost: MakeCost, attention: Attention, names: list[str]
) -> None:
    inputs, steps = _mixed_steps()
    cost = make_cost(attention, inputs)
    loads = cost.count(steps)
    written = lower_mixed(cost.model, loads)
    works = {work.name: work for work in written}
    order = list(works)
    assert order[order.index("attention norm") + 1 :][: len(names)] == names
    decode = [w.op.tokens for w in written if isinstance(w.op, AttentionDecode)]
    prefill = [w.op.tokens for w in written if isinstance(w.op, AttentionPrefill)]
    layers = cost.model.num_layers
    assert np.sum(np.concatenate(decode)) == layers * sum(len(step.decode) for step in steps)
    assert np.sum(np.concatenate(prefill)) == layers * sum(s.tokens - len(s.decode) for s in steps)
    tokens = sum(step.tokens for step in steps)
    assert np.sum(works["o"].op.m) == tokens  # type: ignore[union-attr]
    heads = sum(len(step.emitting) for step in steps)
    assert np.sum(works["lm head"].op.m) == heads  # type: ignore[union-attr]
    if attention is MLA:
        assert np.sum(works["q absorb"].op.m) + np.sum(works["kv up"].op.m) == tokens  # type: ignore[union-attr]


def test_a_longer_context_and_a_larger_chunk_take_longer(make_cost: MakeCost) -> None:
    inputs, steps = _mixed_steps()
    cost = make_cost(GQA, inputs)
    loads = cost.count(steps)

    def total(loads: MixedLoads) -> float:
        priced = price_step(lower_mixed(cost.model, loads), loads.total, cost.cluster)
        return float(play(priced.items, priced.seconds).step_times.sum())

    more = replace(loads, decode_context=loads.decode_context * 100)
    assert total(more) > total(loads)
    more = replace(loads, prefill_pairs=loads.prefill_pairs * 1000)
    assert total(more) > total(loads)


@pytest.mark.parametrize("changes", [{"overlap": "two_batch"}, {"pp": 2}])
def test_what_is_not_served_is_refused(
    make_model: Make,
    make_trace: MakeTrace,
    cluster_of: ClusterOf,
    contiguous: Contiguous,
    changes: dict[str, object],
) -> None:
    model = _model(make_model)
    trace = make_trace(model)
    deployment = Deployment.of(contiguous(model, 4))
    ranks = 4
    if "pp" in changes:
        layout = Parallelism(attention=AttentionLayout(dp=4, pp=2), experts=ExpertLayout(ep=4))
        deployment, ranks = deployment.model_copy(update={"parallelism": layout}), 8
    else:
        deployment = deployment.model_copy(update=changes)
    source = draw_requests(trace, 1, seed=0)
    with pytest.raises(InputError, match=r"serving with (overlap|pipeline stages) --"):
        ClusterStepCost(model, trace, cluster_of(ranks), deployment, source, np.array([1]))
