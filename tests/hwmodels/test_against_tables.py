"""The catalog's stated held-out errors come out again when `price` meets the measured tables.

This goes through the public operations, not through the fitting code: a permutation, the grouped
GEMM with the loads that were measured, and a permutation, on shapes that the fit did not see.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hwmodels import Gemm, GroupedGemm, Permute, load_cluster, price

pytest.importorskip("aiconfigurator_core", reason="install aiconfigurator-core to read its tables")
READER = Path(__file__).parents[2] / "benchmarks" / "silicon_tables.py"


@pytest.fixture(scope="module")
def tables():
    """The table reader of the fitting script."""
    spec = importlib.util.spec_from_file_location("silicon_tables", READER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["silicon_tables"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["silicon_tables"]


def frame_of(
    tables, gpu: str, op: str, engine: str, column: str, shape: list[str], keys: list[str]
):
    for path in reversed(tables.versions(gpu, op, engine, f"{op}_perf")):
        frame = pd.read_parquet(path)
        frame = frame[~frame.kernel_source.str.contains("nongated|situ")]
        frame = tables.sample(frame, column, "bf16", shape, keys)
        if len(frame):
            return frame[frame.held_out]
    return None


@pytest.mark.parametrize(("gpu", "board"), [("h100", "hgx-h100-8"), ("b200", "hgx-b200-8")])
def test_gemm(tables, gpu: str, board: str) -> None:
    cluster = load_cluster(board)
    frames = [
        frame_of(tables, gpu, "gemm", engine, "gemm_dtype", ["n", "k"], ["m", "n", "k"])
        for engine in tables.ENGINES
    ]
    rows = pd.concat(frames)
    m, n, k = (rows[c].to_numpy() for c in ("m", "n", "k"))
    op = Gemm(m=m, n=n, k=k, weight_dtype="bf16", activation_dtype="bf16")
    told = price(op, cluster)
    measured = rows.latency.to_numpy() * 1e-3
    cost = cluster.device.kernel("gemm", "bf16")[0]
    assert cost.held_out is not None
    assert np.median(np.abs(told.seconds / measured - 1)) == pytest.approx(
        cost.held_out.median, abs=0.01
    )
    inside = np.mean((told.low <= measured) & (measured <= told.high))
    assert inside == pytest.approx(0.8, abs=0.03)


def test_balanced_experts(tables) -> None:
    """TensorRT-LLM's balanced rows on H100: within 15 % in the median on unseen shapes."""
    cluster = load_cluster("hgx-h100-8")
    shape = ["hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size"]
    keys = [*shape, "num_tokens", "distribution"]
    frame = frame_of(tables, "h100", "moe", "trtllm", "moe_dtype", shape, keys)
    frame = frame[frame.distribution == "balanced"]
    ratios = [_price_row(row, cluster) / (row.latency * 1e-3) for row in frame.itertuples()]
    assert len(ratios) > 300
    assert np.median(np.abs(np.array(ratios) - 1)) < 0.15


def _price_row(row, cluster) -> float:
    local = row.num_experts // row.moe_ep_size
    pairs = -(-row.num_tokens * row.topk // row.moe_ep_size)
    counts = pairs // local + (np.arange(local) < pairs % local)
    grouped = GroupedGemm(
        tokens_per_expert=counts[None, :],
        hidden=row.hidden_size,
        width=row.inter_size // row.moe_tp_size,
        gated=True,
        weight_dtype="bf16",
        activation_dtype="bf16",
    )
    moved = Permute(rows=pairs, row_bytes=2 * row.hidden_size)
    return 2 * price(moved, cluster).seconds[0] + price(grouped, cluster).seconds[0]
