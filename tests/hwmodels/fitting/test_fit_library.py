"""Fits on tables of one's own machine: parameters found again, a quarter of the shapes unseen."""

import numpy as np
import pandas as pd
import pytest

from hwmodels.fitting.library import MODELS, fit_library, held_out_of
from hwmodels.kernels.base import Limits
from hwmodels.kernels.library import LibraryGemmCost
from hwmodels.ops import Gemm
from hwmodels.silicon.table import Table
from hwmodels.silicon.wheel import Source

LIMITS = Limits(flops=1e11, bandwidth=2e10, units=1, cache=3e7)
TRUE = {"launch": 3e-6, "compute_efficiency": 0.9, "memory_efficiency": 0.6, "packing": 0.4}


def _table(noise=0.0, shapes=16):
    rng = np.random.default_rng(0)
    sizes = [(64 * int(a), 64 * int(b)) for a, b in rng.integers(2, 30, (shapes, 2))]
    rows = [(m, n, k) for n, k in sizes for m in (1, 2, 8, 40, 300)]
    frame = pd.DataFrame(rows, columns=["m", "n", "k"])
    op = Gemm(
        **{c: frame[c].to_numpy() for c in frame}, weight_dtype="fp32", activation_dtype="fp32"
    )
    true = LibraryGemmCost(**TRUE | {"launch": "3 us"}, rows=1e-3)
    frame["seconds"] = true.seconds(op, LIMITS) * np.exp(noise * rng.standard_normal(len(rows)))
    frame["floor"] = noise
    source = Source(device="t", engine="torch", version="1", path="t", sha256="", package="t")
    return Table(
        source=source, op="gemm", dtype="fp32", kernel="t", parts=[op], frame=frame,
        shape=("n", "k"), swept=(),
    )  # fmt: skip


def test_every_fourth_shape_is_held_out():
    table = _table(shapes=16)
    held = held_out_of(table)
    shapes = table.frame[["n", "k"]].drop_duplicates()
    unseen = table.frame.loc[held, ["n", "k"]].drop_duplicates()
    assert len(unseen) == -(-len(shapes) // 4)
    assert not pd.merge(unseen, table.frame.loc[~held, ["n", "k"]]).shape[0]


def test_parameters_come_back():
    cost = fit_library(_table(), LIMITS)
    for name, value in TRUE.items():
        assert getattr(cost, name) == pytest.approx(value, rel=0.05), name
    assert cost.held_out is not None
    assert cost.held_out.median < 0.01
    assert cost.evidence == "fitted"


def test_rows_that_repeat_badly_can_count_less():
    table = _table(noise=0.02)
    spoilt = table.frame["m"].to_numpy() == 8
    table.frame.loc[spoilt, "seconds"] *= 3
    weights = np.where(spoilt, 1e-6, 1.0)
    cost = fit_library(table, LIMITS, weights=weights)
    assert cost.packing == pytest.approx(TRUE["packing"], rel=0.3)  # type: ignore[attr-defined]


def test_every_kernel_of_a_device_has_a_model():
    from typing import get_args

    from hwmodels.device import Kernel

    assert set(MODELS) == set(get_args(Kernel)) - {"mla_decode", "mla_prefill"}
