"""Megatron's router replay: what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from basis.errors import InputError
from traces.importers.megatron import FORMATS_MEGATRON

(REPLAY,) = FORMATS_MEGATRON
IDS = np.array([[0, 1], [2, 3], [4, 5]])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([IDS, IDS], "2 layers recorded, small has 3 MoE layers .* pipeline ranks"),
        ([IDS, IDS, IDS, IDS], "4 layers recorded, small has 3 MoE layers"),
        ([IDS, None, IDS], r"routers \[1\] recorded nothing"),
        ([], "a list -- a list of tensors"),
        ({"a": IDS}, "a dict -- a list of tensors"),
        ([IDS, IDS, IDS * 1.0], "router 2: torch.float64"),
        ([IDS, IDS, IDS[0]], r"router 2: torch.int64\[2\] -- integers in 2"),
        ([IDS, IDS, IDS[:2]], r"3 of 3 layers, of shapes \[2, 2\], \[3, 2\]"),
        ([IDS[:, :1]] * 3, "1 experts per token and layer, small has top-2"),
        ([IDS, IDS, IDS + 9], r"out of range \(first: 12, row 1, layer 4\)"),
        ([IDS, 7, IDS], "router 1: a int -- a plain tensor of integers"),
    ],
)
def test_damage(engines: Any, tmp_path: Path, data: Any, message: str) -> None:
    path = engines.save_torch(data, tmp_path / "x.pt")
    with pytest.raises(InputError, match=message):
        list(REPLAY.read(path, engines.asked()).chunks)


def test_a_long_batch_comes_in_chunks(engines: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    layers = [rng.random((40000, 12)).argsort(axis=1)[:, :2] for _ in range(3)]
    path = engines.save_torch(layers, tmp_path / "x.pt")
    chunks = list(REPLAY.read(path, engines.asked()).chunks)
    assert [chunk.num_tokens for chunk in chunks] == [16384, 16384, 7232]
    experts = np.concatenate([chunk.experts for chunk in chunks])
    assert all(np.array_equal(experts[:, n], layers[n]) for n in range(3))
    assert np.concatenate([chunk.request_id for chunk in chunks]).tolist() == list(range(40000))
