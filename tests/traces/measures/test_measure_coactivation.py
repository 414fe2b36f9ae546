"""Pairs against plain loops, the expectation against its definition, clusters that were planted."""

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traces.measures.base import About, measure
from traces.measures.coactivation import CoActivation, CoActivations, clusters, expected_pairs
from traces.routing_trace import RoutingTrace, TraceMeta
from traces.synth import synthetic_trace, zipf_shares
from traces.trace_set import chunks_of, open_traces

Make = Callable[..., RoutingTrace]


def co_activation(trace: RoutingTrace, rows: int = 10**6) -> CoActivation:
    counted = CoActivations(About.of(trace))
    measure(trace, [counted], rows=rows)
    return counted.result()


@settings(max_examples=15)
@given(top_k=st.integers(1, 4), rows=st.integers(1, 30), cut=st.integers(0, 3))
def test_plain_loops_any_chunks_any_parts(
    make_trace: Make, top_k: int, rows: int, cut: int
) -> None:
    trace = make_trace(top_k=top_k)
    first, second = CoActivations(About.of(trace)), CoActivations(About.of(trace))
    for chunk in chunks_of(trace, rows):
        for part, of_part in ((first, chunk.request_id < cut), (second, chunk.request_id >= cut)):
            if of_part.any():
                part.add(chunk.select(of_part))
    second.merge(first)
    found = second.result()
    pairs = np.zeros((3, 8, 8), int)
    for token in trace.experts.tolist():
        for layer, chosen in enumerate(token):
            for a, b in combinations(chosen, 2):
                pairs[layer, a, b] += 1
                pairs[layer, b, a] += 1
    assert np.array_equal(found.pairs, pairs)
    assert found.tokens == trace.num_tokens
    assert found.to_dict() == co_activation(trace).to_dict()


