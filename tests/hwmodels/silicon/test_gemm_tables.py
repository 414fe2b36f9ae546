"""Readers of dense products and casts: made tables for the rules, the wheel's for the units."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hwmodels import load_device
from hwmodels.silicon import wheel
from hwmodels.silicon.gemm import copies_of, gemm_tables
from hwmodels.silicon.small import stream_tables

pytest.importorskip("aiconfigurator_core")


def write(root: Path, folder: str, engine: str, name: str, rows: list[dict[str, object]]) -> None:
    target = root / "data" / "h100_sxm" / folder / engine / "1.0"
    target.mkdir(parents=True)
    pd.DataFrame(rows).to_parquet(target / f"{name}.parquet")


def row(m: int, n: int, k: int, ms: float, dtype: str = "bfloat16") -> dict[str, object]:
    return {"gemm_dtype": dtype, "kernel_source": "k", "m": m, "n": n, "k": k, "latency": ms}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(wheel, "root", lambda: tmp_path)
    return tmp_path


def test_rows_that_no_h100_can_time_go(root: Path) -> None:
    # 8192^2 bf16 weights are 134 MB, 40 us at 3.35 TB/s; 4096^3 x 2 FLOP are 139 us at 989 TFLOP/s
    write(
        root, "gemm", "trtllm", "gemm_perf",
        [
            row(1, 8192, 8192, 0.050), row(1, 8192, 8192 * 2, 0.070),
            row(4096, 4096, 4096, 0.130), row(4096, 4096, 4096 + 64, 0.200),
            row(1, 64, 64, 0.0026), row(1, 64, 128, 0.110),
            row(1, 64, 64, 0.0030, "unheard_of"),
        ],
    )  # fmt: skip
    (table,) = gemm_tables("h100", ["trtllm"])
    kept = table.frame[["m", "n", "k"]].to_numpy().tolist()
    assert kept == [[1, 64, 64], [4096, 4096, 4160], [1, 8192, 8192]]
    assert {d.rule[:6]: d.rows for d in table.dropped} == {"faster": 2, "over t": 1}
    np.testing.assert_allclose(table.seconds, [2.6e-6, 200e-6, 50e-6])
    (op,) = table.parts
    assert op.m.tolist() == [1, 4096, 1]  # type: ignore[union-attr]


def test_calls_shorter_than_the_host_go(root: Path) -> None:
    small = [row(m, 1024, 1024, 0.08, "fp8_block") for m in range(1, 30)]
    large = [row(16384, 8192, 8192, 1.5, "fp8_block"), row(2048, 4096, 4096, 0.09, "fp8_block")]
    write(root, "gemm", "vllm", "gemm_perf", small + large)
    (table,) = gemm_tables("h100", ["vllm"])
    assert table.frame["m"].tolist() == [16384]
    assert {d.rule[:5]: d.rows for d in table.dropped} == {"bound": 30}


def test_casts_beat_memory_only_in_the_cache(root: Path) -> None:
    rows = [
        {"kernel_source": "cast", "m": m, "k": 1000, "latency": ms}
        for m, ms in ((1, 0.0014), (10_000, 0.007), (100_000, 0.080), (100_001, 0.100), (2, 0.2))
    ]
    write(root, "quantize", "trtllm", "scale_matrix_perf", rows)
    write(root, "quantize", "sglang", "scale_matrix_perf", rows)
    (table,) = stream_tables("h100")
    assert table.source.engine == "trtllm"
    # 300 MB at 3.35 TB/s take 90 us, far beyond the cache; 30 MB in 7 us are in it
    assert table.frame["m"].tolist() == [1, 10_000, 100_001]
    (op,) = table.parts
    assert op.bytes.tolist() == [3000, 30_000_000, 300_003_000]  # type: ignore[union-attr]
    assert sorted(d.rows for d in table.dropped) == [1, 1]


def test_the_wheels_h100() -> None:
    tables = {t.dtype: t for t in gemm_tables("h100", ["trtllm"])}
    assert set(tables) == {"bf16", "fp8", "fp8_block"}
    table = tables["bf16"]
    f = table.frame
    hit = f[(f.m == 4353) & (f.n == 65536) & (f.k == 51200)]
    np.testing.assert_allclose(hit["seconds"], [39.301023e-3])
    assert (table.shape, table.swept) == (("n", "k"), ("m",))
    peak = load_device("h100").flops("bf16").value
    share = table.parts[0].flops() / table.seconds / peak  # type: ignore[union-attr]
    assert 0.5 < share.max() < 1
    assert copies_of(table) == 5
