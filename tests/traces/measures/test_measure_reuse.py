"""Reuse between tokens against plain loops, closed forms and published figures."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traces.measures.base import About, measure
from traces.measures.reuse import Reuse, ReuseResult
from traces.routing_trace import RoutingTrace
from traces.synth import synthetic_trace
from traces.trace_set import open_traces

Make = Callable[..., RoutingTrace]


def reuse_of(trace: RoutingTrace, lags: tuple[int, ...], rows: int = 7) -> ReuseResult:
    reuse = Reuse(About.of(trace), lags)
    measure(trace, [reuse], rows=rows)
    return reuse.result()


def brute(trace: RoutingTrace, lag: int) -> tuple[int, list[float]]:
    where = {
        (int(r), int(p)): i
        for i, (r, p) in enumerate(zip(trace.request_id, trace.position, strict=True))
    }
    pairs = [(i, where[r, p + lag]) for (r, p), i in where.items() if (r, p + lag) in where]
    shares = [
        [
            len(set(trace.experts[i, layer].tolist()) & set(trace.experts[j, layer].tolist()))
            / trace.meta.top_k
            for i, j in pairs
        ]
        for layer in range(trace.num_layers)
    ]
    return len(pairs), [float(np.mean(share)) if share else np.nan for share in shares]


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5).map(tuple),
    top_k=st.integers(1, 4), rows=st.integers(1, 40), gaps=st.floats(0, 0.7),
    lags=st.lists(st.integers(1, 9), min_size=1, max_size=3, unique=True).map(tuple),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_equals_brute_force(
    make_trace: Make,
    lengths: tuple[int, ...],
    top_k: int,
    rows: int,
    gaps: float,
    lags: tuple[int, ...],
    seed: int,
) -> None:
    trace = make_trace(lengths=lengths, top_k=top_k, experts=6, seed=seed)
    kept = np.random.default_rng(seed).random(trace.num_tokens) >= gaps
    trace = trace.select(kept) if kept.any() else trace
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("traces.measures.reuse._BLOCK", rows)
        found = reuse_of(trace, lags, rows)
    for at, lag in enumerate(lags):
        pairs, shares = brute(trace, lag)
        assert found.pairs[at] == pairs
        assert found.observed[at].tolist() == pytest.approx(shares, nan_ok=True)


def test_a_cycle_of_four_experts(make_trace: Make) -> None:
    trace = make_trace(lengths=(8, 8), experts=4, top_k=1)
    turning = np.broadcast_to((trace.position % 4)[:, None, None], (16, 3, 1))
    found = reuse_of(replace(trace, experts=turning.astype(np.uint16)), (1, 2, 4, 16))
    assert found.observed.tolist()[:3] == [[0] * 3, [0] * 3, [1] * 3]
    assert np.isnan(found.observed[3]).all()
    assert found.independent.tolist() == [0.25] * 3
    figures = found.to_dict()["lags"]
    assert [(row["lag"], row["pairs"]) for row in figures] == [(1, 14), (2, 12), (4, 8), (16, 0)]
    assert figures[3]["reuse"]["mean"] is None


def test_independent_tokens_show_the_independent_reuse() -> None:
    shares = np.tile(np.array([0.3, 0.2, 0.15, 0.15, 0.1, 0.1]), (2, 1))
    trace = synthetic_trace(shares, tokens=40_000, requests=8, top_k=2, seed=0)
    found = reuse_of(trace, (1, 4), rows=10_000)
    for observed in found.observed:
        assert observed == pytest.approx(found.independent, rel=0.01)


def test_more_choices_than_a_byte_counts(make_trace: Make) -> None:
    trace = make_trace(lengths=(3,), layers=1, experts=300, top_k=300)
    assert reuse_of(trace, (1,)).observed.tolist() == [[1.0]]


def test_published_figures_of_gpt_oss(moeplan_data: Path) -> None:
    traces = open_traces(moeplan_data / "traces" / "gpt-oss-20b-mmlu.parquet")
    reuse = Reuse(About.of(traces))
    measure(traces, [reuse])
    figures = reuse.result().to_dict()
    assert f"{figures['lags'][0]['reuse']['mean']:.3f}" == "0.432"
    assert f"{figures['independent']['mean']:.3f}" == "0.199"
