"""Round trips, chunked reading, and every kind of bad file with its message."""

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from basis.errors import InputError
from traces.checks import check_cells
from traces.meta import TraceMeta, decode, encode
from traces.model_spec import Attention, ModelSpec
from traces.routing_trace import (
    RoutingTrace,
    TraceWarning,
    TraceWriter,
    check_against_model,
    iter_trace,
    read_trace,
    request_order,
    write_trace,
)

Make = Callable[..., RoutingTrace]


def same(a: RoutingTrace, b: RoutingTrace) -> bool:
    return (
        a.meta == b.meta
        and a.domains == b.domains
        and a.columns.keys() == b.columns.keys()
        and all(np.array_equal(a.columns[name], b.columns[name]) for name in a.columns)
    )


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    layers=st.integers(1, 4),
    experts=st.integers(1, 300),
    data=st.data(),
    weights=st.booleans(),
    seed=st.integers(0, 99),
)
def test_round_trip(
    make_trace: Make, tmp_path: Path, lengths: list[int], layers: int, experts: int,
    data: st.DataObject, weights: bool, seed: int,
) -> None:  # fmt: skip
    top_k = data.draw(st.integers(1, min(experts, 9)))
    trace = make_trace(
        lengths=tuple(lengths), layers=layers, experts=experts, top_k=top_k, weights=weights,
        seed=seed,
    )  # fmt: skip
    path = tmp_path / "trace.parquet"
    write_trace(trace, path)
    back = read_trace(path)
    assert same(trace, back)
    assert {a.dtype for a in back.columns.values()} == {a.dtype for a in trace.columns.values()}
    rows = data.draw(st.integers(1, 50))
    chunks = list(iter_trace(path, rows))
    assert all(chunk.num_tokens <= rows for chunk in chunks)
    joined = np.concatenate([chunk.experts for chunk in chunks])
    assert np.array_equal(joined, trace.experts)
    assert not list(tmp_path.glob("*.partial"))


def test_writing_in_chunks_equals_writing_at_once(make_trace: Make, tmp_path: Path) -> None:
    trace = make_trace(lengths=(30, 20))
    path = tmp_path / "chunks.parquet"
    with TraceWriter(path, trace.meta, trace.domains, weights=True) as out:
        for start in range(0, 50, 7):
            out.write(trace.select(np.arange(start, min(start + 7, 50))))
        assert not path.exists()
    assert same(trace, read_trace(path))


def test_a_failed_write_leaves_no_file(make_trace: Make, tmp_path: Path) -> None:
    trace = make_trace()
    path = tmp_path / "trace.parquet"
    with (
        pytest.raises(InputError, match="weights must be in all chunks"),
        TraceWriter(path, trace.meta, trace.domains, weights=False) as out,
    ):
        out.write(trace)
    with (
        pytest.raises(InputError, match="metadata or domains differ"),
        TraceWriter(path, trace.meta, ("other",), weights=True) as out,
    ):
        out.write(trace)
    with pytest.raises(InputError, match="no such folder"):
        write_trace(trace, tmp_path / "absent" / "x.parquet")
    assert list(tmp_path.iterdir()) == []


def test_weights_can_be_left_out(make_trace: Make, tmp_path: Path) -> None:
    path = tmp_path / "trace.parquet"
    write_trace(make_trace(), path)
    assert read_trace(path, weights=False).weights is None


def test_select_keeps_order(make_trace: Make) -> None:
    trace = make_trace()
    rows = np.array([5, 1, 1])
    picked = trace.select(rows)
    assert np.array_equal(picked.experts, trace.experts[rows])
    assert picked.num_tokens == 3
    mask = trace.decode
    assert trace.select(mask).num_tokens == mask.sum()


def test_request_order_counts_first_appearances(make_trace: Make) -> None:
    trace = make_trace(lengths=(3, 3, 3))
    seen: dict[int, int] = {}
    expected = [seen.setdefault(int(r), len(seen)) for r in trace.request_id]
    assert request_order(trace).tolist() == expected


