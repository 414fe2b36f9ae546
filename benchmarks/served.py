"""Served models, predicted against measured: TPOT, TTFT and latency of 13 development cells.

    python benchmarks/served.py [--prices fitted|measured|auto|transfer]

Needs the extra ``silicon`` (the measured runs). Each cell's overhead is fitted on the other cells
of its engine; kernel prices come from the catalog. Writes benchmarks/results/served.md.
"""

import argparse
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import get_args

import numpy as np

from hwmodels.engines import PriceMode
from hwmodels.silicon.served_rows import CELLS, SPECULATED, ServedRows, served_rows
from moeplan.served import ACCEPTED, Prediction, Profile, leave_one_cell_out, profiles
from moeplan.served_bound import decoding, impossible, least_tpot
from moeplan.served_models import prices_of
from moeplan.served_overhead import CELL_SPREAD, FAR, Overhead
from moeplan.served_routing import SKEW
from moeplan.served_scores import QUANTITIES, Pair, contradicted, errors, interval, pairs
from moeplan.served_steps import PARTS

RESULT = Path(__file__).parent / "results" / "served.md"
NAMES = {"tpot": "TPOT", "latency": "request latency", "ttft": "TTFT"}
OTHERS = (
    ("aiconfigurator, measured tables", "18.1 / 35.6", "", "35.6 / 45.2"),
    ("aiconfigurator, speed of light", "56.2 / 56.0", "", ""),
    ("target", "14 / 20", "16 / 22", "30 / -"),
)
"""Other predictors on (nearly) the same runs: median / mean error, %."""


