"""Drawn traces are valid, depend on the seed alone, and have the covariances of their generator."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal, norm

from basis.errors import InputError
from traces.routing_trace import read_trace
from traces.synth_draw import Sampler, draw_chunks, draw_trace, request_lengths, write_drawn
from traces.synth_model import NEVER, Process, SynthFit

Make = Callable[..., SynthFit]
plain = settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@plain
@given(
    layers=st.integers(1, 3), experts=st.integers(1, 9), data=st.data(),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6), seed=st.integers(0, 9),
    prompt=st.sampled_from([0.0, 0.3, 0.9]),
)  # fmt: skip
def test_drawn_traces_are_valid(
    make_fit: Make, layers: int, experts: int, data: st.DataObject, lengths: list[int], seed: int,
    prompt: float,
) -> None:  # fmt: skip
    top_k = data.draw(st.integers(1, experts))
    kinds = data.draw(st.integers(1, 4))
    first = data.draw(st.integers(0, 5))
    fit = make_fit(
        layers=layers, experts=experts, top_k=top_k, prompt_share=prompt, kinds=kinds, first=first
    )
    trace = draw_trace(fit, np.array(lengths), seed=seed)
    assert np.bincount(trace.request_id).tolist() == lengths
    for request, length in enumerate(lengths):
        own = trace.request_id == request
        assert trace.position[own].tolist() == list(range(length))
        assert (~trace.decode[own]).sum() == round(prompt * length)
        assert (np.diff(trace.step[own][trace.decode[own]]) == 1).all()
        assert (trace.step[own][~trace.decode[own]] == 0).all()
    for cell in trace.experts.reshape(-1, top_k).tolist():
        assert len(set(cell)) == top_k
        assert max(cell) < experts
    assert trace.meta.synthetic
    assert "synthetic" in trace.meta.note


def test_the_trace_depends_on_the_seed_alone(make_fit: Make, tmp_path: Path) -> None:
    fit = make_fit(layers=2, experts=8, kinds=5)
    lengths = np.array([5, 40, 1, 17])
    whole = draw_trace(fit, lengths, seed=3)
    for rows in (1, 10, 1000):
        chunks = list(draw_chunks(fit, lengths, seed=3, rows=rows))
        assert np.array_equal(np.concatenate([c.experts for c in chunks]), whole.experts)
    assert len(list(draw_chunks(fit, lengths, seed=3, rows=1))) == 4
    assert not np.array_equal(draw_trace(fit, lengths, seed=4).experts, whole.experts)
    # a request's tokens do not depend on the others
    alone = draw_trace(fit, lengths[:2], seed=3)
    assert np.array_equal(alone.experts, whole.experts[:45])
    write_drawn(fit, lengths, tmp_path / "x.parquet", seed=3)
    back = read_trace(tmp_path / "x.parquet")
    assert back.meta == fit.meta
    assert back.meta.synthetic
    for name, column in whole.columns.items():
        assert np.array_equal(back.columns[name], column)


def only(fit: SynthFit, decay: float) -> SynthFit:
    """Give all the variance to one process, every cell for itself."""
    cells = fit.means.shape[1]
    process = Process(
        name="only", decay=decay, loadings=np.zeros((cells, 1), np.float32),
        own=np.ones(cells, np.float32),
    )  # fmt: skip
    return replace(fit, processes=(process,))


def test_two_experts_follow_the_normal_distribution(make_fit: Make) -> None:
    fit = replace(only(make_fit(layers=2, experts=2), 0.0), means=np.array([[0.5, -0.3, 0.0, 1.0]]))
    trace = draw_trace(fit, np.array([100_000]), seed=0)
    share = (trace.experts[:, :, 0] == 0).mean(axis=0)
    expected = norm.cdf(np.array([0.8, -1.0]) / np.sqrt(2))
    assert share == pytest.approx(expected, abs=5 * np.sqrt(0.25 / 100_000))


@pytest.mark.parametrize("decay", [0.0, 0.6, 0.97, 1.0])
def test_a_process_forgets_at_its_rate(make_fit: Make, decay: float) -> None:
    fit = replace(only(make_fit(layers=1, experts=2), decay), means=np.zeros((1, 2)))
    requests, length, lag = 4000, 12, 5
    trace = draw_trace(fit, np.full(requests, length), seed=1)
    first = (trace.experts[:, 0, 0] == 0).reshape(requests, length)
    # top-1 of two: the sign of a normal variable, so P(same) = 1/2 + asin(r) / pi
    same = (first[:, 2] == first[:, 2 + lag]).mean()
    assert same == pytest.approx(0.5 + np.arcsin(decay**lag) / np.pi, abs=5 * 0.5 / requests**0.5)
    assert first.mean() == pytest.approx(0.5, abs=5 * 0.5 / requests**0.5)


def test_long_requests_go_on_where_a_piece_ends(
    make_fit: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("traces.synth_draw._PIECE_CELLS", 3 * 2)  # three tokens at a time
    fit = replace(only(make_fit(layers=1, experts=2), 0.97), means=np.zeros((1, 2)))
    first = draw_trace(fit, np.full(3000, 6), seed=1).experts[:, 0, 0].reshape(3000, 6)
    same = (first[:, 2] == first[:, 3]).mean()  # across the border
    assert same == pytest.approx(0.5 + np.arcsin(0.97) / np.pi, abs=5 * 0.5 / 3000**0.5)
    constant = draw_trace(only(fit, 1.0), np.full(50, 10), seed=1).experts.reshape(50, 10)
    assert (constant == constant[:, :1]).all()


def test_common_factors_bring_cells_together(make_fit: Make) -> None:
    fit = make_fit(layers=2, experts=2)
    loadings = np.array([[0.8], [0], [0.8], [0]], np.float32)
    process = Process(name="x", decay=0.0, loadings=loadings, own=1 - loadings[:, 0] ** 2)
    fit = replace(fit, processes=(process,), means=np.zeros((1, 4)))
    trace = draw_trace(fit, np.array([100_000]), seed=0)
    zero = trace.experts[:, :, 0] == 0
    # differences of the two experts' scores: variance 2, covariance of the layers 0.64
    both = multivariate_normal([0, 0], [[2, 0.64], [0.64, 2]]).cdf([0, 0])
    assert zero.all(axis=1).mean() == pytest.approx(both, abs=5 * np.sqrt(0.25 / 100_000))
    assert zero.all(axis=1).mean() > 0.25 + 0.03


def test_independent_tokens_have_the_loads_of_long_traces(make_fit: Make) -> None:
    fit = make_fit(layers=1, experts=6)
    rng = np.random.default_rng(0)
    kinds = np.zeros(12_000, np.int64)
    one = np.bincount(Sampler(fit).independent(kinds, rng).reshape(-1), minlength=6) / 12_000
    many = draw_trace(fit, np.ones(12_000, int), seed=0).experts
    other = np.bincount(many.reshape(-1), minlength=6) / 12_000
    assert one == pytest.approx(other, abs=6 * np.sqrt(2 * 0.25 / 12_000))


def test_requests_keep_topics_that_are_spread_evenly(make_fit: Make) -> None:
    """Of 16 even requests, each of 16 equal shares of a normal is met once."""
    fit = replace(only(make_fit(layers=1, experts=2), 1.0), means=np.array([[0.0, 0.3]]))
    sampler = Sampler(fit)
    own = np.stack([sampler._topics(request, 5)[1] for request in range(64)])
    for part in (own[:32:2], own[1:32:2], own[32::2]):
        strata = np.sort(np.floor(norm.cdf(part) * 16), axis=0)
        assert np.array_equal(strata, np.tile(np.arange(16)[:, None], 2))
    assert len(np.unique(own)) == own.size


def test_cells_without_load_are_never_used(make_fit: Make) -> None:
    fit = make_fit(layers=1, experts=6, top_k=2)
    means = fit.means.copy()
    means[:, [1, 4]] = NEVER
    used = np.unique(draw_trace(replace(fit, means=means), np.array([2000]), seed=0).experts)
    assert used.tolist() == [0, 2, 3, 5]


@plain
@given(tokens=st.integers(1, 3000), data=st.data(), seed=st.integers(0, 9))
def test_lengths_sum_to_the_tokens(
    make_fit: Make, tokens: int, data: st.DataObject, seed: int
) -> None:
    fit = make_fit(layers=1, experts=2)
    requests = data.draw(st.integers(1, tokens))
    lengths = request_lengths(fit, tokens=tokens, requests=requests, seed=seed)
    assert len(lengths) == requests
    assert lengths.min() >= 1
    assert lengths.sum() == tokens


def test_lengths_have_the_fitted_distribution(make_fit: Make) -> None:
    fit = replace(make_fit(layers=1, experts=2), lengths=np.array([100.0, 200.0, 600.0]))
    lengths = request_lengths(fit, tokens=275 * 4000, requests=None, seed=0)
    assert abs(len(lengths) - 4000) <= 1  # mean of the two halves: (150 + 400) / 2
    assert np.quantile(lengths, [0, 0.5, 1]) == pytest.approx([100, 200, 600], rel=0.05)
    with pytest.raises(InputError, match="requests 11 -- must be between 1 and tokens"):
        request_lengths(fit, tokens=10, requests=11, seed=0)
