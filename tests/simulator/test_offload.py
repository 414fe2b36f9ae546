"""Steps with tiers: closed forms, recurrences, conservation, and what is refused."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from basis.errors import InfeasibleError, InputError
from basis.schema import validate
from hwmodels import Cluster, load_cluster, price
from hwmodels.ops import Copy, GroupedGemm
from simulator import Deployment, Placement, Workload, simulate
from simulator.offload import Offload
from simulator.offload_result import OffloadResult
from simulator.offload_simulate import simulate_offload
from simulator.program import Stream, evaluate, simulate_events
from traces import ModelSpec, RoutingTrace

ModelOf = Callable[..., ModelSpec]
TraceOf = Callable[..., RoutingTrace]
Run = Callable[..., OffloadResult]
STEPS, LAYERS, BATCH = 6, 4, 3


@pytest.fixture(scope="module")
def station() -> Cluster:
    return load_cluster("workstation-rtx4090")


@pytest.fixture(scope="module")
def model(make_model: ModelOf) -> ModelSpec:
    return make_model(num_layers=LAYERS)


@pytest.fixture(scope="module")
def run(
    model: ModelSpec,
    make_trace: TraceOf,
    contiguous: Callable[[ModelSpec, int], Placement],
    station: Cluster,
) -> Run:
    """Simulate one offload; every step takes the same two experts where ``constant``."""

    def simulated(
        *,
        constant: bool = False,
        cluster: Cluster = station,
        batch: int = BATCH,
        warmup: int | None = None,
        **offload: Any,
    ) -> OffloadResult:
        same = np.tile(np.arange(2), (8 * 16, LAYERS, 1)) if constant else None
        deployment = Deployment.of(contiguous(model, 1)).model_copy(
            update={"offload": validate(offload, Offload, "offload")}
        )
        workload = Workload(decode_batch=batch)
        return simulate_offload(
            model,
            make_trace(model, same),
            cluster,
            deployment,
            workload,
            steps=STEPS,
            warmup=warmup,
        )

    return simulated


EVERYTHING = [list(range(8))] * LAYERS
SETTINGS: list[dict[str, Any]] = [
    {},
    {"resident": [[0, 1, 2]] * LAYERS},
    {"predictor": {"name": "exact"}},
    {"predictor": {"name": "gate_reuse", "depth": 2, "accuracy": 0.7}},
    {"predictor": {"name": "all"}, "resident": [[7]] * LAYERS},
    {"cache": {"slots": 3}, "predictor": {"name": "frequent", "count": 2}},
    {"cache": {"slots": 9, "scope": "global", "score": "lfu"}},
    {"site": {"name": "home", "processor": "cpu"}},
    {"site": {"name": "list", "processor": "cpu"}, "cache": {"slots": 3}},
    {"site": {"name": "split", "processor": "cpu"}, "predictor": {"name": "exact"}},
    {"site": {"name": "one_unit", "processor": "cpu"}, "cache": {"slots": 2}},
    {"predictor": {"name": "exact", "count": 1}},
    {"site": {"name": "ops_per_byte", "processor": "cpu", "threshold": 2}, "home": "nvme"},
    {"home": "nvme", "predictor": {"name": "exact", "depth": 2}},
    {"attention": "cpu", "predictor": {"name": "all"}},
]


def _copy_s(size: float, source: str, target: str, cluster: Cluster) -> float:
    op = Copy(bytes=np.array([size]), source=source, target=target)
    return float(price(op, cluster).seconds[0])


def _item_s(result: OffloadResult, name: str) -> np.ndarray:
    """Seconds of an item in each step and MoE layer, [S, L]."""
    at = [i for i, item in enumerate(result.played.items) if item.name == name]
    return np.asarray(result.played.busy[:, at, 0])


def _plain(run: Run, model: ModelSpec, make_trace: TraceOf, cluster: Cluster, **k: Any) -> Any:
    slots = np.tile(np.arange(8, dtype=np.int32), (LAYERS, 1))
    deployment = Deployment.of(Placement(slots=slots, num_experts=8, num_ranks=1))
    same = np.tile(np.arange(2), (8 * 16, LAYERS, 1)) if k.get("constant") else None
    workload = Workload(decode_batch=BATCH)
    return simulate(model, make_trace(model, same), cluster, deployment, workload, steps=STEPS)


@pytest.mark.parametrize("site", ["fetch", "home", "planned"])
def test_everything_resident_is_the_plain_simulation(
    run: Run, model: ModelSpec, make_trace: TraceOf, station: Cluster, site: str
) -> None:
    rule: dict[str, Any] = {"name": site, "processor": "cpu"}
    if site == "planned":
        rule["table"] = [["side"] * 8] * LAYERS
    ours = run(resident=EVERYTHING, site=rule)
    plain = _plain(run, model, make_trace, station)
    assert ours.step_times == pytest.approx(plain.step_times, rel=1e-9)
    assert ours.step_times_high == pytest.approx(plain.step_times_high, rel=1e-9)
    assert ours.hit_rate == 1
    assert ours.memory.total == pytest.approx(plain.memory.total)
    assert ours.tokens_per_second == pytest.approx(plain.tokens_per_second)


def test_on_demand_fetching_has_a_closed_form(
    run: Run, model: ModelSpec, make_trace: TraceOf, station: Cluster
) -> None:
    """Two experts a layer: router, two copies, the second expert's call; permute is hidden."""
    ours = run(constant=True)
    plain = _plain(run, model, make_trace, station, constant=True)
    op = GroupedGemm(
        tokens_per_expert=np.array([[BATCH, BATCH], [BATCH, 0]]),
        hidden=model.hidden_size,
        width=model.expert_width,
        gated=True,
        weight_dtype="bf16",
        activation_dtype="bf16",
    )
    both, one = price(op, station).seconds
    copy = _copy_s(model.bytes_per_expert, "host", "hbm", station)
    permute = _item_s(ours, "permute")[0, 0]
    assert copy > one + permute
    expected = plain.step_times + LAYERS * (2 * copy + one - permute - both)
    assert ours.step_times == pytest.approx(expected, rel=1e-9)
    rate = station.node.links["pcie"].bandwidth.value
    assert (ours.step_times >= LAYERS * 2 * model.bytes_per_expert / rate).all()
    assert ours.hit_rate == 0


