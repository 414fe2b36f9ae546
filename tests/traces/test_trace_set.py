"""Data sets of files against plain loops over the rows that were written."""

import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basis.errors import InputError
from traces.routing_trace import (
    RoutingTrace,
    TooLargeError,
    TraceWarning,
    TraceWriter,
    write_trace,
)
from traces.trace_set import TraceSet, chunks_of, open_traces

Make = Callable[..., RoutingTrace]
Row = tuple[int, int, str, bool, int, list[list[int]]]


def rows_in_order(traces: list[RoutingTrace]) -> list[Row]:
    """Request after request in order of first appearance, by plain loops."""
    rows: list[Row] = []
    number = 0
    for trace in traces:
        for id_ in dict.fromkeys(trace.request_id.tolist()):
            if id_ < 0:
                continue
            mine = [t for t in range(trace.num_tokens) if trace.request_id[t] == id_]
            for t in sorted(mine, key=lambda t: int(trace.position[t])):
                rows.append(row_of(trace, t, number))
            number += 1
    return rows


def row_of(trace: RoutingTrace, t: int, number: int) -> Row:
    return (
        number,
        int(trace.position[t]),
        trace.domains[trace.domain[t]],
        bool(trace.decode[t]),
        int(trace.step[t]),
        trace.experts[t].tolist(),
    )


def rows_of(traces: TraceSet, rows: int) -> list[Row]:
    found: list[Row] = []
    for chunk in traces.chunks(rows=rows):
        assert 1 <= chunk.num_tokens <= rows
        assert chunk.domains == traces.domains
        assert chunk.meta == traces.meta
        found += [row_of(chunk, t, int(chunk.request_id[t])) for t in range(chunk.num_tokens)]
    return found


def renamed(trace: RoutingTrace, domains: tuple[str, ...]) -> RoutingTrace:
    return replace(trace, domains=domains)


def sorted_by_request(trace: RoutingTrace) -> RoutingTrace:
    return trace.select(np.lexsort((trace.position, -trace.request_id)))


@settings(deadline=None, max_examples=30)
@given(
    files=st.lists(
        st.tuples(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.booleans()),
        min_size=1, max_size=3,
    ),
    rows=st.integers(1, 30), seed=st.integers(0, 99),
)  # fmt: skip
def test_chunks_equal_plain_loops(
    make_trace: Make,
    tmp_path_factory: pytest.TempPathFactory,
    files: list[tuple[list[int], bool]],
    rows: int,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("set")
    names = [("prose", "code", "unused"), ("code", "law", "prose"), ("law", "x", "prose")]
    written = []
    for i, (lengths, ordered) in enumerate(files):
        trace = renamed(make_trace(lengths=tuple(lengths), seed=seed + i), names[i])
        written.append(sorted_by_request(trace) if ordered else trace)
        write_trace(written[-1], folder / f"{i}.parquet")
    traces = open_traces(folder)
    expected = rows_in_order(written)
    assert rows_of(traces, rows) == expected
    assert traces.num_tokens == len(expected)
    numbers = [row[0] for row in expected]
    assert traces.lengths.tolist() == [numbers.count(r) for r in range(traces.num_requests)]
    for i, (_, ordered) in enumerate(files):
        assert traces.files[i].ordered or not ordered
    first, *rest = range(len(files))
    again = list(traces.chunks([*rest, first], rows=rows))  # numbers do not depend on the order
    assert sum(chunk.num_tokens for chunk in again) == len(expected)
    assert {int(r) for chunk in again for r in chunk.request_id} == set(numbers)


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5).map(tuple), rows=st.integers(1, 30)
)
def test_chunks_of_a_trace_in_memory(make_trace: Make, lengths: tuple[int, ...], rows: int) -> None:
    trace = make_trace(lengths=lengths)
    found = [
        row_of(chunk, t, int(chunk.request_id[t]))
        for chunk in chunks_of(trace, rows)
        for t in range(chunk.num_tokens)
    ]
    assert found == rows_in_order([trace])


