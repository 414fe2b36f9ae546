"""Transfer between devices against rows that one set of parameters made."""

from pathlib import Path

import numpy as np
import pytest

from hwmodels.fitting.transfer import PROTOTYPES, Drawn, LeftOut, interval, load, save, transfer
from hwmodels.kernels.base import Limits
from hwmodels.ops import Gemm

TRUE = {p.name: p.start for p in PROTOTYPES["gemm"].PARAMETERS} | {"launch": 7e-6, "feed": 6e10}
PEAKS = {"small": (2e14, 1e12), "middle": (6e14, 2e12), "large": (1e15, 4e12), "huge": (2e15, 8e12)}


def _drawn(name: str, slower: float = 1.0, rows: int = 150) -> Drawn:
    rng = np.random.default_rng(len(name))
    m, n, k = (2 ** rng.integers(low, high, rows) for low, high in ((0, 13), (8, 14), (8, 14)))
    op = Gemm(m=m, n=n, k=k, weight_dtype="bf16", activation_dtype="bf16")
    flops, bandwidth = PEAKS[name]
    cost = PROTOTYPES["gemm"]
    features = cost.features(op, Limits(flops=flops, bandwidth=bandwidth, units=100, cache=4e7))
    return Drawn(features=features, seconds=slower * cost.time(TRUE, features))


def test_devices_that_obey_one_law_transfer_exactly() -> None:
    found = transfer("gemm", {name: _drawn(name) for name in PEAKS}, "made")
    assert found is not None
    assert {s.device for s in found.left_out} == set(PEAKS)
    for one in found.left_out:
        assert one.errors.median < 0.01
    assert found.cost.evidence == "transfer"
    assert found.cost.low > 0.95
    assert found.cost.high < 1.05


def test_the_interval_is_what_the_others_showed() -> None:
    slow = {"small": 1.0, "middle": 1.0, "large": 1.0, "huge": 2.0}
    found = transfer("gemm", {name: _drawn(name, slower) for name, slower in slow.items()}, "made")
    assert found is not None
    worst = max(found.left_out, key=lambda one: one.errors.median)
    assert worst.device == "huge"
    assert found.coverage["huge"] < 0.2  # three equal devices say nothing of one twice as slow


def test_too_few_devices_give_nothing() -> None:
    assert transfer("gemm", {name: _drawn(name) for name in ("small", "large")}, "made") is None


def test_every_device_weighs_the_same_in_an_interval() -> None:
    many = LeftOut(device="many", ratio=np.full(900, 1.0))
    few = LeftOut(device="few", ratio=np.full(100, 3.0))
    assert interval([many, few]) == (1.0, 3.0)
    spread = LeftOut(device="spread", ratio=np.linspace(0.0, 1.0, 1001))
    low, high = interval([spread])
    assert (low, high) == pytest.approx((0.1, 0.9), abs=2e-3)


def test_drawn_rows_come_back_from_their_file(tmp_path: Path) -> None:
    drawn = {"gemm|bf16": _drawn("small"), "gemm|fp8": _drawn("large")}
    save(tmp_path / "rows.npz", drawn)
    again = load(tmp_path / "rows.npz")
    assert set(again) == set(drawn)
    for key, rows in drawn.items():
        np.testing.assert_array_equal(again[key].seconds, rows.seconds)
        assert set(again[key].features) == set(rows.features)
        for name, values in rows.features.items():
            np.testing.assert_array_equal(again[key].features[name], values)