@pytest.mark.parametrize("faster", [1.0, 12.0, 60.0, 200.0])
@pytest.mark.parametrize("depth", [1, 2])
def test_layer_streaming_is_the_steady_state_of_the_ring(
    run: Run, station: Cluster, faster: float, depth: int
) -> None:
    """Equal steps one after another, copies and layers counted on through all of them.

    copy_n begins when copy_(n-1) and the experts of layer n - depth - 1 have ended, across the ends
    of steps. Ours is that in the long run, or longer by less than a copy: it waits at a step's end
    for the copies of the next one's first layers.
    """
    cluster = station.scaled(communication=faster) if faster > 1 else station
    ours = run(predictor={"name": "all", "depth": depth}, cluster=cluster)
    copies = _item_s(ours, "prefetch")
    experts = _item_s(ours, "experts copied ahead") + _item_s(ours, "unpermute")
    items, busy = ours.played.items, ours.played.busy[:, :, 0]
    first, *before, tail = (
        busy[:, [i for i, it in enumerate(items) if it.layer == layer and _comes_first(it)]].sum(1)
        for layer in range(-1, LAYERS + 1)
    )
    now, copied = np.zeros(STEPS), np.zeros(STEPS)
    done: list[np.ndarray] = []
    ends: list[np.ndarray] = []
    for n in range(40 * LAYERS):
        layer = n % LAYERS
        freed = done[n - depth - 1] if n > depth else 0.0
        copied = np.maximum(copied, freed) + copies[:, 0]
        begins = now + before[layer] + (first if layer == 0 else 0)
        now = np.maximum(begins, copied) + experts[:, layer]
        done.append(now)
        if layer == LAYERS - 1:
            now = now + tail
            ends.append(now)
    period = (ends[-1] - ends[-21]) / 20
    assert copies == pytest.approx(np.broadcast_to(copies[:1, :1], copies.shape), rel=1e-9)
    assert (ours.step_times >= period * (1 - 1e-9)).all()
    assert (ours.step_times < period + copies[:, 0]).all()
    if faster in (1, 200):  # the copies bind, or the kernels do
        busiest = np.maximum(copies.sum(axis=1), first + sum(before) + experts.sum(axis=1) + tail)
        assert period == pytest.approx(busiest, rel=1e-9)
        assert ours.step_times == pytest.approx(period, rel=1e-9)


