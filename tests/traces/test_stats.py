"""Statistics against hand-made traces, brute force, and published figures of a real trace."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import traces.stats
from basis.errors import InputError
from traces.routing_trace import RoutingTrace, read_trace, request_order
from traces.stats import load_skew, predictability, reuse, trace_statistics
from traces.synth import synthetic_trace

Make = Callable[..., RoutingTrace]


def with_experts(trace: RoutingTrace, experts: np.ndarray) -> RoutingTrace:
    return replace(trace, experts=experts.astype(np.uint16), weights=None)


def brute_reuse(trace: RoutingTrace) -> np.ndarray:
    where = {
        (int(r), int(p)): i
        for i, (r, p) in enumerate(zip(trace.request_id, trace.position, strict=True))
    }
    shares = [
        [
            len(set(trace.experts[i, layer].tolist()) & set(trace.experts[j, layer].tolist()))
            for layer in range(trace.num_layers)
        ]
        for (r, p), i in where.items()
        if (j := where.get((r, p + 1))) is not None
    ]
    return np.mean(shares, axis=0) / trace.meta.top_k


def brute_predictability(trace: RoutingTrace) -> tuple[list[float], list[float]]:
    even = request_order(trace) % 2 == 0
    learnt, guess = [], []
    for layer in range(trace.num_layers - 1):
        together = np.zeros((trace.meta.num_experts, trace.meta.num_experts), int)
        used = np.zeros(trace.meta.num_experts, int)
        for token in trace.experts[even]:
            for f in token[layer + 1]:
                used[f] += 1
                for e in token[layer]:
                    together[e, f] += 1
        hits = [
            together[e].argmax() in token[layer + 1]
            for token in trace.experts[~even]
            for e in token[layer]
        ]
        learnt.append(float(np.mean(hits)))
        guess.append(float(np.mean([used.argmax() in t[layer + 1] for t in trace.experts[~even]])))
    return learnt, guess


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=2, max_size=5).map(tuple),
    layers=st.integers(1, 3), top_k=st.integers(1, 4), chunk=st.integers(1, 50),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_reuse_and_predictability_equal_brute_force(
    make_trace: Make, lengths: tuple[int, ...], layers: int, top_k: int, chunk: int, seed: int
) -> None:
    trace = make_trace(lengths=lengths, layers=layers, top_k=top_k, experts=5, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traces.stats, "_CHUNK_CELLS", chunk)
        observed, _ = reuse(trace)
        learnt, guess = predictability(trace)
    if max(lengths) == 1:
        assert np.isnan(observed).all()
    else:
        assert observed == pytest.approx(brute_reuse(trace))
    expected_learnt, expected_guess = brute_predictability(trace)
    assert learnt.tolist() == pytest.approx(expected_learnt)
    assert guess.tolist() == pytest.approx(expected_guess)


def test_extremes(make_trace: Make) -> None:
    trace = make_trace(lengths=(8, 8), experts=4, top_k=1)
    constant = with_experts(trace, np.zeros((16, 3, 1)))
    assert load_skew(np.array([[16, 0, 0, 0]])).tolist() == [4.0]
    assert [r.tolist() for r in reuse(constant)] == [[1.0] * 3] * 2
    # layer 1 and 2 copy layer 0, which turns through all experts: each layer tells the next
    turning = (trace.position % 4)[:, None, None]
    walk = with_experts(trace, np.broadcast_to(turning, (16, 3, 1)))
    observed, independent = reuse(walk)
    assert observed.tolist() == [0.0] * 3
    assert independent.tolist() == [0.25] * 3
    learnt, guess = predictability(walk)
    assert (learnt.tolist(), guess.tolist()) == ([1.0, 1.0], [0.25, 0.25])


def test_independent_tokens_show_the_independent_reuse() -> None:
    shares = np.tile(np.array([0.3, 0.2, 0.15, 0.15, 0.1, 0.1]), (2, 1))
    trace = synthetic_trace(shares, tokens=40_000, requests=8, top_k=2, seed=0)
    observed, independent = reuse(trace)
    assert observed == pytest.approx(independent, rel=0.01)
    learnt, guess = predictability(trace)
    assert learnt == pytest.approx(guess, abs=0.01)


def test_uniform_loads_are_within_the_standard_error() -> None:
    trace = synthetic_trace(np.full((4, 16), 1 / 16), tokens=5000, requests=5, top_k=4, seed=1)
    figures = trace_statistics(trace)
    assert figures.load_standard_error == pytest.approx(np.sqrt(0.75 / (5000 * 0.25)))
    excess = figures.load_max_over_mean - 1
    assert (excess > 0).all()
    assert (excess < 5 * figures.load_standard_error).all()


def test_layers_that_are_not_adjacent_predict_nothing(make_trace: Make) -> None:
    trace = make_trace()
    gap = replace(trace, meta=replace(trace.meta, moe_layer_ids=(0, 1, 8)))
    assert len(predictability(gap)[0]) == 1
    far = replace(trace, meta=replace(trace.meta, moe_layer_ids=(0, 4, 8)))
    assert trace_statistics(far).to_dict()["predictability_mean"] is None


def test_one_request(make_trace: Make) -> None:
    one = make_trace(lengths=(9,))
    with pytest.raises(InputError, match="one request"):
        predictability(one)
    assert len(trace_statistics(one).predictability) == 0


def test_no_tokens(make_trace: Make) -> None:
    empty = make_trace().select(np.array([], np.int64))
    with pytest.raises(InputError, match="no tokens"):
        trace_statistics(empty)


def test_to_dict_is_plain_json(make_trace: Make) -> None:
    trace = make_trace(lengths=(1, 1, 1))  # no two consecutive tokens: reuse unknown
    figures = trace_statistics(trace).to_dict()
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert figures["reuse"] == [None] * 3
    assert figures["reuse_mean"] is None
    assert figures["tokens_per_domain"] == {"prose": 2, "code": 1, "unused": 0}
    assert figures["load_max_over_mean_worst"] == max(figures["load_max_over_mean"])


def test_published_figures_of_gpt_oss(moeplan_data: Path) -> None:
    trace = read_trace(moeplan_data / "traces" / "gpt-oss-20b-mmlu.parquet", weights=False)
    figures = trace_statistics(trace).to_dict()
    assert f"{figures['load_max_over_mean_mean']:.2f}" == "2.81"
    assert f"{figures['load_max_over_mean_worst']:.2f}" == "4.09"
    assert f"{figures['reuse_mean']:.3f}" == "0.432"
    assert f"{figures['reuse_independent_mean']:.3f}" == "0.199"
    assert f"{figures['predictability_mean']:.3f}" == "0.631"
    assert f"{figures['predictability_unconditional_mean']:.3f}" == "0.359"
