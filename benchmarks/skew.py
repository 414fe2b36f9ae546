"""Skew: what uneven experts gain and cost, measured, and predicted from the loads alone.

    python benchmarks/skew.py                       # print; minutes
    python benchmarks/skew.py --write               # and update the results

Part 1: TensorRT-LLM's tables of at least 128 experts; the latency under a power law relative to the
balanced one of the same shape and tokens. Expert layers are fitted on the shapes that are not held
out (`hwmodels.fitting.moe`); measured and predicted ratios are compared on the held-out shapes.
Part 2: the wide-EP tables; the latency with EPLB, with or without spare slots, relative to none.
The same fits predict it; none of these rows was fitted. SGLang's wide-EP kernels are in no other
table: they are fitted on some numbers of ranks and scored on the others.
"""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hwmodels.fitting.moe import fit_moe
from hwmodels.kernels.grouped_gemm import GroupedGemmCost
from hwmodels.ops import GroupedGemm
from hwmodels.silicon.loads import DRAWS, power_law
from hwmodels.silicon.moe import MoeTable, moe_tables
from hwmodels.silicon.table import limits_of
from hwmodels.silicon.wideep import wideep_tables

RESULTS = Path(__file__).parent / "results" / "skew.md"
GPUS = ("h100", "h200", "b200")
KINDS = ("power_law_1.01", "power_law_1.2")
TOKENS = {  # the bins of the published table, and those between
    "1-8": (1, 8), "16-32": (16, 32), "48-128": (48, 128), "160-256": (160, 256),
    "320-1k": (320, 1024), "1.5k-4k": (1536, 4096), "6k": (6144, 6144), "> 8k": (8192, 1 << 30),
}  # fmt: skip
RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
SHOWN = (1, 8, 32, 128)
FEWEST = 128  # experts
WIDE_HEAD = [
    "", "## SGLang's wide-EP kernels, on numbers of ranks that were not fitted", "",
    "Power laws of 0.6 to 1.2; the ratio is to the uniform row of as many ranks and tokens.", "",
    "| GPU | kernel | ranks | rows | median error | mean | ratios | median error | skew ignored |",
    "|---|---|---|---|---|---|---|---|---|",
]  # fmt: skip
SHAPE = ["hidden_size", "inter_size", "num_experts", "topk", "moe_tp_size", "moe_ep_size"]
Show = Callable[[pd.DataFrame], str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="update the results")
    parser.add_argument("--gpu", nargs="*", default=list(GPUS))
    args = parser.parse_args()
    law, eplb, wide = [], [], []
    for gpu in args.gpu:
        costs: dict[str, GroupedGemmCost] = {}
        for table in moe_tables(gpu, ("trtllm",)):
            assert isinstance(table, MoeTable)
            if (table.frame["num_experts"] < FEWEST).all():
                continue
            cost = fit_moe(table, limits_of(table))
            if table.kernel.endswith("cutlass"):
                costs[table.dtype] = cost
            law.append(skew_ratios(table, cost))
        for table in wideep_tables(gpu, ("trtllm",)):
            eplb.append(eplb_ratios(table, costs[table.dtype]))
        wide += [wide_line(table) for table in wideep_tables(gpu, ("sglang",))]
        print(f"{gpu}: done", flush=True)
    text = report(pd.concat(law, ignore_index=True), pd.concat(eplb, ignore_index=True), args.gpu)
    text += "\n".join(WIDE_HEAD + wide) + "\n"
    print(text)
    if args.write:
        RESULTS.write_text(text, encoding="utf-8")


def wide_line(table: MoeTable) -> str:
    """Fit a SGLang wide-EP table on some numbers of ranks; seconds and ratios on the others."""
    cost = fit_moe(table, limits_of(table))
    frame = table.frame.assign(predicted=predicted(table, cost))[table.held_out]
    keys = ["moe_ep_size", "num_tokens"]
    even = frame[frame["distribution"] == "uniform"]
    skewed = frame[frame["distribution"] != "uniform"].merge(
        even[[*keys, "seconds", "predicted"]], on=keys, suffixes=("", "_even")
    )
    pairs = ratios(skewed, skewed["seconds_even"], skewed["predicted_even"])
    off = 100 * np.abs(frame["predicted"] / frame["seconds"] - 1)
    ranks = ", ".join(str(r) for r in sorted(frame["moe_ep_size"].unique()))
    return (
        f"| {table.source.device} | {table.kernel} | {ranks} | {len(frame)} | "
        f"{off.median():.1f} % | {off.mean():.1f} % | {len(pairs)} | {percent(pairs)} | "
        f"{percent(ignored(pairs))} |"
    )


def predicted(table: MoeTable, cost: GroupedGemmCost) -> NDArray[np.float64]:
    """Return the cost model's seconds [n] of a table's rows."""
    return cost.time(cost.numbers(), table.features(cost, limits_of(table)))