def test_wrong_arrays_are_refused(make_trace: Make) -> None:
    trace = make_trace()
    with pytest.raises(InputError, match=r"experts is uint16\[20, 2, 2\] -- must be uint16\[20, 3"):
        replace(trace, experts=trace.experts[:, :2])
    with pytest.raises(InputError, match="step is int64"):
        replace(trace, step=trace.step.astype(np.int64))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 0}, "at least 1"),
        ({"num_experts": True}, "at least 1"),
        ({"top_k": 9}, "top_k 9 -- at most num_experts 8"),
        ({"num_experts": 65535}, "at most 65534"),
        ({"model": 5}, "model, source, licence and note are texts"),
        ({"synthetic": "no"}, "synthetic is true or false"),
        ({"moe_layer_ids": (2, 1)}, "ascending"),
        ({"moe_layer_ids": ()}, "ascending"),
        ({"moe_layer_ids": (-1, 1)}, "from 0"),
        ({"schema": "moeplan.trace/9"}, "this version reads 'moeplan.trace/1'"),
    ],
)
def test_impossible_metadata(changes: dict[str, Any], message: str) -> None:
    fields = {"model": "m", "num_experts": 8, "top_k": 2, "moe_layer_ids": (0, 1)} | changes
    with pytest.raises(InputError, match=message):
        TraceMeta(**fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "expected a mapping"),
        ('{"model": "m"}', r"missing \['moe_layer_ids', 'num_experts', 'schema', 'top_k'\]"),
        ('{"licens": 1}', r"unknown \['licens'\]"),
    ],
)
def test_unreadable_metadata(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        decode(text)


def test_metadata_round_trip(make_trace: Make) -> None:
    trace = make_trace()
    assert decode(encode(trace.meta, trace.domains)) == (trace.meta, trace.domains)
    broken = json.loads(encode(trace.meta, trace.domains)) | {"domains": [1]}
    with pytest.raises(InputError, match="must list integers, domains texts"):
        decode(json.dumps(broken))


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    """Apply ``change`` to the Arrow table of a Parquet file."""
    pq.write_table(change(pq.read_table(path)), path)


@pytest.fixture
def trace_path(make_trace: Make, tmp_path: Path) -> Path:
    path = tmp_path / "trace.parquet"
    write_trace(make_trace(lengths=(40, 30, 50)), path)
    return path


def with_experts(path: Path, change: Callable[[Any], None]) -> None:
    """Change the expert ids ``[T, L, K]`` in a file, past the writer's checks."""

    def apply(table: Any) -> Any:
        column = table.schema.get_field_index("experts")
        field = table.schema.field(column)
        ids = np.array(table["experts"].combine_chunks().flatten()).reshape(-1, 3, 2)
        change(ids)
        array = pa.FixedSizeListArray.from_arrays(pa.array(ids.reshape(-1)), type=field.type)
        return table.set_column(column, field, array)

    rewrite(path, apply)


def refused(path: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as whole:
        read_trace(path)
    assert str(path) in str(whole.value)
    with pytest.raises(InputError, match=message):
        list(iter_trace(path, 7))


def test_missing_file(tmp_path: Path) -> None:
    refused(tmp_path / "absent.parquet", "no such file")


def test_not_parquet(tmp_path: Path) -> None:
    path = tmp_path / "pointer.parquet"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 18728410\n")
    refused(path, "not a readable Parquet file.*Git LFS pointer")
    path.write_bytes(b"")
    refused(path, "not a readable Parquet file")


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
def test_truncated(trace_path: Path, keep: float) -> None:
    whole = trace_path.read_bytes()
    trace_path.write_bytes(whole[: int(len(whole) * keep)])
    refused(trace_path, "is it truncated")


def test_one_flipped_bit(trace_path: Path) -> None:
    data = bytearray(trace_path.read_bytes())
    column = pq.ParquetFile(trace_path).metadata.row_group(0).column(5)
    assert column.path_in_schema.startswith("experts")
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    trace_path.write_bytes(bytes(data))
    refused(trace_path, "damaged after row 0")


def test_no_rows(trace_path: Path) -> None:
    rewrite(trace_path, lambda table: table.slice(0, 0))
    refused(trace_path, "no rows")


def test_no_metadata(trace_path: Path) -> None:
    rewrite(trace_path, lambda table: table.replace_schema_metadata(None))
    refused(trace_path, "missing moe.model, moe.num_experts")


def test_wrong_columns_are_listed_together(trace_path: Path) -> None:
    def change(table: Any) -> Any:
        table = table.drop_columns(["step"])
        position = table["position"].cast(pa.int64())
        return table.set_column(1, "position", position)

    rewrite(trace_path, change)
    refused(trace_path, "column position is int64, must be int32; column step is missing")


@pytest.mark.parametrize("name", ["position", "experts"])
def test_a_column_that_is_there_twice(trace_path: Path, name: str) -> None:
    rewrite(trace_path, lambda table: table.append_column(table.schema.field(name), table[name]))
    refused(trace_path, f"column {name} is there twice")


def test_list_size_against_metadata(trace_path: Path) -> None:
    def change(table: Any) -> Any:
        document = json.loads(table.schema.metadata[b"moeplan.trace"]) | {"top_k": 3}
        return table.replace_schema_metadata({"moeplan.trace": json.dumps(document)})

    rewrite(trace_path, change)
    refused(trace_path, r"lists 6 values a row, the metadata says 3 layers x top-3 = 9")


def test_variable_lists(trace_path: Path) -> None:
    def change(table: Any) -> Any:
        column = table.schema.get_field_index("experts")
        lists = table["experts"].cast(pa.list_(pa.uint16()))
        return table.set_column(column, "experts", lists)

    rewrite(trace_path, change)
    refused(trace_path, "column experts is list<.*must be fixed_size_list<uint16>")


def test_nulls(trace_path: Path) -> None:
    def change(table: Any) -> Any:
        values = table["step"].to_pylist()
        values[3] = values[5] = None
        return table.set_column(3, "step", pa.array(values, pa.int32()))

    rewrite(trace_path, change)
    with pytest.raises(InputError, match="2 nulls in column step"):
        read_trace(trace_path)


def test_ids_out_of_range(trace_path: Path) -> None:
    def change(ids: Any) -> None:
        ids[100, 2, 0] = 8
        ids[110, 0] = [9, 10]

    with_experts(trace_path, change)
    with pytest.raises(InputError, match=r"2 cells out of range \(first: row 100, layer 2\)"):
        read_trace(trace_path)
    with pytest.raises(InputError, match=r"1 cells out of range \(first: row 100, layer 2\)"):
        list(iter_trace(trace_path, 9))


def test_repeated_experts(trace_path: Path) -> None:
    def change(ids: Any) -> None:
        ids[7:9, 1] = 5

    with_experts(trace_path, change)
    refused(trace_path, r"cells with a repeated expert \(first: row 7, layer 1\)")


def test_missing_cells(trace_path: Path) -> None:
    def change(ids: Any) -> None:
        ids[2, 1] = 65535
        ids[3, 0, 1] = 65535

    with_experts(trace_path, change)
    refused(trace_path, r"2 cells missing \(first: row 2, layer 1\) -- a token needs")


def test_bad_weights_and_rows_are_not_written(make_trace: Make, tmp_path: Path) -> None:
    trace = make_trace()
    assert trace.weights is not None
    weights = trace.weights.copy()
    weights[4, 1, 0] = np.nan
    with pytest.raises(InputError, match=r"1 cells with bad weights \(first: row 4, layer 1\)"):
        write_trace(replace(trace, weights=weights), tmp_path / "x.parquet")
    for name, value in (("position", -1), ("step", -5), ("request_id", -2), ("domain", 3)):
        column = getattr(trace, name).copy()
        column[6] = value
        with pytest.raises(InputError, match=r"1 bad rows \(first: row 6\)"):
            write_trace(replace(trace, **{name: column}), tmp_path / "x.parquet")


def test_repeated_positions(make_trace: Make, tmp_path: Path) -> None:
    trace = make_trace()
    twice = trace.select(np.array([0, 1, 2, 1]))
    with pytest.raises(InputError, match=r"1 rows repeat a position of their request"):
        write_trace(twice, tmp_path / "x.parquet")


def test_rows_without_a_request_are_left_out_and_said(make_trace: Make, tmp_path: Path) -> None:
    trace = make_trace()
    request, position = trace.request_id.copy(), trace.position.copy()
    request[[2, 9]] = position[[2, 9]] = -1
    odd = replace(trace, request_id=request, position=position)
    path = tmp_path / "x.parquet"
    with TraceWriter(path, odd.meta, odd.domains, weights=True) as out:
        out.write(odd)
    with pytest.warns(TraceWarning, match="2 of 20 rows have no request"):
        back = read_trace(path)
    assert same(back, odd.select(request >= 0))
    with pytest.warns(TraceWarning, match="2 of 20 rows"):
        assert sum(chunk.num_tokens for chunk in iter_trace(path, 3)) == 18


def test_a_file_without_any_request(make_trace: Make, tmp_path: Path) -> None:
    trace = make_trace()
    path = tmp_path / "x.parquet"
    none = replace(trace, request_id=np.full(20, -1, np.int32))
    with TraceWriter(path, none.meta, none.domains, weights=True) as out:
        out.write(none)
    refused(path, "no row has a request")


def test_declared_size_is_checked_before_reading(trace_path: Path) -> None:
    with pytest.raises(InputError, match=r"120 rows take .* at most .* iter_trace"):
        read_trace(trace_path, max_bytes=1000)


def transport_table(trace: RoutingTrace, **metadata: str) -> Any:
    """Lay a trace out as the transport files are."""
    cells = trace.meta.num_layers * trace.meta.top_k
    phases = ["decode" if d else "prefill" for d in trace.decode]
    domains = [trace.domains[d] for d in trace.domain]
    flat = pa.array(trace.experts.reshape(-1))
    table = pa.table(
        {
            "request_id": trace.request_id,
            "position": trace.position,
            "phase": pa.array(phases).dictionary_encode(),
            "step": trace.step,
            "domain": pa.array(domains).dictionary_encode(),
            "experts": pa.FixedSizeListArray.from_arrays(flat, cells),
        }
    )
    meta = {
        "moe.model": "m", "moe.num_experts": "8", "moe.top_k": "2", "moe.num_layers": "3",
        "moe.moe_layer_ids": "[0, 4, 5]", "moe.license": "Apache-2.0", "moe.source_repo": "a/b",
    }  # fmt: skip
    return table.replace_schema_metadata(meta | metadata)


def test_transport_file(make_trace: Make, tmp_path: Path) -> None:
    trace = make_trace(weights=False)
    path = tmp_path / "transport.parquet"
    pq.write_table(transport_table(trace), path, row_group_size=6)
    back = read_trace(path)
    assert back.meta.moe_layer_ids == (0, 4, 5)
    assert (back.meta.licence, back.meta.source) == ("Apache-2.0", "a/b")
    for name in ("request_id", "position", "decode", "step", "experts"):
        assert np.array_equal(back.columns[name], trace.columns[name])
    names = [trace.domains[d] for d in trace.domain]
    assert [back.domains[d] for d in back.domain] == names
    assert back.domains == tuple(dict.fromkeys(names))  # by first appearance, over all chunks
    assert {chunk.domains for chunk in iter_trace(path, 4)} == {back.domains}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"moe.num_layers": "4"}, r"moe.num_layers 4, but moe.moe_layer_ids \[0, 4, 5\]"),
        ({"moe.top_k": "two"}, "not readable"),
        ({"moe.moe_layer_ids": "7"}, "not readable"),
        ({"moe.moe_layer_ids": "[" * 100_000}, "not readable"),
        ({"moe.num_experts": "1"}, "top_k 2 -- at most num_experts 1"),
    ],
)
def test_bad_transport_metadata(
    make_trace: Make, tmp_path: Path, metadata: dict[str, str], message: str
) -> None:
    path = tmp_path / "transport.parquet"
    pq.write_table(transport_table(make_trace(), **metadata), path)
    refused(path, message)


