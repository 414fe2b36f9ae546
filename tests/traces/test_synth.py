"""Synthetic loads have the statistics that they are made from; tokens stay valid."""

import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basis.errors import InputError
from traces.counts import expert_counts
from traces.routing_trace import read_trace, write_trace
from traces.synth import (
    loadstats_layers,
    shares_from_loadstats,
    synthetic_step_counts,
    synthetic_trace,
    zipf_shares,
)


def test_zipf_is_a_permuted_power_law() -> None:
    shares = zipf_shares(16, 1.3, layers=5, seed=0)
    assert shares.shape == (5, 16)
    assert shares.sum(axis=1) == pytest.approx(1)
    ranked = -np.sort(-shares, axis=1)
    assert ranked / ranked[:, :1] == pytest.approx(np.tile(np.arange(1, 17) ** -1.3, (5, 1)))
    assert len({tuple(layer.argsort()) for layer in shares}) == 5
    assert np.array_equal(shares, zipf_shares(16, 1.3, layers=5, seed=0))


def test_step_counts_conserve_and_follow_the_shares() -> None:
    shares = zipf_shares(16, 1.0, layers=3, seed=1)
    counts = synthetic_step_counts(shares, steps=50, tokens=400, top_k=4, seed=2)
    assert counts.shape == (50, 3, 16)
    assert counts.dtype == np.int32
    assert (counts.sum(axis=-1) == 1600).all()
    mean, variance = counts.mean(axis=0), counts.var(axis=0)
    error = np.sqrt(1600 * shares * (1 - shares) / 50)
    assert (abs(mean - 1600 * shares) < 5 * error).all()
    # binomial variance, not a rounded mean
    assert variance.mean() == pytest.approx((1600 * shares * (1 - shares)).mean(), rel=0.2)
    again = synthetic_step_counts(shares, steps=50, tokens=400, top_k=4, seed=2)
    assert np.array_equal(counts, again)


@settings(deadline=None)
@given(
    layers=st.integers(1, 3), experts=st.integers(2, 20), tokens=st.integers(1, 60),
    data=st.data(), seed=st.integers(0, 99),
)  # fmt: skip
def test_synthetic_traces_are_valid(
    layers: int, experts: int, tokens: int, data: st.DataObject, seed: int
) -> None:
    top_k = data.draw(st.integers(1, experts - 1))
    requests = data.draw(st.integers(1, tokens))
    shares = np.full((layers, experts), 1 / experts)
    trace = synthetic_trace(shares, tokens=tokens, requests=requests, top_k=top_k, seed=seed)
    assert trace.num_requests == requests
    sizes = np.bincount(trace.request_id)
    assert sizes.max() - sizes.min() <= 1
    for request, size in enumerate(sizes):
        assert trace.position[trace.request_id == request].tolist() == list(range(size))
    ordered = np.sort(trace.experts, axis=-1)
    assert (np.diff(ordered.astype(int), axis=-1) > 0).all()
    assert ordered.max() < experts
    assert trace.meta.synthetic


def test_synthetic_loads_come_out(tmp_path: Path) -> None:
    shares = np.array([[0.22, 0.18, 0.15, 0.12, 0.1, 0.08, 0.06, 0.05, 0.04, 0.0]])
    trace = synthetic_trace(shares, tokens=60_000, requests=6, top_k=4, seed=0)
    loads = expert_counts(trace.experts, 10) / trace.experts.size
    assert loads[0, -1] == 0
    # the closed form is asymptotic in the number of experts; at ten it is good to 6 %
    assert loads[0, :9] == pytest.approx(shares[0, :9], rel=0.06)
    wide = zipf_shares(128, 0.6, layers=2, seed=0)
    trace = synthetic_trace(wide, tokens=30_000, requests=6, top_k=8, seed=0)
    loads = expert_counts(trace.experts, 128) / (30_000 * 8)
    assert loads.max(axis=1) == pytest.approx(wide.max(axis=1), rel=0.02)
    write_trace(trace, tmp_path / "x.parquet")
    assert read_trace(tmp_path / "x.parquet").meta.synthetic


@pytest.mark.parametrize(
    ("shares", "changes", "message"),
    [
        (np.array([[0.6, 0.2, 0.2]]), {}, r"largest share 0.600 -- with top-2 distinct"),
        (np.array([[0.4, 0.3, 0.2]]), {}, "each row sums to 1"),
        (np.array([[1.2, -0.2]]), {}, "each row sums to 1"),
        (np.array([0.5, 0.5]), {}, "each row sums to 1"),
        (np.full((1, 4), 0.25), {"requests": 11}, "requests 11 -- must be between 1 and tokens"),
        (np.full((1, 4), 0.25), {"top_k": 0}, "top_k 0 -- at least 1"),
    ],
)
def test_impossible_shares(shares: np.ndarray, changes: dict[str, int], message: str) -> None:
    options = {"tokens": 10, "requests": 2, "top_k": 2, "seed": 0} | changes
    with pytest.raises(InputError, match=message):
        synthetic_trace(shares, **options)


