"""Files of torch.save: what is no data is not loaded, and sizes that lie cost nothing."""

import io
import os
import pickle
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from basis.errors import InputError
from traces.importers.megatron import FORMATS_MEGATRON
from traces.importers.sglang_counts import FORMATS_SGLANG_COUNTS
from traces.importers.sglang_recorder import FORMATS_SGLANG_RECORDER
from traces.importers.torch_files import integers, load_torch, peek_pickle, whole_numbers

torch = pytest.importorskip("torch")
READERS = [*FORMATS_SGLANG_RECORDER, *FORMATS_SGLANG_COUNTS, *FORMATS_MEGATRON]
MIB = 2**20


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rewritten(path: Path, change: Callable[[str, bytes], bytes]) -> Path:
    """Write the zip again with changed members."""
    with zipfile.ZipFile(path) as old:
        members = [(name, old.read(name)) for name in old.namelist()]
    with zipfile.ZipFile(path, "w") as new:
        for name, data in members:
            new.writestr(name, change(name, data))
    return path


def test_tensors_lists_and_numbers_come_back(tmp_path: Path) -> None:
    data = {"a": torch.arange(6, dtype=torch.int32).reshape(2, 3), "b": [1, None, "x", 0.5]}
    torch.save(data, tmp_path / "x.pt")
    found = load_torch(tmp_path / "x.pt")
    assert found["b"] == data["b"]
    assert np.array_equal(integers(found["a"], 2, "a"), [[0, 1, 2], [3, 4, 5]])


class Runs:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("reader", READERS, ids=lambda each: each.name)
def test_a_forbidden_global_is_not_run(engines: Any, reader: Any, tmp_path: Path) -> None:
    folder, path = tmp_path / "made", tmp_path / "x.pt"
    torch.save({"records": [{"x": Runs(folder)}], "logical_count": 0}, path)
    with pytest.raises(
        InputError, match=r"holds \w+\.mkdir, which is no plain data, and was not l"
    ):
        reader.read(path, engines.asked())
    assert not folder.exists()


def test_a_class_is_not_loaded(tmp_path: Path) -> None:
    torch.save([io.BytesIO], tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"holds _io.BytesIO, which is no plain data"):
        load_torch(tmp_path / "x.pt")