def _comes_first(item: Any) -> bool:
    return item.stream == Stream.COMPUTE and item.name not in (
        "experts",
        "experts copied ahead",
        "unpermute",
    )


@pytest.mark.parametrize("offload", SETTINGS)
def test_the_evaluator_equals_the_event_engine_and_paths_add_up(
    run: Run, offload: dict[str, Any]
) -> None:
    ours = run(**offload)
    seconds = ours.played.busy
    for times in (
        evaluate(ours.played.items, seconds),
        simulate_events(ours.played.items, seconds),
    ):
        assert times.end == pytest.approx(ours.played.end, abs=1e-12)
    mean = ours.step_time_s["mean"]
    assert sum(ours.critical_path.values()) == pytest.approx(mean, rel=1e-9)
    assert sum(ours.seconds_by_cause.values()) == pytest.approx(mean, rel=1e-9)
    assert sum(ours.site_shares.values()) == pytest.approx(1)
    assert (ours.step_times_low <= ours.step_times).all()


@pytest.mark.parametrize("offload", SETTINGS)
def test_bytes_and_tokens_are_conserved(
    run: Run, model: ModelSpec, station: Cluster, offload: dict[str, Any]
) -> None:
    """Every active expert runs once; copies into the fast memory = experts not held, in seconds."""
    ours = run(**offload)
    d = ours.decisions
    held = d.residency.held & ~d.residency.ahead
    assert ((d.where > 0) == (d.tokens > 0)).all()
    assert not (d.fetched & d.residency.held).any()
    demand = int((d.fetched & ~held).sum())
    ahead = d.residency.ahead.sum(axis=-1)[..., 0]
    link = station.path("host", "hbm")
    rate = link[0].cost("copy").efficiency * link[0].bandwidth.value
    whole = ours.offload.predictor.name == "all"
    calls = demand + int((ahead > 0).sum() if whole else ahead.sum())
    seconds = calls * link[0].cost("copy").startup
    seconds += (demand + ahead.sum()) * model.bytes_per_expert / rate
    assert ours.busy.get("fetch", 0.0) * STEPS == pytest.approx(seconds, rel=1e-9)
    tokens = STEPS * BATCH
    moved = ours.fetched_bytes_per_token * tokens
    assert moved == pytest.approx((demand + ahead.sum()) * model.bytes_per_expert)
    grouped = [i for i, it in enumerate(ours.played.items) if it.stream == Stream.SIDE]
    runs_aside = offload.get("attention") is not None or bool(d.aside.any())
    assert bool(ours.played.busy[:, grouped].any()) == runs_aside


SITE_CHOICES: list[dict[str, Any]] = [
    {"name": "fetch"},
    {"name": "home", "processor": "cpu"},
    {"name": "list", "processor": "cpu"},
    {"name": "list_code", "processor": "cpu"},
    {"name": "split", "processor": "cpu"},
    {"name": "ops_per_byte", "processor": "cpu", "threshold": 2},
    {"name": "one_unit", "processor": "cpu"},
    {"name": "planned", "processor": "cpu", "table": [["side", "fetch"] * 4] * LAYERS},
]
CACHES: list[dict[str, Any]] = [
    {"slots": 3},
    {"slots": 2, "score": "belady"},
    {"slots": 5, "score": "lfu"},
    {"slots": 9, "scope": "global", "score": "lfu"},
]
AHEAD: list[dict[str, Any]] = [
    {},
    {"name": "exact", "depth": 1},
    {"name": "gate_reuse", "depth": 2, "accuracy": 0.6, "count": 1},
    {"name": "frequent", "count": 2},
]


