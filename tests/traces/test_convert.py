"""Conversions lose nothing, and a bad npz is refused before it is loaded."""

import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from basis.errors import InputError
from traces.convert import convert, read_jsonl, read_npz, write_jsonl, write_npz
from traces.routing_trace import RoutingTrace, TraceWarning, read_trace, write_trace

Make = Callable[..., RoutingTrace]


def assert_same(a: RoutingTrace, b: RoutingTrace) -> None:
    assert (a.meta, a.domains) == (b.meta, b.domains)
    assert a.columns.keys() == b.columns.keys()
    for name in a.columns:
        assert a.columns[name].dtype == b.columns[name].dtype
        assert np.array_equal(a.columns[name], b.columns[name])


@pytest.mark.parametrize("weights", [True, False])
def test_round_trip_over_npz(make_trace: Make, tmp_path: Path, weights: bool) -> None:
    trace = make_trace(weights=weights)
    write_trace(trace, tmp_path / "a.parquet")
    convert(tmp_path / "a.parquet", tmp_path / "b.npz")
    convert(tmp_path / "b.npz", tmp_path / "c.parquet")
    assert_same(trace, read_npz(tmp_path / "b.npz"))
    assert_same(trace, read_trace(tmp_path / "c.parquet"))


def test_jsonl_has_every_number(make_trace: Make, tmp_path: Path) -> None:
    trace = make_trace(lengths=(3000, 2000))  # more than one block of rows
    write_trace(trace, tmp_path / "a.parquet")
    convert(tmp_path / "a.parquet", tmp_path / "b.jsonl")
    head, *rows = map(json.loads, (tmp_path / "b.jsonl").read_text().splitlines())
    assert head["schema"] == "moeplan.trace/1"
    assert head["moe_layer_ids"] == [0, 1, 2]
    assert [r["phase"] == "decode" for r in rows] == trace.decode.tolist()
    assert [head["domains"].index(r["domain"]) for r in rows] == trace.domain.tolist()
    for name in ("request_id", "position", "step", "experts", "weights"):
        back = np.array([r[name] for r in rows], trace.columns[name].dtype)
        assert np.array_equal(back, trace.columns[name])


def test_jsonl_without_weights(make_trace: Make, tmp_path: Path) -> None:
    write_trace(make_trace(weights=False), tmp_path / "a.parquet")
    convert(tmp_path / "a.parquet", tmp_path / "b.jsonl")
    lines = (tmp_path / "b.jsonl").read_text().splitlines()
    assert "weights" not in json.loads(lines[1])


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("a.csv", "b.npz", "cannot read '.csv' -- one of .parquet, .npz, .jsonl"),
        ("a.parquet", "b.txt", "cannot write '.txt' -- one of .parquet, .npz, .jsonl"),
        ("a.parquet", "a.parquet", "same file"),
        ("a.parquet", "absent/b.npz", "no such folder"),
        ("absent.parquet", "b.npz", "no such file"),
        ("absent.npz", "b.parquet", "no such file"),
        ("absent.jsonl", "b.parquet", "no such file"),
    ],
)
def test_impossible_conversions(
    make_trace: Make, tmp_path: Path, source: str, target: str, message: str
) -> None:
    write_trace(make_trace(), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=message):
        convert(tmp_path / source, tmp_path / target)


@pytest.fixture
def arrays(make_trace: Make, tmp_path: Path) -> dict[str, Any]:
    write_npz(make_trace(), tmp_path / "good.npz")
    with np.load(tmp_path / "good.npz") as archive:
        return {name: archive[name] for name in archive.files}


