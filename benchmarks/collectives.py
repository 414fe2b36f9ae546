"""Collectives and expert exchanges: fitted models on sizes that no fit saw.

    python benchmarks/collectives.py --out benchmarks/results/collectives.md

Every table of the wheel aiconfigurator-core is fitted by itself (`hwmodels.fitting.comm`); pools
weigh rows alike. Held out: a quarter of the message sizes, or of (width, k, experts, tokens,
ranks), by hash. Beside it startup and bandwidth alone, fitted on the same rows.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from scipy.optimize import minimize

from hwmodels import load_device
from hwmodels.fitting.comm import CommFit, fit_comm
from hwmodels.kernels.base import Limits
from hwmodels.ops import Floats
from hwmodels.silicon.comm import CommTable, engine_tables, library_tables
from hwmodels.silicon.comm_moe import deepep_tables, exchange_tables
from hwmodels.silicon.wheel import GPUS

POOLS: dict[str, Callable[[CommTable], bool]] = {
    "NCCL, NVLink": lambda t: t.source.engine == "nccl" and t.link.startswith("nvlink"),
    "NCCL and oneCCL, PCIe": lambda t: (
        t.source.engine in ("nccl", "oneccl") and t.link.startswith("pcie")
    ),
    "DeepEP, inside a node": lambda t: (
        t.source.engine == "sglang" and "deepep" in t.kernel and t.level == "node"
    ),
    "DeepEP, across nodes": lambda t: (
        t.source.engine == "sglang" and "deepep" in t.kernel and t.level == "network"
    ),
    "engines' all-reduce, NVLink": lambda t: (
        t.op == "all_reduce" and t.source.engine in ("trtllm", "sglang", "vllm")
        and t.link.startswith("nvlink")
    ),
    "engines' all-reduce, PCIe": lambda t: (
        t.op == "all_reduce" and t.source.engine in ("trtllm", "sglang", "vllm")
        and t.link.startswith("pcie")
    ),
    "TensorRT-LLM's exchange": lambda t: (
        t.op in ("dispatch", "combine") and t.source.engine == "trtllm"
    ),
    "vLLM's exchange": lambda t: t.op in ("dispatch", "combine") and t.source.engine == "vllm",
}  # fmt: skip


def tables(device: str) -> Iterator[CommTable]:
    """Yield all tables of a device."""
    yield from library_tables(device)
    yield from engine_tables(device)
    yield from deepep_tables(device)
    yield from exchange_tables(device)


def startup_and_bandwidth(table: CommTable) -> Floats:
    """Return seconds of a line in the busiest port's bytes, fitted like the rest."""
    moved, seconds, seen = table.load.port, table.seconds, ~table.held_out

    def loss(x: Floats) -> float:
        line = np.exp(x[0]) + moved[seen] / np.exp(x[1])
        return float(np.abs(np.log(line / seconds[seen])).mean())

    start = np.array([np.log(1e-5), np.log(1e11)])
    x = minimize(loss, start, method="Nelder-Mead").x
    return np.asarray(np.exp(x[0]) + moved / np.exp(x[1]))


def errors(fit: CommFit, units: float) -> dict[str, Floats]:
    """Return |predicted / measured - 1| of fitted and held-out rows, and of the line's."""
    table = fit.table
    limits = Limits(flops=0.0, bandwidth=table.rate, units=units)
    predicted = fit.cost.time(fit.cost.numbers(), table.features(fit.cost, limits))
    error, held = np.abs(predicted / table.seconds - 1), table.held_out
    line = np.abs(startup_and_bandwidth(table) / table.seconds - 1)
    return {"fitted": error[~held], "held out": error[held], "line": line[held]}


def cell(values: Floats) -> str:
    return f"{100 * np.median(values):.1f} / {100 * values.mean():.1f}" if len(values) else ""


def report() -> str:
    found = []
    for device in GPUS:
        units = load_device(device).limits("bf16").units
        found += [(fit, errors(fit, units)) for fit in fit_comm(list(tables(device)), units)]
    lines = [
        "# Collectives and expert exchanges", "",
        "`python benchmarks/collectives.py --out benchmarks/results/collectives.md`", "",
        "Tables of aiconfigurator-core 0.12.0 (Apache-2.0), ten GPUs. Errors are |predicted / "
        "measured - 1|, median / mean in percent. *Line*: startup and bandwidth alone.", "",
        "| pool | held-out rows | line | fitted rows | held out |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, belongs in POOLS.items():
        parts = [e for fit, e in found if belongs(fit.table)]
        pooled = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
        lines.append(
            f"| {name} | {len(pooled['held out'])} | {cell(pooled['line'])} | "
            f"{cell(pooled['fitted'])} | **{cell(pooled['held out'])}** |"
        )
    lines += ["", "## Every table", "",
              "| GPU | library or engine | kernel | use | format | level | left out | held-out "
              "rows | line | fitted rows | held out |", "|" + "---|" * 11]  # fmt: skip
    for fit, e in found:
        t = fit.table
        cells = [
            t.source.device, t.source.engine, t.kernel, t.op, t.dtype, t.level,
            f"{sum(d.rows for d in t.dropped)}", f"{len(e['held out'])}",
            *(cell(e[name]) for name in ("line", "fitted", "held out")),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    asked = parser.parse_args()
    text = report()
    print(text)
    if asked.out:
        asked.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