@pytest.mark.parametrize("ahead", AHEAD)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("site", SITE_CHOICES)
def test_only_what_is_copied_enters_the_cache(
    run: Run,
    station: Cluster,
    model: ModelSpec,
    site: dict[str, Any],
    cache: dict[str, Any],
    ahead: dict[str, Any],
) -> None:
    """Bytes on the fetch stream = loads x an expert's; what is held was copied and not yet lost.

    The simulated steps are played from the first on (no steps before them), so whatever a layer
    finds in the cache must have been copied in these steps.
    """
    if site["name"] == "home" and not ahead:
        with pytest.raises(InputError, match="cache with site home: nothing is ever copied"):
            run(site=site, cache=cache)
        return
    ours = run(site=site, cache=cache, predictor=ahead, resident=[[5]] * LAYERS, warmup=0)
    d, static = ours.decisions, np.arange(8) == 5
    copied = d.fetched | d.residency.ahead
    before = np.zeros_like(copied)
    before[1:] = np.maximum.accumulate(copied, axis=0)[:-1]
    assert not (d.residency.held & ~(static | before | d.residency.ahead)).any()
    assert not (copied & static).any()
    assert not (d.fetched & d.residency.held).any()
    link = station.path("host", "hbm")[0]
    copy = link.cost("copy")
    one = copy.startup + model.bytes_per_expert / (link.bandwidth.value * copy.efficiency)
    assert ours.busy.get("fetch", 0.0) * STEPS == pytest.approx(copied.sum() * one, rel=1e-9)
    moved = ours.fetched_bytes_per_token * STEPS * BATCH
    assert moved == pytest.approx(copied.sum() * model.bytes_per_expert)
    if cache.get("scope") != "global":
        assert (d.residency.held & ~static).sum(axis=-1).max() <= cache["slots"]
    if (most := ahead.get("count")) is not None:
        assert d.residency.ahead.sum(axis=-1).max() <= most


def test_a_site_that_copies_nothing_leaves_the_cache_empty(run: Run, station: Cluster) -> None:
    """Where a copy takes far longer than the side processor, no rule with times ever copies."""
    slow = station.scaled(communication=1e-4)
    for name in ("list", "list_code", "split", "one_unit", "ops_per_byte"):
        site = {"name": name, "processor": "cpu", "threshold": 100}
        ours = run(site=site, cache={"slots": 6}, batch=1, cluster=slow)
        assert ours.hit_rate == 0
        assert ours.site_shares["aside"] == 1
        assert "fetch" not in ours.busy
    planned = {"name": "planned", "processor": "cpu", "table": [["side"] * 8] * LAYERS}
    with pytest.raises(InputError, match="cache with site planned: nothing is ever copied"):
        run(site=planned, cache={"slots": 2})


def test_a_limit_on_prefetch_keeps_the_link_free(run: Run) -> None:
    free = run(predictor={"name": "exact"}).decisions
    for most in (1, 2):
        limited = run(predictor={"name": "exact", "count": most}).decisions
        ahead = limited.residency.ahead
        assert (ahead.sum(-1) == np.minimum(free.residency.ahead.sum(-1), most)).all()
        assert not (ahead & ~free.residency.ahead).any()
        assert (limited.fetched | ahead).sum() == (free.fetched | free.residency.ahead).sum()


def test_exact_prefetch_leaves_only_the_first_layers_exposed(run: Run) -> None:
    ours = run(predictor={"name": "exact", "depth": 2})
    active = ours.decisions.tokens > 0
    assert not ours.decisions.residency.held[:, :2].any()
    assert (ours.decisions.residency.held[:, 2:] == active[:, 2:]).all()
    assert ours.prefetch_precision == 1
    assert ours.step_times.mean() < run().step_times.mean()


def test_a_larger_cache_is_not_slower_and_belady_has_the_most_hits(run: Run) -> None:
    sizes = [run(cache={"slots": slots}).step_times.mean() for slots in (2, 4, 8)]
    assert sizes[0] >= sizes[1] >= sizes[2]
    hits = {score: run(cache={"slots": 3, "score": score}).hit_rate for score in ("lru", "belady")}
    assert hits["belady"] >= hits["lru"]