def main() -> None:
    """Predict, score, write."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument(
        "--prices", choices=get_args(PriceMode), help="what prices kernels; default: fits, if any"
    )
    asked = options.parse_args()
    start = time.perf_counter()
    measured = served_rows()
    found = profiles(measured.rows, prices_of(asked.prices))
    beaten = impossible(measured.rows)
    every, overheads = leave_one_cell_out(found, beaten)
    took = time.perf_counter() - start
    text = "\n".join(_page(measured, found, every, beaten, overheads, took, asked.prices))
    RESULT.write_text(text + "\n", encoding="utf-8")
    print(text)


def _page(
    measured: ServedRows,
    found: Sequence[Profile],
    every: Sequence[Prediction],
    beaten: set[str],
    overheads: dict[str, Overhead],
    took: float,
    prices: str | None,
) -> Iterable[str]:
    found = [p for p in found if p.row.name not in beaten]
    predictions = [p for p in every if p.row.name not in beaten]
    plain = [p for p in predictions if not p.row.drafts]
    wrong = contradicted(measured.rows)
    sound = [p for p in predictions if p.row.name not in wrong]
    alone = [_alone(p) for p in found]
    asked = f" --prices {prices}" if prices else ""
    yield "# Served models: predicted against measured"
    yield ""
    yield (
        f"Command: `python benchmarks/served.py{asked}` (Python "
        f"{platform.python_version()}, numpy {np.__version__}; {took:.0f} s). {len(every)} "
        "runs of 13 development cells; the runs of a cell are held out of every fit when it is "
        f"predicted. {len(beaten)} runs that beat the peak bandwidth of their GPUs are left out by "
        "that rule and listed below. Median / mean of |predicted / measured - 1| in %, in brackets "
        "the median of predicted / measured."
    )
    yield from _table(
        ("predictor", "runs", *(NAMES[q] for q in QUANTITIES), "rank correlation of TTFT"),
        [
            ("kernels and engine overhead", *_scores(predictions)),
            ("kernels alone, nothing fitted end to end", *_scores(alone)),
            ("kernels and overhead, all runs, impossible ones too", *_scores(every)),
            ("kernels and overhead, runs without drafts", *_scores(plain)),
            ("kernels and overhead, without contradicted runs (see below)", *_scores(sound)),
            *((name, "", *scores, "") for name, *scores in OTHERS),
        ],
    )
    yield from _order(predictions)
    yield from _by_cell(predictions, overheads)
    for title, key in (
        ("model", lambda p: p.row.family),
        ("GPU", lambda p: p.row.system),
        ("engine", lambda p: p.row.engine),
        ("prompt and output tokens", _lengths),
        ("requests in the system", lambda p: _band(p.row.concurrency)),
        ("layout", _layout),
    ):
        yield from _by(title, key, predictions)
    yield from _parts(found, overheads)
    yield from _rules(measured, beaten, found)


def _scores(predictions: Sequence[Prediction]) -> tuple[str, ...]:
    """Write runs, the errors of each quantity, and the rank correlation of TTFT."""
    scored = [errors(predictions, q) for q in QUANTITIES]
    each = (f"{e.median:.1%} / {e.mean:.1%} ({e.ratio:.2f})".replace("%", "") for e in scored)
    return (str(len(predictions)), *each, f"{scored[-1].rank:.2f}")


def _alone(profile: Profile) -> Prediction:
    """Return the prediction from kernels alone."""
    ttft, tpot = profile.sums.times(Overhead(gap=0, eager=0, sequence=0, request=0))
    return Prediction(row=profile.row, ttft=ttft, tpot=tpot, own_system=False)


def _order(predictions: Sequence[Prediction]) -> Iterable[str]:
    yield "## Order of layouts"
    yield ""
    yield (
        "Pairs of layouts that differ in nothing else (checkpoint, system, engine version, "
        "lengths, concurrency, GPUs); 95 % interval of Clopper and Pearson. aiconfigurator orders "
        "69 % of 62 pairs of all cells rightly; the target is 80 %."
    )
    rows = []
    for quantity in ("tpot", "latency"):
        every = pairs(predictions, quantity)
        apart = [p for p in every if abs(np.log(p.measured)) > np.log(1.05)]
        rows += [
            (f"by {NAMES[quantity]}", *_share(every)),
            (f"by {NAMES[quantity]}, those more than 5 % apart", *_share(apart)),
        ]
    yield from _table(("pairs", "right", "of", "share", "interval"), rows)
    cells = sorted({str(p.key[0]) for p in pairs(predictions)})
    yield from _table(
        ("cell, by TPOT", "right", "of", "share", "interval"),
        [(c, *_share([p for p in pairs(predictions) if p.key[0] == c])) for c in cells],
    )


def _share(found: Sequence[Pair]) -> tuple[str, ...]:
    right = sum(p.right for p in found)
    low, high = interval(right, len(found))
    share = f"{right / len(found):.0%}" if found else "-"
    return str(right), str(len(found)), share, f"{low:.0%} to {high:.0%}"


def _by_cell(predictions: Sequence[Prediction], overheads: dict[str, Overhead]) -> Iterable[str]:
    yield "## By cell"
    for own, title in (
        (True, "Overhead from other models on the same engine and system:"),
        (False, "No other model on this engine and system; overhead from other systems:"),
    ):
        yield ""
        yield title
        mine = {
            c: [p for p in predictions if p.row.cell == c and p.own_system == own] for c in CELLS
        }
        yield from _table(
            ("cell", "runs", *(NAMES[q] for q in QUANTITIES), "rank of TTFT"),
            [(cell, *_scores(ps)) for cell, ps in mine.items() if ps]
            + [("all of these", *_scores([p for ps in mine.values() for p in ps]))],
        )
    yield "Overhead that each cell was predicted with:"
    yield from _table(
        (
            "cell",
            "share",
            "prompt share",
            "gap, us",
            "eager gap, us",
            "sequence, us",
            "request, ms",
        ),
        [
            (
                cell,
                f"{o.share:.2f}",
                f"{o.prompt_share:.2f}",
                f"{o.gap * 1e6:.2f}",
                f"{o.eager * 1e6:.0f}",
                f"{o.sequence * 1e6:.1f}",
                f"{o.request * 1e3:.0f}",
            )
            for cell, o in overheads.items()
        ],
    )


def _by(
    title: str, key: Callable[[Prediction], str], predictions: Sequence[Prediction]
) -> Iterable[str]:
    yield f"## By {title}"
    groups: dict[str, list[Prediction]] = {}
    for p in predictions:
        groups.setdefault(key(p), []).append(p)
    yield from _table(
        (title, "runs", *(NAMES[q] for q in QUANTITIES), "rank of TTFT"),
        [(name, *_scores(groups[name])) for name in sorted(groups)],
    )


def _band(concurrency: int) -> str:
    for most in (8, 32, 128):
        if concurrency <= most:
            return f"to {most:3d}"
    return "above 128"


def _lengths(p: Prediction) -> str:
    known = p.row.inputs % 1024 == 0
    return f"{p.row.inputs} / {p.row.outputs}" if known else "others"


def _layout(p: Prediction) -> str:
    ranks = p.row.ranks
    attention = "DP attention" if ranks.dp > 1 else "TP attention" if ranks.tp > 1 else "one GPU"
    return attention + (", EP experts" if ranks.moe_ep > 1 else "")


def _parts(found: Sequence[Profile], overheads: dict[str, Overhead]) -> Iterable[str]:
    """Of what a token's time is made, by cell."""
    yield "## What TPOT is made of"
    rows = []
    for cell in overheads:
        mine = [p for p in found if p.row.cell == cell]
        shares = np.array([[*p.parts, p.sums.times(overheads[cell])[1]] for p in mine])
        parts, whole = shares[:, :-1], shares[:, -1]
        mean = (parts / whole[:, None]).mean(axis=0)
        rows.append((cell, *(f"{m:.0%}" for m in mean), f"{1 - mean.sum():+.0%}"))
    yield from _table(("cell", *PARTS, "engine"), rows)


