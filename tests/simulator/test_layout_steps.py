"""Steps on any layout: what is conserved, what equals what, bounds, and closed forms."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from basis import validate
from hwmodels import AllToAll, Cluster, Gemm, GroupedGemm, Route, load_cluster, price
from hwmodels.ops import AllGather, AllReduce, AttentionDecode, ReduceScatter
from simulator import Deployment, Placement, Result, Workload, simulate
from simulator.batches import compose
from simulator.dispatch import Dispatcher
from simulator.layout import Layout
from simulator.loads import StepLoads, count_loads
from simulator.lowering import lower
from simulator.parallelism import Parallelism
from simulator.pricing import price_step
from simulator.program import evaluate, simulate_events
from simulator.work import Work
from traces import ModelSpec, RoutingTrace

ModelOf = Callable[..., ModelSpec]
TraceOf = Callable[..., RoutingTrace]
PlacementOf = Callable[[ModelSpec, int], Placement]


def _parallelism(
    dp: int, tp: int = 1, pp: int = 1, *, ep: int = 1, etp: int = 1, exchange: str = "all_to_all"
) -> Parallelism:
    data = {
        "attention": {"dp": dp, "tp": tp, "pp": pp},
        "experts": {"ep": ep, "tp": etp, "exchange": exchange},
    }
    return validate(data, Parallelism, "test")


@st.composite
def _layouts(draw: st.DrawFn, stages: tuple[int, ...] = (1, 2)) -> Layout:
    """Layouts of up to 8 ranks per stage that divide the model of these tests."""
    dp, tp = draw(st.sampled_from([(d, t) for d in (1, 2, 4, 8) for t in (1, 2, 4) if d * t <= 8]))
    lanes, pp = dp * tp, draw(st.sampled_from(stages))
    ep, etp = draw(
        st.sampled_from([(e, t) for e in (1, 2, 4, 8) for t in (1, 2, 4) if lanes % (e * t) == 0])
    )
    how = draw(st.sampled_from(["all_to_all", "all_gather"]))
    return Layout.of(_parallelism(dp, tp, pp, ep=ep, etp=etp, exchange=how), lanes * pp)


def _cluster(ranks: int, per_node: int = 8) -> Cluster:
    cluster = load_cluster("hgx-h100-8x2")
    node = cluster.node.model_copy(update={"devices": per_node})
    return cluster.model_copy(update={"node": node, "nodes": 16, "gpus": ranks})


def _model(make_model: ModelOf) -> ModelSpec:
    model = make_model(
        num_layers=4, moe_layer_ids=(1, 2, 3), dense_width=640, shared_expert_width=256
    )
    attention = model.attention.model_copy(update={"num_kv_heads": 4})
    return model.model_copy(update={"attention": attention})


def _loads(
    model: ModelSpec,
    trace: RoutingTrace,
    placement: Placement,
    layout: Layout,
    cluster: Cluster,
    tokens: int,
) -> StepLoads:
    steps = compose(trace, Workload(decode_batch=tokens), layout.dp, steps=2, seed=3)
    dispatcher = Dispatcher(
        placement=placement,
        dispatch="even",
        node_of=cluster.node_of[layout.exchange_groups[0]],
    )
    return count_loads(
        model, trace, steps, dispatcher, layout=layout, node_of=cluster.node_of, seed=1
    )


def _simulate(
    model: ModelSpec,
    trace: RoutingTrace,
    placement: Placement,
    layout: Parallelism,
    cluster: Cluster | None = None,
    **options: Any,
) -> Result:
    a = layout.attention
    deployment = Deployment.of(placement, parallelism=layout).model_copy(
        update={"overlap": options.pop("overlap", "none")}
    )
    workload = options.pop("workload", Workload(decode_batch=options.pop("batch", 32)))
    cluster = cluster or _cluster(a.dp * a.tp * a.pp)
    return simulate(model, trace, cluster, deployment, workload, steps=2, **options)


def _sum(works: list[Work], kinds: tuple[type, ...], what: str) -> float:
    return sum(
        getattr(w.op, what)().sum() * len(w.layers) / w.shape[1]
        for w in works
        if isinstance(w.op, kinds)
    )


SOME = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@SOME
@given(_layouts(), st.integers(1, 40), st.sampled_from([3, 8]))
def test_work_is_divided_and_nothing_is_lost(
    make_model: ModelOf,
    make_trace: TraceOf,
    contiguous: PlacementOf,
    layout: Layout,
    tokens: int,
    per_node: int,
) -> None:
    """FLOP over all ranks are those of one rank, but for the router that a tp group repeats."""
    model = _model(make_model)
    trace, placement = make_trace(model), contiguous(model, layout.ep)
    cluster = _cluster(layout.num_ranks, per_node)
    loads = _loads(model, trace, placement, layout, cluster, tokens)
    assert loads.step_tokens.tolist() == [tokens] * 2
    assert (loads.slices.sum(axis=1) == tokens).all()
    pairs = tokens * model.top_k
    assert (loads.per_slot.sum(axis=-1) == pairs).all()
    assert (loads.rank_load.sum(axis=-1) == pairs * layout.etp).all()

    one = Layout.data_parallel(1)
    alone = _loads(model, trace, contiguous(model, 1), one, _cluster(1), tokens)
    kinds = (Gemm, GroupedGemm, AttentionDecode)
    there, whole = (_sum(lower(model, k), kinds, "flops") for k in (loads, alone))
    assert there == pytest.approx(whole, rel=1e-12)
    repeated = layout.tp if layout.fused else 1
    there, whole = (_sum(lower(model, k), (Route,), "flops") for k in (loads, alone))
    assert there == pytest.approx(whole * repeated, rel=1e-12)


@SOME
@given(_layouts(), st.integers(1, 40))
def test_tokens_travel_only_among_equal_indices_and_reach_all_their_experts(
    make_model: ModelOf,
    make_trace: TraceOf,
    contiguous: PlacementOf,
    layout: Layout,
    tokens: int,
) -> None:
    model = _model(make_model)
    cluster = _cluster(layout.num_ranks)  # a stage is inside a node: nothing is forwarded
    loads = _loads(model, make_trace(model), contiguous(model, layout.ep), layout, cluster, tokens)
    lane = np.arange(layout.lanes)
    peers = np.zeros((layout.lanes, layout.lanes), dtype=bool)
    for group in layout.exchange_groups:
        peers[np.ix_(group, group)] = True
    assert not loads.sent[:, :, ~peers].any()
    per_token = model.comm_size * 2
    assert loads.sent.sum(axis=(-1, -2)) == pytest.approx(loads.cross_rank * per_token)
    assert not loads.cross_node.any()
    if loads.arrived is None:
        assert layout.fused or layout.gathered == 1
        return
    if layout.exchanged == 1:
        assert (loads.arrived == loads.slices[:, None]).all()
    else:  # what arrived came from others or was the rank's own
        own = loads.arrived - loads.sent.sum(axis=2)[:, :, lane] / per_token
        assert (own >= 0).all()
        assert (own <= loads.slices[:, None]).all()
    gathered = loads.arrived.reshape(2, 3, -1, layout.gathered).sum(axis=-1)
    most = loads.rows.sum(axis=-1).reshape(2, 3, -1, layout.gathered)
    assert (gathered[..., None] * model.top_k >= most).all()


def test_an_all_to_all_to_everyone_moves_what_an_all_gather_does(
    make_model: ModelOf, make_trace: TraceOf, contiguous: PlacementOf
) -> None:
    ranks, tokens = 4, 24
    model = make_model(num_experts=ranks, top_k=ranks)  # every token visits every rank
    placement, cluster = contiguous(model, ranks), _cluster(ranks)
    works = {}
    for how in ("all_to_all", "all_gather"):
        layout = Layout.of(_parallelism(ranks, ep=ranks, exchange=how), ranks)
        loads = _loads(model, make_trace(model), placement, layout, cluster, tokens)
        works[how] = {w.name: w.op for w in lower(model, loads)}
    exchange = works["all_to_all"]["dispatch"]
    assert isinstance(exchange, AllToAll)
    for name, kind in (
        ("dispatch all-gather", AllGather),
        ("combine reduce-scatter", ReduceScatter),
    ):
        ring = works["all_gather"][name]
        assert isinstance(ring, kind)
        through = np.asarray(ring.bytes) * (ranks - 1) / ranks
        received = exchange.traffic.sum(axis=1)
        assert received == pytest.approx(np.repeat(through[:, None], ranks, axis=1))
    assert "dispatch" not in works["all_gather"]


@pytest.mark.parametrize("how", ["all_to_all", "all_gather"])
def test_on_one_rank_every_layout_is_the_same(
    make_model: ModelOf, make_trace: TraceOf, contiguous: PlacementOf, how: str
) -> None:
    model = _model(make_model)
    options = (model, make_trace(model), contiguous(model, 1))
    plain = _simulate(*options, Parallelism.dp_ep(1)).to_dict()
    assert _simulate(*options, _parallelism(1, exchange=how)).to_dict() == plain


def test_plain_tensor_parallelism_is_a_rank_of_narrow_layers_and_two_all_reduces(
    make_model: ModelOf, make_trace: TraceOf, contiguous: PlacementOf
) -> None:
    """Every layer's time by its own price, added up; no all-to-all, no gather but of the logits."""
    ranks, batch = 4, 32
    model = _model(make_model)
    cluster = _cluster(ranks)
    result = _simulate(
        model, make_trace(model), contiguous(model, 1), _parallelism(1, 4, etp=4), batch=batch
    )
    names = [item.name for item in result.first_step.items]
    assert {n for n in names if "all-" in n or "scatter" in n or n in ("dispatch", "combine")} == {
        "embedding all-reduce",
        "attention all-reduce",
        "ffn all-reduce",
        "experts all-reduce",
        "logits all-gather",
    }
    reduce = AllReduce(bytes=batch * 1024 * 2, ranks=(0, 1, 2, 3))
    gather = AllGather(bytes=batch * 4096 * 2, ranks=(0, 1, 2, 3))
    once = price(reduce, cluster).seconds[0]
    expected = (1 + 2 * 4) * once + price(gather, cluster).seconds[0]
    assert result.seconds_by_cause["tensor_parallel"] == pytest.approx(expected, rel=1e-12)
    assert result.seconds_by_cause["wait"] == pytest.approx(0, abs=1e-12)
    step = result.first_step
    assert step.step_times[0] == pytest.approx(step.busy[0, :, 0].sum(), rel=1e-12)