def test_attention_beside_the_cache_moves_queries_and_outputs(
    run: Run, model: ModelSpec, station: Cluster
) -> None:
    here, there = run(resident=EVERYTHING), run(resident=EVERYTHING, attention="cpu")
    a = model.attention
    out = BATCH * 2 * (a.num_heads * a.head_dim + a.kv_elements_per_token)
    back = BATCH * 2 * a.num_heads * a.v_head_dim
    copies = _copy_s(out, "hbm", "host", station) + _copy_s(back, "host", "hbm", station)
    kernel = _item_s(there, "attention") - _item_s(here, "attention")
    expected = here.step_times + LAYERS * copies + kernel.sum(axis=1)
    assert there.step_times == pytest.approx(expected, rel=1e-9)
    assert any(term.startswith("KV cache") for term in there.tiers["host"].terms)
    assert there.memory.kv_cache.tolist() == [0]


def test_a_shared_copy_engine_queues_results_behind_weights(run: Run) -> None:
    """Copies ahead for later layers delay what comes back from the side processor."""
    setting: dict[str, Any] = {
        "predictor": {"name": "frequent", "count": 6},
        "site": {"name": "home", "processor": "cpu"},
    }
    own, shared = run(**setting), run(copy_engine="shared", **setting)
    assert (shared.step_times >= own.step_times - 1e-12).all()
    assert shared.step_times.mean() > own.step_times.mean()
    assert shared.busy == pytest.approx(own.busy)


@pytest.mark.parametrize(
    "offload",
    [
        {"predictor": {"name": "exact", "depth": 2}},
        {"predictor": {"name": "all"}},
        {"site": {"name": "home", "processor": "cpu"}},
        {"site": {"name": "list", "processor": "cpu"}, "resident": [[0, 5]] * LAYERS},
    ],
)
def test_experts_that_wait_in_the_host_do_not_come_from_storage(
    run: Run, offload: dict[str, Any]
) -> None:
    """All of them warm is a home in the host; some of them lies between that and none."""
    host, storage = run(**offload), run(home="nvme", **offload)
    warm, some = (run(home="nvme", warm=[list(range(n))] * LAYERS, **offload) for n in (8, 5))
    assert warm.step_times == pytest.approx(host.step_times, rel=1e-9)
    assert host.step_times.mean() < some.step_times.mean() < storage.step_times.mean()
    assert "storage" not in warm.busy
    in_host = some.tiers["host"].terms["warm experts"] + some.tiers["nvme"].terms["experts"]
    assert in_host == pytest.approx(host.tiers["host"].terms["experts"])


def test_two_processors_on_one_memory_copy_nothing(
    model: ModelSpec, make_trace: TraceOf, contiguous: Callable[[ModelSpec, int], Placement]
) -> None:
    cluster = load_cluster("duplex-4", gpus=1)
    deployment = Deployment.of(contiguous(model, 1))
    workload, trace = Workload(decode_batch=16), make_trace(model)
    plain = simulate(model, trace, cluster, deployment, workload, steps=STEPS)
    both = {"home": "hbm", "site": {"name": "split", "processor": "pim"}}
    ours = simulate_offload(
        model,
        trace,
        cluster,
        deployment.model_copy(update={"offload": validate(both, Offload, "offload")}),
        workload,
        steps=STEPS,
    )
    assert ours.fetched_bytes_per_token == 0
    assert 0 < ours.site_shares["aside"] < 1
    assert set(ours.busy) == {"compute", "side"}
    assert ours.step_times.mean() < plain.step_times.mean()


def test_ranks_of_a_layout_each_have_their_own_slots(
    model: ModelSpec, make_trace: TraceOf, contiguous: Callable[[ModelSpec, int], Placement]
) -> None:
    cluster = load_cluster("ktransformers-4x4090", gpus=2)
    offload = {"resident": [[0, 1, 4]] * LAYERS, "site": {"name": "home", "processor": "cpu"}}
    deployment = Deployment.of(contiguous(model, 2)).model_copy(
        update={"offload": validate(offload, Offload, "offload")}
    )
    trace, workload = make_trace(model), Workload(decode_batch=8)
    ours = simulate_offload(model, trace, cluster, deployment, workload, steps=STEPS)
    held = ours.decisions.residency.held[0, 0]
    assert held.tolist() == [[True, True, False, False], [True, False, False, False]]
    times = evaluate(ours.played.items, ours.played.busy)
    assert times.end == pytest.approx(ours.played.end, abs=1e-12)
    assert sum(ours.critical_path.values()) == pytest.approx(ours.step_time_s["mean"], rel=1e-9)


