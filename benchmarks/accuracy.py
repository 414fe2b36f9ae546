"""The page that says how accurate predictions are: docs/reference/accuracy.md.

    moeplan calibrate --from silicon --out hwmodels/catalog/fitted --rows ROWS
    python benchmarks/accuracy.py --rows ROWS

ROWS holds every measured row with its prediction, one Parquet file per device and engine. Errors
are |predicted / measured - 1|. Only rows of shapes that no fit saw are scored, if not said
otherwise; the end-to-end tables are those of benchmarks/results/served.md.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy.optimize import minimize

from hwmodels.engines import engines_of
from hwmodels.kernels.exchange import ByTokens
from hwmodels.kernels.transfers import TransferModel
from hwmodels.link import Transfer
from hwmodels.silicon.wheel import GPUS

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/reference/accuracy.md"
PICTURES = ROOT / "docs/images"
CORE = ("h100", "h200", "b200")
NAMES = {
    "gemm": "dense GEMM",
    "grouped_gemm": "expert layer",
    "attention_prefill": "attention, prefill",
    "attention_decode": "attention, decode",
    "mla_prefill": "latent attention, prefill",
    "mla_decode": "latent attention, decode",
    "stream": "cast",
}
SWEPT = {
    "gemm": ("m", (16, 128, 1024)),
    "grouped_gemm": ("num_tokens", (16, 128, 1024)),
    "attention_prefill": ("isl", (256, 2048, 8192)),
    "attention_decode": ("batch_size", (8, 64, 256)),
    "mla_prefill": ("isl", (256, 2048, 8192)),
    "mla_decode": ("batch_size", (8, 64, 256)),
    "stream": ("m", (16, 128, 1024)),
}
"""What a regime is told by, and the upper ends of its first classes."""
BETWEEN: tuple[Transfer, ...] = (
    "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "dispatch", "combine",
)  # fmt: skip
LAW = ("balanced", "power_law_1.01", "power_law_1.2")
DRAWN = 4000  # points of a picture


def read_rows(folder: Path) -> pd.DataFrame:
    """Return the rows of all devices and engines."""
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise SystemExit(f"{folder}: no rows -- run moeplan calibrate with --rows {folder}")
    return pd.concat([pd.read_parquet(f) for f in files], ignore_index=True)


def error(predicted: pd.Series, measured: pd.Series) -> pd.Series:
    return (predicted / measured - 1).abs()


def cell(errors: pd.Series) -> str:
    """Median / mean, percent; empty without rows."""
    return f"{100 * errors.median():.1f} / {100 * errors.mean():.1f}" if len(errors) else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def roofline(rows: pd.DataFrame) -> pd.Series:
    """Predict with one pair of efficiencies per device, kernel and format, fitted like the rest."""
    out = pd.Series(np.nan, index=rows.index)
    for _, group in rows.groupby(["device", "op", "dtype"]):
        seen = group[~group.held_out]
        seen = seen.sample(min(len(seen), 3000), random_state=0)
        ideal = seen[["compute", "memory"]].to_numpy()
        target = np.log(seen.measured.to_numpy())

        def loss(x: np.ndarray, ideal: np.ndarray = ideal, target: np.ndarray = target) -> float:
            return float(np.abs(np.log((ideal * np.exp(x)).max(axis=1)) - target).mean())

        x = minimize(loss, np.array([0.7, 0.7]), method="Nelder-Mead").x
        both = group[["compute", "memory"]].to_numpy() * np.exp(x)
        out[group.index] = both.max(axis=1)
    return out


def pooled(rows: pd.DataFrame) -> Iterator[list[str]]:
    """Yield one line per kernel: three devices, then all."""
    for op, name in NAMES.items():
        for label, devices in (("H100, H200, B200", CORE), ("all", tuple(rows.device.unique()))):
            group = rows[(rows.op == op) & rows.device.isin(devices)]
            held, seen = group[group.held_out], group[~group.held_out]
            asked = group[group.interpolated.notna()]
            yield [
                name, label, f"{len(held):,}", cell(error(held.roofline, held.measured)),
                cell(error(seen.predicted, seen.measured)),
                f"**{cell(error(held.predicted, held.measured))}**",
                cell(error(asked.interpolated, asked.measured)),
            ]  # fmt: skip


def regimes(rows: pd.DataFrame) -> Iterator[list[str]]:
    """Yield one line per kernel and class of its swept size, for the three devices."""
    held = rows[rows.held_out & rows.device.isin(CORE)]
    for op, (column, ends) in SWEPT.items():
        group = held[held.op == op]
        if column not in group:
            continue
        low = 0
        for high in (*ends, np.inf):
            part = group[(group[column] > low) & (group[column] <= high)]
            span = f"above {low}" if high == np.inf else f"{low + 1} to {high}"
            yield [NAMES[op], f"{column} {span}", f"{len(part):,}",
                   cell(error(part.predicted, part.measured))]  # fmt: skip
            low = int(high) if high != np.inf else low


def loads(rows: pd.DataFrame) -> Iterator[list[str]]:
    """Yield the expert layer's errors by the loads that were timed, for the three devices."""
    held = rows[rows.held_out & rows.device.isin(CORE) & (rows.op == "grouped_gemm")]
    for law in LAW:
        part = held[held.distribution == law]
        yield [law, f"{len(part):,}", cell(error(part.roofline, part.measured)),
               cell(error(part.predicted, part.measured))]  # fmt: skip


