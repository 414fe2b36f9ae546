"""Mixed steps are counted as `count_loads` counts them, whatever the shortcut."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from hwmodels import Cluster
from simulator.batches import Composition
from simulator.deployment import Deployment
from simulator.dispatch import Dispatcher
from simulator.layout import Layout
from simulator.loads import StepLoads, count_loads
from simulator.parallelism import AttentionLayout, ExpertLayout, Parallelism
from simulator.placement import Placement
from simulator.serving_loads import ServingCounter
from simulator.serving_scheduler import Scheduler, ServingStep
from traces import Attention, ModelSpec, RoutingTrace
from traces.request_source import draw_requests

Make = Callable[..., ModelSpec]
MakeTrace = Callable[..., RoutingTrace]
Contiguous = Callable[[ModelSpec, int], Placement]
FIELDS = ("per_slot", "sent", "tokens", "sequences", "cross_node", "cross_rank")
INPUTS = np.tile([300, 5, 40, 700, 64, 1, 130, 90], 5)
OUTPUTS = np.tile([30, 9, 1, 4, 20, 2, 6, 12], 5)


def _windowed(make_model: Make) -> ModelSpec:
    heads = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 128, "v_head_dim": 128}
    attention = Attention(kind="gqa", windows=(None, 50), **heads)  # type: ignore[arg-type]
    return make_model(attention=attention)


def _trace(make_trace: MakeTrace, model: ModelSpec) -> RoutingTrace:
    """Three long requests, the first 90 tokens of each a prompt."""
    trace = make_trace(model, requests=3, length=210)
    return replace(trace, decode=trace.position >= 90)


def _steps(groups: int) -> list[ServingStep]:
    rules = Scheduler(
        inputs=INPUTS,
        outputs=OUTPUTS,
        num_ranks=groups,
        max_batch_tokens=96,
        max_running=9,
        admission="preempt",
        kv_bytes=lambda tokens: np.asarray(tokens, dtype=np.float64),
        kv_capacity=710.0,
    )
    state, steps = rules.submit(rules.start, len(INPUTS)), []
    while (planned := rules.plan(state)) is not None:
        steps.append(planned[0])
        state = planned[1]
    assert sum(len(step.preempted) for step in steps)  # recomputed answers are among the chunks
    return steps


def _written_out(counter: ServingCounter, steps: Sequence[ServingStep]) -> StepLoads:
    composition = Composition(
        batches=tuple(counter.batch(step) for step in steps),
        decode=True,
        statement="test",
        stand_in=False,
    )
    return count_loads(
        counter.model,
        counter.trace,
        composition,
        counter.dispatcher,
        seed=counter.seed + steps[0].number,
        layout=counter.layout,
        node_of=counter.node_of,
    )


@pytest.mark.parametrize("node_of", [[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 2, 3]])
def test_running_sums_count_what_tokens_one_by_one_count(
    make_model: Make, make_trace: MakeTrace, contiguous: Contiguous, node_of: list[int]
) -> None:
    model = _windowed(make_model)
    trace = _trace(make_trace, model)
    dispatcher = Dispatcher(
        placement=contiguous(model, 4), dispatch="even", node_of=np.array(node_of)
    )
    counter = ServingCounter(
        model, trace, draw_requests(trace, len(INPUTS), seed=1), INPUTS, dispatcher,
        Layout.data_parallel(4), np.array(node_of),
    )  # fmt: skip
    assert counter.routes is not None
    steps = _steps(4)
    got, wanted = counter.count(steps), _written_out(counter, steps)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(got.total, name), getattr(wanted, name), name)
    np.testing.assert_array_equal(got.decode_context + got.prefill_pairs, wanted.context)
    np.testing.assert_array_equal(got.decode_tokens + got.prefill_tokens, wanted.tokens)


def test_replicas_and_tensor_parallel_groups_are_counted_whole(
    make_model: Make, make_trace: MakeTrace, cluster_of: Callable[[int], Cluster]
) -> None:
    model = _windowed(make_model)
    trace = _trace(make_trace, model)
    slots = np.array([[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]] * 2, dtype=np.int32)
    deployment = Deployment.of(
        Placement(slots=slots, num_experts=8, num_ranks=4),
        parallelism=Parallelism(attention=AttentionLayout(dp=2, tp=2), experts=ExpertLayout(ep=4)),
    )
    cluster = cluster_of(4)
    layout = deployment.layout_for(model, cluster)
    counter = ServingCounter(
        model, trace, draw_requests(trace, len(INPUTS), seed=1), INPUTS,
        deployment.dispatcher_for(model, cluster), layout, cluster.node_of,
    )  # fmt: skip
    assert counter.routes is None
    steps = _steps(2)
    got, wanted = counter.count(steps), _written_out(counter, steps)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(got.total, name), getattr(wanted, name), name)
    np.testing.assert_array_equal(got.decode_context + got.prefill_pairs, wanted.context)
    one_by_one = [counter.count([step]).total.per_slot[0] for step in steps]
    np.testing.assert_array_equal(np.stack(one_by_one), got.total.per_slot)


def test_pairs_of_the_chunks_of_a_prompt_add_up(
    make_model: Make, make_trace: MakeTrace, contiguous: Contiguous
) -> None:
    """All chunks of a prompt of n tokens: n (n + 1) / 2 pairs, or cut to the window."""
    model = _windowed(make_model)
    trace = _trace(make_trace, model)
    node_of = np.zeros(1, dtype=np.int64)
    dispatcher = Dispatcher(placement=contiguous(model, 1), dispatch="even", node_of=node_of)
    inputs = np.array([700])
    rules = Scheduler(
        inputs=inputs, outputs=np.array([1]), num_ranks=1, max_batch_tokens=96, max_running=1,
        admission="reserve", kv_bytes=lambda n: np.asarray(n, dtype=np.float64), kv_capacity=1e9,
    )  # fmt: skip
    state, steps = rules.submit(rules.start, 1), []
    while (planned := rules.plan(state)) is not None:
        steps.append(planned[0])
        state = planned[1]
    counter = ServingCounter(
        model, trace, draw_requests(trace, 1, seed=0), inputs, dispatcher,
        Layout.data_parallel(1), node_of,
    )  # fmt: skip
    pairs = counter.count(steps).prefill_pairs.sum(axis=(0, 2))
    assert pairs.tolist() == [700 * 701 // 2, 50 * 51 // 2 + 650 * 50]
