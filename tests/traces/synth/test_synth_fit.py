"""A fit to drawn traces brings back the statistics of the generator that drew them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from basis.errors import InputError
from traces.counts import expert_counts
from traces.routing_trace import RoutingTrace, read_trace, request_order
from traces.splits import split_requests
from traces.stats import trace_statistics
from traces.synth_draw import draw_trace
from traces.synth_fit import _factors, fit_trace
from traces.synth_loads import ASSUMED, fit_loads
from traces.synth_model import SynthFit

Make = Callable[..., SynthFit]


def pair_shares(trace: RoutingTrace) -> np.ndarray:
    """Share of tokens that use both of two cells, ``[D, D]``."""
    dense = np.zeros((trace.num_tokens, trace.num_layers, trace.meta.num_experts))
    np.put_along_axis(dense, trace.experts.astype(int), 1, axis=-1)
    flat = dense.reshape(trace.num_tokens, -1)
    return flat.T @ flat / len(flat)


@pytest.fixture(scope="module")
def drawn_and_fitted(make_fit: Make) -> tuple[RoutingTrace, ...]:
    truth = make_fit(layers=3, experts=8, top_k=2, spread=1.0)
    seen = draw_trace(truth, np.full(300, 100), seed=11)
    many = np.full(900, 100)  # what is compared is to scatter less than what is fitted
    return seen, draw_trace(truth, many, seed=12), draw_trace(fit_trace(seen), many, seed=13)


def test_a_fit_brings_the_statistics_back(
    drawn_and_fitted: tuple[RoutingTrace, ...],
) -> None:
    seen, truth, again = drawn_and_fitted
    loads = [expert_counts(t.experts, 8) / t.num_tokens for t in (truth, again)]
    assert loads[1] == pytest.approx(loads[0], abs=0.03)
    real, ours = trace_statistics(truth), trace_statistics(again)
    assert (real.reuse > real.reuse_independent + 0.1).all()  # there is something to find
    assert ours.reuse == pytest.approx(real.reuse, abs=0.02)
    assert real.predictability.mean() > real.predictability_unconditional.mean() + 0.03
    assert ours.predictability == pytest.approx(real.predictability, abs=0.04)
    pairs = [pair_shares(t) for t in (truth, again, seen)]
    used = np.diag(pairs[0])
    independent = np.outer(used, used)
    different = ~np.eye(len(used), dtype=bool)
    structure = np.abs(pairs[0] - independent)[different].mean()
    apart, by_chance = (np.abs(pairs[0] - p)[different].mean() for p in pairs[1:])
    assert by_chance < structure / 4
    assert apart < 3 * by_chance  # no structure at all would be 8.6 times


def test_first_tokens_come_back(make_fit: Make) -> None:
    truth = make_fit(layers=2, experts=16, top_k=2, first=16, spread=1.5)
    lengths = np.full(150, 90)
    seen = draw_trace(truth, lengths, seed=1)
    fit = fit_trace(seen)
    assert len(fit.means) == len(fit.kinds.share) + 16
    again = draw_trace(fit, lengths, seed=2)
    for place in (0, 7, 15, 16):
        one, other = (
            expert_counts(t.experts[t.position == place], 16) / 150 for t in (seen, again)
        )
        assert np.abs(one - other).mean() < 0.04
    body = expert_counts(seen.experts[seen.position > 15], 16) / (150 * 74)
    assert np.abs(expert_counts(seen.experts[seen.position == 7], 16) / 150 - body).mean() > 0.08
    few = draw_trace(truth, np.full(40, 90), seed=1)  # too few to tell
    fit = fit_trace(few)
    assert len(fit.means) == len(fit.kinds.share)


def test_a_fit_depends_on_its_seed_alone(make_fit: Make) -> None:
    trace = draw_trace(make_fit(layers=1, experts=4), np.full(40, 70), seed=0)
    first, second = fit_trace(trace, seed=5), fit_trace(trace, seed=5)
    assert np.array_equal(first.means, second.means)
    for one, other in zip(first.processes, second.processes, strict=True):
        assert np.array_equal(one.loadings, other.loadings)
    assert first.meta.synthetic
    assert first.meta.note.startswith("synthetic: fitted to a synthetic trace of")
    assert "2800 tokens, 40 requests" in first.meta.note
    assert np.quantile(first.lengths, [0, 1]).tolist() == [70, 70]


def test_factors_of_a_covariance_that_has_some() -> None:
    rng = np.random.default_rng(0)
    true = rng.standard_normal((30, 2)) / 3
    variance = np.square(true).sum(axis=1) + 0.2
    found = _factors(true @ true.T + 0.2 * np.eye(30), variance, 2).astype(float)
    off = ~np.eye(30, dtype=bool)
    assert (found @ found.T)[off] == pytest.approx((true @ true.T)[off], abs=0.03)
    # noise only: nothing may explain more than there is
    noise = rng.standard_normal((30, 30))
    found = _factors(noise + noise.T, np.full(30, 0.1), 5).astype(float)
    assert np.square(found).sum(axis=1).max() <= 0.1 + 1e-6


def test_loads_alone() -> None:
    shares = np.array([[0.24, 0.2, 0.16, 0.14, 0.1, 0.08, 0.05, 0.03, 0.0, 0.0]])
    shares = np.concatenate([shares, shares[:, ::-1]])
    fit = fit_loads(shares, top_k=3, model="m", moe_layer_ids=(3, 5), known_from="a table", seed=1)
    trace = draw_trace(fit, np.full(2000, 20), seed=0)
    loads = expert_counts(trace.experts, 10) / (trace.num_tokens * 3)
    assert loads == pytest.approx(shares, abs=0.012)
    assert (loads[shares == 0] == 0).all()
    assert trace.meta.moe_layer_ids == (3, 5)
    assert trace.meta.synthetic
    assert "loads of a table; all else from assumptions" in trace.meta.note
    total = sum(strength.common + strength.own for strength in ASSUMED)
    assert total == pytest.approx(1)
    found = trace_statistics(trace)
    assert (found.reuse > found.reuse_independent + 0.05).all()


def test_loads_with_a_lender(make_fit: Make) -> None:
    lender = make_fit(layers=2, experts=6, prompt_share=0.25, kinds=3, first=2)
    shares = np.full((3, 20), 1 / 20)
    fit = fit_loads(
        shares, top_k=2, model="m", moe_layer_ids=(0, 1, 2), known_from="x", like=lender
    )
    assert fit.prompt_share == 0.25
    assert fit.means.shape == (3, 60)  # kinds, but no first tokens
    assert fit.means.std(axis=0).mean() > 0.1
    loads = expert_counts(draw_trace(fit, np.full(400, 50), seed=0).experts, 20) / (20_000 * 2)
    assert loads == pytest.approx(shares, abs=0.012)
    assert np.array_equal(fit.lengths, lender.lengths)
    assert "made for tests" in fit.meta.note
    for ours, theirs in zip(fit.processes, lender.processes, strict=True):
        assert ours.decay == theirs.decay
        assert ours.common.mean() == pytest.approx(theirs.common.mean(), rel=1e-4)
        assert ours.own.mean() == pytest.approx(theirs.own.mean(), rel=1e-4)


@pytest.mark.parametrize(
    ("shares", "top_k", "message"),
    [
        (np.array([[0.6, 0.4]]), 2, "largest share 0.600"),
        (np.array([[0.6, 0.4]]), 0, "top_k 0 -- at least 1"),
        (np.array([[0.6, 0.3]]), 1, "each row sums to 1"),
        (np.array([0.5, 0.5]), 1, "each row sums to 1"),
        (np.array([[np.nan, 0.5]]), 1, "each row sums to 1"),
    ],
)
def test_impossible_loads(shares: np.ndarray, top_k: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit_loads(shares, top_k=top_k, model="m", moe_layer_ids=(0,), known_from="x")


def test_a_recorded_trace(moeplan_data: Path) -> None:
    """Three middle layers only: seconds. All of them, on requests not fitted to: benchmarks."""
    whole = read_trace(moeplan_data / "traces" / "gpt-oss-20b-mmlu.parquet", weights=False)
    even, odd = split_requests(layers(whole, 3), "interleaved")
    drawn = draw_trace(fit_trace(even), np.bincount(request_order(odd)), seed=0)
    ours, real = trace_statistics(drawn), trace_statistics(odd)
    assert ours.load_max_over_mean == pytest.approx(real.load_max_over_mean, rel=0.12)
    assert ours.reuse == pytest.approx(real.reuse, rel=0.06)
    assert (ours.reuse > real.reuse_independent + 0.1).all()


def layers(trace: RoutingTrace, count: int) -> RoutingTrace:
    """Keep some layers in the middle of a trace."""
    meta = replace(trace.meta, moe_layer_ids=trace.meta.moe_layer_ids[8 : 8 + count])
    return replace(trace, meta=meta, experts=trace.experts[:, 8 : 8 + count].copy())
