"""Loads against plain loops, closed forms and published figures."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traces.measures.base import About, measure
from traces.measures.load import Load, LoadResult, Loads
from traces.routing_trace import RoutingTrace
from traces.trace_set import open_traces

Make = Callable[..., RoutingTrace]


def loads_of(trace: RoutingTrace, **options: int) -> LoadResult:
    load = Load(About.of(trace), **options)
    measure(trace, [load], rows=7)
    return load.result()


def counted(trace: RoutingTrace, keep: Callable[[int], bool]) -> list[list[int]]:
    counts = [[0] * trace.meta.num_experts for _ in range(trace.num_layers)]
    for t in range(trace.num_tokens):
        if keep(t):
            for layer in range(trace.num_layers):
                for expert in trace.experts[t, layer].tolist():
                    counts[layer][expert] += 1
    return counts


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
    top_k=st.integers(1, 4), seed=st.integers(0, 99),
)  # fmt: skip
def test_counts_equal_plain_loops(
    make_trace: Make, lengths: tuple[int, ...], top_k: int, seed: int
) -> None:
    trace = make_trace(lengths=lengths, top_k=top_k, seed=seed)
    found = loads_of(trace)
    assert found.tokens == trace.num_tokens
    assert found.loads.counts.tolist() == counted(trace, lambda t: True)
    for name, wanted in (("decode", True), ("prefill", False)):
        rows = [t for t in range(trace.num_tokens) if trace.decode[t] == wanted]
        assert (name in found.by_phase) == bool(rows)
        if rows:
            assert found.by_phase[name].tokens == len(rows)
            assert found.by_phase[name].loads.counts.tolist() == counted(trace, rows.__contains__)
    for at, name in enumerate(trace.domains):
        rows = [t for t in range(trace.num_tokens) if trace.domain[t] == at]
        assert (name in found.by_domain) == bool(rows)
        if rows:
            assert found.by_domain[name].loads.counts.tolist() == counted(trace, rows.__contains__)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=9).filter(any))
def test_figures_of_a_layer(loads: list[int]) -> None:
    found = Loads(counts=np.array([loads]), moe_layer_ids=(3,))
    experts, total = len(loads), sum(loads)
    differences = sum(abs(a - b) for a in loads for b in loads)
    entropy = -sum(x / total * np.log2(x / total) for x in loads if x)
    assert found.max_over_mean == pytest.approx(max(loads) / total * experts)
    assert found.gini == pytest.approx(differences / (2 * experts * total), abs=1e-12)
    assert found.entropy_bits == pytest.approx(entropy)
    assert found.entropy_share == pytest.approx(entropy / np.log2(experts) if experts > 1 else 1)
    assert found.unused.tolist() == [loads.count(0)]


def test_extremes() -> None:
    found = Loads(counts=np.array([[5, 5, 5, 5], [20, 0, 0, 0]]), moe_layer_ids=(0, 4))
    assert found.max_over_mean.tolist() == [1, 4]
    assert found.entropy_bits.tolist() == [2, 0]
    assert found.entropy_share.tolist() == [1, 0]
    assert found.gini.tolist() == [0, 0.75]
    assert found.unused.tolist() == [0, 3]
    figures = found.to_dict()
    assert figures["gini"]["mean"] == 0.375
    assert (figures["max_over_mean"]["highest"], figures["max_over_mean"]["highest_at"]) == (4, 4)


def test_a_layer_without_tokens_is_not_known() -> None:
    figures = Loads(counts=np.zeros((1, 4), np.int64), moe_layer_ids=(0,)).to_dict()
    assert figures["max_over_mean"]["mean"] is None
    assert figures["entropy_bits"]["mean"] is None
    assert figures["gini"]["mean"] is None


def test_too_many_domains_are_not_told_apart(make_trace: Make) -> None:
    trace = make_trace()
    size = 2 * 3 * 3 * 8 * 8  # phases, domains, layers, experts, bytes
    found = loads_of(trace, max_bytes=size - 1)
    assert found.by_domain == {}
    assert found.to_dict()["domains_left_out"].startswith("3 domains take 0 MiB")
    assert found.loads.counts.tolist() == counted(trace, lambda t: True)
    assert found.by_phase.keys() == {"prefill", "decode"}
    assert loads_of(trace, max_bytes=size).by_domain.keys() == {"prose", "code"}


def test_figures_of_a_part_have_no_lists(make_trace: Make) -> None:
    figures = loads_of(make_trace()).to_dict()
    assert "each" in figures["gini"]
    assert figures["by_domain"]["prose"]["tokens"] == 16
    assert "each" not in figures["by_domain"]["prose"]["gini"]


def test_one_expert(make_trace: Make) -> None:
    trace = make_trace(experts=1, top_k=1)
    only = replace(trace, experts=np.zeros_like(trace.experts))
    assert loads_of(only).loads.entropy_share.tolist() == [1.0] * 3


def test_published_figures_of_gpt_oss(moeplan_data: Path) -> None:
    traces = open_traces(moeplan_data / "traces" / "gpt-oss-20b-mmlu.parquet")
    load = Load(About.of(traces))
    measure(traces, [load])
    figures = load.result().to_dict()
    assert f"{figures['max_over_mean']['mean']:.2f}" == "2.81"
    assert f"{figures['max_over_mean']['highest']:.2f}" == "4.09"
    assert figures["tokens"] == 125_771
    assert sum(part["tokens"] for part in figures["by_domain"].values()) == 125_771
