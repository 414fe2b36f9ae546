"""Standard errors against loops over the requests and against simulation; the verdicts."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traces.measures.base import About, measure
from traces.measures.support import Support, SupportResult
from traces.routing_trace import RoutingTrace, request_order
from traces.synth import synthetic_trace
from traces.trace_set import open_traces

Make = Callable[..., RoutingTrace]


def support_of(trace: RoutingTrace, rows: int = 1000) -> SupportResult:
    support = Support(About.of(trace))
    measure(trace, [support], rows=rows)
    return support.result()


def answers(found: SupportResult) -> dict[str, str]:
    return {finding.question: finding.answer for finding in found.findings}


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=2, max_size=6).map(tuple),
    top_k=st.integers(1, 3), rows=st.integers(1, 20), seed=st.integers(0, 99),
)  # fmt: skip
def test_standard_errors_equal_plain_loops(
    make_trace: Make, lengths: tuple[int, ...], top_k: int, rows: int, seed: int
) -> None:
    trace = make_trace(lengths=lengths, top_k=top_k, experts=4, layers=2, seed=seed)
    found = support_of(trace, rows)
    tokens, requests = trace.num_tokens, len(lengths)
    number = request_order(trace)
    for layer in range(2):
        variances, binomial = [], 0.0
        for expert in range(4):
            uses = (trace.experts[:, layer] == expert).any(axis=1)
            share = uses.mean()
            squares = 0.0
            for r in range(requests):
                squares += (uses[number == r].sum() - share * (number == r).sum()) ** 2
            variances.append(requests / (requests - 1) * squares / tokens**2)
            binomial += share * (1 - share)
        assert found.standard_error[layer].tolist() == pytest.approx(
            np.sqrt(variances).tolist(), abs=1e-7
        )
        assert found.relative_standard_error[layer] == pytest.approx(
            np.sqrt(np.mean(variances)) / (top_k / 4), abs=1e-7
        )
        if sum(variances) > 1e-9:
            assert found.effective_tokens[layer] == pytest.approx(binomial / sum(variances))
    pairs = {(r, p) for r, p in zip(number.tolist(), trace.position.tolist(), strict=True)}
    assert found.consecutive == sum((r, p - 1) in pairs for r, p in pairs)
    assert (found.tokens, found.requests) == (tokens, requests)
    assert found.decode_tokens == trace.decode.sum()


def test_independent_tokens_and_stuck_requests() -> None:
    shares = np.full((20, 16), 1 / 16)
    trace = synthetic_trace(shares, tokens=20_000, requests=400, top_k=2, seed=0)
    found = support_of(trace)
    assert found.effective_tokens.mean() == pytest.approx(20_000, rel=0.1)
    assert found.relative_standard_error.mean() == pytest.approx(
        found.independent_standard_error, rel=0.05
    )
    first = np.searchsorted(trace.request_id, trace.request_id)
    stuck = support_of(replace(trace, experts=trace.experts[first]))
    assert stuck.effective_tokens.mean() == pytest.approx(400, rel=0.1)


def test_standard_errors_are_those_of_many_traces() -> None:
    shares = np.tile(np.array([0.2, 0.2, 0.1] + [0.0625] * 8), (50, 1))
    trace = synthetic_trace(shares, tokens=6000, requests=300, top_k=3, reuse=0.8, seed=0)
    found = support_of(trace)  # 50 layers are 50 traces of one layer
    used = np.stack([(trace.experts == e).any(axis=2).mean(axis=0) for e in range(11)])
    spread = used.std(axis=1, ddof=1)
    errors = np.sqrt((found.standard_error**2).mean(axis=0))
    assert errors.mean() == pytest.approx(spread.mean(), rel=0.1)
    assert found.effective_tokens.mean() < 3000  # tokens of a request are alike


def test_a_large_skewed_trace_supports_everything() -> None:
    trace = synthetic_trace(np.full((2, 8), 1 / 8), tokens=9000, requests=300, top_k=2, seed=0)
    decode = np.arange(9000) % 30 > 3
    domain = (np.arange(9000) // 30 % 2).astype(np.int16)
    found = support_of(replace(trace, decode=decode, domain=domain, domains=("a", "b")))
    assert set(answers(found).values()) == {"yes"}
    assert found.domains == ("a", "b")


def test_a_small_one_does_not(make_trace: Make) -> None:
    found = support_of(make_trace(lengths=(3,), prompt=0))
    assert answers(found) == {
        "placement by load": "no",
        "stragglers of a step": "no",
        "held-out scores": "no",
        "difference between domains": "no",
        "locality from token to token": "yes",
        "decode": "yes",
        "prefill": "no",
    }
    figures = found.to_dict()
    assert figures["relative_standard_error"]["mean"] is None
    assert figures["findings"][0]["value"] is None
    assert figures["domains"] == ["prose"]
    assert not support_of(make_trace(lengths=(1, 1))).consecutive


def test_rough_is_between() -> None:
    trace = synthetic_trace(np.full((2, 8), 1 / 8), tokens=600, requests=20, top_k=2, seed=0)
    found = answers(support_of(trace))
    assert found["placement by load"] == "roughly"  # sqrt(0.75 / (600 * 0.25)) = 0.07
    assert found["stragglers of a step"] == "roughly"


def test_gpt_oss_has_fewer_independent_tokens_than_tokens(moeplan_data: Path) -> None:
    traces = open_traces(moeplan_data / "traces" / "gpt-oss-20b-mmlu.parquet")
    support = Support(About.of(traces))
    measure(traces, [support])
    found = support.result()
    assert found.decode_tokens == found.tokens == 125_771
    assert (found.effective_tokens < found.tokens / 2).all()
    assert (found.relative_standard_error > found.independent_standard_error).all()


def test_requests_that_are_all_the_same_leave_no_error(make_trace: Make) -> None:
    one = make_trace(lengths=(7,), weights=False)
    rows = np.tile(np.arange(7), 3)
    same = replace(one.select(rows), request_id=np.repeat(np.arange(3), 7).astype(np.int32))
    assert (support_of(same).standard_error == 0).all()