def skew_ratios(table: MoeTable, cost: GroupedGemmCost) -> pd.DataFrame:
    """Return measured and predicted latency relative to balanced, of each power-law row."""
    frame = table.frame.assign(predicted=predicted(table, cost), held_out=table.held_out)
    frame = frame.assign(imbalance=imbalance(table))
    frame = frame[frame["num_experts"] >= FEWEST]
    keys = [*SHAPE, "num_tokens"]
    even = frame[frame["distribution"] == "balanced"]
    pairs = frame[frame["distribution"].isin(KINDS)].merge(
        even[[*keys, "seconds", "predicted"]], on=keys, suffixes=("", "_even")
    )
    return ratios(pairs, pairs["seconds_even"], pairs["predicted_even"]).assign(
        gpu=table.source.device, table=f"{table.dtype} {table.kernel}"
    )


def eplb_ratios(table: MoeTable, cost: GroupedGemmCost) -> pd.DataFrame:
    """Return measured and predicted latency with EPLB relative to none, of each balanced row."""
    frame = table.frame.assign(predicted=predicted(table, cost))
    keys = [*SHAPE, "num_tokens", "distribution"]
    none = frame[~frame["eplb"] & (frame["num_slots"] == frame["num_experts"])]
    pairs = frame[frame["eplb"]].merge(
        none[[*keys, "seconds", "predicted"]], on=keys, suffixes=("", "_none")
    )
    return ratios(pairs, pairs["seconds_none"], pairs["predicted_none"]).assign(
        gpu=table.source.device, spare=pairs["num_slots"] > pairs["num_experts"]
    )


def ratios(pairs: pd.DataFrame, measured: pd.Series, model: pd.Series) -> pd.DataFrame:
    """Add measured and predicted ratios and their error, the bin of tokens; seconds to ratios."""
    pairs = pairs.assign(measured=pairs["seconds"] / measured, model=pairs["predicted"] / model)
    bins = np.full(len(pairs), "between", dtype=object)
    for name, (low, high) in TOKENS.items():
        bins[pairs["num_tokens"].between(low, high)] = name
    return pairs.assign(error=np.abs(pairs["model"] / pairs["measured"] - 1), bin=bins)


def imbalance(table: MoeTable) -> NDArray[np.float64]:
    """Return (token, expert) pairs of the busiest rank over the mean rank's, per row."""
    rows = []
    for first, others in zip(table.parts, table.more, strict=True):
        assert isinstance(first, GroupedGemm)
        rows.append(np.mean([op.rows() for op in (first, *others)], axis=0))
    mean = table.frame["num_tokens"] * table.frame["topk"] / table.frame["moe_ep_size"]
    return np.concatenate(rows) / mean.to_numpy()