def kernels(rows: pd.DataFrame) -> Iterator[list[str]]:
    """Yield one line per device, engine and kernel of the engine's."""
    keys = ["op", "device", "engine", "dtype", "kernel"]
    for key, group in rows.groupby(keys, sort=True):
        op, *labels = map(str, key)
        held, seen = group[group.held_out], group[~group.held_out]
        asked = group[group.interpolated.notna()]
        yield [
            NAMES.get(op, op), *labels, f"{len(held):,}",
            cell(error(seen.predicted, seen.measured)),
            cell(error(held.predicted, held.measured)),
            cell(error(asked.interpolated, asked.measured)),
        ]  # fmt: skip


def collectives() -> Iterator[list[str]]:
    """Yield one line per device and engine: errors on held-out sizes, from the fitted files."""
    for device in GPUS:
        for engine, fits in engines_of(device).items():
            costs = fits.interconnect
            if costs:
                yield [device, engine, *(_stated(costs.get(name)) for name in BETWEEN)]


def _stated(cost: TransferModel | None) -> str:
    """Median of a collective's held-out errors; of one by tokens, for few and for many."""
    if cost is None:
        return ""
    parts = [cost.few, cost.many] if isinstance(cost, ByTokens) else [cost]
    return ", ".join(f"{100 * part.held_out.median:.1f}" for part in parts if part.held_out)


def transfers(path: Path) -> tuple[list[list[str]], str]:
    """Return the errors of each device left out, by kernel, and the interval's coverage."""
    found = pd.DataFrame(json.loads(path.read_text(encoding="utf-8")))
    devices = sorted(found.device.unique())
    lines = []
    for op, name in NAMES.items():
        part = found[found.op == op]
        if len(part):
            medians = part.groupby("device")["median"].median()
            lines.append(
                [name, *(f"{100 * medians[d]:.0f}" if d in medians else "" for d in devices),
                 f"{100 * part['median'].median():.1f}"]
            )  # fmt: skip
    share = {d: np.average(part.coverage, weights=part.rows) for d, part in found.groupby("device")}
    lines.append(["**interval covers**", *(f"{100 * share[d]:.0f} %" for d in devices),
                  f"{100 * np.average(found.coverage, weights=found.rows):.1f} %"])  # fmt: skip
    return lines, " | ".join(devices)


