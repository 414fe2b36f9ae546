"""Pairs are counted as plain loops count them; correlations are exact."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import multivariate_normal, norm

from basis.errors import InputError
from traces import synth_moments
from traces.routing_trace import RoutingTrace
from traces.synth_moments import LAGS, moments


@pytest.mark.parametrize("correlation", [-0.6, -0.3, 0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize(("one", "other"), [(0.5, 0.5), (0.1, 0.1), (0.05, 0.3)])
def test_correlations_are_those_of_the_bivariate_normal(
    correlation: float, one: float, other: float
) -> None:
    exact = multivariate_normal([0, 0], [[1, correlation], [correlation, 1]])
    joint = float(exact.cdf([norm.ppf(one), norm.ppf(other)]))
    used = np.array([[one, other]])
    table = np.array([[one, joint], [joint, other]])
    found = synth_moments._latent(table, used, np.ones((1, 1)), 10**9)
    assert found[0, 1] == pytest.approx(correlation, abs=0.005)
    assert found[0, 1] == found[1, 0]


@pytest.mark.parametrize("correlation", [-0.5, 0.0, 0.4, 0.8])
def test_kinds_are_taken_out_of_the_correlation(correlation: float) -> None:
    """Three kinds use two cells differently; pairs of tokens are of the same kind or not."""
    used = np.array([[0.5, 0.4], [0.02, 0.3], [0.2, 0.01]])
    between = np.array([[0.3, 0.1, 0.0], [0.1, 0.2, 0.05], [0.0, 0.05, 0.2]])
    exact = multivariate_normal([0, 0], [[1, correlation], [correlation, 1]])
    joint = sum(
        between[a, b] * float(exact.cdf(norm.ppf([used[a, 0], used[b, 1]])))
        for a in range(3)
        for b in range(3)
    )
    table = np.array([[0.0, joint], [joint, 0.0]])
    found = synth_moments._latent(table, used, between, 10**9)
    assert found[0, 1] == pytest.approx(correlation, abs=0.005)


def test_rare_pairs_are_drawn_towards_independence() -> None:
    used = np.array([[0.01, 0.01]])
    never = np.array([[0.01, 0.0], [0.0, 0.01]])
    few, many = (
        synth_moments._latent(never, used, np.ones((1, 1)), pairs)[0, 1] for pairs in (1000, 10**7)
    )
    assert -0.15 < few < 0
    assert many < -0.3


def test_pairs_are_counted_as_loops_count_them(
    make_trace: Callable[..., RoutingTrace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synth_moments, "_CHUNK_ROWS", 16)  # many chunks
    trace = make_trace(lengths=(70, 9, 41, 64), layers=2, experts=4, top_k=2)
    uses: dict[int, dict[int, np.ndarray]] = {}
    for request, position, experts in zip(
        trace.request_id.tolist(), trace.position.tolist(), trace.experts, strict=True
    ):
        vector = np.zeros((2, 4))
        for layer in range(2):
            vector[layer, experts[layer]] = 1
        uses.setdefault(request, {})[position] = vector.reshape(-1)
    order = list(uses)
    rows = [uses[r][p] for r in order for p in sorted(uses[r])]
    owner = [r for r in order for _ in uses[r]]
    near = synth_moments._near(
        np.stack([np.nonzero(v.reshape(2, 4))[1].reshape(2, 2) for v in rows]).astype(np.uint16),
        np.array(owner), 4,
    )  # fmt: skip
    for (joint, count), lag in zip(near, (0, *LAGS), strict=True):
        pairs = [
            (rows[i], rows[i + lag]) for i in range(len(rows) - lag) if owner[i] == owner[i + lag]
        ]
        expected = sum(np.outer(a, b) + np.outer(b, a) for a, b in pairs) / (2 * len(pairs))
        assert count == len(pairs)
        assert joint == pytest.approx(expected)
    measured = moments(trace, 3)
    assert measured.latent.shape == (2 + len(LAGS), 8, 8)
    assert np.abs(measured.latent).max() <= 1
    assert measured.latent == pytest.approx(measured.latent.transpose(0, 2, 1))
    assert measured.used.shape == (len(measured.kinds.share), 8)
    assert measured.kinds.share @ measured.used == pytest.approx(np.mean(rows, axis=0))


def test_far_apart_is_first_third_against_last(make_trace: Callable[..., RoutingTrace]) -> None:
    trace = make_trace(lengths=(66, 90, 10), layers=1, experts=3, top_k=1)
    trace = trace.select(np.lexsort((trace.position, trace.request_id)))
    _, request = np.unique(trace.request_id, return_inverse=True)
    joint, count = synth_moments._far_apart(trace, request)
    expected = np.zeros((3, 3))
    for owner in set(request.tolist()):
        one_hot = np.eye(3)[trace.experts[request == owner][:, 0, 0]]
        third = len(one_hot) // 3
        if len(one_hot) >= 64:
            first, last = one_hot[:third].mean(axis=0), one_hot[-third:].mean(axis=0)
            expected += third * (np.outer(first, last) + np.outer(last, first)) / 2
    assert count == 22 + 30
    assert joint == pytest.approx(expected / count)


def test_traces_that_cannot_be_measured(make_trace: Callable[..., RoutingTrace]) -> None:
    with pytest.raises(InputError, match="1 requests of at least 64 tokens"):
        moments(make_trace(lengths=(70, 9, 41)), 1)
    with pytest.raises(InputError, match="2 layers x 1025 experts = 2050"):
        moments(make_trace(layers=2, experts=1025), 1)
