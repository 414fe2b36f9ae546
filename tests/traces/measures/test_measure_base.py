"""Whatever way a data set is cut, a measure finds the same, bit by bit."""

import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traces.measures.base import About, groups, measure, plain, spread
from traces.measures.drift import Drift
from traces.measures.flow import Flow
from traces.measures.load import Load
from traces.measures.reuse import Reuse
from traces.measures.support import Support
from traces.routing_trace import RoutingTrace, request_order, write_trace
from traces.trace_set import TraceSet, open_traces

Make = Callable[..., RoutingTrace]
MAKERS = [Load, Flow, partial(Reuse, lags=(1, 2, 3)), partial(Drift, windows=4), Support]


def figures(measures: Sequence[Any]) -> list[Any]:
    """Return all results as JSON; raises where a figure is not plain."""
    return [json.loads(json.dumps(m.result().to_dict(), allow_nan=False)) for m in measures]


def made(about: About) -> list[Any]:
    return [make(about) for make in MAKERS]


def split_files(trace: RoutingTrace, cuts: list[int], folder: Path) -> TraceSet:
    """Write whole requests to files, in order, so that they keep their numbers."""
    number = request_order(trace)
    part = np.searchsorted(sorted(cuts), number, side="right")
    for i, at in enumerate(np.unique(part)):
        write_trace(trace.select(part == at), folder / f"{i}.parquet")
    return open_traces(folder)


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=7).map(tuple),
    top_k=st.integers(1, 3), cuts=st.lists(st.integers(1, 6), max_size=3),
    rows=st.integers(1, 30), gaps=st.booleans(), seed=st.integers(0, 99),
    shuffled=st.randoms(use_true_random=False),
)  # fmt: skip
def test_any_cut_and_any_order_of_merging(
    make_trace: Make,
    tmp_path_factory: pytest.TempPathFactory,
    lengths: tuple[int, ...],
    top_k: int,
    cuts: list[int],
    rows: int,
    gaps: bool,
    seed: int,
    shuffled: Any,
) -> None:
    trace = make_trace(lengths=lengths, top_k=top_k, experts=5, seed=seed)
    if gaps and trace.num_tokens > 3:
        kept = np.random.default_rng(seed).random(trace.num_tokens) < 0.8
        trace = trace.select(kept) if kept.any() else trace
    whole = made(About.of(trace))
    measure(trace, whole, rows=10**6)
    expected = figures(whole)

    traces = split_files(trace, cuts, tmp_path_factory.mktemp("set"))
    about = About.of(traces)
    in_one_pass = made(about)
    measure(traces, in_one_pass, rows=rows)
    assert figures(in_one_pass) == expected

    parts = []
    for file in range(len(traces.files)):
        parts.append(made(about))
        measure(traces, parts[-1], [file], rows=rows)
    shuffled.shuffle(parts)
    merged = made(about)
    for part in pickle.loads(pickle.dumps(parts)):
        for mine, theirs in zip(merged, part, strict=True):
            mine.merge(theirs)
    assert figures(merged) == expected
    assert figures(merged) == expected  # a result can be asked for again


def test_about_a_trace_in_memory_and_in_files(make_trace: Make, tmp_path: Path) -> None:
    trace = make_trace(lengths=(3, 1, 5))
    write_trace(trace, tmp_path / "a.parquet")
    ours, theirs = About.of(trace), About.of(open_traces(tmp_path))
    assert ours.lengths.tolist() == theirs.lengths.tolist() == [3, 1, 5]
    assert replace(ours, lengths=theirs.lengths, meta=theirs.meta).num_tokens == theirs.num_tokens
    assert (ours.num_requests, ours.domains) == (3, theirs.domains)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(-2, 3), max_size=12))
def test_groups(labels: list[int]) -> None:
    values, rows = np.array(labels, np.int64), np.arange(len(labels))
    found = {label: rows[part].tolist() for label, part in groups(values)}
    expected = {x: [i for i, y in enumerate(labels) if y == x] for x in sorted(set(labels))}
    assert found == expected
    assert list(found) == list(expected)


def test_neighbouring_rows_are_a_slice() -> None:
    kinds = [type(part) for _, part in groups(np.array([7, 7, 3, 7, 5, 5]))]
    assert kinds == [slice, slice, np.ndarray]


@dataclass(frozen=True)
class Inner:
    values: Any

    def to_dict(self) -> dict[str, Any]:
        return {"own": True}


@dataclass(frozen=True)
class Outer:
    kept: Any
    left: int = 0


def test_plain() -> None:
    value = Outer(kept={"a": np.array([[1.0, np.nan]]), 2: (np.int64(3), float("nan"), "x", None)})
    assert plain(value, ("left",)) == {"kept": {"a": [[1.0, None]], "2": [3, None, "x", None]}}
    assert plain(Outer(kept=[Inner(1)])) == {"kept": [{"own": True}], "left": 0}


def test_spread() -> None:
    found = spread(np.array([2.0, np.nan, 5.0]), ["a", "b", "c"])
    assert found == {
        "mean": 3.5, "lowest": 2.0, "lowest_at": "a", "highest": 5.0, "highest_at": "c",
        "each": [2.0, None, 5.0],
    }  # fmt: skip
    assert spread(np.array([np.nan]), ["a"])["mean"] is None
    assert spread(np.empty(0), [])["each"] == []
