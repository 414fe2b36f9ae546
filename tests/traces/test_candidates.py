"""The best candidates of each token: in memory, on disk, checked, and synthetic."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from basis.errors import InputError
from traces.convert import convert
from traces.counts import expert_counts
from traces.meta import META_KEY, TraceMeta, decode, encode
from traces.routing_trace import RoutingTrace, TraceWriter, iter_trace, read_trace, write_trace
from traces.splits import split_requests
from traces.synth import synthetic_trace, zipf_shares

Make = Callable[..., RoutingTrace]


@pytest.fixture
def trace() -> RoutingTrace:
    shares = zipf_shares(16, 0.5, layers=3, seed=0)
    return synthetic_trace(shares, tokens=60, requests=4, top_k=2, seed=0, candidates=5)


def same(a: RoutingTrace, b: RoutingTrace) -> bool:
    return (
        a.meta == b.meta
        and a.columns.keys() == b.columns.keys()
        and all(
            a.columns[n].dtype == b.columns[n].dtype and np.array_equal(a.columns[n], b.columns[n])
            for n in a.columns
        )
    )


def test_round_trips(trace: RoutingTrace, tmp_path: Path) -> None:
    assert trace.meta.num_candidates == 5
    assert list(trace.columns)[-2:] == ["candidates", "candidate_scores"]
    path = tmp_path / "a.parquet"
    write_trace(trace, path)
    assert same(trace, read_trace(path))
    chunks = list(iter_trace(path, 7))
    assert np.array_equal(np.concatenate([c.candidates for c in chunks]), trace.candidates)
    assert same(convert(path, tmp_path / "a.npz"), trace)
    assert same(convert(tmp_path / "a.npz", tmp_path / "b.parquet"), trace)
    convert(path, tmp_path / "a.jsonl")
    head, first = (tmp_path / "a.jsonl").read_text().splitlines()[:2]
    assert json.loads(head)["num_candidates"] == 5
    assert trace.candidates is not None
    assert trace.candidate_scores is not None
    assert json.loads(first)["candidates"] == trace.candidates[0].tolist()
    assert json.loads(first)["candidate_scores"] == trace.candidate_scores[0].tolist()
    for part in split_requests(trace, "interleaved"):
        assert part.candidates is not None
        assert len(part.candidates) == part.num_tokens


def test_candidates_can_be_left_out(trace: RoutingTrace, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_trace(trace, path)
    plain = replace(
        trace, meta=replace(trace.meta, num_candidates=0), candidates=None, candidate_scores=None
    )
    assert same(read_trace(path, candidates=False), plain)
    assert all(c.candidates is None for c in iter_trace(path, candidates=False))


def test_a_file_without_candidates_is_as_it_was(make_trace: Make, tmp_path: Path) -> None:
    trace = make_trace()
    write_trace(trace, tmp_path / "a.parquet")
    file = pq.ParquetFile(tmp_path / "a.parquet")
    assert file.schema_arrow.names == [
        "request_id", "position", "decode", "step", "domain", "experts", "weights",
    ]  # fmt: skip
    stored = json.loads(file.schema_arrow.metadata[META_KEY])
    assert "num_candidates" not in stored
    assert decode(encode(trace.meta, trace.domains)) == (trace.meta, trace.domains)


def test_a_router_may_skip_its_best_candidates(trace: RoutingTrace, tmp_path: Path) -> None:
    assert trace.candidates is not None
    limited = replace(trace, experts=trace.candidates[..., 3:].copy())  # groups, bias
    write_trace(limited, tmp_path / "a.parquet")
    assert same(read_trace(tmp_path / "a.parquet"), limited)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("candidates", 16, "1 cells with bad candidates .first: row 8, layer 1. -- ids must be"),
        ("candidates", "repeat", "1 cells with bad candidates .first: row 8, layer 1"),
        ("candidate_scores", np.nan, "1 cells with bad candidate scores .first: row 8, layer 1"),
        ("candidate_scores", -1, "1 cells with bad candidate scores"),
        ("candidate_scores", 0, "scores must be finite, not negative and descending"),
    ],
)
def test_bad_cells(
    trace: RoutingTrace, tmp_path: Path, name: str, value: Any, message: str
) -> None:
    column = trace.columns[name].copy()
    column[8, 1, 2] = column[8, 1, 1] if value == "repeat" else value
    bad = replace(trace, **{name: column})
    with pytest.raises(InputError, match=message):
        write_trace(bad, tmp_path / "a.parquet")
    np.savez(tmp_path / "a.npz", meta=encode(bad.meta, bad.domains), **bad.columns)
    with pytest.raises(InputError, match=message):
        convert(tmp_path / "a.npz", tmp_path / "b.parquet")


def test_metadata_and_arrays_must_agree(trace: RoutingTrace, tmp_path: Path) -> None:
    for changes in (
        {"candidates": None},
        {"candidate_scores": None},
        {"candidates": None, "candidate_scores": None},
        {"meta": replace(trace.meta, num_candidates=0)},
    ):
        with pytest.raises(InputError, match=r"num_candidates [05], candidates and their scores"):
            replace(trace, **changes)
    with pytest.raises(InputError, match=r"candidates is uint16\[60, 3, 5\] -- must be .* 3, 6\]"):
        replace(trace, meta=replace(trace.meta, num_candidates=6))
    for count in (-1, 1, 2, 17, 4.0, True):
        with pytest.raises(InputError, match=f"num_candidates {count} -- 0, or more than top_k 2"):
            replace(trace.meta, num_candidates=count)  # type: ignore[arg-type]
    path = tmp_path / "a.parquet"
    write_trace(trace, path)
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["candidates"]), path)
    with pytest.raises(InputError, match="column candidates is missing"):
        read_trace(path)
    lying = encode(replace(trace.meta, num_candidates=7), trace.domains)
    pq.write_table(table.replace_schema_metadata({META_KEY: lying.encode()}), path)
    with pytest.raises(InputError, match=r"column candidates lists 15 values a row.* top-7 = 21"):
        read_trace(path)


def test_a_chunk_without_candidates_is_refused(
    trace: RoutingTrace, make_trace: Make, tmp_path: Path
) -> None:
    plain = replace(
        trace, meta=replace(trace.meta, num_candidates=0), candidates=None, candidate_scores=None
    )
    with (
        pytest.raises(InputError, match="a chunk's metadata"),
        TraceWriter(tmp_path / "a.parquet", trace.meta, trace.domains, weights=True) as out,
    ):
        out.write(plain)


@pytest.mark.parametrize("reuse", [0.0, 0.9])
def test_synthetic_candidates(reuse: float) -> None:
    shares = zipf_shares(24, 0.5, layers=2, seed=0)
    trace = synthetic_trace(
        shares, tokens=30_000, requests=15_000, top_k=3, seed=1, candidates=6, reuse=reuse
    )
    assert trace.candidates is not None
    assert trace.candidate_scores is not None
    assert trace.weights is not None
    assert trace.meta.synthetic
    assert np.array_equal(trace.candidates[..., :3], trace.experts)
    scores = trace.candidate_scores.astype(float)
    assert (np.diff(scores, axis=-1) <= 0).all()
    assert (scores.sum(axis=-1) < 1.002).all()
    chosen = scores[..., :3] / scores[..., :3].sum(axis=-1, keepdims=True)
    assert trace.weights.astype(float) == pytest.approx(chosen, abs=2e-3)
    loads = expert_counts(trace.experts, 24) / trace.experts[:, 0].size
    assert loads == pytest.approx(shares, rel=0.12)  # the loads do not depend on reuse


def overlap(trace: RoutingTrace) -> float:
    """Share of a token's experts that the next token of the request uses too, layer 0."""
    a, b = trace.experts[:-1, 0], trace.experts[1:, 0]
    both = (a[:, :, None] == b[:, None, :]).any(axis=2).mean(axis=1)
    return float(both[np.diff(trace.request_id) == 0].mean())


def test_reuse_is_between_tokens_of_a_request() -> None:
    shares = np.full((1, 32), 1 / 32)
    options: dict[str, Any] = {"tokens": 6000, "requests": 60, "top_k": 4, "seed": 0}
    found = [overlap(synthetic_trace(shares, **options, reuse=r)) for r in (0, 0.3, 0.7, 1)]
    assert found == sorted(found)
    assert found[0] == pytest.approx(4 / 32, abs=0.01)
    assert found[3] > 0.6
    first = synthetic_trace(shares, **options, reuse=1.0)
    starts = np.flatnonzero(first.position == 0)
    across = (first.experts[starts[1:] - 1, 0, :, None] == first.experts[starts[1:], 0, None]).any(
        axis=2
    )
    assert across.mean() < 0.3
    for reuse in (-0.1, 1.1):
        with pytest.raises(InputError, match=f"reuse {reuse} -- a share of the variance"):
            synthetic_trace(shares, **options, reuse=reuse)


def test_meta_of_old_traces_has_no_candidates() -> None:
    meta = TraceMeta(model="m", num_experts=8, top_k=2, moe_layer_ids=(0,))
    assert meta.num_candidates == 0
