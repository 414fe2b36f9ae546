"""The simulator against closed forms, bounds and invariants that hold for any placement."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hwmodels import Cluster, load_cluster, price
from simulator import Deployment, Placement, Result, Workload, simulate
from simulator.batches import Composition, StepBatch
from simulator.dispatch import Dispatcher
from simulator.loads import count_loads
from simulator.lowering import lower
from simulator.pricing import price_step
from simulator.program import Played, play
from traces import ModelSpec, RoutingTrace

ModelOf = Callable[..., ModelSpec]
TraceOf = Callable[..., RoutingTrace]
PlacementOf = Callable[[ModelSpec, int], Placement]
ClusterOf = Callable[[int], Cluster]


def _simulate(
    model: ModelSpec, trace: RoutingTrace, cluster: Cluster, placement: Placement, **options: int
) -> Result:
    workload = Workload(decode_batch=options.pop("batch", 8))
    return simulate(model, trace, cluster, Deployment.of(placement), workload, **options)


def _play(
    model: ModelSpec,
    trace: RoutingTrace,
    cluster: Cluster,
    placement: Placement,
    home: NDArray[np.int64],
) -> Played:
    """One decode step of all tokens of the trace with given homes."""
    batch = StepBatch(
        rows=np.arange(trace.num_tokens),
        context=np.ones(trace.num_tokens, dtype=np.int64),
        home=home,
        last=np.ones(trace.num_tokens, dtype=np.bool_),
    )
    steps = Composition(batches=(batch,), decode=True, statement="", stand_in=False)
    dispatcher = Dispatcher(placement=placement, dispatch="even", node_of=cluster.node_of)
    loads = count_loads(model, trace, steps, dispatcher)
    priced = price_step(lower(model, loads), loads, cluster)
    return play(priced.items, priced.seconds)


def test_one_rank_equals_the_sum_of_its_ops(
    make_model: ModelOf, make_trace: TraceOf, contiguous: PlacementOf, cluster_of: ClusterOf
) -> None:
    model, cluster = make_model(), cluster_of(1)
    trace, placement = make_trace(model), contiguous(model, 1)
    batch = StepBatch(
        rows=np.arange(5),
        context=np.arange(1, 6),
        home=np.zeros(5, dtype=np.int64),
        last=np.ones(5, dtype=np.bool_),
    )
    steps = Composition(batches=(batch,), decode=True, statement="", stand_in=False)
    dispatcher = Dispatcher(placement=placement, dispatch="even", node_of=cluster.node_of)
    loads = count_loads(model, trace, steps, dispatcher)
    works = lower(model, loads)
    total = sum(
        price(work.op, cluster).seconds.sum() * len(work.layers) / work.shape[1] for work in works
    )
    played = price_step(works, loads, cluster)
    step = play(played.items, played.seconds[:1])
    assert {work.name for work in works}.isdisjoint({"dispatch", "combine"})
    assert step.step_times[0] == pytest.approx(total, rel=1e-12)
    assert step.idle.max() == pytest.approx(0, abs=1e-12 * total)


def test_uniform_all_to_all_equals_the_closed_form(
    make_model: ModelOf, make_trace: TraceOf, contiguous: PlacementOf, cluster_of: ClusterOf
) -> None:
    ranks, own = 4, 6
    model = make_model(num_experts=ranks, top_k=ranks)  # every token goes to every rank
    cluster = cluster_of(ranks)
    result = _simulate(
        model, make_trace(model), cluster, contiguous(model, ranks), batch=ranks * own, steps=3
    )
    cost = cluster.intra.cost("all_to_all")
    sent = (ranks - 1) * own * model.comm_size * 2
    one = cost.startup + sent / (cost.efficiency * cluster.intra.bandwidth.value)
    for stage in ("dispatch", "combine"):
        assert result.seconds_by_cause[stage] == pytest.approx(
            model.num_moe_layers * one, rel=1e-12
        )
    off_diagonal = ~np.eye(ranks, dtype=bool)
    per_pair = 2 * model.num_moe_layers * own * model.comm_size * 2
    assert result.traffic[off_diagonal] == pytest.approx(per_pair)
    assert not result.traffic.diagonal().any()


def test_doubling_all_rates_halves_the_time_without_fixed_latencies(
    make_model: ModelOf, make_trace: TraceOf, contiguous: PlacementOf
) -> None:
    model = make_model()
    cluster = load_cluster("hgx-h100-8x2", gpus=16)
    slots = np.tile(np.arange(16) % 8, (2, 1))
    placement = Placement(slots=slots, num_experts=8, num_ranks=16)
    once, twice = (
        _simulate(model, make_trace(model), cluster.scaled(rates=x, fixed=0), placement, batch=64)
        for x in (1.0, 2.0)
    )
    assert twice.step_times == pytest.approx(once.step_times / 2, rel=1e-12)


def test_fixed_latencies_do_not_shrink(
    make_model: ModelOf, make_trace: TraceOf, contiguous: PlacementOf, cluster_of: ClusterOf
) -> None:
    model, cluster = make_model(), cluster_of(4)
    once, twice = (
        _simulate(model, make_trace(model), c, contiguous(model, 4))
        for c in (cluster, cluster.scaled(rates=2))
    )
    assert (twice.step_times > once.step_times / 2).all()
    assert (twice.step_times < once.step_times).all()


def _idle_last_rank(rng: np.random.Generator, tokens: int) -> NDArray[np.int64]:
    """Top-2 of experts 0..5 in each of two layers: with 8 experts on 4 ranks, rank 3 is idle."""
    skewed = rng.random((tokens, 2, 6)) * rng.random((1, 2, 6))
    return np.argsort(-skewed, axis=-1)[..., :2]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), tokens=st.integers(1, 60), fixed=st.sampled_from([0.0, 1.0]))
def test_relieving_the_busiest_rank_never_costs_time_when_communication_is_free(
    make_model: ModelOf,
    make_trace: TraceOf,
    contiguous: PlacementOf,
    cluster_of: ClusterOf,
    seed: int,
    tokens: int,
    fixed: float,
) -> None:
    rng = np.random.default_rng(seed)
    model = make_model()
    trace = make_trace(model, _idle_last_rank(rng, tokens), requests=tokens, length=1)
    cluster = cluster_of(4).scaled(communication=np.inf, fixed=fixed)
    before = contiguous(model, 4)
    layer = int(rng.integers(2))
    load = np.bincount(trace.experts[:, layer].ravel() // 2, minlength=4)
    busy = int(load.argmax())
    moved = before.slots.copy()
    give, take = 2 * busy + int(rng.integers(2)), 6 + int(rng.integers(2))
    moved[layer, [give, take]] = moved[layer, [take, give]]
    after = Placement(slots=moved, num_experts=8, num_ranks=4)
    home = rng.integers(4, size=tokens)
    old, new = (_play(model, trace, cluster, p, home).step_times[0] for p in (before, after))
    assert load[3] == 0
    assert new <= old * (1 + 1e-12)


def test_moving_an_expert_saves_its_compute_less_the_communication_it_adds(
    make_model: ModelOf, make_trace: TraceOf, contiguous: PlacementOf, cluster_of: ClusterOf
) -> None:
    """All 48 tokens live on rank 0 and use its experts 0 and 1; expert 1 moves to idle rank 3."""
    tokens, width, hidden = 48, 1536, 1024
    model = make_model(num_layers=1)
    cluster = cluster_of(4)
    experts = np.tile(np.array([0, 1]), (tokens, 1, 1))
    trace = make_trace(model, experts, requests=tokens, length=1)
    before = contiguous(model, 4)
    after = Placement(slots=np.array([[0, 6, 2, 3, 4, 5, 1, 7]]), num_experts=8, num_ranks=4)
    home = np.zeros(tokens, dtype=np.int64)
    old, new = (_play(model, trace, cluster, p, home).step_times[0] for p in (before, after))

    device = cluster.device
    grouped, permute = (device.kernel(n, "bf16")[0] for n in ("grouped_gemm", "permute"))  # type: ignore[arg-type]
    memory = device.memory.bandwidth.value

    def ffn(active: int) -> float:  # memory bound: 48 tokens are far below the ridge
        weights = active * (3 * hidden * width * 2 + grouped.ramp_bytes)
        rows = active * tokens * (2 * hidden + 3 * width) * 2
        return float(grouped.launch + (weights + rows) / (grouped.memory_efficiency * memory))

    def permutes(active: int) -> float:
        moved = 2 * active * tokens * hidden * 2
        return float(2 * (permute.launch + moved / (permute.memory_efficiency * memory)))

    link = cluster.intra
    one_way = tokens * hidden * 2 / (link.cost("all_to_all").efficiency * link.bandwidth.value)
    saved = ffn(2) + permutes(2) - ffn(1) - permutes(1)
    assert old - new == pytest.approx(saved - 2 * one_way, rel=1e-9)
    assert saved > 2 * one_way > 0


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), batch=st.integers(1, 40), ranks=st.sampled_from([1, 2, 4]))
def test_no_step_beats_its_bounds_and_causes_add_up(
    make_model: ModelOf,
    make_trace: TraceOf,
    contiguous: PlacementOf,
    cluster_of: ClusterOf,
    seed: int,
    batch: int,
    ranks: int,
) -> None:
    model = make_model()
    result = _simulate(
        model,
        make_trace(model),
        cluster_of(ranks),
        contiguous(model, ranks),
        batch=batch,
        steps=2,
        seed=seed,
    )
    step = result.first_step
    own = step.busy[0].sum(axis=0)
    assert step.step_times[0] >= own.max() * (1 - 1e-12)
    assert own + step.idle[0] == pytest.approx(step.step_times[0], rel=1e-9)
    assert sum(result.seconds_by_cause.values()) == pytest.approx(
        result.step_time_s["mean"], rel=1e-12
    )
    assert (result.step_times_low <= result.step_times).all()
    assert (result.step_times <= result.step_times_high).all()


def test_a_step_is_the_sum_over_phases_of_the_slowest_rank(
    make_model: ModelOf, make_trace: TraceOf, contiguous: PlacementOf, cluster_of: ClusterOf
) -> None:
    model = make_model()
    result = _simulate(model, make_trace(model), cluster_of(4), contiguous(model, 4), batch=30)
    step = result.first_step
    together = np.array([item.groups is not None for item in step.items])
    begins = np.append(True, together[1:] | together[:-1])
    runs = np.add.reduceat(step.busy[0], np.flatnonzero(begins), axis=0)
    assert step.step_times[0] == pytest.approx(runs.max(axis=1).sum(), rel=1e-9)


def test_the_same_seed_gives_the_same_result(
    make_model: ModelOf, make_trace: TraceOf, contiguous: PlacementOf, cluster_of: ClusterOf
) -> None:
    model = make_model()
    one, same, other = (
        _simulate(
            model, make_trace(model), cluster_of(4), contiguous(model, 4), batch=12, seed=seed
        ).to_dict()
        for seed in (3, 3, 4)
    )
    assert one == same
    assert one != other
