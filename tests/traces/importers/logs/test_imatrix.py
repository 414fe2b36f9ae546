"""Importance matrices of llama.cpp, and GGUF headers that lie."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from basis.errors import InputError
from traces.counts_trace import CountsTrace, read_counts
from traces.importers.base import Asked
from traces.importers.formats import Imported, import_file
from traces.importers.gguf_header import read_gguf_header
from traces.importers.imatrix import FORMATS_IMATRIX

Gguf = Callable[..., bytes]


def do_import(content: bytes, tmp_path: Path, asked: Asked) -> tuple[Imported, CountsTrace]:
    source, target = tmp_path / "imatrix.gguf", tmp_path / "c.parquet"
    source.write_bytes(content)
    return import_file(source, target, asked=asked, formats=FORMATS_IMATRIX), read_counts(target)


def name(layer: int, part: str = "gate") -> str:
    return f"blk.{layer}.ffn_{part}_exps.weight.counts"


def test_gate_and_up_in_one(gguf_bytes: Gguf, tmp_path: Path) -> None:
    tensors = {name(3, "gate_up"): [1.0, 3.0], name(5): [2.0, 2.0], name(5, "gate_up"): [9.0, 9.0]}
    _, counts = do_import(gguf_bytes(tensors), tmp_path, Asked())
    assert counts.moe_layer_ids == (3, 5)
    assert counts.loads.tolist() == [[1, 3], [2, 2]]
    assert counts.top_k is None


def test_tokens_times_top_k(gguf_bytes: Gguf, tmp_path: Path) -> None:
    """8 tokens of 2 choices each; the last layer counted fewer tokens."""
    tensors = {name(0): [4.0, 6.0, 6.0], name(1): [16.0, 0.0, 0.0], name(2): [2.0, 0.0, 0.0]}
    found, counts = do_import(gguf_bytes(tensors, chunks=2), tmp_path, Asked())
    assert counts.top_k == 2
    assert found.notes == ("layers counted 2 to 16 choices: not the same tokens in all",)


def test_counts_that_floats_rounded_are_noted(gguf_bytes: Gguf, tmp_path: Path) -> None:
    found, counts = do_import(gguf_bytes({name(0): [2.0**24 + 2, 0.0]}), tmp_path, Asked())
    assert counts.loads.tolist() == [[2**24 + 2, 0]]
    assert "were rounded" in found.notes[0]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"blk.0.ffn_gate.weight.counts": [5.0]}, "no tensor blk"),
        ({name(1): [1.0] * 8, name(2): [1.0] * 9}, r"counts of \[8, 9\] values"),
        ({name(1): [1.0] * 4}, "4 experts, top-None; .* has 8"),
        ({name(1): [0.5] + [1.0] * 7}, "no whole counts"),
        ({name(1): [-1.0] * 8}, "no whole counts"),
        ({name(1): [float("nan")] * 8}, "no whole counts"),
        ({name(1): [1e30] * 8}, "no whole counts"),
        ({name(1): [0.0] * 8}, "all counts are 0"),
        ({name(7): [1.0] * 8}, "layers 7; .* has 3 MoE layers"),
        ({name(1): [3.0] * 8}, "top-3; .* top-2"),
    ],
)
def test_bad_matrices(
    tensors: dict[str, list[float]], message: str, gguf_bytes: Gguf, tmp_path: Path, asked: Asked
) -> None:
    chunks = 2 if "top-3" in message else 0
    with pytest.raises(InputError, match=message):
        do_import(gguf_bytes(tensors, chunks=chunks), tmp_path, asked)
    assert not (tmp_path / "c.parquet").exists()


def test_a_model_in_gguf_is_no_matrix(gguf_bytes: Gguf, tmp_path: Path) -> None:
    content = gguf_bytes({name(1): [1.0] * 8}, kind="model")
    with pytest.raises(InputError, match="no format recognises it"):
        do_import(content, tmp_path, Asked())


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (4, struct.pack("<I", 1), "version 1 -- GGUF of version 2 or 3"),
        (8, struct.pack("<Q", 2**60), "declares 1152921504606846976 tensors"),
        (16, struct.pack("<Q", 2**60), "declares 1152921504606846976 keys"),
        (24, struct.pack("<Q", 10**10), "declares 10000000000 bytes"),
    ],
)
def test_headers_that_lie(
    at: int, value: bytes, message: str, gguf_bytes: Gguf, tmp_path: Path
) -> None:
    content = bytearray(gguf_bytes({name(1): [1.0] * 8}))
    content[at : at + len(value)] = value
    (tmp_path / "i.gguf").write_bytes(content)
    with pytest.raises(InputError, match=message):
        import_file(
            tmp_path / "i.gguf", tmp_path / "c.parquet", format="imatrix", formats=FORMATS_IMATRIX
        )


def test_a_tensor_of_ten_gigabytes(gguf_bytes: Gguf, tmp_path: Path) -> None:
    content = gguf_bytes({name(1): [1.0] * 8})
    shape = struct.pack("<IQQ", 2, 1, 8)
    assert content.count(shape) == 1
    for size, message in ((65_000, "truncated; write it again"), (10**10, "values, types")):
        (tmp_path / "i.gguf").write_bytes(content.replace(shape, struct.pack("<IQQ", 2, 1, size)))
        with pytest.raises(InputError, match=message):
            import_file(tmp_path / "i.gguf", tmp_path / "c.parquet", formats=FORMATS_IMATRIX)


def test_a_list_longer_than_the_file(gguf_bytes: Gguf, tmp_path: Path) -> None:
    content = gguf_bytes({name(1): [1.0] * 8})
    texts = struct.pack("<IIQ", 9, 8, 2)
    for kind, length in ((8, 2**50), (4, 2**50), (9, 1), (77, 1)):
        bad = content.replace(texts, struct.pack("<IIQ", 9, kind, length))
        (tmp_path / "i.gguf").write_bytes(bad)
        with pytest.raises(InputError, match="declares "):
            import_file(tmp_path / "i.gguf", tmp_path / "c.parquet", formats=FORMATS_IMATRIX)


def test_files_of_the_gguf_package(tmp_path: Path, asked: Asked) -> None:
    """The package writes the layout that llama.cpp does; its own reader reads the same counts."""
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(1)
    counts = rng.multinomial(2000, np.full(8, 1 / 8), size=3)
    path = tmp_path / "imatrix.gguf"
    writer = gguf.GGUFWriter(path, arch="unused")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["a.txt", "b.txt"])
    writer.add_uint32("imatrix.chunk_count", 10)
    writer.add_uint32("imatrix.chunk_size", 100)
    for layer, values in zip((1, 2, 3), counts, strict=True):
        writer.add_tensor(name(layer), values.astype(np.float32).reshape(8, 1))
        writer.add_tensor(f"blk.{layer}.ffn_gate_exps.weight.in_sum2", np.ones((8, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_gguf_header(path)
    assert header.keys["imatrix.chunk_size"] == 100
    theirs = {t.name: t.data.reshape(-1).tolist() for t in gguf.GGUFReader(path).tensors}
    assert {t.name for t in header.tensors} == set(theirs)
    import_file(path, tmp_path / "c.parquet", asked=asked, formats=FORMATS_IMATRIX)
    back = read_counts(tmp_path / "c.parquet")
    assert back.loads.tolist() == counts.tolist()
    assert back.loads.tolist() == [theirs[name(layer)] for layer in (1, 2, 3)]
