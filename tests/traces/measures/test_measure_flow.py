"""Flow from layer to layer against plain loops, closed forms and published figures."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traces.measures.base import About, measure
from traces.measures.flow import Flow, FlowResult
from traces.routing_trace import RoutingTrace, request_order
from traces.synth import synthetic_trace
from traces.trace_set import open_traces

Make = Callable[..., RoutingTrace]


def flow_of(trace: RoutingTrace, **options: int) -> FlowResult:
    flow = Flow(About.of(trace), **options)
    measure(trace, [flow], rows=50)
    return flow.result()


def brute(trace: RoutingTrace) -> tuple[list[float], list[float], list[float]]:
    """Predictability, unconditional, mutual information by loops over tokens."""
    even = request_order(trace) % 2 == 0
    size = trace.meta.num_experts
    learnt, guess, information = [], [], []
    for layer in range(trace.num_layers - 1):
        together, both = np.zeros((size, size), int), np.zeros((size, size), int)
        used = np.zeros(size, int)
        for token, learn in zip(trace.experts, even, strict=True):
            for f in token[layer + 1]:
                used[f] += learn
                for e in token[layer]:
                    together[e, f] += learn
                    both[e, f] += 1
        hits = [
            together[e].argmax() in token[layer + 1]
            for token in trace.experts[~even]
            for e in token[layer]
        ]
        learnt.append(float(np.mean(hits)))
        guess.append(float(np.mean([used.argmax() in t[layer + 1] for t in trace.experts[~even]])))
        joint = both / both.sum()
        information.append(
            sum(
                joint[e, f] * np.log2(joint[e, f] / joint[e].sum() / joint[:, f].sum())
                for e in range(size)
                for f in range(size)
                if joint[e, f]
            )
        )
    return learnt, guess, information


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=2, max_size=5).map(tuple),
    layers=st.integers(1, 3), top_k=st.integers(1, 4), keys=st.integers(1, 99),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_equals_brute_force(
    make_trace: Make, lengths: tuple[int, ...], layers: int, top_k: int, keys: int, seed: int
) -> None:
    trace = make_trace(lengths=lengths, layers=layers, top_k=top_k, experts=5, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("traces.measures.flow._KEYS", keys)
        found = flow_of(trace)
    learnt, guess, information = brute(trace)
    assert found.predictability.tolist() == pytest.approx(learnt)
    assert found.unconditional.tolist() == pytest.approx(guess)
    assert found.mutual_information.tolist() == pytest.approx(information, abs=1e-12)


def test_more_experts_than_fit_16_bit_keys(make_trace: Make) -> None:
    trace = make_trace(experts=300, top_k=5, layers=2)
    found = flow_of(trace)
    learnt, guess, information = brute(trace)
    assert found.predictability.tolist() == pytest.approx(learnt)
    assert found.unconditional.tolist() == pytest.approx(guess)
    assert found.mutual_information.tolist() == pytest.approx(information)


def test_a_layer_that_tells_the_next(make_trace: Make) -> None:
    trace = make_trace(lengths=(8, 8), experts=4, top_k=1)
    turning = np.broadcast_to((trace.position % 4)[:, None, None], (16, 3, 1))
    found = flow_of(replace(trace, experts=turning.astype(np.uint16)))
    assert found.predictability.tolist() == [1, 1]
    assert found.unconditional.tolist() == [0.25, 0.25]
    assert found.mutual_information.tolist() == found.next_entropy.tolist() == [2, 2]


@pytest.mark.parametrize("skewed", [False, True])
def test_independent_layers_show_the_floor(skewed: bool) -> None:
    shares = np.array([0.12] * 4 + [0.0325] * 16) if skewed else np.full(20, 0.05)
    trace = synthetic_trace(np.tile(shares, (9, 1)), tokens=4000, requests=8, top_k=4, seed=0)
    found = flow_of(trace)
    # the mean of 8 pairs of chi-square with about 16 ^ 2 degrees of freedom: to about 3 %
    assert found.mutual_information.mean() == pytest.approx(
        found.mutual_information_floor, rel=0.12
    )
    assert found.mutual_information_floor == pytest.approx(16**2 / (2 * 4000 * 16 * np.log(2)))
    assert found.predictability == pytest.approx(found.unconditional, abs=0.05)


def test_only_adjacent_layers(make_trace: Make) -> None:
    trace = make_trace()
    gap = flow_of(replace(trace, meta=replace(trace.meta, moe_layer_ids=(0, 1, 8))))
    assert gap.layers == ((0, 1),)
    assert gap.predictability.tolist() == pytest.approx(brute(trace)[0][:1])
    far = flow_of(replace(trace, meta=replace(trace.meta, moe_layer_ids=(0, 4, 8))))
    assert far.skipped == "no two recorded layers are adjacent in the model"
    assert far.to_dict()["predictability"]["mean"] is None


def test_too_large_is_skipped_with_the_reason(make_trace: Make) -> None:
    size = 2 * 2 * 8 * 8 * 8  # parities, pairs of layers, experts twice, bytes
    assert not flow_of(make_trace(), max_bytes=size).skipped
    figures = flow_of(make_trace(), max_bytes=size - 1).to_dict()
    assert figures["skipped"].startswith("pair counts of 2 pairs of layers of 8 experts take")
    assert figures["layer_pairs"] == []


def test_one_request_scores_nothing(make_trace: Make) -> None:
    figures = flow_of(make_trace(lengths=(9,))).to_dict()
    assert figures["predictability"]["each"] == [None, None]
    assert figures["mutual_information_bits"]["mean"] > 0


def test_published_figures_of_gpt_oss(moeplan_data: Path) -> None:
    traces = open_traces(moeplan_data / "traces" / "gpt-oss-20b-mmlu.parquet")
    flow = Flow(About.of(traces))
    measure(traces, [flow])
    figures = flow.result().to_dict()
    assert f"{figures['predictability']['mean']:.3f}" == "0.631"
    assert f"{figures['predictability_unconditional']['mean']:.3f}" == "0.359"
