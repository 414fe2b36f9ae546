"""How well expert layers are priced on shapes that no fit saw, beside two simpler models.

    python benchmarks/grouped_gemm.py                    # print; some minutes a GPU
    python benchmarks/grouped_gemm.py --write            # and update the results

Three models are fitted on the same fitted shapes and scored on the same held-out ones: the fitted
mode (`GroupedGemmCost` for each GPU, engine, format and kernel); the same model without the loads,
every row taken as balanced; and the plain roofline, one pair of efficiencies for each GPU and
format, with the bytes and FLOP of the actual loads.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import least_squares

from hwmodels.figures import HeldOut
from hwmodels.fitting.fit import score
from hwmodels.fitting.moe import fit_moe
from hwmodels.kernels.grouped_gemm import GroupedGemmCost
from hwmodels.ops import Floats, GroupedGemm
from hwmodels.silicon.loads import rank_loads
from hwmodels.silicon.moe import MoeTable, moe_tables
from hwmodels.silicon.table import limits_of

RESULTS = Path(__file__).parent / "results" / "grouped_gemm.md"
GPUS = ("h100", "h200", "b200")


@dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """One table with its models' predictions."""

    table: MoeTable
    cost: GroupedGemmCost
    fitted: Floats
    oblivious: Floats
    compute: Floats
    """Seconds at peak FLOP/s, mean over the draws."""
    memory: Floats
    """Seconds at peak bandwidth, mean over the draws."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="update the results")
    parser.add_argument("--gpu", nargs="*", default=list(GPUS))
    args = parser.parse_args()
    found = []
    for gpu in args.gpu:
        for table in moe_tables(gpu):
            if isinstance(table, MoeTable) and (~table.held_out).any():
                found.append(scored(table))
        print(f"{gpu}: done", flush=True)
    text = report(found, args.gpu)
    print(text)
    if args.write:
        RESULTS.write_text(text, encoding="utf-8")


def scored(table: MoeTable) -> Scored:
    limits = limits_of(table)
    cost = fit_moe(table, limits)
    even = balanced(table)
    blind = fit_moe(even, limits)
    draws = []
    for first, more in zip(table.parts, table.more, strict=True):
        assert isinstance(first, GroupedGemm)
        draws.append((first, *more))
    flops = [np.mean([op.flops() for op in part], axis=0) for part in draws]
    moved = [np.mean([op.bytes_moved() for op in part], axis=0) for part in draws]
    return Scored(
        table=table,
        cost=cost,
        fitted=table.predicted(cost, limits),
        oblivious=even.predicted(blind, limits),
        compute=np.concatenate(flops) / limits.flops,
        memory=np.concatenate(moved) / limits.bandwidth,
    )


def balanced(table: MoeTable) -> MoeTable:
    """Return the table as a model sees it that does not know the loads."""
    parts, place = [], 0
    for part in table.parts:
        assert isinstance(part, GroupedGemm)
        rows = table.frame.iloc[place : place + len(part)]
        place += len(part)
        counts = [
            rank_loads(int(t), int(k), int(e), int(r), "balanced")[0]
            for t, k, e, r in zip(
                rows["num_tokens"], rows["topk"], rows["num_experts"], rows["moe_ep_size"],
                strict=True,
            )
        ]  # fmt: skip
        parts.append(replace(part, tokens_per_expert=np.stack(counts)))
    return replace(table, parts=parts, more=[[] for _ in parts])


def roofline(group: list[Scored]) -> list[Floats]:
    """Return the plain roofline's seconds, one pair of efficiencies for all tables of a group."""
    held = np.concatenate([s.table.held_out for s in group])
    compute = np.concatenate([s.compute for s in group])
    memory = np.concatenate([s.memory for s in group])
    seconds = np.concatenate([s.table.seconds for s in group])

    def predicted(x: Floats) -> Floats:
        return np.maximum(compute / np.exp(x[0]), memory / np.exp(x[1]))

    def residuals(x: Floats) -> Floats:
        return np.log(predicted(x) / seconds)[~held]

    best = least_squares(
        residuals,
        np.log([0.4, 0.7]), bounds=(np.log([0.01, 0.01]), [0, 0]), loss="soft_l1", f_scale=0.03,
    )  # fmt: skip
    return np.split(predicted(best.x), np.cumsum([len(s.table.frame) for s in group])[:-1])