def report(law: pd.DataFrame, eplb: pd.DataFrame, gpus: Iterable[str]) -> str:
    held = law[law["held_out"]]
    lines = [
        "# Skew: measured, and predicted from the loads",
        "",
        f"Made by `python benchmarks/skew.py --write` on {', '.join(gpus)}; TensorRT-LLM's tables "
        "of the wheel aiconfigurator-core 0.12.0. Ratios are medians; an error is the median over "
        "rows of |predicted ratio / measured ratio - 1|. Rows that the readers' rules leave out "
        "are not there.",
        "",
        "## Latency under a power law relative to balanced, at least 128 experts",
        "",
        f"All {len(law):,} measured rows, power_law_1.01 / 1.2:",
        "",
        *grid(law, SHOWN, lambda c: f"{c['measured'].median():.2f}"),
        "",
        "Busiest rank over mean, of the loads drawn again by the authors' rule:",
        "",
        *grid(law, SHOWN, lambda c: f"{c['imbalance'].median():.2f}"),
        "",
        f"The {len(held):,} rows of held-out shapes, measured -> predicted (error), both laws:",
        "",
        *table_of(held, RANKS, cell),
        "",
        *summary("Over all these rows", held),
        *summary("At 16-128 tokens on one rank (the gain)",
                 held[held["num_tokens"].between(16, 128) & (held["moe_ep_size"] == 1)]),
        *summary("At 1,536 tokens and more on 8 and more ranks (the straggler)",
                 held[(held["num_tokens"] >= 1536) & (held["moe_ep_size"] >= 8)]),
        "",
        "The tables average five draws that nobody recorded. Two such sets differ, in the tokens",
        "of the busiest rank (256 experts, k 8; power_law_1.01 / 1.2, median of 200 pairs), by:",
        "",
        *draws_differ(),
        "",
        "By GPU and kernel (held-out shapes):",
        "",
        "| GPU | table | rows | error | if skew is ignored |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for (gpu, name), rows in held.groupby(["gpu", "table"]):
        lines.append(
            f"| {gpu} | {name} | {len(rows)} | {percent(rows)} | {percent(ignored(rows))} |"
        )
    lines += ["", "## Latency with EPLB relative to none", "", *eplb_lines(eplb)]
    return "\n".join(lines)


def draws_differ(pairs: int = 200) -> list[str]:
    """Return how far two sets of draws are apart: what no prediction from the rule can undo."""
    lines = ["| tokens | " + " | ".join(f"EP{r}" for r in SHOWN) + " |", "|---" * 5 + "|"]
    for tokens in (32, 256, 1024, 8192):
        cells = []
        for ranks in SHOWN:
            gaps = []
            for kind in KINDS:
                rng = np.random.default_rng(0)
                exponent = float(kind.removeprefix("power_law_"))
                counts = power_law(tokens, 8, 256, ranks, exponent, rng, 2 * pairs * DRAWS)
                busiest = counts.sum(axis=2).max(axis=1).reshape(2, pairs, DRAWS).mean(axis=2)
                gaps.append(100 * np.median(np.abs(busiest[0] / busiest[1] - 1)))
            cells.append(" / ".join(f"{gap:.1f} %" for gap in gaps))
        lines.append(f"| {tokens} | " + " | ".join(cells) + " |")
    return lines


def eplb_lines(eplb: pd.DataFrame) -> list[str]:
    """Return the part on balancing: without and with spare slots, then two published figures."""
    lines = []
    for spare in (False, True):
        rows = eplb[eplb["spare"] == spare]
        slots = "288 slots for 256 experts" if spare else "no spare slots"
        lines += [f"{slots}, {len(rows):,} rows, measured -> predicted (error), both laws:", ""]
        lines += [*table_of(rows, RANKS, cell), "", *summary("Over all these rows", rows), ""]
    steep = eplb[eplb["distribution"] == "power_law_1.2"]
    many = steep[(steep["num_tokens"] > 4096) & ~steep["spare"]]
    parts = [f"EP{r} {cell(many[many['moe_ep_size'] == r])}" for r in (8, 16, 32)]
    lines += [f"power_law_1.2, over 4k tokens, no spare slots: {', '.join(parts)}.", ""]
    keys = ["gpu", *SHAPE, "distribution", "num_tokens"]
    two = eplb[(eplb["moe_ep_size"] == 2) & eplb["num_tokens"].between(16, 1024)]
    both = two[two["spare"]].merge(two[~two["spare"]], on=keys, suffixes=("", "_plain"))
    cost = both["seconds"] / both["seconds_plain"]
    model = both["predicted"] / both["predicted_plain"]
    bins = both.groupby("bin", sort=False)
    parts = [
        f"{b} tokens {cost[i.index].median():.2f} -> {model[i.index].median():.2f}" for b, i in bins
    ]
    lines += [f"Spare slots relative to none spare, both with EPLB, EP2: {', '.join(parts)}.", ""]
    return lines


def cell(rows: pd.DataFrame) -> str:
    """Return measured and predicted medians and the error of some rows."""
    return f"{rows['measured'].median():.2f} -> {rows['model'].median():.2f} ({percent(rows)})"


def percent(rows: pd.DataFrame) -> str:
    """Return the median error of some rows."""
    return f"{100 * rows['error'].median():.1f} %"


def ignored(rows: pd.DataFrame) -> pd.DataFrame:
    """Return rows with the error of a model that does not see loads: every ratio is one."""
    return rows.assign(error=np.abs(1 / rows["measured"] - 1))


def summary(title: str, rows: pd.DataFrame) -> list[str]:
    """Return a line on the rows and on the median cells (of ranks and tokens)."""
    cells = rows.groupby(["moe_ep_size", "bin", "distribution"])[["measured", "model"]].median()
    gap = np.abs(cells["model"] / cells["measured"] - 1)
    return [
        f"- {title}: {len(rows):,} rows, median error {percent(rows)} (mean "
        f"{100 * rows['error'].mean():.1f} %); {percent(ignored(rows))} if skew is ignored. "
        f"Medians of the {len(cells)} cells: off by {100 * gap.median():.1f} % in the median, "
        f"{100 * gap.max():.1f} % at most, {100 * (gap <= 0.1).mean():.0f} % within 10 %."
    ]


def grid(rows: pd.DataFrame, ranks: Iterable[int], show: Show) -> list[str]:
    """Return a table with both power laws in each cell."""

    def both(found: pd.DataFrame) -> str:
        parts = [found[found["distribution"] == kind] for kind in KINDS]
        return " / ".join(show(p) if len(p) else "-" for p in parts)

    return table_of(rows, ranks, both)


def table_of(rows: pd.DataFrame, ranks: Iterable[int], show: Show) -> list[str]:
    """Return a table of token bins over ranks."""
    used = [r for r in ranks if (rows["moe_ep_size"] == r).any()]
    lines = [
        "| tokens | " + " | ".join(f"EP{r}" for r in used) + " |",
        "|---" * (len(used) + 1) + "|",
    ]
    for name in TOKENS:
        found = [rows[(rows["bin"] == name) & (rows["moe_ep_size"] == r)] for r in used]
        lines.append(f"| {name} | " + " | ".join(show(f) if len(f) else "-" for f in found) + " |")
    return lines


if __name__ == "__main__":
    main()
