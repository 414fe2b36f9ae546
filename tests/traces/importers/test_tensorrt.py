"""TensorRT-LLM's statistics: ranks, layer names, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from basis.errors import InputError
from traces.importers.base import Asked
from traces.importers.tensorrt import FORMATS_TENSORRT
from traces.routing_trace import RoutingTrace

save_file = pytest.importorskip("safetensors.numpy").save_file
COUNTS, RAW = FORMATS_TENSORRT
Join = Callable[[Any], RoutingTrace]


def folder_of(
    at: Path, ranks: list[dict[str, np.ndarray]], raw: bool = False, **about: Any
) -> Path:
    (at / "meta_info.json").write_text(
        json.dumps({"num_experts": 12, "num_experts_per_token": 2} | about)
    )
    for number, tensors in enumerate(ranks):
        save_file(tensors, at / f"rank{number}{'_raw' * raw}.safetensors")
    return at


def counts(*layers: int, steps: tuple[int, ...] = (7, 8), value: int = 2) -> dict[str, np.ndarray]:
    return {f"{s}_{n}": np.full(12, value, np.int64) for s in steps for n in layers}


def ids(*layers: int, tokens: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        f"{step}_{layer}": rng.random((tokens, 12)).argsort(axis=1)[:, :2].astype(np.int32)
        for step in (7, 8)
        for layer in layers
    }


def test_numbers_of_moe_layers(engines: Any, joined: Join, tmp_path: Path) -> None:
    found = COUNTS.read(folder_of(tmp_path, [counts(0, 1, 2)]), engines.asked())
    assert found.counts.moe_layer_ids == (1, 2, 4)
    assert "layers 0 to 2 were taken as MoE indices, not as layers" in found.notes
    tokens = RAW.read(folder_of(tmp_path, [ids(0, 1, 2)], raw=True), engines.asked())
    assert joined(tokens).meta.moe_layer_ids == (1, 2, 4)


def test_ranks_that_counted_the_same(engines: Any, tmp_path: Path) -> None:
    found = COUNTS.read(folder_of(tmp_path, [counts(1, 2, 4)] * 2), engines.asked())
    assert found.counts.relative
    assert found.counts.counts.sum() == 2 * 2 * 3 * 12 * 2
    assert any("all ranks counted the same" in note for note in found.notes)


def test_ranks_that_recorded_the_same_tokens(engines: Any, joined: Join, tmp_path: Path) -> None:
    first, other = ids(1, 2, 4), ids(1, 2, 4, tokens=5, seed=1)
    tokens = RAW.read(folder_of(tmp_path, [first, first, other], raw=True), engines.asked())
    found = joined(tokens)
    assert found.num_tokens == 2 * (3 + 5)
    assert dict(tokens.dropped) == {"rows of ranks that recorded the same tokens as another": 6}
    assert np.array_equal(found.experts[:3, 0], first["7_1"])


def test_iterations_without_tokens(engines: Any, tmp_path: Path) -> None:
    tensors = counts(1, 2, 4) | counts(1, 2, 4, steps=(9,), value=0)
    found = COUNTS.read(folder_of(tmp_path, [tensors]), engines.asked())
    assert len(found.counts.counts) == 2
    assert dict(found.dropped) == {"iterations without tokens": 1}


def test_padding_rows(engines: Any, joined: Join, tmp_path: Path) -> None:
    tensors = ids(1, 2, 4)
    for tensor in tensors.values():
        tensor[-1] = -1
    tokens = RAW.read(folder_of(tmp_path, [tensors], raw=True), engines.asked())
    assert joined(tokens).num_tokens == 4
    assert list(tokens.dropped.values()) == [2]


@pytest.mark.parametrize(
    ("ranks", "about", "message"),
    [
        ([counts(1, 2)], {}, "layers 1, 2 recorded -- small has MoE layers 1, 2, 4"),
        ([counts(1, 2, 5)], {}, "layers 1, 2, 5 recorded"),
        ([counts(1, 2, 4, steps=(7, 9))], {}, "6 tensors for iterations 7 to 9 of 3 layers"),
        ([counts(1, 2, 4) | counts(1, steps=(9,))], {}, "7 tensors for iterations 7 to 9 of 3"),
        ([{"a": np.zeros(12, np.int64)}], {}, "tensor 'a' -- names are ITERATION_LAYER"),
        ([{"7_1": np.zeros(12, np.float32)}], {}, "is F32 -- integers are recorded"),
        ([counts(1, 2, 4)], {"num_experts": 13}, "13 experts, top-2 -- small has 12, top-2"),
        ([counts(1, 2, 4)], {"num_experts_per_token": 3}, "12 experts, top-3 -- small has 12"),
        ([counts(1, 2, 4)], {"num_experts": "x"}, "num_experts 'x'"),
        ([counts(1, 2, 4)], {"num_experts": 10**9}, "num_experts 1000000000"),
        ([counts(1, 2, 4, value=-1)], {}, "counts .* at least 0"),
        ([counts(1, 2, 4, value=0)], {}, "all counts are 0"),
        ([counts(1, 2, 4) | {"7_1": np.full(11, 2)}], {}, r"counts \[11\] at 7_1 -- 12, one for"),
        ([counts(1, 2, 4) | {"7_1": np.eye(12, dtype=np.int64)[0]}], {}, "no multiple of num_exp"),
        ([{}], {}, "no tensors -- record"),
    ],
)
def test_damaged_counts(
    engines: Any, tmp_path: Path, ranks: Any, about: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        COUNTS.read(folder_of(tmp_path, ranks, **about), engines.asked())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"7_1": np.full((3, 2), 12)}, r"6 expert ids out of range \(first: 12, row 0, layer 1\)"),
        ({"7_1": np.zeros((3, 3), np.int64)}, r"3 of 3 layers, of shapes \[3, 2\], \[3, 3\]"),
        ({"7_1": np.zeros((2, 2), np.int64)}, r"3 of 3 layers, of shapes \[2, 2\], \[3, 2\]"),
        ({"9_1": np.zeros((2, 2), np.int64)}, "7 tensors for iterations 7 to 9 of 3 layers"),
    ],
)
def test_damaged_ids(
    engines: Any, joined: Join, tmp_path: Path, change: dict[str, np.ndarray], message: str
) -> None:
    folder = folder_of(tmp_path, [ids(1, 2, 4) | change], raw=True)
    with pytest.raises(InputError, match=message):
        joined(RAW.read(folder, engines.asked()))


def test_wrong_k_in_raw_ids(engines: Any, joined: Join, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [ids(1, 2, 4)], raw=True, num_experts_per_token=3)
    with pytest.raises(InputError, match="2 experts per token and layer, not stated has top-3"):
        joined(RAW.read(folder, Asked()))


def test_a_rank_without_some_layers(engines: Any, joined: Join, tmp_path: Path) -> None:
    part = {name: value for name, value in ids(1, 2, 4, seed=3).items() if name != "8_2"}
    folder = folder_of(tmp_path, [ids(1, 2, 4), part], raw=True)
    with pytest.raises(InputError, match="iteration 8, rank 1: 2 of 3 layers"):
        joined(RAW.read(folder, engines.asked()))


@pytest.mark.parametrize("text", ["", "{}", "[1]", "{", '{"num_experts": 12}'])
def test_a_bad_description(engines: Any, tmp_path: Path, text: str) -> None:
    folder = folder_of(tmp_path, [counts(1, 2, 4)])
    (folder / "meta_info.json").write_text(text)
    with pytest.raises(
        InputError, match=r"meta_info.json: (empty|num_experts and num_experts_per)"
    ):
        COUNTS.read(folder, engines.asked())


def test_no_files(engines: Any, tmp_path: Path) -> None:
    folder_of(tmp_path, [])
    for each, name in ((COUNTS, "rank"), (RAW, "_raw")):
        with pytest.raises(InputError, match=name):
            each.read(tmp_path, engines.asked())


def test_a_pointer_among_the_ranks(engines: Any, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [counts(1, 2, 4)] * 2)
    (folder / "rank1.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid x\n")
    with pytest.raises(InputError, match=r"rank1.safetensors: a Git LFS pointer"):
        COUNTS.read(folder, engines.asked())


def test_a_rank_cut_off(engines: Any, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [counts(1, 2, 4)])
    path = folder / "rank0.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match=r"declares 96 bytes at .* are there -- truncated"):
        COUNTS.read(folder, engines.asked())
