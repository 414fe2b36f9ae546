"""MoE-Infinity's counts: which layers they are of, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from basis.errors import InputError
from traces.importers.moe_infinity import FORMATS_MOE_INFINITY

(TRACER,) = FORMATS_MOE_INFINITY


def test_moe_layers_alone(engines: Any, tmp_path: Path) -> None:
    counts = engines.source().counts()[:, list(engines.moe)]
    np.save(tmp_path / "x.npy", counts.astype(np.float32))
    found = TRACER.read(tmp_path / "x.npy", engines.asked())
    assert np.array_equal(found.counts.counts, counts)
    assert not found.dropped


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c / 7, "whole numbers from 0 on"),
        (lambda c: -c, "whole numbers from 0 on"),
        (lambda c: c * np.nan, "counts such as nan"),
        (lambda c: c + np.inf, "counts such as inf"),
        (lambda c: c * 0, "all counts are 0"),
        (lambda c: c[0], r"float32\[6, 12\] -- floats \[sequences"),
        (lambda c: c.astype(np.int32), "int32"),
        (lambda c: c[:, :4], "4 layers recorded, small has 6 layers, 3 MoE layers"),
        (lambda c: c[:, ::-1], r"layers \[3\] counted tokens"),
        (lambda c: c[:, :, :9], "9 experts, small has 12"),
        (lambda c: c[:0], "holds nothing"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_damage(
    engines: Any, tmp_path: Path, change: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    counts = engines.source().counts().astype(np.float32)
    np.save(tmp_path / "x.npy", change(counts))
    with pytest.raises(InputError, match=message):
        TRACER.read(tmp_path / "x.npy", engines.asked())