def report(found: list[Scored], gpus: list[str]) -> str:
    groups: dict[tuple[str, str], list[Scored]] = {}
    for one in found:
        groups.setdefault((one.table.source.device, one.table.dtype), []).append(one)
    plain: dict[int, Floats] = {}
    for group in groups.values():
        plain |= {id(s): p for s, p in zip(group, roofline(group), strict=True)}
    lines = [
        "# Expert layers: errors on unseen shapes",
        "",
        f"`python benchmarks/grouped_gemm.py --write`, GPUs {', '.join(gpus)}.",
        "Cells: median / mean of |predicted / measured - 1|, %.",
        "A quarter of the shapes (hidden, inner width, experts, k, tp, ep) is held out by a hash.",
        "",
        "| GPU | engine | format | kernel | rows | fitted shapes | **held-out** | without loads | "
        "plain roofline |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for s in found:
        t, held = s.table, s.table.held_out
        kernel = t.kernel.replace("flashinfer", "fi").replace("compressedtensors", "ct")
        cells = [
            f"{t.source.device} | {t.source.engine} {t.source.version} | {t.dtype} | {kernel}",
            f"{len(held)}",
            _cell(s.fitted, t, ~held), f"**{_cell(s.fitted, t, held)}**",
            _cell(s.oblivious, t, held), _cell(plain[id(s)], t, held),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "## Pooled over held-out rows", "", *_pooled(found, plain, gpus), ""]
    lines += ["## Rows left out", "", *_dropped(found), ""]
    return "\n".join(lines)


def _cell(predicted: Floats, table: MoeTable, rows: NDArray[np.bool_]) -> str:
    if not rows.any():
        return "-"
    return _text(score(predicted[rows], table.seconds[rows]))


def _text(errors: HeldOut) -> str:
    return f"{100 * errors.median:.1f} / {100 * errors.mean:.1f}"


def _pooled(found: list[Scored], plain: dict[int, Floats], gpus: list[str]) -> list[str]:
    parts = []
    for s in found:
        frame = s.table.frame.assign(
            gpu=s.table.source.device, fitted=s.fitted, oblivious=s.oblivious, plain=plain[id(s)]
        )
        parts.append(frame[s.table.held_out])
    rows = pd.concat(parts, ignore_index=True)
    rows["regime"] = pd.cut(
        rows["num_tokens"], [0, 16, 128, 1024, 1 << 30], labels=["1-16", "17-128", "129-1k", "> 1k"]
    ).astype(str)
    lines = [
        "| rows of | rows | **fitted mode** | without loads | plain roofline |",
        "|---|---|---|---|---|",
    ]
    chosen = [("all", rows)]
    for column in ("gpu", "distribution", "regime"):
        chosen += [(f"{column} {key}", group) for key, group in rows.groupby(column)]
    for name, group in chosen:
        measured = group["seconds"].to_numpy()
        cells = [
            _text(score(group[m].to_numpy(), measured)) for m in ("fitted", "oblivious", "plain")
        ]
        lines.append(f"| {name} | {len(group)} | **{cells[0]}** | {cells[1]} | {cells[2]} |")
    return lines


def _dropped(found: list[Scored]) -> list[str]:
    counts: dict[str, int] = {}
    for s in found:
        for d in s.table.dropped:
            counts[d.rule] = counts.get(d.rule, 0) + d.rows
    kept = sum(len(s.table.frame) for s in found)
    total = kept + sum(counts.values())
    lines = ["| rule | rows | share |", "|---|---|---|", f"| kept | {kept} | {kept / total:.1%} |"]
    return lines + [f"| {rule} | {n} | {n / total:.1%} |" for rule, n in counts.items()]


if __name__ == "__main__":
    main()
