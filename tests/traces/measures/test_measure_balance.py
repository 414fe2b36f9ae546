"""Imbalance of steps against plain loops and closed forms; capacity against its definition."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basis.errors import InputError
from traces.batches import decode_batches
from traces.measures.balance import balance
from traces.measures.base import About, measure
from traces.measures.sample import Sample
from traces.routing_trace import RoutingTrace, request_order
from traces.synth import synthetic_trace, zipf_shares
from traces.trace_set import open_traces

Make = Callable[..., RoutingTrace]


@settings(max_examples=10)
@given(batch=st.integers(1, 12), seed=st.integers(0, 99))
def test_plain_loops(make_trace: Make, batch: int, seed: int) -> None:
    trace = make_trace(lengths=(9, 7, 12, 8), experts=8, seed=seed)
    found = balance(trace, batches=(batch,), ranks=(2, 3, 4, 8), factors=(1.0, 1.5), seed=seed)
    of_batch = found.by_batch[0]
    rows = decode_batches(trace, batch=batch, steps=of_batch.steps, seed=seed).rows
    worst = {groups: [] for groups in (8, 2, 4)}
    dropped, straggler = {1.0: 0, 1.5: 0}, {1.0: [], 1.5: []}
    total = 0
    for step in rows:
        for layer in range(3):
            loads = [0] * 8
            for row in step:
                for expert in trace.experts[row, layer]:
                    loads[expert] += 1
            total += sum(loads)
            for groups, seen in worst.items():
                size = 8 // groups
                of_groups = [sum(loads[g * size : (g + 1) * size]) for g in range(groups)]
                seen.append(max(of_groups) / (sum(loads) / groups))
            for factor in dropped:
                room = -int(-factor * 2 * batch // 8) if batch > 1 else batch
                dropped[factor] += sum(max(load - room, 0) for load in loads)
                straggler[factor].append(min(max(loads), room) / (2 * batch / 8))
    assert of_batch.experts.observed == pytest.approx(np.mean(worst[8]))
    assert of_batch.experts.observed_by_layer.mean() == pytest.approx(np.mean(worst[8]))
    assert of_batch.experts.observed_p95 == pytest.approx(np.quantile(worst[8], 0.95))
    assert [imbalance.groups for imbalance in of_batch.ranks] == [2, 4]  # 3 does not divide 8
    for imbalance in of_batch.ranks:
        assert imbalance.observed == pytest.approx(np.mean(worst[imbalance.groups]))
    for capped in of_batch.capped:
        assert capped.dropped == pytest.approx(dropped[capped.factor] / total, abs=1e-12)
        assert capped.straggler == pytest.approx(np.mean(straggler[capped.factor]))


def test_shuffling_breaks_up_the_requests(make_trace: Make) -> None:
    # request r always uses expert r: a step of all four is even, four tokens at random are not
    trace = make_trace(lengths=(50,) * 4, layers=1, experts=4, top_k=1, prompt=0)
    own = request_order(trace).astype(np.uint16)[:, None, None]
    found = balance(replace(trace, experts=own), batches=(4,), ranks=(2,)).by_batch[0]
    for imbalance in (found.experts, *found.ranks):
        assert imbalance.observed == 1
        assert imbalance.shuffled == pytest.approx(imbalance.even, rel=0.1)
        assert imbalance.even > 1.2


def test_one_token_is_as_uneven_as_can_be(make_trace: Make) -> None:
    found = balance(make_trace(experts=8, top_k=2), batches=(1,), ranks=(4,)).by_batch[0]
    for figure in (found.experts.observed, found.experts.shuffled, found.experts.even):
        assert figure == 8 / 2
    assert all(capped.dropped == 0 and capped.straggler == 4 for capped in found.capped)


def test_independent_tokens_are_at_their_floor() -> None:
    even = synthetic_trace(
        np.full((4, 16), 1 / 16), tokens=20_000, requests=200, top_k=2, seed=1
    )  # fmt: skip
    for of_batch in balance(even, batches=(8, 64), ranks=(4,)).by_batch:
        for imbalance in (of_batch.experts, *of_batch.ranks):
            assert imbalance.observed == pytest.approx(imbalance.even, rel=0.03)
            assert imbalance.shuffled == pytest.approx(imbalance.even, rel=0.03)
    shares = zipf_shares(16, 0.7, layers=4, seed=2)
    skewed = synthetic_trace(shares, tokens=20_000, requests=200, top_k=2, seed=1)
    of_batch = balance(skewed, batches=(256,), ranks=()).by_batch[0]
    assert of_batch.experts.observed == pytest.approx(of_batch.experts.shuffled, rel=0.03)
    assert of_batch.experts.shuffled > 1.5 * of_batch.experts.even
    loads = shares.max(axis=1) * 16  # what a very large step would show
    assert of_batch.experts.observed == pytest.approx(loads.mean(), rel=0.1)


def test_the_even_floor_for_two_tokens() -> None:
    # 2 tokens, 1 of E experts each: the same with chance 1 / E, so busiest is 1 + 1 / E
    trace = synthetic_trace(np.full((1, 4), 0.25), tokens=4000, requests=40, top_k=1, seed=0)
    found = balance(trace, batches=(2,), ranks=()).by_batch[0]
    assert found.experts.even == pytest.approx((1 + 1 / 4) / (2 / 4), rel=0.08)


def test_all_experts_for_every_token_are_even(make_trace: Make) -> None:
    found = balance(make_trace(experts=4, top_k=4), batches=(3,), ranks=(2,)).by_batch[0]
    for imbalance in (found.experts, *found.ranks):
        assert imbalance.observed == imbalance.shuffled == imbalance.even == 1
    assert [capped.dropped for capped in found.capped] == [0, 0, 0, 0]


def test_a_larger_factor_drops_less(make_trace: Make) -> None:
    trace = make_trace(lengths=(20, 25, 30), experts=8, top_k=2, seed=4)
    found = balance(trace, batches=(16,), factors=(0.5, 1.0, 1.25, 1.5, 2.0, 4.0)).by_batch[0]
    dropped = [capped.dropped for capped in found.capped]
    assert dropped == sorted(dropped, reverse=True)
    assert dropped[0] > 0
    assert dropped[-1] == 0  # room for every token of the step


def test_the_seed_decides_and_json_is_plain(make_trace: Make) -> None:
    trace = make_trace()
    first, again, other = (
        balance(trace, batches=(4,), phase="any", seed=s).to_dict() for s in (1, 1, 2)
    )
    assert first == again != other
    assert first["by_batch"][0]["experts"]["observed_by_layer"]["mean"] > 1


def test_bad_input(make_trace: Make) -> None:
    trace = make_trace()
    with pytest.raises(InputError, match=r"capacity factors \[0\] -- must be above 0"):
        balance(trace, factors=(0,))
    with pytest.raises(InputError, match="batch 0 -- must be at least 1"):
        balance(trace, batches=(0,))
    with pytest.raises(InputError, match="no decode rows"):
        balance(make_trace(prompt=99))


def test_gpt_oss_is_less_even_than_chance(moeplan_data: Path) -> None:
    traces = open_traces(moeplan_data / "traces" / "gpt-oss-20b-mmlu.parquet")
    sample = Sample(About.of(traces), 30_000)
    measure(traces, [sample])
    found = balance(sample.result().trace, batches=(64,), ranks=(8,)).by_batch[0]
    for imbalance in (found.experts, *found.ranks):
        assert imbalance.observed > 1.1 * imbalance.even
        assert imbalance.shuffled > 1.1 * imbalance.even