@pytest.mark.parametrize("reader", READERS, ids=lambda each: each.name)
def test_a_plain_pickle(engines: Any, reader: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(pickle.dumps({"records": []}))
    with pytest.raises(InputError, match=r"no file of torch\.save .* another format"):
        reader.read(path, engines.asked())


@pytest.mark.parametrize("reader", READERS, ids=lambda each: each.name)
def test_a_zip_of_something_else(engines: Any, reader: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.arange(3))
    with pytest.raises(InputError, match=r"a zip without data\.pkl"):
        reader.read(tmp_path / "x.npz", engines.asked())


def test_packed_members(tmp_path: Path) -> None:
    """A zip bomb: 100 MB of zeros in 100 KB."""
    path = tmp_path / "x.pt"
    torch.save([torch.zeros(4, dtype=torch.int64)], path)
    with zipfile.ZipFile(path) as old:
        members = [(name, old.read(name)) for name in old.namelist()]
    with zipfile.ZipFile(path, "w") as new:
        for name, data in members:
            if name.endswith("data/0"):
                packed = zipfile.ZipInfo(name)
                packed.compress_type = zipfile.ZIP_DEFLATED
                with new.open(packed, "w") as out:
                    for _ in range(100):
                        out.write(bytes(10**6))
            else:
                new.writestr(name, data)
    before = peak()
    with pytest.raises(
        InputError, match=r"declares 100000000 bytes, packed in \d+ -- torch.save pa"
    ):
        load_torch(path)
    assert peak() - before < 64 * MIB


def test_a_member_that_declares_10_gb(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save([torch.zeros(4, dtype=torch.int64)], path)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        at = archive.start_dir
    entry = data.index(b"PK\x01\x02", at)
    while b"data/0" not in data[entry + 46 : entry + 46 + 40]:
        entry = data.index(b"PK\x01\x02", entry + 4)
    for place in (20, 24):  # packed and plain size in the directory, 32 bits
        data[entry + place : entry + place + 4] = (4 * 10**9).to_bytes(4, "little")
    path.write_bytes(data)
    before = peak()
    with pytest.raises(
        InputError, match=r"members declare 4\d{9} bytes, the file has \d{3,4} -- tr"
    ):
        load_torch(path)
    assert peak() - before < 64 * MIB


def test_a_tensor_larger_than_its_data(tmp_path: Path) -> None:
    """Both the tensor's shape and its storage are said to have 10**9 numbers of 8 bytes."""
    path = tmp_path / "x.pt"
    torch.save([torch.zeros(300, 2, dtype=torch.int64)], path)
    small, large = b"M" + (600).to_bytes(2, "little"), b"J" + (10**9).to_bytes(4, "little")
    rows = b"M" + (300).to_bytes(2, "little")

    def storage(name: str, data: bytes) -> bytes:
        return data.replace(small, large) if name.endswith("data.pkl") else data

    def shape(name: str, data: bytes) -> bytes:
        return data.replace(rows, large) if name.endswith("data.pkl") else data

    before = peak()
    for change in (storage, shape):
        assert large in rewritten(path, change).read_bytes()
        found = outcome(path)
        # a storage that only says so is cut to the file, a shape beyond its storage refused
        assert found == 600 if change is storage else "not readable by torch" in str(found)
    assert peak() - before < 64 * MIB


def outcome(path: Path) -> int | str:
    """Return how many numbers the first tensor has, or why it was refused."""
    try:
        return int(load_torch(path)[0].numel())
    except InputError as error:
        return str(error)


def test_one_number_as_a_tensor_of_10_gb(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save([torch.zeros(1, dtype=torch.int64).expand(10**9, 2)], path)
    before = peak()
    with pytest.raises(InputError, match=r"x: declares \[1000000000, 2\], more than its data"):
        integers(load_torch(path)[0], 2, "x")
    assert peak() - before < 64 * MIB


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(2), "torch.float32.* -- integers in 1"),
        (torch.zeros(2, dtype=torch.bool), "bool -- integers"),
        (torch.zeros(2, 2, dtype=torch.int32), r"torch.int32\[2, 2\] -- integers in 1"),
        (torch.zeros(2, dtype=torch.int32).to_sparse(), "a Tensor -- a plain tensor"),
        ([1, 2], "a list -- a plain tensor"),
    ],
)
def test_what_is_no_integers(tensor: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        integers(tensor, 1, "x")


@pytest.mark.parametrize("values", [None, "12", [1, 2.0], [True], [2**70], (1, 2)])
def test_what_are_no_whole_numbers(values: Any) -> None:
    with pytest.raises(InputError, match=r"x: (a list of whole numbers|numbers beyond 64 bits)"):
        whole_numbers(values, "x")


def test_a_damaged_pickle(tmp_path: Path) -> None:
    torch.save([torch.zeros(3, dtype=torch.int64)], tmp_path / "x.pt")
    rng = np.random.default_rng(0)
    original = (tmp_path / "x.pt").read_bytes()
    for _ in range(60):
        data = bytearray(original)
        with zipfile.ZipFile(io.BytesIO(original)) as archive:
            pickled = archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
        start = original.index(pickled)
        data[start + int(rng.integers(len(pickled)))] = int(rng.integers(256))
        (tmp_path / "x.pt").write_bytes(data)
        found = outcome(tmp_path / "x.pt")
        assert found == 3 or "x.pt: " in str(found)


def test_a_look_at_what_is_none(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"PK\x03\x04 and nothing more")
    assert peek_pickle(tmp_path / "x", b"PK\x03\x04") == b""
    assert peek_pickle(tmp_path, b"") == b""
    with zipfile.ZipFile(tmp_path / "two", "w") as archive:
        archive.writestr("a/data.pkl", b"1")
        archive.writestr("b/data.pkl", b"2")
    assert peek_pickle(tmp_path / "two", b"PK") == b""


def test_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save([1], tmp_path / "x.pt")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(InputError, match=r"need torch, .* pip install 'moeplan\[record\]'"):
        load_torch(tmp_path / "x.pt")
