"""The main figures of a trace in memory: hand-made traces, and published ones of a real trace."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from basis.errors import InputError
from traces.routing_trace import RoutingTrace, read_trace
from traces.stats import trace_statistics
from traces.synth import synthetic_trace

Make = Callable[..., RoutingTrace]


def with_experts(trace: RoutingTrace, experts: np.ndarray) -> RoutingTrace:
    return replace(trace, experts=experts.astype(np.uint16), weights=None)


def test_extremes(make_trace: Make) -> None:
    trace = make_trace(lengths=(8, 8), experts=4, top_k=1)
    constant = trace_statistics(with_experts(trace, np.zeros((16, 3, 1))))
    assert constant.load_max_over_mean.tolist() == [4.0] * 3
    assert constant.reuse.tolist() == constant.reuse_independent.tolist() == [1.0] * 3
    # layer 1 and 2 copy layer 0, which turns through all experts: each layer tells the next
    turning = (trace.position % 4)[:, None, None]
    walk = trace_statistics(with_experts(trace, np.broadcast_to(turning, (16, 3, 1))))
    assert walk.load_max_over_mean.tolist() == [1.0] * 3
    assert walk.reuse.tolist() == [0.0] * 3
    assert walk.reuse_independent.tolist() == [0.25] * 3
    assert walk.predictability.tolist() == [1.0, 1.0]
    assert walk.predictability_unconditional.tolist() == [0.25, 0.25]


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
    assert len(trace_statistics(gap).predictability) == 1
    far = replace(trace, meta=replace(trace.meta, moe_layer_ids=(0, 4, 8)))
    assert trace_statistics(far).to_dict()["predictability_mean"] is None


def test_one_request(make_trace: Make) -> None:
    one = trace_statistics(make_trace(lengths=(9,)))
    assert len(one.predictability) == len(one.predictability_unconditional) == 0


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
