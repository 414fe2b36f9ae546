"""JSON lines are the same in blocks of any size, and damage names its line."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from basis.errors import InputError
from traces.json_lines import rows_of_lists, tables

SCHEMA = pa.schema({"a": pa.int32(), "b": pa.list_(pa.float32()), "c": pa.string()})


@settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "a": st.integers(-(2**31), 2**31 - 1),
                "b": st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False)),
                "c": st.text(),
                "other": st.one_of(st.none(), st.integers(), st.lists(st.text())),
            },
        )
    ),
    block=st.integers(1, 300),
    blank=st.sampled_from(["", "\n", " \n\n"]),
)
def test_as_the_json_module_reads_them(
    rows: list[dict[str, object]],
    block: int,
    blank: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("traces.json_lines._BLOCK_BYTES", block)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" + blank for row in rows))
    found, count = [], 1
    for record, table in tables(path, SCHEMA):
        assert record == count
        count += table.num_rows
        found += table.to_pylist()
    assert found == [{name: row.get(name) for name in "abc"} for row in rows]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n{"a": 2', "line 2 is not JSON .*cut off"),
        ('{"a": 1}\n[1]\n', "line 2 is no object"),
        (b'{"a": 1}\n{"c": "\xff"}\n', "line 2 is not JSON"),
        ('{"a": 1}\n{"a": "x"}\n', "lines 1 to 2: .* the same type in all"),
        ('{"a": 1.5}\n', "lines 1 to 1"),
        ('{"a": 3000000000}\n', "lines 1 to 1"),
        ("[" * 100_000 + "\n", "line 1 is not JSON"),
    ],
)
def test_damage(text: str | bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(InputError, match=message):
        list(tables(tmp_path / "a.jsonl", SCHEMA))


def test_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("traces.json_lines._BLOCK_BYTES", 2**10)
    monkeypatch.setattr("traces.json_lines._MOST_LINE_BYTES", 2**20)
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n' + b" " * 2**21)
    with pytest.raises(InputError, match="line 2 is longer than 1 MiB"):
        list(tables(tmp_path / "a.jsonl", SCHEMA))


def test_lists_of_one_length() -> None:
    def column(values: list[object]) -> object:
        return pa.chunked_array([pa.array(values, pa.list_(pa.int32()))])

    assert rows_of_lists(column([[1, 2], [3, 4]]), 2, "x").tolist() == [[1, 2], [3, 4]]
    for values, message in (
        ([[1, 2], [3]], "x has 1 values, 2 are right"),
        ([[1, 2], None], "x has 0 values"),
        ([[1, 2], [3, None]], "x has nulls"),
    ):
        with pytest.raises(InputError, match=message):
            rows_of_lists(column(values), 2, "x")