def test_unknown_phase(make_trace: Make, tmp_path: Path) -> None:
    path = tmp_path / "transport.parquet"
    table = transport_table(make_trace())
    phases = pa.array(["verify"] * table.num_rows)
    pq.write_table(table.set_column(2, "phase", phases), path)
    refused(path, "phase 'verify' -- prefill or decode")


@pytest.mark.parametrize("column", ["phase", "domain"])
def test_text_that_is_not_utf8(make_trace: Make, tmp_path: Path, column: str) -> None:
    path = tmp_path / "transport.parquet"
    table = transport_table(make_trace())
    texts = pa.array([b"\xff"] * table.num_rows, pa.binary()).view(pa.string())
    pq.write_table(table.set_column(table.schema.get_field_index(column), column, texts), path)
    refused(path, "damaged.*utf-8")


def model(**changes: Any) -> ModelSpec:
    fields = {
        "name": "m", "family": "mixtral", "num_layers": 3, "hidden_size": 8, "vocab_size": 16,
        "tie_embeddings": False, "moe_layer_ids": (0, 1, 2), "num_experts": 8, "top_k": 2,
        "expert_width": 4, "weight_dtype": "bf16", "expert_dtype": "bf16",
        "activation_dtype": "bf16", "kv_dtype": "bf16", "comm_size": 8,
        "attention": Attention(
            kind="gqa", num_heads=2, num_kv_heads=2, head_dim=4, v_head_dim=4, windows=(None,) * 3
        ),
    } | changes  # fmt: skip
    return ModelSpec.model_validate(fields)