def picture(rows: pd.DataFrame, op: str) -> Path:
    """Draw predicted against measured of unseen shapes, one panel per device."""
    figure, axes = plt.subplots(1, len(CORE), figsize=(9, 3.1), sharex=True, sharey=True)
    for axis, device in zip(axes, CORE, strict=True):
        held = rows[(rows.op == op) & (rows.device == device) & rows.held_out]
        held = held.sample(min(DRAWN // 3, len(held)), random_state=0)
        for engine, part in held.groupby("engine"):
            axis.loglog(part.measured * 1e6, part.predicted * 1e6, ".", ms=1.5, label=engine)
        ends = [held.measured.min() * 1e6, held.measured.max() * 1e6]
        axis.loglog(ends, ends, "k", lw=0.6)
        axis.set_title(f"{device.upper()}: {cell(error(held.predicted, held.measured))} %")
        axis.set_xlabel("measured, us")
    axes[0].set_ylabel("predicted, us")
    axes[0].legend(markerscale=6, frameon=False)
    figure.tight_layout()
    path = PICTURES / f"accuracy-{op.replace('_', '-')}.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def page(rows: pd.DataFrame, folder: Path, served: Path) -> str:
    """Return the page."""
    rows = rows.assign(roofline=roofline(rows))
    lines = [
        "# How accurate predictions are",
        "",
        "Made by `moeplan calibrate --from silicon --out hwmodels/catalog/fitted --rows ROWS` and "
        "`python benchmarks/accuracy.py --rows ROWS`; do not edit. Measured: the kernel tables of "
        "aiconfigurator-core 0.12.0 (Apache-2.0). Errors are |predicted / measured - 1|, median / "
        "mean in percent. Unseen: a quarter of the *shapes* (weights, heads, layout), by a hash, "
        "which no fit used. What a row must be to count, and how many are left out by which rule, "
        "is in the readers (`hwmodels/silicon/`). The tables of B60 follow both peaks to 0.1 % and "
        "look modelled, not measured; they count in *all*.",
        "",
        "## What each way of pricing is good for",
        "",
        "| `prices:` | rests on | use it for | error |",
        "|---|---|---|---|",
        "| (no engine) | five-parameter rooflines per GPU and format over two engines | a first "
        "answer, and hardware without tables | 8 to 30 % in the median by kernel |",
        "| `fitted` | physical models per (GPU, engine, format, kernel) | any shape on a measured "
        "GPU | see below |",
        "| `measured` | the engine's table itself, between its points | shapes that were "
        "measured; others are refused | see below |",
        "| `transfer` | the same models fitted on all other GPUs, with this one's data sheet | "
        "GPUs that nobody measured | see below |",
        "| `auto` | measured where covered, else fitted, else transfer | most questions | |",
        "",
        "## Kernels",
        "",
        "*Roofline*: one pair of efficiencies per GPU, kernel and format. *Measured mode*: token "
        "counts and lengths held out of known shapes.",
        "",
        *table(
            ["kernel", "GPUs", "unseen rows", "roofline", "fitted, seen shapes",
             "fitted, unseen shapes", "measured mode"],
            pooled(rows),
        ),
        "By regime, fitted, unseen shapes of H100, H200 and B200:",
        "",
        *table(["kernel", "regime", "rows", "fitted"], regimes(rows)),
        "The expert layer by the loads that were timed ([the same model without the loads]"
        "(../../benchmarks/results/grouped_gemm.md); [what skew gains and costs]"
        "(../../benchmarks/results/skew.md)):",
        "",
        *table(["loads", "rows", "roofline", "fitted"], loads(rows)),
    ]  # fmt: skip
    for op in ("grouped_gemm", "gemm", "attention_decode"):
        drawn = picture(rows, op)
        lines += [f"![{NAMES[op]}, predicted against measured](../images/{drawn.name})", ""]
    lines += [
        "## Between ranks",
        "",
        "Inside a node, median error in percent on message sizes (all-reduce, gather, scatter, "
        "all-to-all of NCCL) or (width, k, experts, tokens) that no fit saw. All-reduce is the "
        "engine's own in a CUDA graph; dispatch and combine are DeepEP's low-latency and normal "
        "kernels, or the engine's. DeepEP across nodes was measured on H200 only. [Every table, "
        "and pools](../../benchmarks/results/collectives.md).",
        "",
        *table(["GPU", "engine", *(name.replace("_", "-") for name in BETWEEN)], collectives()),
    ]
    if (folder / "transfer.json").is_file():
        shown, devices = transfers(folder / "transfer.json")
        lines += [
            "## A GPU that nobody measured",
            "",
            "Each GPU left out of every fit in turn, all its drawn rows scored: median error in "
            "percent, the median over engines and formats. The stated 80 % interval is the one "
            "that the other GPUs showed when they were left out.",
            "",
            *table(["kernel", *devices.split(" | "), "all"], shown),
        ]
    if served.is_file():
        text = served.read_text(encoding="utf-8").split("\n", 1)[1].replace("\n## ", "\n### ")
        lines += ["## End to end", text]
    lines += [
        "## Every kernel",
        "",
        *table(
            ["kernel", "GPU", "engine", "format", "engine's name", "unseen rows", "seen shapes",
             "unseen shapes", "measured mode"],
            kernels(rows),
        ),
    ]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, required=True, help="folder of moeplan calibrate")
    parser.add_argument("--out", type=Path, default=PAGE, help="Markdown file to write")
    asked = parser.parse_args()
    served = ROOT / "benchmarks/results/served.md"
    asked.out.write_text(page(read_rows(asked.rows), asked.rows, served), encoding="utf-8")
    print(f"wrote {asked.out}")


if __name__ == "__main__":
    main()
