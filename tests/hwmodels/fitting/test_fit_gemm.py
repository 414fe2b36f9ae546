"""Fits of dense products and streams: what made a table is found again on unseen shapes."""

import numpy as np
import pandas as pd
import pytest

from basis import InputError
from hwmodels.fitting.gemm import fit_gemm
from hwmodels.fitting.stream import fit_stream
from hwmodels.kernels.base import Limits
from hwmodels.kernels.gemm import GemmCost
from hwmodels.kernels.stream import StreamCost
from hwmodels.ops import Elementwise, Gemm
from hwmodels.silicon.table import Table
from hwmodels.silicon.wheel import Source

LIMITS = Limits(flops=1e15, bandwidth=3e12, units=132, cache=50e6)
SIDES = (64, 256, 1024, 1536, 4096, 7168, 16384)
ROWS = (1, 4, 16, 33, 64, 128, 129, 512, 1025, 4096, 16384)
TRUE = GemmCost.model_validate(
    {
        "launch": "5 us",
        "compute_efficiency": 0.8,
        "sustained": 0.7,
        "memory_efficiency": 0.8,
        "feed": "150 GB/s",
        "step": "0.6 ns",
        "store": 0.5,
        "sharpness": 2.0,
        "quantise": 2.0,
        "quantise_row": "1 ns",
        "tiles": "by_rows",
    }
)


def source(engine: str) -> Source:
    return Source(
        device="h100", engine=engine, version="1", path="made.parquet", sha256="0", package="made"
    )


def gemm_table(engine: str = "sglang", dtype: str = "fp8", sides: tuple[int, ...] = SIDES) -> Table:
    n, k, m = (a.ravel() for a in np.meshgrid(sides, sides, ROWS, indexing="ij"))
    op = Gemm(m=m, n=n, k=k, weight_dtype=dtype, activation_dtype="bf16")
    noise = np.exp(np.random.default_rng(0).normal(0, 0.01, len(m)))
    frame = pd.DataFrame({"n": n, "k": k, "m": m, "seconds": TRUE.seconds(op, LIMITS) * noise})
    return Table(
        source=source(engine), op="gemm", dtype=dtype, kernel="made", parts=[op], frame=frame,
        shape=("n", "k"), swept=("m",),
    )  # fmt: skip


def test_finds_the_structure_and_unseen_shapes() -> None:
    found = fit_gemm(gemm_table(), LIMITS)
    assert found.tiles == "by_rows"
    assert found.copies is None
    assert found.held_out is not None
    assert found.held_out.median < 0.015  # the noise alone has 0.7 %
    assert found.held_out.mean < 0.03
    assert found.launch == pytest.approx(5e-6, rel=0.1)
    assert found.low > 0.95
    assert found.high < 1.06
    assert found.evidence == "fitted"


def test_refuses_rows_with_the_hosts_time() -> None:
    with pytest.raises(InputError, match="timed without a CUDA graph"):
        fit_gemm(gemm_table("vllm", "fp8_block"), LIMITS)


def test_refuses_too_few_shapes() -> None:
    with pytest.raises(InputError, match=r"\d+ shapes to fit .* leave this kernel out"):
        fit_gemm(gemm_table(sides=(64, 256, 1024)), LIMITS)


def test_stream_is_found_again() -> None:
    true = StreamCost.model_validate(
        {"launch": "1.5 us", "memory_efficiency": 0.9, "cache_speed": 1.6, "kept": 0.7}
    )
    k, m = (a.ravel() for a in np.meshgrid(SIDES, ROWS, indexing="ij"))
    op = Elementwise(bytes=3 * m * k)
    frame = pd.DataFrame({"k": k, "m": m, "seconds": true.seconds(op, LIMITS)})
    table = Table(
        source=source("trtllm"), op="stream", dtype="bf16", kernel="made", parts=[op],
        frame=frame, shape=("k",), swept=("m",),
    )  # fmt: skip
    found = fit_stream(table, LIMITS)
    assert found.numbers() == pytest.approx(true.numbers(), rel=0.02)
    assert found.held_out is not None
    assert found.held_out.mean < 0.005