def test_trace_against_model(make_trace: Make) -> None:
    trace = make_trace()
    check_against_model(trace, model())
    with pytest.raises(InputError, match="num_experts: trace 8, config 9; top_k: trace 2, co"):
        check_against_model(trace, model(num_experts=9, top_k=3))
    with pytest.raises(InputError, match="layers 0 of the trace are no MoE layers"):
        check_against_model(trace, model(moe_layer_ids=(1, 2), dense_width=4))
    partial = replace(
        trace, meta=replace(trace.meta, moe_layer_ids=(0, 2)), experts=trace.experts[:, :2],
        weights=None,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"records 2 of 3 MoE layers \(missing: 1\)"):
        check_against_model(partial, model())


def test_checks_count_over_chunks(make_trace: Make) -> None:
    trace = make_trace(lengths=(3,), layers=1, experts=4, top_k=1)
    many = 2**22 + 10  # more than one chunk of cells
    columns = {name: np.repeat(column[:1], many, axis=0) for name, column in trace.columns.items()}
    columns["experts"][[5, many - 2]] = 4
    with pytest.raises(InputError, match=r"2 cells out of range \(first: row 105, layer 0\)"):
        check_cells(columns, trace.meta, 3, "x", first_row=100)


def test_real_files(moeplan_data: Path) -> None:
    folder = moeplan_data / "traces"
    oss = read_trace(folder / "gpt-oss-20b-mmlu.parquet", weights=False)
    assert (oss.num_tokens, oss.num_requests, oss.num_layers) == (125_771, 443, 24)
    assert oss.decode.all()
    assert len(oss.domains) > 50
    with pytest.raises(InputError, match=r"199 cells missing \(first: row 1, layer 4\)"):
        read_trace(folder / "dirty-mixtral-8x7b-humaneval.parquet")
    with pytest.warns(TraceWarning, match="836 of 4357 rows have no request"):
        qwen = read_trace(folder / "qwen1.5-moe-gsm8k.parquet")
    assert (qwen.num_tokens, qwen.num_requests) == (4357 - 836, 25)
    assert qwen.meta.moe_layer_ids == (0, 8, 12, 18, 23)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flame = read_trace(folder / "flame-moe-290m-dclm.parquet")
        granite = read_trace(folder / "granite-3.0-1b-artificial.parquet")
    assert (flame.num_tokens, bool(flame.decode.any())) == (2048, False)
    assert (granite.num_tokens, granite.weights) == (216, None)