def test_a_rule_that_reckons_with_times_is_at_most_the_worse_of_both_processors(run: Run) -> None:
    fetch, home = run(), run(site={"name": "home", "processor": "cpu"})
    worst = max(fetch.step_times.mean(), home.step_times.mean())
    for name in ("list", "list_code", "split"):
        assert run(site={"name": name, "processor": "cpu"}).step_times.mean() <= worst


@pytest.mark.parametrize(
    ("offload", "message"),
    [
        ({"site": {"name": "fetsh"}}, "site.name"),
        ({"predicter": {}}, "did you mean 'predictor'"),
        ({"predictor": {"depth": 0}}, "predictor.depth"),
        ({"site": {"name": "split"}}, "site split needs a processor"),
        ({"site": {"name": "planned"}}, "site planned needs a table"),
        ({"cache": {"slots": 2}, "predictor": {"name": "all"}}, "leave out the cache"),
        ({"predictor": {"name": "all", "count": 2}}, "whole layers -- leave out count"),
        ({"resident": [[0, 0]] * 4}, "named twice"),
        ({"resident": [[0]] * 3}, "3 rows, tiny has 4 MoE layers"),
        ({"resident": [[9]] * 4}, "expert 9 -- tiny has experts 0 to 7"),
        ({"site": {"name": "planned", "table": [["fetch"] * 7] * 4}}, "give one choice for each"),
        ({"site": {"name": "planned", "table": [["fast"] * 8] * 4}}, "the expert is not resident"),
        ({"site": {"name": "home", "processor": "npu"}}, "no processor 'npu'"),
        ({"home": "cxl"}, "no memory 'cxl'"),
        ({"warm": [[0]] * 4}, "one link joins 'host' and 'hbm'"),
        ({"home": "nvme", "warm": [[0]] * 2}, "offload.warm has 2 rows"),
        ({"home": "hbm", "cache": {"slots": 2}}, "'hbm' is the fast memory"),
        ({"cache": {"slots": 2, "score": "mrs"}}, "2k = 4 best candidates"),
    ],
)
def test_bad_input_is_one_clear_message(run: Run, offload: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(**offload)


def test_a_tier_graph_without_a_path_is_refused(run: Run, station: Cluster) -> None:
    node = station.node.model_copy(update={"links": {"pcie": station.node.links["pcie"]}})
    with pytest.raises(InputError, match="no path from 'nvme' to 'hbm' -- edges: "):
        run(home="nvme", cluster=station.model_copy(update={"node": node}))


def test_a_tier_that_overflows_is_refused_with_levers(run: Run, station: Cluster) -> None:
    small = station.device.memory.model_copy(
        update={"capacity": station.device.memory.capacity.times(0.007)}
    )
    device = station.device.model_copy(update={"memories": {"hbm": small}})
    cluster = station.model_copy(update={"device": device})
    with pytest.raises(InfeasibleError, match=r"memory hbm .* resident experts .* at most") as no:
        run(resident=EVERYTHING, cluster=cluster)
    assert any("fewer resident experts (of 32, all layers)" in lever for lever in no.value.levers)
    fewer = int(no.value.levers[0].split()[0])
    kept = (32 - fewer) // LAYERS
    run(resident=[list(range(kept))] * LAYERS, cluster=cluster)


@pytest.mark.parametrize("home", ["host", "nvme"])
def test_a_processor_that_copies_by_itself_takes_turns(run: Run, home: str) -> None:
    plan = {"home": home, "cache": {"slots": 3}}
    beside = run(**plan)
    result = run(**plan, copy_engine="none")
    streams = {i.stream for i in result.played.items if i.name in ("read", "fetch")}
    assert streams == {Stream.COMPUTE}
    # the same kernels and copies in the same order, one after the other
    assert result.played.busy == pytest.approx(beside.played.busy)
    assert result.step_times == pytest.approx(result.played.busy.sum(axis=(1, 2)))
    assert (result.step_times > beside.step_times).all()
    assert (result.decisions.residency.held == beside.decisions.residency.held).all()