def _rules(measured: ServedRows, beaten: set[str], found: Sequence[Profile]) -> Iterable[str]:
    yield "## Rows left out and repaired, by rule"
    yield from _table(
        ("rule", "rows"), [(rule, str(n)) for rule, n in sorted(measured.counts.items())]
    )
    yield (
        "Left out: TPOT below the bytes of a step over the peak bandwidth of all GPUs (weights "
        "outside the experts once, experts that the decoding requests touch, their cache; how many "
        "decode follows by Little's law). Such a client sees tokens late and in bursts: the sum, a "
        "request's latency, may be right, its two parts are not."
    )
    yield from _table(
        ("cell", "tokens", "requests", "decoding", "GPUs", "TPOT, ms", "least, ms", "TTFT, s"),
        [
            (
                r.cell,
                f"{r.inputs} / {r.outputs}",
                str(r.concurrency),
                f"{decoding(r):.0f}",
                str(r.ranks.gpus),
                f"{r.tpot * 1e3:.2f}",
                f"{least_tpot(r) * 1e3:.2f}",
                f"{r.ttft:.1f}",
            )
            for r in measured.rows
            if r.name in beaten
        ],
    )
    yield (
        "Contradicted by other runs, yet scored above unless said otherwise: by Little's law more "
        "requests decode than in two other runs of the deployment, in less than two thirds of "
        "their time per token."
    )
    wrong = contradicted(measured.rows)
    yield from _table(
        ("cell", "version", "tokens", "requests", "GPUs", "TPOT, ms", "TTFT, s"),
        [
            (
                r.cell,
                r.version or "not stated",
                f"{r.inputs} / {r.outputs}",
                str(r.concurrency),
                str(r.ranks.gpus),
                f"{r.tpot * 1e3:.1f}",
                f"{r.ttft:.1f}",
            )
            for r in measured.rows
            if r.name in wrong
        ],
    )
    yield "## Assumptions"
    yield ""
    remarks = sorted(
        f"{system}, {engine}: prices rest on {evidence!r}{'; ' + remark if remark else ''}"
        for system, engine, evidence, remark in {
            (p.row.system, p.row.engine, p.evidence, p.remark) for p in found
        }
    )
    for line in (
        "Lengths of 1024 and 8192 are drawn from 80 to 100 % of the stated, ten requests per user "
        "(recipes of InferenceX); other lengths are fixed. TTFT and TPOT are means over requests.",
        f"Routing: popularity of experts log-normal with {SKEW} (measured loads of DeepSeek-V3/R1: "
        "0.9), experts in order, no redundant slots.",
        f"{SPECULATED}: three drafts a step (one with data-parallel attention), each accepted "
        f"with {ACCEPTED} if those before it were (DeepSeek-V3 report: 1.8 tokens a step with "
        "one draft).",
        f"Overhead: a level of each cell (standard deviation {CELL_SPREAD} of the logarithm) is "
        f"free in the fit and dropped in the prediction; runs on other systems weigh {FAR}.",
        "KV cache in fp8 on Blackwell and bf16 on Hopper; formats of checkpoints as published.",
        *remarks,
    ):
        yield f"- {line}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterable[str]:
    yield ""
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield "| " + " | ".join(text.replace("|", ", ") for text in row) + " |"
    yield ""


if __name__ == "__main__":
    main()
