"""Loads without tokens: what is written comes back, and damage is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from basis.errors import InputError
from traces.counts_trace import (
    COUNTS_KEY,
    CountsTrace,
    is_counts,
    read_counts,
    write_counts,
)


def make(counts: Any = None, **changes: Any) -> CountsTrace:
    values = np.arange(24).reshape(2, 3, 4) if counts is None else counts
    about: dict[str, Any] = {"model": "tiny", "moe_layer_ids": (1, 2, 5)[: values.shape[1]]}
    return CountsTrace(counts=values, **(about | changes))


@settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    counts=arrays(
        np.int64, st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 6)),
        elements=st.integers(0, 2**62),
    ),
    source=st.text(st.characters(codec="utf-8"), max_size=10),
    relative=st.booleans(),
)  # fmt: skip
def test_round_trip(tmp_path: Path, counts: Any, source: str, relative: bool) -> None:
    top_k = min(2, counts.shape[2])
    written = make(
        counts, source=source, relative=relative, top_k=top_k, licence="MIT", note="a note"
    )
    write_counts(written, tmp_path / "c.parquet")
    back = read_counts(tmp_path / "c.parquet")
    assert back.counts.dtype == np.int64
    assert np.array_equal(back.counts, counts)
    for name in ("model", "moe_layer_ids", "top_k", "source", "licence", "note", "relative"):
        assert getattr(back, name) == getattr(written, name)


def test_loads_are_sums_over_steps() -> None:
    counts = make()
    for layer in range(3):
        for expert in range(4):
            wanted = sum(int(counts.counts[step, layer, expert]) for step in range(2))
            assert counts.loads[layer, expert] == wanted
    assert counts.num_experts == 4


def test_rows_are_readable_by_others(tmp_path: Path) -> None:
    write_counts(make(), tmp_path / "c.parquet")
    table = pq.read_table(tmp_path / "c.parquet").to_pydict()
    assert table["step"] == [0, 0, 0, 1, 1, 1]
    assert table["layer"] == [1, 2, 5, 1, 2, 5]
    assert table["counts"][4] == [16, 17, 18, 19]


@pytest.mark.parametrize(
    ("counts", "changes", "message"),
    [
        (np.zeros((2, 3, 4)), {}, r"float64\[2, 3, 4\] -- int64"),
        (np.zeros((3, 4), np.int64), {}, r"int64\[3, 4\] -- int64 \[steps, layers, E\]"),
        (np.zeros((0, 3, 4), np.int64), {}, "counts: int64"),
        (np.full((1, 3, 4), -2), {}, "counts: -2 -- at least 0"),
        (None, {"moe_layer_ids": (1, 2)}, "for 3 layers"),
        (None, {"moe_layer_ids": (2, 1, 5)}, "ascending"),
        (None, {"moe_layer_ids": (-1, 1, 5)}, "one index from 0"),
        (None, {"top_k": 5}, "top_k 5 -- 1 to the 4 experts"),
        (None, {"top_k": 0}, "top_k 0"),
    ],
)
def test_impossible_counts(counts: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(counts, **changes)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        write_counts(make(), tmp_path / "absent" / "c.parquet")


@pytest.mark.usefixtures("full_disk")
def test_a_failed_write_changes_nothing(tmp_path: Path) -> None:
    target, folder = tmp_path / "c.parquet", tmp_path / "folder"
    target.write_text("before")
    folder.mkdir()
    with pytest.raises(InputError, match="folder: a folder -- name a file"):
        write_counts(make(), folder)
    large = np.random.default_rng(0).integers(0, 2**60, (50, 3, 4))
    with pytest.raises(InputError, match=r"c\.parquet: not written \(File too large\)"):
        write_counts(make(large), target)
    assert target.read_text() == "before"
    assert set(tmp_path.iterdir()) == {target, folder}


def test_what_is_a_file_of_counts(tmp_path: Path) -> None:
    write_counts(make(), tmp_path / "c.parquet")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    (tmp_path / "text").write_text("layer,expert,count\n")
    assert is_counts(tmp_path / "c.parquet")
    for name in ("other.parquet", "text", "absent"):
        assert not is_counts(tmp_path / name)


Spoil = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda about: about | {"schema": "moeplan.counts/2"}, "no loads of moeplan.counts/1"),
        (lambda about: about | {"more": 1}, "no loads of"),
        (lambda about: {k: v for k, v in about.items() if k != "note"}, "no loads of"),
        (
            lambda about: about | {"moe_layer_ids": [1, 2, 5, 6]},
            "24 counts for 4 layers|6 rows for 4 layers",
        ),
        (lambda about: about | {"moe_layer_ids": []}, "24 counts for 0 layers|6 rows for 0 layers"),
        (
            lambda about: about | {"moe_layer_ids": [5, 2, 1]},
            "c.parquet: (counts: moe_layer_ids|column layer)",
        ),
        (lambda about: about | {"top_k": 9}, "c.parquet: counts: top_k 9"),
    ],
)
def test_damaged_descriptions(tmp_path: Path, spoil: Spoil, message: str) -> None:
    path = tmp_path / "c.parquet"
    write_counts(make(), path)
    table = pq.read_table(path)
    about = spoil(json.loads(table.schema.metadata[COUNTS_KEY]))
    pq.write_table(table.replace_schema_metadata({COUNTS_KEY: json.dumps(about)}), path)
    with pytest.raises(InputError, match=message):
        read_counts(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not a readable Parquet file of loads"),
        (b"", "not a readable Parquet file of loads"),
        (b"version https://git-lfs.github.com/spec/v1\n" + b"x" * 90, "a Git LFS pointer"),
    ],
)
def test_unreadable_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "c.parquet").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_counts(tmp_path / "c.parquet")


def test_truncated_and_flipped(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    write_counts(make(np.arange(3000).reshape(250, 3, 4)), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not a readable Parquet file of loads"):
        read_counts(path)
    spoilt = bytearray(whole)
    spoilt[len(whole) // 4] ^= 0xFF
    path.write_bytes(bytes(spoilt))
    with pytest.raises(InputError, match=r"c\.parquet: "):
        read_counts(path)


def test_another_column_type(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    write_counts(make(), path)
    table = pq.read_table(path)
    lists = pa.array(table["counts"].to_pylist(), pa.list_(pa.int64()))
    changed = table.set_column(2, "counts", lists).replace_schema_metadata(table.schema.metadata)
    pq.write_table(changed, path)
    with pytest.raises(InputError, match=r"column counts is list<.*must be fixed_size_list"):
        read_counts(path)


def test_more_cells_than_memory_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_counts(make(), tmp_path / "c.parquet")
    monkeypatch.setattr("traces.counts_trace._MAX_CELLS", 20)
    with pytest.raises(InputError, match="6 rows of 4 experts -- at most 20 counts"):
        read_counts(tmp_path / "c.parquet")


@pytest.mark.parametrize(
    "change",
    [
        {"moe_layer_ids": [1.5, 2, 5]}, {"moe_layer_ids": ["a", 2, 5]}, {"moe_layer_ids": 3},
        {"top_k": "2"}, {"model": 3}, {"relative": "no"},
    ],
)  # fmt: skip
def test_descriptions_of_other_types(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "c.parquet"
    write_counts(make(), path)
    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[COUNTS_KEY]) | change
    pq.write_table(table.replace_schema_metadata({COUNTS_KEY: json.dumps(about)}), path)
    with pytest.raises(InputError, match="has the wrong type"):
        read_counts(path)


def test_rows_in_another_order(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    write_counts(make(), path)
    pq.write_table(pq.read_table(path).take([1, 0, 2, 3, 4, 5]), path)
    with pytest.raises(InputError, match="column layer is not step after step"):
        read_counts(path)


@pytest.mark.parametrize("where", [(0,), (0, 1)])
def test_nulls(tmp_path: Path, where: tuple[int, ...]) -> None:
    path = tmp_path / "c.parquet"
    write_counts(make(), path)
    table = pq.read_table(path)
    values = table["counts"].to_pylist()
    if len(where) == 1:
        values[0] = None
    else:
        values[0][1] = None
    lists = pa.array(values, pa.list_(pa.int64(), 4))
    changed = table.set_column(2, "counts", lists).replace_schema_metadata(table.schema.metadata)
    pq.write_table(changed, path)
    with pytest.raises(InputError, match="nulls in column counts"):
        read_counts(path)
