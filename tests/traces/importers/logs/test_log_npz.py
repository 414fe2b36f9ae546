"""npz per request: nothing is unpickled, and headers are not believed."""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from basis.errors import InputError
from traces.importers.base import Asked
from traces.importers.formats import Imported, import_file
from traces.importers.log_npz import FORMATS_NPZ
from traces.routing_trace import RoutingTrace, read_trace

rng = np.random.default_rng(5)


def routing(tokens: int, layers: int = 3) -> Any:
    return rng.random((tokens, layers, 8)).argsort(axis=-1)[..., :2].astype(np.uint8)


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, request_id=np.array(4), **arrays)
    return path


def do_import(source: Path, asked: Asked) -> tuple[Imported, RoutingTrace]:
    target = source.parent / "a.parquet"
    return import_file(source, target, asked=asked, formats=FORMATS_NPZ), read_trace(target)


@pytest.mark.parametrize("layers", [3, 4])
def test_both_layer_axes(layers: int, tmp_path: Path, asked: Asked) -> None:
    ids = routing(6, layers)
    if layers == 4:
        ids[:, 0] = 0
    path = save(tmp_path / "r.npz", prompt_token_ids=np.arange(4), routed_experts=ids)
    _, trace = do_import(path, asked)
    assert np.array_equal(trace.experts, ids[:, -3:])
    assert trace.decode.tolist() == [False] * 4 + [True] * 2
    assert trace.step.tolist() == [0] * 4 + [1, 2]


def test_rows_never_captured_are_dropped(tmp_path: Path, asked: Asked) -> None:
    ids = routing(6)
    ids[2:4] = 0
    found, trace = do_import(save(tmp_path / "r.npz", routed_experts=ids), asked)
    assert sum(found.dropped.values()) == 2
    assert trace.position.tolist() == [0, 1, 4, 5]
    assert any("no prompt_token_ids" in note for note in found.notes)


def test_more_rows_than_a_chunk(tmp_path: Path, asked: Asked) -> None:
    ids = routing(20_000)
    _, trace = do_import(
        save(tmp_path / "r.npz", prompt_token_ids=np.arange(17_000), routed_experts=ids), asked
    )
    assert np.array_equal(trace.experts, ids)
    assert np.array_equal(trace.position, np.arange(20_000))
    assert int(trace.decode.sum()) == 3000


def pickled(path: Path, value: Any) -> None:
    np.savez(path, request_id=np.array(4), routed_experts=np.array(value, object))


@pytest.mark.parametrize("value", [None, [1, 2], {"a": 1}])
def test_pickled_requests_are_counted_in_a_folder(value: Any, tmp_path: Path, asked: Asked) -> None:
    folder = tmp_path / "requests"
    folder.mkdir()
    ids = routing(5)
    save(folder / "1.npz", routed_experts=ids)
    pickled(folder / "2.npz", value)
    found, trace = do_import(folder, asked)
    name = "files whose routed_experts is a pickled object (no routing returned)"
    assert found.dropped == {name: 1}
    assert np.array_equal(trace.experts, ids)


def test_a_single_pickle_is_refused(tmp_path: Path, asked: Asked) -> None:
    pickled(tmp_path / "2.npz", None)
    with pytest.raises(InputError, match="holds pickled objects, which are not read"):
        do_import(tmp_path / "2.npz", asked)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (routing(5, 2), "2 layers recorded"),
        (routing(5)[..., :1], "1 experts per token"),
        (routing(5) + np.uint8(7), "out of range"),
        (routing(5).astype(float), "expert ids are integers"),
        (np.array(3), "expert ids are integers"),
        (routing(5)[:, 0], "expert ids are integers"),
        (routing(0), "no token is left"),
    ],
)
def test_bad_arrays(ids: Any, message: str, tmp_path: Path, asked: Asked) -> None:
    with pytest.raises(InputError, match=message):
        do_import(save(tmp_path / "r.npz", routed_experts=ids), asked)
    assert not (tmp_path / "a.parquet").exists()


def test_more_rows_than_tokens(tmp_path: Path, asked: Asked) -> None:
    path = save(
        tmp_path / "r.npz", prompt_token_ids=np.arange(2), output_token_ids=np.arange(2),
        routed_experts=routing(5),
    )  # fmt: skip
    with pytest.raises(InputError, match="5 rows for 4 prompt and output tokens"):
        do_import(path, asked)


def test_ten_gigabytes_in_a_small_header(tmp_path: Path, asked: Asked) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10**10 // 6, 3, 2)}
    )
    path = save(tmp_path / "r.npz", prompt_token_ids=np.arange(2))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("routed_experts.npy", header.getvalue() + bytes(100))
    with pytest.raises(InputError, match=r"its header declares 9999999996 bytes, 100 are there"):
        do_import(path, asked)
