"""The measured mode on token counts that it was not shown: error, coverage, scatter of the tables.

    python benchmarks/measured_mode.py                   # print; minutes
    python benchmarks/measured_mode.py --write           # and update the results

Of each known shape one inner point in five, by hash, is left out at once and priced from the
others; ends of what was swept are never left out. Scatter is what single measurements differ from
a line through their neighbours, over the root of 1.5: noise, and steps that the table resolves.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from hwmodels.silicon.attention import attention_tables
from hwmodels.silicon.gemm import gemm_tables
from hwmodels.silicon.measured import held_out_seconds, scatter
from hwmodels.silicon.mla import mla_tables
from hwmodels.silicon.moe import moe_tables
from hwmodels.silicon.table import limits_of
from hwmodels.silicon.wheel import GPUS

RESULTS = Path(__file__).parent / "results" / "measured_mode.md"
READERS = (gemm_tables, moe_tables, attention_tables, mla_tables)
FEWEST = 50  # rows of a table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="update the results")
    parser.add_argument("--gpu", nargs="*", default=list(GPUS))
    args = parser.parse_args()
    found = [rows for gpu in args.gpu for rows in errors_of(gpu)]
    text = report(pd.concat(found, ignore_index=True))
    print(text)
    if args.write:
        RESULTS.write_text(text, encoding="utf-8")


def errors_of(gpu: str) -> list[pd.DataFrame]:
    """Return the held-out rows of each table of a GPU with their error; NaN where refused."""
    out = []
    for read in READERS:
        for table in read(gpu):
            if len(table.frame) < FEWEST:
                continue
            limits = limits_of(table)
            predicted, held = held_out_seconds(table, limits)
            rows = pd.DataFrame({"error": np.abs(predicted / table.seconds[held] - 1)})
            out.append(
                rows.assign(
                    gpu=gpu, engine=table.source.engine, op=table.op, dtype=table.dtype,
                    kernel=table.kernel, scatter=scatter(table, limits), rows=len(table.frame),
                )
            )  # fmt: skip
        print(f"{gpu}: {read.__name__} done", flush=True)
    return out


def report(rows: pd.DataFrame) -> str:
    lines = [
        "# The measured mode: token counts held out of known shapes",
        "",
        "Made by `python benchmarks/measured_mode.py --write` from the wheel aiconfigurator-core "
        f"0.12.0, on {', '.join(rows['gpu'].unique())}. "
        "Errors are |predicted / measured - 1| in percent, median / mean, over the rows that "
        "the other points cover; the others are refused.",
        "",
        "| kernel | held-out rows | covered | error | H100, H200, B200 | scatter |",
        "|---|---|---|---|---|---|",
    ]
    main_gpus = rows["gpu"].isin(["h100", "h200", "b200"])
    for op, found in [*rows.groupby("op"), ("all", rows)]:
        three = found[main_gpus[found.index]]
        lines.append(
            f"| {op} | {len(found):,} | {covered(found)} | {error(found)} | {error(three)} | "
            f"{100 * found['scatter'].median():.1f} |"
        )
    lines += ["", "By GPU and kernel (median / mean):", ""]
    ops = sorted(rows["op"].unique())
    lines += ["| GPU | " + " | ".join(ops) + " |", "|---" * (len(ops) + 1) + "|"]
    for gpu, found in rows.groupby("gpu", sort=False):
        cells = [found[found["op"] == op] for op in ops]
        lines.append(f"| {gpu} | " + " | ".join(error(c) if len(c) else "-" for c in cells) + " |")
    lines += [
        "",
        "By table (scatter: half of the rows differ by more from the line through their "
        "neighbours, over the root of 1.5; noise and steps both count):",
        "",
        "| GPU | engine | kernel | format | engine's name | rows | covered | error | scatter |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for key, found in rows.groupby(["gpu", "engine", "op", "dtype", "kernel"], sort=False):
        lines.append(
            f"| {' | '.join(map(str, key))} | {found['rows'].iloc[0]:,} | {covered(found)} | "
            f"{error(found)} | {100 * found['scatter'].iloc[0]:.1f} |"
        )
    return "\n".join(lines) + "\n"


def covered(rows: pd.DataFrame) -> str:
    """Return the share of rows that were priced."""
    return f"{100 * rows['error'].notna().mean():.0f} %"


def error(rows: pd.DataFrame) -> str:
    """Return median and mean error in percent."""
    return f"{100 * rows['error'].median():.1f} / {100 * rows['error'].mean():.1f}"


if __name__ == "__main__":
    main()