def test_folded_layouts_have_the_collectives_of_the_paper(
    make_model: ModelOf, make_trace: TraceOf, contiguous: PlacementOf
) -> None:
    """RS over tp, A2A-V over ep, AG-V over etp, experts, and back (MoE Parallel Folding)."""
    model = _model(make_model)
    layout = _parallelism(2, 4, ep=4, etp=2)
    result = _simulate(model, make_trace(model), contiguous(model, 4), layout)
    names = [i.name for i in result.first_step.items if i.layer == 2 and i.groups is not None]
    assert names == [
        "attention reduce-scatter",
        "dispatch",
        "dispatch all-gather",
        "combine reduce-scatter",
        "combine",
        "tokens all-gather",
    ]


@SOME
@given(_layouts(), st.integers(4, 40), st.sampled_from(["none", "two_batch"]), st.booleans())
def test_no_step_beats_its_bounds_and_causes_add_up(
    make_model: ModelOf,
    make_trace: TraceOf,
    contiguous: PlacementOf,
    layout: Layout,
    tokens: int,
    overlap: str,
    decode: bool,
) -> None:
    model = _model(make_model)
    cluster = _cluster(layout.num_ranks)
    work = {"decode_batch": tokens} if decode else {"prefill_tokens": 16 + tokens}
    result = _simulate(
        model,
        make_trace(model),
        contiguous(model, layout.ep),
        layout.parallelism,
        cluster,
        workload=Workload.model_validate(work),
        overlap=overlap,
    )
    assert sum(result.seconds_by_cause.values()) == pytest.approx(
        result.step_time_s["mean"], rel=1e-9
    )
    assert (result.step_times_low <= result.step_times).all()
    assert (result.step_times <= result.step_times_high).all()
    # each rank reads at least its share of the attention weights in every step
    read = model.attention.matrix_parameters(1024) * 2 * 4 / layout.pp / layout.tp
    assert (result.step_times >= read / 3.35e12).all()
    assert result.first_step.num_ranks == layout.num_ranks
    assert result.loads.step_tokens.sum() == (2 * tokens if decode else result.loads.slices.sum())
    assert result.summary()["steps"] == 2