def test_a_request_that_goes_on_over_the_surveys_batches(
    make_trace: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("traces.trace_set.CHUNK_ROWS", 1)  # the ids are read 16 rows at a time
    trace = sorted_by_request(make_trace(lengths=(40, 5, 30)))
    write_trace(trace, tmp_path / "a.parquet")
    survey = open_traces(tmp_path / "a.parquet").files[0]
    assert survey.ordered
    assert survey.lengths.tolist() == [40, 5, 30]
    back = trace.select(np.r_[0:20, 40:75, 20:40])  # the first request is interrupted
    write_trace(back, tmp_path / "b.parquet")
    survey = open_traces(tmp_path / "b.parquet").files[0]
    assert not survey.ordered
    assert survey.lengths.tolist() == [40, 5, 30]


def test_descending_positions_are_put_in_order(make_trace: Make, tmp_path: Path) -> None:
    trace = sorted_by_request(make_trace(lengths=(9,)))
    write_trace(trace.select(np.arange(9)[::-1]), tmp_path / "a.parquet")
    traces = open_traces(tmp_path / "a.parquet")
    assert not traces.files[0].ordered
    assert [row[1] for row in rows_of(traces, 4)] == list(range(9))


@pytest.mark.parametrize("ordered", [True, False])
def test_rows_without_a_request_are_left_out(
    make_trace: Make, tmp_path: Path, ordered: bool
) -> None:
    trace = make_trace(lengths=(6, 7))
    trace = sorted_by_request(trace) if ordered else trace
    request = trace.request_id.copy()
    request[[0, 5, 12]] = -1
    trace = replace(trace, request_id=request)
    write_unchecked(trace, tmp_path / "a.parquet")
    traces = open_traces(tmp_path / "a.parquet")
    assert (traces.num_tokens, traces.files[0].dropped) == (10, 3)
    with pytest.warns(TraceWarning, match="3 of 13 rows have no request"):
        assert rows_of(traces, 4) == rows_in_order([trace])
    write_unchecked(replace(trace, request_id=np.full(13, -1, np.int32)), tmp_path / "none.parquet")
    with pytest.raises(InputError, match=r"none\.parquet: no row has a request"):
        open_traces(tmp_path / "none.parquet")


def write_unchecked(trace: RoutingTrace, path: Path) -> None:
    """Write without the check of positions, which are not known to be unique here."""
    with TraceWriter(path, trace.meta, trace.domains, weights=trace.weights is not None) as out:
        out.write(trace)


def test_what_is_refused(make_trace: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no \.parquet files"):
        open_traces(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        open_traces(tmp_path / "absent.parquet")
    first, second = tmp_path / "a.parquet", tmp_path / "b.parquet"
    write_trace(make_trace(), first)
    write_trace(make_trace(experts=9), second)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "link.parquet").symlink_to(first)
    for again in (first, tmp_path / "sub" / ".." / "a.parquet", tmp_path / "sub" / "link.parquet"):
        with pytest.raises(InputError, match=rf"{again.name}: named twice, before as .*a\.parquet"):
            open_traces([first, again])
    with pytest.raises(InputError, match="sub: a folder beside files"):
        open_traces([first, tmp_path / "sub"])
    with pytest.raises(InputError, match=r"b\.parquet: random, 9 exp.* has random, 8 exp"):
        open_traces(tmp_path)
    second.write_bytes(second.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"b.parquet: not a readable Parquet file"):
        open_traces(tmp_path)


def test_a_mixed_file_that_does_not_fit(
    make_trace: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_trace(make_trace(), tmp_path / "a.parquet")
    traces = open_traces(tmp_path)

    def too_large(path: Path, **columns: bool) -> RoutingTrace:
        raise TooLargeError(f"{path}: 9 rows take 9.0 GiB in memory")

    monkeypatch.setattr("traces.trace_set.read_trace", too_large)
    with pytest.raises(InputError, match=r"9\.0 GiB in memory; its requests are mixed"):
        next(traces.chunks())


def test_other_faults_of_a_mixed_file_are_told_alone(make_trace: Make, tmp_path: Path) -> None:
    trace = make_trace()
    write_unchecked(trace.select(np.r_[0:20, 3]), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"1 rows repeat a position .* one id\?$"):
        next(open_traces(tmp_path).chunks())


def test_ids_that_are_impossible(make_trace: Make, tmp_path: Path) -> None:
    write_trace(make_trace(), tmp_path / "a.parquet")
    table = pq.read_table(tmp_path / "a.parquet")
    ids = pa.array(np.full(20, -2, np.int32))
    field = table.schema.field("request_id")
    pq.write_table(table.set_column(0, field, ids), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"no row has a request \(20 rows, all ids below 0\)"):
        open_traces(tmp_path)


@pytest.mark.parametrize("row_group", [500, 80_000])
def test_memory_does_not_grow_with_the_file(
    make_trace: Make, tmp_path: Path, row_group: int
) -> None:
    part = make_trace(lengths=(2_000,), layers=16, experts=256, top_k=8, weights=False)
    path = tmp_path / "a.parquet"
    rows = np.tile(np.arange(2_000), 40)
    trace = replace(part.select(rows), request_id=np.repeat(np.arange(40), 2_000).astype(np.int32))
    write_trace(trace, path)
    pq.write_table(pq.read_table(path), path, row_group_size=row_group)
    del trace
    before, file_bytes = pa.total_allocated_bytes(), path.stat().st_size
    held = [pa.total_allocated_bytes() - before for _ in open_traces(path).chunks(rows=500)]
    assert len(held) == 160
    assert file_bytes > 4 * 2**20
    assert max(held) < file_bytes / 2


def test_weights_come_where_they_are_asked_for(make_trace: Make, tmp_path: Path) -> None:
    write_trace(make_trace(), tmp_path / "a.parquet")
    traces = open_traces(tmp_path)
    assert next(traces.chunks()).weights is None
    assert next(traces.chunks(weights=True)).weights is not None


def test_synthetic_if_any_file_is_and_picklable(make_trace: Make, tmp_path: Path) -> None:
    trace = make_trace()
    real = replace(trace, meta=replace(trace.meta, synthetic=False))
    write_trace(real, tmp_path / "a.parquet")
    assert not open_traces(tmp_path).meta.synthetic
    write_trace(trace, tmp_path / "b.parquet")
    traces = pickle.loads(pickle.dumps(open_traces(tmp_path)))
    assert traces.meta.synthetic
    assert rows_of(traces, 7) == rows_in_order([trace, trace])


def test_real_files(moeplan_data: Path) -> None:
    folder = moeplan_data / "traces"
    traces = open_traces(folder / "gpt-oss-20b-mmlu.parquet")
    assert (traces.num_tokens, traces.num_requests) == (125_771, 443)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TraceWarning)
        qwen = open_traces([folder / "qwen1.5-moe-gsm8k.parquet"])
        assert sum(chunk.num_tokens for chunk in qwen.chunks()) == qwen.num_tokens == 4357 - 836
    assert qwen.files[0].dropped == 836