HEADER = "layer,gpqa_max_over_mean,gpqa_top32_share_pct,{0}0.01_2.0,{0}2.0_4.0,{0}4.0_6.0".format(
    "gpqa_experts_with_load_over_mean_in_"
)


def test_loadstats_of_a_small_file(tmp_path: Path) -> None:
    path = tmp_path / "stats.csv"
    path.write_text(f"{HEADER}\n0,5.0,67.0,50,8,6\n1,3.0,65.0,52,12,0\n")
    shares = shares_from_loadstats(path, 64, seed=0)
    loads = np.sort(shares, axis=1) * 64
    assert loads.sum(axis=1) == pytest.approx(64)
    assert loads[:, -1] == pytest.approx([5.0, 3.0])
    assert shares.shape == (2, 64)
    histogram = [np.histogram(layer, [0.01, 2, 4, 6])[0].tolist() for layer in loads]
    assert histogram == [[50, 8, 6], [52, 12, 0]]
    top = loads[:, -32:].sum(axis=1) / 64
    assert top[1] == pytest.approx(0.65)
    # 14 experts hold at least 41 of 64, so the other 18 of the top 32 would be below the rest
    assert top[0] > 0.67


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layer,x\n1,2\n", "gpqa_max_over_mean.*are missing"),
        ("", "not a table of numbers"),
        (f"{HEADER}\n0,5.0,a,50,8,6\n", "not a table of numbers"),
        (f"{HEADER}\n0,5.0,67\n0,5.0,67.0,50,8,6\n", "row 1 has 3 cells, the header 6"),
        (f"{HEADER}\n0,5.0,67\n", "row 1 has 3 cells, the header 6.*cut off"),
        (f"{HEADER}\n", r"not a table of numbers \(no rows\)"),
        (f"{HEADER}\n0,nan,67.0,50,8,6\n", "gpqa_max_over_mean nan -- from 1 to 64"),
        (f"{HEADER}\n0,5.0,670,50,8,6\n", "gpqa_top32_share_pct 670 -- from 0 to 100"),
        (f"{HEADER}\n0,5.0,67.0,72,-8,0\n", "in_0.01_2.0 72 -- from 0 to 64"),
        (f"{HEADER}_x\n0,5.0,67.0,50,8,6\n", "in_<low>_<high>, numbers"),
        (f"{HEADER}\n0,5.0,67.0,50,8,5\n", r"histograms sum to \[63\] -- must be num_experts"),
    ],
)
def test_bad_loadstats(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "stats.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        shares_from_loadstats(path, 64, seed=0)
    with pytest.raises(InputError, match="no such file"):
        shares_from_loadstats(tmp_path / "absent.csv", 64, seed=0)


@pytest.mark.parametrize(
    "layers", [("3", "3"), ("4", "3"), ("0", "1.5"), ("nan", "1"), ("-1", "1")]
)
def test_bad_layers_of_loadstats(tmp_path: Path, layers: tuple[str, str]) -> None:
    path = tmp_path / "stats.csv"
    path.write_text("layer,x\n" + "".join(f"{layer},1\n" for layer in layers))
    with pytest.raises(InputError, match=r"stats.csv: layer .* -- (whole numbers|from 0)"):
        loadstats_layers(path)


def test_deepseek_loadstats_come_out(moeplan_data: Path) -> None:
    path = moeplan_data / "deepseek-v3r1-loadstats.csv"
    shares = shares_from_loadstats(path, 256, seed=0)
    loads = np.sort(shares, axis=1) * 256
    assert shares.shape == (58, 256)
    assert shares.sum(axis=1) == pytest.approx(1)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    largest = np.array([float(r["gpqa_max_over_mean"]) for r in rows])
    top = np.array([float(r["gpqa_top32_share_pct"]) for r in rows])
    assert loads[:, -1] == pytest.approx(largest, rel=1e-9)
    assert loads[:, -32:].sum(axis=1) / 2.56 == pytest.approx(top, rel=1e-9)
    bins = [name for name in rows[0] if "experts_with_load" in name]
    edges = [float(name.split("_")[-2]) for name in bins] + [13.2901]  # the largest is an edge
    for layer, row in zip(loads, rows, strict=True):
        assert np.histogram(layer, edges)[0].tolist() == [int(row[name]) for name in bins]
    other = shares_from_loadstats(path, 256, seed=1)
    assert not np.array_equal(shares, other)
    assert np.sort(other, axis=1) == pytest.approx(loads / 256)
