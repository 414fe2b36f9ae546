"""Distances of loads against plain loops, and their floors against simulation."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traces.measures.base import About, measure
from traces.measures.drift import Drift, DriftResult, distance, floor
from traces.routing_trace import RoutingTrace, request_order
from traces.splits import split_requests
from traces.synth import synthetic_trace

Make = Callable[..., RoutingTrace]


def drift_of(trace: RoutingTrace, **options: int) -> DriftResult:
    drift = Drift(About.of(trace), **options)
    measure(trace, [drift], rows=1000)
    return drift.result()


def brute(first: RoutingTrace, second: RoutingTrace) -> list[float]:
    """Total variation distance of each layer, by loops."""
    answer = []
    for layer in range(first.num_layers):
        one, other = (trace.experts[:, layer].reshape(-1).tolist() for trace in (first, second))
        answer.append(
            sum(
                abs(one.count(e) / len(one) - other.count(e) / len(other))
                for e in range(first.meta.num_experts)
            )
            / 2
        )
    return answer


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=2, max_size=9).map(tuple),
    windows=st.sampled_from([2, 4, 8]), seed=st.integers(0, 99),
)  # fmt: skip
def test_distances_equal_plain_loops(
    make_trace: Make, lengths: tuple[int, ...], windows: int, seed: int
) -> None:
    trace = make_trace(lengths=lengths, seed=seed)
    found = drift_of(trace, windows=windows)
    early_late, interleaved = (
        brute(*split_requests(trace, how)) for how in ("early_late", "interleaved")
    )
    assert found.early_late.tolist() == pytest.approx(early_late)
    assert found.even_odd.tolist() == pytest.approx(interleaved)
    assert found.domains == ("prose", "code")
    prose, code = (trace.select(trace.domain == at) for at in (0, 1))
    assert found.between_domains[0, 1] == pytest.approx(np.mean(brute(prose, code)))
    assert found.domain_tokens.tolist() == [prose.num_tokens, code.num_tokens]
    window = request_order(trace) * windows // len(lengths)
    first, last = (trace.select(window == at) for at in (0, windows - 1))
    if first.num_tokens and last.num_tokens:
        assert found.windows[0, -1] == pytest.approx(np.mean(brute(first, last)))
    else:
        assert np.isnan(found.windows[0, -1])


def test_extremes() -> None:
    assert distance(np.array([3, 1, 0]), np.array([6, 2, 0])) == 0
    assert distance(np.array([3, 1, 0]), np.array([0, 0, 9])) == 1
    assert floor(np.array([5, 5]), np.array([7, 7]), 2) == 0  # every token uses both
    assert np.isnan(floor(np.array([0, 0]), np.array([7, 7]), 2))


@pytest.mark.parametrize("top_k", [1, 4])
def test_floor_is_what_independent_tokens_show(top_k: int) -> None:
    shares = np.tile(np.array([0.2, 0.2, 0.1] + [0.05] * 10), (100, 1))
    trace = synthetic_trace(shares, tokens=3000, requests=6, top_k=top_k, seed=0)
    found = drift_of(trace)
    # 100 layers are 100 draws
    assert found.even_odd.mean() == pytest.approx(found.independent.mean(), rel=0.05)
    assert found.early_late.mean() == pytest.approx(found.independent.mean(), rel=0.05)
    assert 1 <= found.alike < 1.05
    upper = np.triu_indices(8, 1)
    known = ~np.isnan(found.windows[upper])
    assert found.windows[upper][known].mean() == pytest.approx(
        found.windows_floor[upper][known].mean(), rel=0.08
    )


def test_drift_and_alike_tokens_are_told_apart() -> None:
    shares = np.full((20, 16), 1 / 16)
    trace = synthetic_trace(shares, tokens=4000, requests=40, top_k=2, seed=0)
    number = request_order(trace)
    later = replace(trace, experts=np.where((number < 20)[:, None, None], trace.experts % 8, 8))
    drifting = drift_of(replace(later, experts=later.experts.astype(np.uint16)))
    assert drifting.early_late == pytest.approx(1)
    assert (drifting.even_odd < 0.1).all()
    # all tokens of a request are its first: distances grow although nothing drifts
    first = np.searchsorted(number, number)
    stuck = drift_of(replace(trace, experts=trace.experts[first]))
    assert stuck.alike == pytest.approx(10, rel=0.15)  # sqrt(100 tokens a request)
    assert stuck.early_late.mean() == pytest.approx(stuck.even_odd.mean(), rel=0.2)


def test_one_request_is_not_known(make_trace: Make) -> None:
    figures = drift_of(make_trace(lengths=(9,))).to_dict()
    assert figures["early_late"]["mean"] is None
    assert figures["alike"] is None


def test_too_many_domains_are_not_compared(make_trace: Make) -> None:
    size = 3 * 3 * 8 * 8  # domains, layers, experts, bytes
    assert drift_of(make_trace(), max_bytes=size).domains == ("prose", "code")
    figures = drift_of(make_trace(), max_bytes=size - 1).to_dict()
    assert figures["domains_left_out"].startswith("3 domains take 0 MiB")
    assert figures["domains_farthest"] == []


def test_the_pairs_farthest_above_their_floor_come_first(make_trace: Make) -> None:
    trace = make_trace(lengths=(300, 300, 300), experts=8, top_k=1)
    number = request_order(trace).astype(np.int16)
    own = np.where((number == 2)[:, None, None], trace.experts // 4, trace.experts)
    three = replace(trace, domain=number, experts=own.astype(np.uint16))
    pairs = drift_of(three).to_dict()["domains_farthest"]
    assert {frozenset(pair["domains"]) for pair in pairs[:2]} == {
        frozenset(("prose", "unused")), frozenset(("code", "unused")),
    }  # fmt: skip
    assert pairs[0]["tokens"] == [300, 300]
