"""Pipelines against closed forms, two batches against their bounds, parts of steps conserved."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels import Cluster, Stage
from hwmodels.ops import AllToAll
from simulator import Deployment, Placement, Result, Workload, simulate
from simulator.batches import compose
from simulator.layout import Layout
from simulator.loads import count_loads
from simulator.lowering import lower
from simulator.micro_batches import split
from simulator.parallelism import AttentionLayout, ExpertLayout, Parallelism
from simulator.playing import pipeline, play_steps, two_batch
from simulator.program import Item, Stream, evaluate, simulate_events
from simulator.timeline import check_timeline
from traces import ModelSpec, RoutingTrace

ModelOf = Callable[..., ModelSpec]
TraceOf = Callable[..., RoutingTrace]
PlacementOf = Callable[[ModelSpec, int], Placement]
ClusterOf = Callable[[int], Cluster]


def _equal(busy: list[float], sends: list[float], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Equal microbatches: [1, microbatches, stages] each."""
    table = np.array([busy, sends])[:, None, None]
    both = np.broadcast_to(table, (2, 1, count, len(busy)))
    return both[0], both[1]


@pytest.mark.parametrize("pp", [1, 2, 4, 7])
def test_a_balanced_pipeline_yields_a_token_per_stage_time(pp: int) -> None:
    """As many microbatches as stages: TPOT = pp (stage + send); free sends leave no bubble."""
    stage, send = 3.0, 0.5
    steady, starts = pipeline(*_equal([stage] * pp, [send] * pp, pp), decode=True)
    assert steady[0] == pytest.approx(pp * (stage + send), rel=1e-12)
    free, _ = pipeline(*_equal([stage] * pp, [0.0] * pp, pp), decode=True)
    assert pp / free[0] == pytest.approx(1 / stage, rel=1e-12)  # microbatches per second
    assert starts[0, 0].tolist() == [s * (stage + send) for s in range(pp)]


def test_an_unbalanced_pipeline_is_as_fast_as_its_slowest_stage() -> None:
    busy, sends = [1.0, 5.0, 2.0], [0.1, 0.1, 0.1]
    decode, _ = pipeline(*_equal(busy, sends, 3), decode=True)
    assert 3 / decode[0] == pytest.approx(1 / max(busy), rel=1e-12)
    few, _ = pipeline(*_equal(busy, sends, 1), decode=True)  # one microbatch: nothing overlaps
    assert few[0] == pytest.approx(sum(busy) + sum(sends), rel=1e-12)


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(0, 10)), min_size=1, max_size=5),
    st.integers(1, 6),
    st.booleans(),
)
def test_equal_microbatches_equal_the_closed_form(
    stages: list[tuple[int, int]], count: int, decode: bool
) -> None:
    busy, sends = [float(b) for b, _ in stages], [float(s) for _, s in stages]
    steady, _ = pipeline(*_equal(busy, sends, count), decode=decode)
    queue = count * max(*busy, *sends)
    assert steady[0] == pytest.approx(max(queue, (sum(busy) + sum(sends)) * decode), rel=1e-12)


