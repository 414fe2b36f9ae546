"""The cache that sees m tokens ahead against a plain loop, and its limits LRU and Belady."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basis.errors import InputError
from traces.caches import hit_rate_curve
from traces.measures.base import About, measure
from traces.measures.sample import Sample
from traces.measures.segment_cache import RATIOS, SegmentCache, segment_cache
from traces.routing_trace import RoutingTrace
from traces.trace_set import open_traces

Make = Callable[..., RoutingTrace]
LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=4).map(tuple)


def slow_hits(sequence: list[list[int]], slots: int, rule: int | str) -> int:
    """Play one layer of one request."""
    held: set[int] = set()
    hits = 0
    for now, used in enumerate(sequence):
        hits += len(held & set(used))
        held |= set(used)
        past = [(t, e) for t in range(now + 1) for e in sequence[t]]
        last = {e: t for t, e in past}
        soon: Counter[int] = Counter()
        if isinstance(rule, int):
            soon.update(e for t in range(now + 1, now + rule) if t < len(sequence)
                        for e in sequence[t])  # fmt: skip
        elif rule == "lfu":
            soon.update(e for _, e in past)
        while len(held) > slots:
            others = held - set(used) or held
            held.remove(min(others, key=lambda e: (soon[e], last[e], e)))
    return hits


@settings(max_examples=25)
@given(lengths=LENGTHS, seed=st.integers(0, 999), ahead=st.integers(1, 15))
def test_plain_loops(make_trace: Make, lengths: tuple[int, ...], seed: int, ahead: int) -> None:
    trace = make_trace(lengths=lengths, layers=2, experts=6, seed=seed)
    found = segment_cache(trace, (ahead, 4))
    accesses = trace.num_tokens * 2
    for slots in range(7):
        for rule, rates in ((ahead, found.hit_rate[0]), ("lru", found.lru), ("lfu", found.lfu)):
            for layer in range(2):
                hits = 0
                for request in set(trace.request_id.tolist()):
                    rows = np.flatnonzero(trace.request_id == request)
                    rows = rows[np.argsort(trace.position[rows])]
                    hits += slow_hits(trace.experts[rows, layer].tolist(), slots, rule)
                assert rates[layer, slots] * accesses == pytest.approx(hits)


@settings(max_examples=20)
@given(length=st.integers(1, 40), seed=st.integers(0, 999))
def test_between_lru_and_belady(make_trace: Make, length: int, seed: int) -> None:
    trace = make_trace(lengths=(length,), layers=2, experts=6, seed=seed)
    found = segment_cache(trace, (1, 4, 100))
    assert np.array_equal(found.hit_rate[0], found.lru)  # nothing ahead but the token itself
    order = np.argsort(trace.position)
    active = np.zeros((length, 2, 6), bool)
    np.put_along_axis(active, trace.experts[order].astype(int), True, axis=2)
    best = hit_rate_curve(active, "belady", range(7))
    assert (found.hit_rate.mean(axis=1) <= best + 1e-12).all()
    assert (np.diff(found.hit_rate, axis=2) >= 0).all()


def test_requests_do_not_share_a_cache(make_trace: Make) -> None:
    trace = make_trace(lengths=(1, 1, 1, 1))
    assert segment_cache(trace).hit_rate.max() == 0


def test_many_requests_in_several_blocks(make_trace: Make) -> None:
    # more (request, layer, expert) than are played at a time
    trace = make_trace(lengths=(3, 5, 2) * 20, layers=4, experts=300, top_k=2)
    found = segment_cache(trace, (4,))
    parts = [
        segment_cache(trace.select(trace.request_id == request), (4,))
        for request in np.unique(trace.request_id)
    ]
    tokens = sum(part.tokens for part in parts)
    for name in ("hit_rate", "lru", "lfu"):
        mean = sum(getattr(part, name) * part.tokens for part in parts) / tokens
        assert getattr(found, name) == pytest.approx(mean)


def test_correlation_over_layers() -> None:
    rates = np.random.default_rng(0).random((2, 5, 9))
    found = SegmentCache(
        lengths=(4, 16), top_k=2, moe_layer_ids=tuple(range(5)), tokens=1,
        hit_rate=rates, lru=rates[1] * 2 + 1, lfu=np.ones((5, 9)),
    )  # fmt: skip
    expected = np.corrcoef(rates[0, :, 4], rates[1, :, 4])[0, 1]
    assert found.correlation(found.lru) == pytest.approx([expected, 1])
    assert np.isnan(found.correlation(found.lfu)).all()
    assert found.to_dict()["correlation_over_layers"]["lfu"] == [None, None]
    assert [found.slots(ratio) for ratio in RATIOS] == [2, 3, 4, 6, 8]
    assert found.slots(10) == 8


def test_bad_input(make_trace: Make) -> None:
    trace = make_trace()
    for lengths in ((), (0, 4)):
        with pytest.raises(InputError, match=r"segment lengths .* at least one, from 1 token"):
            segment_cache(trace, lengths)
    with pytest.raises(InputError, match="no tokens"):
        segment_cache(trace.select(np.zeros(0, int)))


def test_gpt_oss_sees_more_with_a_longer_look_ahead(moeplan_data: Path) -> None:
    traces = open_traces(moeplan_data / "traces" / "gpt-oss-20b-mmlu.parquet")
    sample = Sample(About.of(traces), 3000)
    measure(traces, [sample])
    found = segment_cache(sample.result().trace, (4, 16))
    slots = found.slots(2)
    assert (found.hit_rate[0, :, slots] > found.lru[:, slots]).all()
    assert found.to_dict()["slots"] == [4, 6, 8, 12, 16]
