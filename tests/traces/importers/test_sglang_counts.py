"""SGLang's counts: ranks that belong together, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from basis.errors import InputError
from traces.importers.base import Asked
from traces.importers.sglang_counts import FORMATS_SGLANG_COUNTS

STAT, PER_PASS = FORMATS_SGLANG_COUNTS


def test_one_rank_of_several(engines: Any, tmp_path: Path) -> None:
    source = engines.source()
    folder = engines.write("sglang-per-pass", tmp_path, source)
    halves = [PER_PASS.read(path, engines.asked()) for path in sorted(folder.iterdir())]
    whole = source.counts()[:, list(engines.moe)]
    assert np.array_equal(halves[0].counts.counts, whole - whole // 2)
    assert np.array_equal(
        halves[0].counts.counts.sum() + halves[1].counts.counts.sum(), whole.sum()
    )
    assert PER_PASS.matches(folder / "expert_distribution_recorder_1.5_0.pt", b"PK")


def record(experts: int = 12, key: Any = 100, **changes: Any) -> dict[str, Any]:
    counts = np.zeros((6, 16), np.int32)
    counts[[1, 2, 4], 3] = 2
    slots = np.tile(np.arange(16) % experts, (6, 1))
    each = {"forward_pass_id": key, "rank": 0, "global_physical_count": counts} | changes
    return {"records": [each], "last_physical_to_logical_map": slots}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (record(global_physical_count=np.zeros((6, 15), np.int32)), r"counts \[6, 15\], the map"),
        (record(key="a"), "forward_pass_id 'a' -- a whole number"),
        (record(global_physical_count=np.full((6, 16), -1)), "a count of -"),
        (record(global_physical_count=np.zeros((6, 16), np.int32)), "all counts are 0"),
        (record(global_physical_count=None), "a NoneType -- a plain tensor"),
        (
            record() | {"last_physical_to_logical_map": np.full((6, 16), 99)},
            "every expert has a sl",
        ),
        (record() | {"last_physical_to_logical_map": np.full((6, 16), -1)}, "experts from 0 on"),
        (record(experts=10), "10 experts, small has 12"),
        ({"records": []}, "no forward pass was recorded"),
        ([1], "no records"),
    ],
)
def test_damaged_passes(engines: Any, tmp_path: Path, data: Any, message: str) -> None:
    path = engines.save_torch(data, tmp_path / "x.pt")
    with pytest.raises(InputError, match=message):
        PER_PASS.read(path, engines.asked())


def test_files_of_two_models(engines: Any, tmp_path: Path) -> None:
    engines.save_torch(record(), tmp_path / "a.pt")
    engines.save_torch(record(experts=10), tmp_path / "b.pt")
    with pytest.raises(InputError, match="files of one model belong together"):
        PER_PASS.read(tmp_path, engines.asked())
    engines.save_torch(record(experts=10, key=101), tmp_path / "b.pt")
    with pytest.raises(InputError, match="files of different models"):
        PER_PASS.read(tmp_path, engines.asked())


def test_an_empty_folder(engines: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no \.pt file in it"):
        PER_PASS.read(tmp_path, engines.asked())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda count: count[0], r"int32\[6, 12\] -- integers in 3 dimensions"),
        (lambda count: count.astype(np.float32), "float32"),
        (lambda count: -count, "a count of -"),
        (lambda count: count * 0, "all counts are 0"),
        (lambda count: count[:, :5], "5 layers recorded, small has 6 layers"),
        (lambda count: count[:, ::-1], r"layers \[3\] counted tokens, small has no experts there"),
        (lambda count: count[:, :, :9], "9 experts, small has 12"),
    ],
)
def test_damaged_stat(
    engines: Any, tmp_path: Path, change: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    count = engines.source().counts().astype(np.int32)
    path = engines.save_torch({"rank": 0, "logical_count": change(count)}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=message):
        STAT.read(path, engines.asked())


def test_no_stat(engines: Any, tmp_path: Path) -> None:
    path = engines.save_torch({"rank": 0}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="no logical_count"):
        STAT.read(path, Asked())


def test_only_shares_are_claimed(engines: Any, tmp_path: Path) -> None:
    found = STAT.read(engines.write("sglang-stat", tmp_path), engines.asked())
    assert found.counts.relative
    assert any("shares mean something, totals do not" in note for note in found.notes)