@given(st.integers(1, 4), st.integers(1, 4), st.booleans(), st.integers(0, 2**32 - 1))
def test_unequal_microbatches_keep_their_bounds(
    count: int, depth: int, decode: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    busy, sends = rng.random((2, 3, count, depth))
    steady, _ = pipeline(busy, sends, decode=decode)
    low = np.maximum(busy.sum(axis=1).max(axis=-1), sends.sum(axis=1).max(axis=-1))
    if decode:
        low = np.maximum(low, (busy + sends).sum(axis=-1).max(axis=-1))
    assert (steady >= low * (1 - 1e-9)).all()
    assert (steady <= (busy + sends).sum(axis=(1, 2)) * (1 + 1e-9)).all()


def _half(rng: np.random.Generator, ranks: int) -> list[Item]:
    """A chain of kernels and collectives, some kernels beside one another."""
    items = []
    for i in range(int(rng.integers(1, 14))):
        talks = bool(rng.random() < 0.4)
        items.append(
            Item(
                name="x",
                stage=Stage.OTHER,
                layer=0,
                stream=Stream.COMMUNICATION if talks else Stream.COMPUTE,
                after=None if rng.random() < 0.8 else (int(rng.integers(i)),) if i else (),
                groups=tuple(rng.integers(ranks, size=ranks).tolist()) if talks else None,
            )
        )
    return items


@settings(max_examples=100)
@given(st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_two_batches_are_between_the_busier_stream_and_one_after_the_other(
    ranks: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    items = _half(rng, ranks)
    seconds = rng.random((2, len(items), ranks))
    program, took = two_batch(items, seconds)
    played = evaluate(program, took)
    assert played.end == pytest.approx(simulate_events(program, took).end, abs=1e-9)
    assert took.sum() == pytest.approx(seconds.sum())
    talks = np.array([item.stream == Stream.COMMUNICATION for item in items])
    time = played.step_times[0]
    assert time >= seconds[:, ~talks].sum(axis=(0, 1)).max() * (1 - 1e-12)
    assert time >= seconds[:, talks].sum(axis=(0, 1)).max() * (1 - 1e-12)
    # the longest path visits each segment of each half once, on one rank
    streams = talks.astype(int)
    first = np.concatenate(([0], 1 + np.flatnonzero(np.diff(streams))))
    segments = np.add.reduceat(seconds.max(axis=2), first, axis=1)
    assert time <= segments.sum() * (1 + 1e-12)


def test_two_batches_alternate() -> None:
    """Compute 2, exchange 2, compute 2 each: the other half's compute covers every exchange."""
    chain = [
        Item(name="a", stage=Stage.OTHER, layer=0),
        Item(name="x", stage=Stage.OTHER, layer=0, stream=Stream.COMMUNICATION, groups=(0,)),
        Item(name="b", stage=Stage.OTHER, layer=0),
    ]
    program, took = two_batch(chain, np.full((2, 3, 1), 2.0))
    played = evaluate(program, took)
    assert [item.name for item in program] == ["a", "a", "x", "x", "b", "b"]
    assert played.end[0, :, 0].tolist() == [2, 4, 4, 6, 6, 8]


def _run(
    model: ModelSpec,
    trace: RoutingTrace,
    cluster: Cluster,
    placement: Placement,
    layout: Parallelism,
    *,
    overlap: str = "none",
    batch: int = 64,
) -> Result:
    deployment = Deployment.of(placement, parallelism=layout).model_copy(
        update={"overlap": overlap}
    )
    return simulate(model, trace, cluster, deployment, Workload(decode_batch=batch), steps=2)


def test_two_batches_read_the_weights_twice(
    make_model: ModelOf, make_trace: TraceOf, contiguous: PlacementOf, cluster_of: ClusterOf
) -> None:
    """On one rank there is nothing to hide: the halves cost what two steps of half a batch do."""
    model, layout = make_model(), Parallelism.dp_ep(1)
    options = (model, make_trace(model), cluster_of(1), contiguous(model, 1), layout)
    whole, halved = (_run(*options, overlap=how) for how in ("none", "two_batch"))
    read = model.num_moe_layers * model.num_experts * model.bytes_per_expert
    experts = halved.seconds_by_cause["experts"] - whole.seconds_by_cause["experts"]
    assert experts > 0.9 * read / cluster_of(1).device.memory.bandwidth.value
    assert (halved.step_times > whole.step_times).all()


def test_two_batches_hide_slow_exchanges(
    make_model: ModelOf, make_trace: TraceOf, contiguous: PlacementOf, cluster_of: ClusterOf
) -> None:
    model = make_model(hidden_size=4096, comm_size=4096, expert_width=256)
    layout = Parallelism.dp_ep(4)
    cluster = cluster_of(4).scaled(communication=0.02)
    options = (model, make_trace(model), cluster, contiguous(model, 4), layout)
    whole, halved = (_run(*options, overlap=how, batch=512) for how in ("none", "two_batch"))
    assert (halved.step_times < whole.step_times).all()
    assert halved.seconds_by_cause["overlapped"] < 0
    talk = sum(halved.seconds_by_cause[c] for c in ("dispatch", "combine"))
    assert (halved.step_times > talk * 0.9).all()
    assert not check_timeline(halved.timeline["traceEvents"])


def _staged(dp: int, pp: int, ep: int) -> Parallelism:
    return Parallelism(attention=AttentionLayout(dp=dp, pp=pp), experts=ExpertLayout(ep=ep))


def test_a_simulated_pipeline_is_bound_by_its_stages(
    make_model: ModelOf, make_trace: TraceOf, contiguous: PlacementOf, cluster_of: ClusterOf
) -> None:
    model = make_model(num_layers=4)
    result = _run(model, make_trace(model), cluster_of(4), contiguous(model, 2), _staged(2, 2, 2))
    step = result.first_step
    assert step.num_ranks == 4
    sends = [item for item in step.items if item.name in ("send", "send back")]
    assert len(sends) == 2 * 2  # two microbatches, from each stage to the next
    stays = np.array([item.stage is not Stage.TRANSFER for item in step.items])
    assert (result.step_times[0] >= step.busy[0, stays].sum(axis=0) * (1 - 1e-12)).all()
    assert result.step_times[0] <= step.step_times[0] * (1 + 1e-9)  # overlaps with the next round
    by_rank = np.array([step.busy[0, :, r] > 0 for r in range(4)])
    layers = np.array([item.layer for item in step.items])
    for rank in range(4):  # each rank works on its own stage's layers
        own = {-1, 0, 1} if rank < 2 else {2, 3, 4}
        assert set(layers[by_rank[rank]].tolist()) == own
    assert not check_timeline(result.timeline["traceEvents"])
    assert result.tokens_per_second == pytest.approx(64 * 2 / result.step_times.sum())


def test_stages_send_every_token_once_and_ids_back(
    make_model: ModelOf, make_trace: TraceOf, contiguous: PlacementOf, cluster_of: ClusterOf
) -> None:
    model = make_model(num_layers=3)
    layout = Layout.of(
        Parallelism(attention=AttentionLayout(dp=1, tp=2, pp=3), experts=ExpertLayout(ep=2)), 6
    )
    trace, cluster = make_trace(model), cluster_of(6)
    steps = split(compose(trace, Workload(decode_batch=10), 1, steps=1, seed=0), 3)
    dispatcher = Deployment.of(contiguous(model, 2), parallelism=layout.parallelism).dispatcher_for(
        model, cluster
    )
    loads = count_loads(model, trace, steps, dispatcher, layout=layout, node_of=cluster.node_of)
    moved = {}
    for work in lower(model, loads):
        if work.stage is Stage.TRANSFER:
            assert isinstance(work.op, AllToAll)
            moved[work.name, work.op.ranks] = work.op.traffic.sum()
    assert moved == {
        ("send", ((0, 2), (1, 3))): 10 * 1024 * 2,
        ("send", ((2, 4), (3, 5))): 10 * 1024 * 2,
        ("send back", ((4, 0), (5, 1))): 10 * 4,
    }


@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 4), st.booleans())
def test_parts_hold_every_token_once_and_evenly(
    make_model: ModelOf, make_trace: TraceOf, parts: int, tokens: int, dp: int, decode: bool
) -> None:
    trace = make_trace(make_model(), requests=12, length=5)
    work = Workload(decode_batch=tokens) if decode else Workload(prefill_tokens=5 + tokens)
    steps = compose(trace, work, dp, steps=2, seed=0)
    cut = split(steps, parts).batches
    assert len(cut) == 2 * parts
    for number, batch in enumerate(steps.batches):
        pieces = cut[number * parts : (number + 1) * parts]
        for name in ("rows", "context", "home", "last"):
            joined = np.concatenate([getattr(piece, name) for piece in pieces])
            assert sorted(joined.tolist()) == sorted(getattr(batch, name).tolist())
        sizes = np.array([np.bincount(piece.home, minlength=dp) for piece in pieces])
        unit = 1 if decode else 5  # whole prompts
        assert (sizes.max(axis=0) - sizes.min(axis=0) <= unit).all()
        assert decode or not (sizes % 5).any()


def test_a_program_with_one_stage_is_played_as_it_is() -> None:
    items = [Item(name="x", stage=Stage.OTHER, layer=0)] * 3
    seconds = np.arange(12.0).reshape(2, 3, 2)
    steps = play_steps(items, seconds, Layout.data_parallel(2), 1)
    assert (steps.step_times == evaluate(items, seconds).step_times).all()
