"""Cache curves in chunks against the in-memory functions and a brute-force cache."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basis.errors import InputError
from traces.caches import hit_rate_curve
from traces.caches_inputs import active_experts, token_steps
from traces.measures.cache_keys import keyed, largest
from traces.measures.caches import POLICIES, cache_curve, default_sizes
from traces.routing_trace import RoutingTrace, TraceMeta, read_trace, write_trace
from traces.trace_set import chunks_of, open_traces

Make = Callable[..., RoutingTrace]
SIZES = (0, 1, 2, 3, 5, 8, 11, 24, 30)
TRACES = {
    "lengths": st.lists(st.integers(1, 12), min_size=1, max_size=5).map(tuple),
    "layers": st.integers(1, 3),
    "top_k": st.integers(1, 3),
    "prompt": st.integers(0, 3),
    "seed": st.integers(0, 10**6),
}


def fewer_favourites(trace: RoutingTrace, seed: int) -> RoutingTrace:
    """Make some experts favourites, so that hits are neither rare nor certain."""
    rng = np.random.default_rng(seed)
    shape = (*trace.experts.shape[:2], trace.meta.num_experts)
    clocks = rng.exponential(size=shape) * (1 + np.arange(shape[2])) ** 1.5
    chosen = clocks.argsort(axis=2)[..., : trace.meta.top_k].astype(np.uint16)
    columns = trace.columns | {"experts": chosen}
    return RoutingTrace(meta=trace.meta, domains=trace.domains, **columns)


@settings(max_examples=40)
@given(
    given_by=st.fixed_dictionaries(TRACES),
    policy=st.sampled_from(POLICIES),
    scope=st.sampled_from(("layer", "global")),
    phase=st.sampled_from(("decode", "prefill", "any")),
    rows=st.integers(1, 30),
)
def test_any_chunks_give_the_curve_of_the_whole(
    make_trace: Make, given_by: Any, policy: str, scope: Any, phase: Any, rows: int
) -> None:
    trace = fewer_favourites(make_trace(**given_by), given_by["seed"])
    options: dict[str, Any] = {"scope": scope, "sizes": SIZES}
    rows_of = {"decode": trace.decode, "prefill": ~trace.decode}.get(phase, trace.decode >= 0)
    if not rows_of.any():
        with pytest.raises(InputError, match=f"no {phase} rows"):
            cache_curve(trace, policy, phase=phase, rows=rows, **options)
        return
    curve = cache_curve(trace, policy, phase=phase, rows=rows, **options)
    active = active_experts(trace, token_steps(trace, phase))
    assert curve.hit_rate == pytest.approx(hit_rate_curve(active, policy, **options), abs=1e-12)
    assert curve.accesses == active.sum()
    assert curve.first_uses == active.any(axis=0).sum()
    assert curve.tokens == curve.tokens_of_phase == rows_of.sum()
    if scope == "layer":
        assert curve.hit_rate_by_layer is not None
        for layer, rates in enumerate(curve.hit_rate_by_layer):
            alone = hit_rate_curve(active[:, [layer]], policy, **options)
            assert rates == pytest.approx(alone, abs=1e-12)
    else:
        assert curve.hit_rate_by_layer is None


def brute_force(trace: RoutingTrace, policy: str, slots: int, *, pooled: bool) -> int:
    """Count hits with lists and sets only, the future looked up by walking through it."""
    order = np.lexsort((trace.position, -trace.request_id))  # the fixture's ids descend
    rows = [row for row in order.tolist() if trace.decode[row]]
    cells = [
        [(layer, int(e)) for e in trace.experts[row, layer]]
        for row in rows
        for layer in range(trace.num_layers)
    ]
    hits = 0
    groups = [0] if pooled else list(range(trace.num_layers))
    for group in groups:
        mine = [used for used in cells if pooled or used[0][0] == group]
        held: set[tuple[int, int]] = set()
        for now, used in enumerate(mine):
            hits += len(held & set(used))
            held |= set(used)
            while len(held) > slots:
                others = sorted(held - set(used) or held)

                def value(cell: tuple[int, int], now: int = now, mine: Any = mine) -> Any:
                    past = [t for t in range(now + 1) if cell in mine[t]]
                    if policy == "lru":
                        return past[-1]
                    if policy == "lfu":
                        return (len(past), past[-1])
                    later = [t for t in range(now + 1, len(mine)) if cell in mine[t]]
                    return -later[0] if later else -len(mine)

                held.remove(min(others, key=value))
    return hits


@settings(max_examples=20)
@given(
    seed=st.integers(0, 10**6),
    policy=st.sampled_from(POLICIES),
    slots=st.integers(1, 10),
    pooled=st.booleans(),
)
def test_brute_force(make_trace: Make, seed: int, policy: str, slots: int, pooled: bool) -> None:
    trace = fewer_favourites(make_trace(lengths=(9, 6, 8), layers=2, seed=seed), seed)
    scope: Any = "global" if pooled else "layer"
    curve = cache_curve(trace, policy, scope=scope, sizes=[slots], rows=5)
    hits = brute_force(trace, policy, slots, pooled=pooled)
    assert curve.hit_rate[0] * curve.accesses == pytest.approx(hits)


@settings(max_examples=30)
@given(given_by=st.fixed_dictionaries(TRACES), scope=st.sampled_from(("layer", "global")))
def test_belady_is_never_below_a_real_cache(make_trace: Make, given_by: Any, scope: Any) -> None:
    trace = fewer_favourites(make_trace(**given_by), given_by["seed"])
    sizes = range(1, 25)
    rates = {
        policy: cache_curve(trace, policy, scope=scope, sizes=sizes, phase="any").hit_rate
        for policy in POLICIES
    }
    assert (rates["belady"] >= rates["lru"] - 1e-12).all()
    assert (rates["belady"] >= rates["lfu"] - 1e-12).all()
    assert (np.diff(rates["belady"]) >= -1e-12).all()


def test_a_data_set_of_files_is_one_sequence(make_trace: Make, tmp_path: Path) -> None:
    trace = fewer_favourites(make_trace(lengths=(9, 6, 8, 7)), 3)
    ordered = next(iter(chunks_of(trace, 10**6)))
    for name, rows in (("a", ordered.request_id < 2), ("b", ordered.request_id >= 2)):
        write_trace(ordered.select(rows), tmp_path / f"{name}.parquet")
    for policy in POLICIES:
        for scope in ("layer", "global"):
            options: dict[str, Any] = {"scope": scope, "sizes": SIZES}
            files = cache_curve(open_traces(tmp_path), policy, rows=7, **options)
            memory = cache_curve(trace, policy, **options)
            assert files.hit_rate.tolist() == memory.hit_rate.tolist()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_sample_plays_whole_requests(make_trace: Make, policy: str) -> None:
    trace = fewer_favourites(make_trace(lengths=(9,) * 10), 1)
    curve = cache_curve(trace, policy, tokens=40)
    assert curve.tokens == 4 * 7
    assert curve.tokens_of_phase == 10 * 7
    assert curve.to_dict()["tokens_share"] == 0.4


def test_keys_fit_and_ascend_with_use() -> None:
    experts = np.array([[[0, 1]], [[1, 2]], [[1, 0]], [[3, 1]]])
    for policy, last in (("lru", [3, 3]), ("lfu", [5 * 1 + 3, 5 * 4 + 3]), ("belady", [0, 0])):
        with keyed(policy, lambda: iter([experts[:3], experts[3:]]), 4, 4) as chunks:
            cells, keys = map(np.concatenate, zip(*chunks, strict=True))
        assert np.array_equal(cells, experts)
        assert keys[-1, 0].tolist() == last
        assert keys.min() >= 0
        assert keys.max() <= largest(policy, 4)
    with keyed("belady", lambda: iter([experts[:3], experts[3:]]), 4, 4) as chunks:
        keys = np.concatenate([key for _, key in chunks])
    # steps of the next use: 0 at 2, 1 at 1 | 1 at 2, 2 never | 1 at 3, 0 never
    assert keys[:, 0].tolist() == [[2, 3], [2, 0], [1, 0], [0, 0]]


def test_default_sizes() -> None:
    meta = TraceMeta(model="m", num_experts=32, top_k=4, moe_layer_ids=(0, 1))
    assert default_sizes(meta) == (4, 6, 8, 12, 16, 24)
    assert default_sizes(meta, "global") == (8, 12, 16, 24, 32, 48)
    tiny = TraceMeta(model="m", num_experts=3, top_k=3, moe_layer_ids=(0,))
    assert default_sizes(tiny) == (3,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": "mru"}, "unknown cache policy 'mru' -- one of lru, lfu, belady"),
        ({"scope": "node"}, "unknown cache scope 'node' -- one of layer, global"),
        ({"phase": "idle"}, "unknown phase 'idle' -- one of decode, prefill, any"),
        ({"sizes": [3, -1]}, r"cache sizes \[3, -1\] -- must be at least one count, from 0"),
        ({"sizes": []}, r"cache sizes \[\]"),
        ({"tokens": 0}, "sample of 0 tokens"),
    ],
)
def test_bad_input(make_trace: Make, changes: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"policy": "lru"} | changes
    with pytest.raises(InputError, match=message):
        cache_curve(make_trace(), options.pop("policy"), **options)


def test_gpt_oss_curves(moeplan_data: Path) -> None:
    path = moeplan_data / "traces" / "gpt-oss-20b-mmlu.parquet"
    traces = open_traces(path)
    rates = {}
    for policy in POLICIES:
        curve = cache_curve(traces, policy, sizes=(4, 8, 16, 32), tokens=3000)
        rates[policy] = curve.hit_rate
        assert 2000 < curve.tokens <= 3000
        assert curve.hit_rate[-1] == pytest.approx(1 - curve.first_uses / curve.accesses)
    assert (rates["belady"] >= rates["lru"]).all()
    assert (rates["belady"] >= rates["lfu"]).all()
    assert (rates["lru"][:-1] > np.array([4, 8, 16]) / 32).all()  # better than fixed experts
    first = read_trace(path)
    first = first.select(first.request_id == first.request_id[0])
    active = active_experts(first, token_steps(first))
    for policy in POLICIES:
        curve = cache_curve(first, policy, sizes=(4, 8, 16))
        assert curve.hit_rate == pytest.approx(hit_rate_curve(active, policy, (4, 8, 16)))