def refuse(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(InputError, match=message):
        read_npz(path)


def test_wrong_members(arrays: dict[str, Any], tmp_path: Path) -> None:
    refuse(tmp_path, {k: v for k, v in arrays.items() if k != "step"}, r"missing \['step'\]")
    refuse(tmp_path, arrays | {"more": np.zeros(3)}, r"unknown \['more'\]")
    refuse(tmp_path, arrays | {"meta": np.zeros(3)}, r"meta is float64\[3\] -- one text")
    refuse(tmp_path, arrays | {"meta": np.array(b"{}")}, r"meta is \|S2\[\] -- one text")
    no_text = np.array([0x7FFFFFFF], np.int32).view("<U1").reshape(())
    refuse(tmp_path, arrays | {"meta": no_text}, "bad.npz: 'utf-32-le' codec can't decode")
    refuse(tmp_path, arrays | {"meta": np.array("{}")}, "trace metadata: missing")
    refuse(tmp_path, arrays | {"step": arrays["step"].astype(float)}, "step is float64")
    refuse(tmp_path, arrays | {"request_id": np.array(3, np.int32)}, r"request_id is int32\[\]")
    none = {name: a if name == "meta" else a[:0] for name, a in arrays.items()}
    refuse(tmp_path, none, r"no row has a request \(0 rows\)")


def test_rows_without_a_request_are_left_out(arrays: dict[str, Any], tmp_path: Path) -> None:
    arrays["request_id"][:3] = -1
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.warns(TraceWarning, match="3 of 20 rows have no request"):
        trace = read_npz(tmp_path / "a.npz")
    assert np.array_equal(trace.experts, arrays["experts"][3:])
    lines = [json.loads(line) for line in _jsonl_of(trace, tmp_path)]
    lines[1]["request_id"] = -1
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.warns(TraceWarning, match="1 of 17 rows have no request"):
        assert np.array_equal(read_jsonl(tmp_path / "b.jsonl").experts, trace.experts[1:])


def _jsonl_of(trace: RoutingTrace, folder: Path) -> list[str]:
    write_jsonl(trace, folder / "a.jsonl")
    return (folder / "a.jsonl").read_text().splitlines()


def test_bad_cells(arrays: dict[str, Any], tmp_path: Path) -> None:
    experts = arrays["experts"].copy()
    experts[3, 1] = 4
    refuse(tmp_path, arrays | {"experts": experts}, r"repeated expert \(first: row 3, layer 1\)")
    twice = {k: v if k == "meta" else v[[0, 1, 1]] for k, v in arrays.items()}
    refuse(tmp_path, twice, "1 rows repeat a position")


def test_nothing_is_unpickled(arrays: dict[str, Any], tmp_path: Path) -> None:
    refuse(tmp_path, arrays | {"step": np.array([{"a": 1}], object)}, "holds pickled objects")


def test_truncated_npz(arrays: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    path.write_bytes((tmp_path / "good.npz").read_bytes()[:-300])
    with pytest.raises(InputError, match="not a readable npz"):
        read_npz(path)


def test_archives_that_python_does_not_read(arrays: dict[str, Any], tmp_path: Path) -> None:
    good, path = (tmp_path / "good.npz").read_bytes(), tmp_path / "bad.npz"
    entry = good.index(b"PK\x01\x02")
    for at, flag in ((entry + 8, 1), (entry + 10, 99)):  # encrypted; of no known compression
        path.write_bytes(good[:at] + bytes([flag]) + good[at + 1 :])
        with pytest.raises(InputError, match=r"bad\.npz: not a readable npz"):
            read_npz(path)
    for cut in (b"{'descr': '<f4', 'shape': (((((", b"(" * 5000):
        data = b"\x93NUMPY\x01\x00" + len(cut).to_bytes(2, "little") + cut
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("meta.npy", data)
        with pytest.raises(InputError, match=r"bad\.npz: meta\.npy: no npy array"):
            read_npz(path)


@pytest.mark.parametrize("suffix", [".npz", ".jsonl", ".parquet"])
def test_a_target_that_cannot_be_written_changes_nothing(
    tmp_path: Path, make_trace: Make, suffix: str, request: pytest.FixtureRequest
) -> None:
    source, target = tmp_path / "a.parquet", tmp_path / f"keep{suffix}"
    write_trace(make_trace(lengths=(400, 300)), source)
    target.write_text("before")
    request.getfixturevalue("full_disk")
    with pytest.raises(InputError, match=rf"keep\{suffix}: not written \(File too large\)"):
        convert(source, target)
    assert target.read_text() == "before"
    assert set(tmp_path.iterdir()) == {source, target}


def test_a_folder_or_a_second_name_is_no_target(make_trace: Make, tmp_path: Path) -> None:
    source, folder, second = tmp_path / "a.parquet", tmp_path / "e.parquet", tmp_path / "b.parquet"
    write_trace(make_trace(), source)
    folder.mkdir()
    second.hardlink_to(source)
    with pytest.raises(InputError, match=r"e\.parquet: a folder -- name a file"):
        convert(source, folder)
    with pytest.raises(InputError, match=r"b\.parquet: source and target are the same file"):
        convert(source, second)
    assert set(tmp_path.iterdir()) == {source, folder, second}


def test_a_header_that_declares_ten_gigabytes(arrays: dict[str, Any], tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<u2", "fortran_order": False, "shape": (5 * 10**9,)}
    )
    path = tmp_path / "bad.npz"
    np.savez(path, **{k: v for k, v in arrays.items() if k != "experts"})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("experts.npy", header.getvalue() + bytes(1000))
    with pytest.raises(InputError, match=r"experts.npy: its header declares 10000000000 bytes"):
        read_npz(path)


@pytest.mark.parametrize("weights", [True, False])
def test_round_trip_over_jsonl(
    make_trace: Make, tmp_path: Path, weights: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("traces.json_lines._BLOCK_BYTES", 3000)
    trace = make_trace(lengths=(70, 40), weights=weights)
    write_trace(trace, tmp_path / "a.parquet")
    convert(tmp_path / "a.parquet", tmp_path / "b.jsonl")
    convert(tmp_path / "b.jsonl", tmp_path / "c.parquet")
    assert_same(trace, read_jsonl(tmp_path / "b.jsonl"))
    assert_same(trace, read_trace(tmp_path / "c.parquet"))


def test_candidates_come_back_from_jsonl(make_trace: Make, tmp_path: Path) -> None:
    plain = make_trace()
    rng = np.random.default_rng(0)
    shape = (plain.num_tokens, plain.num_layers)
    trace = replace(
        plain,
        meta=replace(plain.meta, num_candidates=4),
        candidates=rng.random((*shape, 8)).argsort(axis=-1)[..., :4].astype(np.uint16),
        candidate_scores=np.sort(rng.random((*shape, 4)).astype(np.float16))[..., ::-1],
    )
    write_jsonl(trace, tmp_path / "a.jsonl")
    assert_same(trace, read_jsonl(tmp_path / "a.jsonl"))


Lines = list[dict[str, Any]]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r: r[:1], "no rows after the first line"),
        (lambda r: r[1:], "line 1: trace metadata: missing"),
        (lambda r: [r[0], r[1], *r[1:]], "1 rows repeat a position"),
        (lambda r: [r[0], r[1] | {"phase": "both"}], "phase must be prefill or decode"),
        (lambda r: [r[0], r[1] | {"domain": "other"}], "a domain is none of the first line's"),
        (lambda r: [r[0], r[1] | {"step": None}], "a row has no step"),
        (lambda r: [r[0], r[1] | {"experts": [[0, 1]] * 2}], "experts of a row is not 3 lists"),
        (lambda r: [r[0], r[1] | {"experts": [[0, 1], [0, 1], [0]]}], "has 1 values, 2 are right"),
        (lambda r: [r[0], r[1] | {"experts": [[0, 65544]] * 3}], "ids from 0 to 65544"),
        (lambda r: [r[0], r[1] | {"experts": [[0, 8]] * 3}], "cells out of range"),
        (lambda r: [r[0], r[1] | {"experts": [[0, None]] * 3}], "has nulls"),
        (lambda r: [r[0], r[1] | {"weights": None}, r[2]], "weights of a row is not"),
        (lambda r: [r[0], r[1] | {"request_id": "a"}], "lines 1 to 2"),
    ],
)
def test_bad_jsonl(
    make_trace: Make, tmp_path: Path, spoil: Callable[[Lines], Lines], message: str
) -> None:
    write_jsonl(make_trace(), tmp_path / "a.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(x) + "\n" for x in spoil(lines)))
    with pytest.raises(InputError, match=message):
        read_jsonl(tmp_path / "a.jsonl")


def test_truncated_jsonl(make_trace: Make, tmp_path: Path) -> None:
    write_jsonl(make_trace(), tmp_path / "a.jsonl")
    whole = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl").write_bytes(whole[:-20])
    with pytest.raises(InputError, match=r"line 21 is not JSON .* was the file cut off"):
        read_jsonl(tmp_path / "a.jsonl")


def test_jsonl_that_takes_too_much_memory(
    make_trace: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(make_trace(), tmp_path / "a.jsonl")
    monkeypatch.setattr("traces.convert.MAX_BYTES", 100)
    with pytest.raises(InputError, match="more than 100 bytes in memory -- use Parquet"):
        read_jsonl(tmp_path / "a.jsonl")