@settings(max_examples=30)
@given(experts=st.integers(3, 9), tokens=st.integers(5, 60), seed=st.integers(0, 999))
def test_the_expectation_keeps_loads_and_distinctness(experts: int, tokens: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pairs = np.zeros((experts, experts), int)
    for _ in range(tokens):
        a, b, c = rng.permutation(experts)[:3]
        for one, other in combinations((a, b, c), 2):
            pairs[one, other] += 1
            pairs[other, one] += 1
    expected = expected_pairs(pairs)
    assert (np.diag(expected) == 0).all()
    assert np.array_equal(expected, expected.T)
    assert expected.sum(axis=1) == pytest.approx(pairs.sum(axis=1), rel=1e-4, abs=1e-4)
    # no interaction: cross ratios of four different experts are 1
    if experts >= 4 and (expected[:4, :4] + np.eye(4) > 0).all():
        ratio = expected[0, 1] * expected[2, 3] / (expected[0, 3] * expected[2, 1])
        assert ratio == pytest.approx(1)


def test_equal_loads_have_equal_expectations() -> None:
    pairs = np.array([[0, 9, 1, 2], [9, 0, 2, 1], [1, 2, 0, 9], [2, 1, 9, 0]])
    assert expected_pairs(pairs) == pytest.approx(4 * (1 - np.eye(4)))
    assert expected_pairs(np.zeros((3, 3), int)).tolist() == np.zeros((3, 3)).tolist()


def test_independent_tokens_depart_by_chance_only() -> None:
    shares = zipf_shares(16, 0.5, layers=3, seed=0)
    trace = synthetic_trace(shares, tokens=20_000, requests=20, top_k=3, seed=0)
    found = co_activation(trace)
    # order sampling is not exactly quasi-independent, hence the factor
    assert (found.departure < 2 * found.departure_by_chance).all()
    assert found.lift[~np.isnan(found.lift)] == pytest.approx(1, abs=0.2)
    for each in found.clusters:
        assert each.modularity < 0.02


def test_the_chance_departure_is_that_of_drawn_counts() -> None:
    rng = np.random.default_rng(0)
    weight = rng.random(12) + 0.2
    mean = np.triu(np.outer(weight, weight) * 30, 1)
    drawn = []
    for _ in range(200):
        upper = rng.poisson(mean)
        drawn.append(np.abs(upper - mean).sum() / mean.sum() / 2)
    known = CoActivation(
        tokens=0, moe_layer_ids=(0,), strongest=((),), clusters=(),
        pairs=np.round(mean + mean.T).astype(int)[None], expected=(mean + mean.T)[None],
    )  # fmt: skip
    assert known.departure_by_chance[0] == pytest.approx(np.mean(drawn), rel=0.02)


def planted(strength: float) -> RoutingTrace:
    """Two experts of each token, of the same block of 4 (of 16) with the given chance."""
    rng = np.random.default_rng(1)
    tokens = 5000
    first = rng.integers(16, size=tokens)
    near = first // 4 * 4 + (first + rng.integers(1, 4, size=tokens)) % 4
    far = (first + rng.integers(1, 16, size=tokens)) % 16
    second = np.where(rng.random(tokens) < strength, near, far)
    names = np.random.default_rng(2).permutation(16)
    return RoutingTrace(
        meta=TraceMeta(model="planted", num_experts=16, top_k=2, moe_layer_ids=(5,)),
        request_id=np.zeros(tokens, np.int32),
        position=np.arange(tokens, dtype=np.int32),
        decode=np.ones(tokens, bool),
        step=np.arange(tokens, dtype=np.int32),
        domain=np.zeros(tokens, np.int16),
        domains=("all",),
        experts=names[np.stack([first, second], axis=1)][:, None].astype(np.uint16),
    )


def test_planted_clusters_are_found() -> None:
    names = np.random.default_rng(2).permutation(16)
    blocks = sorted(tuple(sorted(names[i : i + 4].tolist())) for i in range(0, 16, 4))
    found = co_activation(planted(0.6))
    assert sorted(found.clusters[0].members) == blocks
    # 0.6 + 0.4 * 3 / 15 of the pairs are inside, 3 / 15 expected
    assert found.clusters[0].modularity == pytest.approx(0.6 + 0.4 / 5 - 1 / 5, abs=0.03)
    assert found.clusters[0].modularity_by_chance < 0.1
    pair = found.strongest[0][0]
    assert any(set(pair.experts) <= set(block) for block in blocks)
    assert pair.lift > 2
    assert pair.deviation > 10
    assert pair.tokens == found.pairs[0][pair.experts]
    written = found.to_dict()
    assert written["strongest"]["5"][0]["experts"] == list(pair.experts)
    assert written["modularity"]["highest_at"] == 5
    none = co_activation(planted(0.0)).clusters[0]
    assert none.modularity == pytest.approx(none.modularity_by_chance, abs=0.03)


def test_clusters_by_chance_are_those_of_the_expectation() -> None:
    pairs = 40 * (1 - np.eye(6, dtype=int))
    found = clusters(pairs, expected_pairs(pairs))
    assert found.modularity == pytest.approx(0, abs=1e-9)
    assert 0 < found.modularity_by_chance < 0.2


def test_a_single_expert_has_no_pairs(make_trace: Make) -> None:
    found = co_activation(make_trace(top_k=1))
    assert found.clusters == ()
    assert np.isnan(found.lift).all()
    assert found.departure.tolist() == [0, 0, 0]
    assert found.to_dict()["modularity"] is None


def test_too_many_experts_are_left_out_and_said(make_trace: Make) -> None:
    trace = make_trace(layers=2, experts=9000)
    counted = CoActivations(About.of(trace))
    measure(trace, [counted])
    counted.merge(CoActivations(About.of(trace)))
    found = counted.result()
    assert found.skipped == "pairs of 9000 experts in 2 layers take 1.2 GiB, at most 1 GiB"
    assert (found.pairs.size, found.departure.size, found.departure_by_chance.size) == (0, 0, 0)
    assert (found.moe_layer_ids, found.clusters) == ((), ())
    assert found.to_dict()["departure"]["mean"] is None


def test_gpt_oss_has_co_activation(moeplan_data: Path) -> None:
    traces = open_traces(moeplan_data / "traces" / "gpt-oss-20b-mmlu.parquet")
    counted = CoActivations(About.of(traces))
    measure(traces, [counted])
    found = counted.result()
    assert (found.pairs.sum(axis=(1, 2)) == traces.num_tokens * 4 * 3).all()
    assert (found.departure > 3 * found.departure_by_chance).all()
    for each in found.clusters:
        assert each.modularity > each.modularity_by_chance
