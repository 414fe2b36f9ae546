"""How many operations `price` handles in a second: physical models beside the plain roofline.

One million dense products of random shapes, and one hundred thousand expert layers of 256 experts
each, on one H100's limits; parameters are round figures, for they do not change the time. Run
from the repository root, on one core:

    OMP_NUM_THREADS=1 python benchmarks/pricing_speed.py

The table goes to the screen and to benchmarks/results/pricing_speed.md.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from hwmodels import Cluster, Gemm, GroupedGemm, Op, load_cluster, price
from hwmodels.device import DEFAULT_KERNELS
from hwmodels.kernels.gemm import GemmCost
from hwmodels.kernels.grouped_gemm import GroupedGemmCost

CLUSTER = "hgx-h100-8"
PRODUCTS, LAYERS, EXPERTS, TOP_K = 1_000_000, 100_000, 256, 8
TOKENS = (16, 4096)
"""Tokens of an expert layer, from a decode step to a prefill; each takes so many experts."""
RUNS = 5
RESULT = Path(__file__).parent / "results" / "pricing_speed.md"
TITLES = {"gemm": "dense products", "grouped_gemm": f"expert layers of {EXPERTS} experts"}


def columns(rng: np.random.Generator) -> Iterator[tuple[str, str, Op, float]]:
    """Yield kernel, what varies, the column, and the operations a second that are asked for."""
    m, n, k = rng.integers(1, 8192, PRODUCTS), *rng.integers(64, 16384, (2, PRODUCTS))
    yield "gemm", "", Gemm(m=m, n=n, k=k, weight_dtype="bf16", activation_dtype="bf16"), 1e6
    share = rng.dirichlet(np.full(EXPERTS, 0.5), LAYERS)
    for tokens in TOKENS:
        loads = np.round(share * tokens * TOP_K).astype(np.int64)
        layers = GroupedGemm(
            tokens_per_expert=loads, hidden=7168, width=2048, gated=True,
            weight_dtype="bf16", activation_dtype="bf16",
        )  # fmt: skip
        yield "grouped_gemm", f", {tokens} tokens", layers, 1e5


def models() -> Iterator[tuple[str, str, Any]]:
    """Yield kernel, name and cost model, the plain roofline first."""
    for kernel in ("gemm", "grouped_gemm"):
        yield kernel, "roofline", DEFAULT_KERNELS[kernel]["bf16"]
    starts: dict[str, Any] = {p.name: p.start for p in GemmCost.PARAMETERS}
    yield "gemm", "tile by rows", GemmCost.model_construct(**starts, tiles="by_rows")
    yield "gemm", "fastest tile", GemmCost.model_construct(**starts)
    yield "gemm", "fastest tile, split or not", GemmCost.model_construct(**starts, split_k=True)
    starts = {p.name: p.start for p in GroupedGemmCost.PARAMETERS}
    yield "grouped_gemm", "physical", GroupedGemmCost.model_construct(**starts)


def with_kernel(cluster: Cluster, kernel: str, cost: Any) -> Cluster:
    """Return the cluster with one cost model for all formats of one kernel."""
    (name, processor), *others = cluster.device.processors.items()
    kernels: dict[Any, Any] = {**processor.kernels, kernel: {"bf16": cost}}
    changed = processor.model_copy(update={"kernels": kernels})
    processors = dict([(name, changed), *others])
    device = cluster.device.model_copy(update={"processors": processors})
    return cluster.model_copy(update={"device": device})


def timed(op: Op, cluster: Cluster) -> float:
    """Return the CPU seconds of one call, the least of several."""
    found = []
    for _ in range(RUNS):
        start = time.process_time()
        price(op, cluster)
        found.append(time.process_time() - start)
    return min(found)


def main() -> None:
    """Time all models on all columns and write the table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    cluster = load_cluster(CLUSTER)
    lines = []
    for kernel, varies, op, asked in columns(np.random.default_rng(0)):
        plain = 0.0
        for of, name, cost in models():
            if of != kernel:
                continue
            seconds = timed(op, with_kernel(cluster, kernel, cost))
            plain = plain or seconds
            rate = len(op) / seconds
            lines.append(
                f"| {TITLES[kernel]}{varies} | {name} | {seconds:.3f} | {rate:,.0f} | {asked:,.0f} "
                f"| {'yes' if rate >= asked else 'NO'} | {seconds / plain:.1f} |"
            )
            print(lines[-1], flush=True)
    RESULT.write_text(
        f"# Speed of prices\n\n{PRODUCTS:,} dense products (m 1 to 8,191, n and k 64 to 16,383, "
        f"uniform) and {LAYERS:,} expert layers (shares of a Dirichlet of 0.5, top-{TOP_K}) "
        f"through `hwmodels.price` on {CLUSTER}; CPU time, the least of {RUNS} calls.\n\n"
        "| operations | model | CPU s | a second | asked for | reached | times the roofline's |\n"
        "|---|---|---|---|---|---|---|\n" + "\n".join(lines) + "\n\nCommand: "
        f"`OMP_NUM_THREADS=1 python benchmarks/pricing_speed.py` (Python "
        f"{platform.python_version()}, numpy {np.__version__}, {os.cpu_count()} cores, load "
        f"average at the end {os.getloadavg()[0]:.1f}).\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