def test_replicas_are_dealt_out_inside_each_block(make_model: ModelOf, make_trace: TraceOf) -> None:
    model = make_model()
    slots = np.tile([0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3], (2, 1))
    placement = Placement(slots=slots, num_experts=8, num_ranks=2)
    layout = Layout.of(_parallelism(8, ep=2, etp=2), 8)
    loads = _loads(model, make_trace(model), placement, layout, _cluster(8), 32)
    blocks = loads.per_slot.reshape(2, 2, 2, 12)
    assert (blocks.sum(axis=-1) == 16 * model.top_k).all()  # half the tokens in each block
    first, second = blocks[..., :4], blocks[..., 8:]
    assert (np.abs(first - second) <= 1).all()


@settings(SOME, max_examples=15)
@given(_layouts(stages=(1,)), st.integers(1, 40))
def test_both_players_agree_and_no_rank_beats_its_memory(
    make_model: ModelOf,
    make_trace: TraceOf,
    contiguous: PlacementOf,
    layout: Layout,
    tokens: int,
) -> None:
    model, cluster = _model(make_model), _cluster(layout.num_ranks)
    loads = _loads(model, make_trace(model), contiguous(model, layout.ep), layout, cluster, tokens)
    works = lower(model, loads)
    priced = price_step(works, loads, cluster)
    fast, events = (f(priced.items, priced.seconds) for f in (evaluate, simulate_events))
    assert fast.end == pytest.approx(events.end, abs=1e-9)
    moved = np.zeros((loads.num_steps, loads.num_ranks))
    for work in works:
        if hasattr(work.op, "bytes_moved"):
            each = work.op.bytes_moved().reshape(work.shape).sum(axis=1)
            moved += each * len(work.layers) / work.shape[1]
    bandwidth = cluster.device.memory.bandwidth.value
    assert (fast.step_times[:, None] >= moved / bandwidth).all()


@settings(SOME, max_examples=20)
@given(_layouts(), st.sampled_from([2, 3, 8]))
def test_nothing_is_sent_where_every_rank_has_a_replica_of_all(
    make_model: ModelOf, make_trace: TraceOf, layout: Layout, per_node: int
) -> None:
    model = _model(make_model)
    slots = np.tile(np.arange(8), (3, layout.ep))
    placement = Placement(slots=slots, num_experts=8, num_ranks=layout.ep)
    cluster = _cluster(layout.num_ranks, per_node)
    steps = compose(make_trace(model), Workload(decode_batch=24), layout.dp, steps=1, seed=0)
    dispatcher = Dispatcher(
        placement=placement, dispatch="nearest", node_of=cluster.node_of[layout.exchange_groups[0]]
    )
    loads = count_loads(
        model, make_trace(model), steps, dispatcher, layout=layout, node_of=cluster.node_of
    )
    assert not loads.sent.any()
    if loads.arrived is not None:
        assert (loads.arrived == loads.slices[:, None]).all()
