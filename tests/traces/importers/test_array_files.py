"""npy, npz and safetensors of others: views where they are good, one message where not."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from basis.errors import InputError
from traces.importers.files import (
    npy_kind,
    npz_names,
    open_npy,
    open_safetensors,
    parse_npy,
    read_npz,
)

save = pytest.importorskip("safetensors.numpy")
KINDS = ["i1", "u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8"]
some_integers = st.sampled_from(KINDS).flatmap(
    lambda kind: arrays.arrays(kind, arrays.array_shapes(min_dims=0, max_dims=3))
)


@settings(deadline=None, max_examples=30)
@given(array=some_integers, fortran=st.booleans())
def test_npy(array: np.ndarray, fortran: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("npy")
    np.save(folder / "x.npy", np.asarray(array, order="F" if fortran else "C"))
    data = (folder / "x.npy").read_bytes()
    for found in (open_npy(folder / "x.npy"), parse_npy(data, "x")):
        assert found.dtype == array.dtype
        assert np.array_equal(found, array)
    assert npy_kind(data) == (array.ndim, array.dtype.kind)
    np.savez_compressed(folder / "x.npz", a=array, b=array)
    assert npz_names(folder / "x.npz") == {"a", "b"}
    assert np.array_equal(read_npz(folder / "x.npz", {"a", "c"})["a"], array)


@settings(deadline=None, max_examples=30)
@given(tensors=st.dictionaries(st.text("abc_1", min_size=1, max_size=4), some_integers, max_size=4))
def test_safetensors(
    tensors: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    save.save_file(tensors, path, metadata={"format": "pt"})
    found = open_safetensors(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert np.array_equal(found[name], tensor)


def safetensors(header: Any, data: bytes = bytes(16), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(kind: str = "I64", shape: Any = (2,), place: Any = (0, 16)) -> dict[str, Any]:
    return {"a": {"dtype": kind, "shape": shape, "data_offsets": place}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"abc", "declares 6513249 bytes, 0 are there"),
        (safetensors({}, length=10**10), "declares 10000000000 bytes, .* no safetensors file"),
        (safetensors(b"{"), "its header is no JSON"),
        (safetensors([1]), "its header is a list"),
        (safetensors(b"[" * 100000), "its header is no JSON"),
        (safetensors({"a": 1}), "tensor 'a' lacks a type"),
        (safetensors({"a": {"dtype": "I64"}}), "tensor 'a' lacks a type"),
        (safetensors(tensor(kind="F32")), "tensor 'a' is F32 -- integers"),
        (safetensors(tensor(shape=(10**9,), place=(0, 8 * 10**9))), "declares 8000000000 bytes"),
        (safetensors(tensor(shape=(3,))), "declares 24 bytes at 0 to 16, 16 are there"),
        (safetensors(tensor(shape=(-1, -2), place=(0, 16))), "declares 16 bytes"),
        (safetensors(tensor(place=(-16, 0))), "declares 16 bytes at -16 to 0"),
        (safetensors(tensor(place=(8, 24))), "at 8 to 24, 16 are there -- truncated"),
        (safetensors(tensor(shape=(0,), place=(99, 99))), "at 99 to 99"),
    ],
)
def test_damaged_safetensors(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        open_safetensors(path)


def cut(data: bytes) -> bytes:
    return data[:-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, "declares 24 bytes, 23 are there"),
        (lambda data: data + b"x", "declares 24 bytes, 25 are there"),
        (lambda data: data[:40], "no npy array"),
        (lambda data: data.replace(b"(3,)", b"(9,)"), "declares 72 bytes, 24 are there"),
        (lambda data: data[:6] + b"\x03" + data[7:], "npy version"),
        (lambda data: data.replace(b"'<i8'", b"'|O' "), "holds pickled objects"),
    ],
)
def test_damaged_npy(tmp_path: Path, change: Callable[[bytes], bytes], message: str) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.arange(3))
    data = change(path.read_bytes())
    path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        open_npy(path)
    with pytest.raises(InputError, match=message):
        parse_npy(data, "x")
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("a.npy", data)
    with pytest.raises(InputError, match=message):
        read_npz(tmp_path / "x.npz", {"a"})


def test_an_npz_that_is_too_large(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.arange(3))
    with pytest.raises(InputError, match=r"declares 152 bytes -- at most 100"):
        read_npz(tmp_path / "x.npz", {"a"}, most=100)


def test_an_npz_with_a_flipped_bit(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.arange(300))
    data = bytearray((tmp_path / "x.npz").read_bytes())
    data[1000] ^= 1
    (tmp_path / "x.npz").write_bytes(data)
    with pytest.raises(InputError, match=r"not a readable npz .*CRC"):
        read_npz(tmp_path / "x.npz", {"a"})


def test_no_npz(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(b"PK nothing")
    assert npz_names(tmp_path / "x.npz") == set()
    with pytest.raises(InputError, match="not a readable npz"):
        read_npz(tmp_path / "x.npz", {"a"})


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        open_npy(tmp_path / "x.npy")


def test_other_bytes_have_no_kind() -> None:
    assert npy_kind(b"") is None
    assert npy_kind(b"\x93NUMPY\x01\x00") is None
