"""Several whole runs of calibrate and validate on one machine, side by side.

    for i in 1 2 3; do
      moeplan calibrate --device cpu --out machine$i
      moeplan validate --machine machine$i --out validation$i
    done
    python benchmarks/validation.py validation1 validation2 validation3

Reads the validation.json of each folder and writes benchmarks/results/validation_cpu.md. A share or
error is in %; rows whose repeats spread by more than 5 % are undecidable: counted, never passed.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

RESULT = Path(__file__).parent / "results" / "validation_cpu.md"


def main() -> None:
    """Read, write, print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("folders", nargs="+", type=Path)
    options.add_argument("--out", type=Path, default=RESULT)
    asked = options.parse_args()
    runs = [json.loads((f / "validation.json").read_text(encoding="utf-8")) for f in asked.folders]
    text = "\n".join(_page(runs)) + "\n"
    asked.out.write_text(text, encoding="utf-8")
    print(text)


def _page(runs: Sequence[dict[str, Any]]) -> Iterable[str]:
    machine = runs[0]["machine"]
    yield "# This machine: predicted against measured"
    yield ""
    yield (
        f"`moeplan calibrate --device cpu`, then `moeplan validate`, {len(runs)} times one after "
        f"the other (`benchmarks/validation.py`). {machine['processor']}, {machine['threads']} "
        f"pinned thread a rank, last-level cache {machine['cache_bytes'] / 2**20:.0f} MiB, torch "
        f"{machine['torch']}, {machine['os']}, {machine['date'][:10]}. Errors are |predicted / "
        "measured - 1| in %, of decidable rows: median / 90th percentile / worst."
    )
    yield ""
    yield _line("", *(f"run {n + 1}" for n in range(len(runs))))
    yield _line(*["---"] * (len(runs) + 1))
    for title, cells in _summary(runs):
        yield _line(title, *cells)
    if _all_have(runs, "operators"):
        yield from _table(runs, "operators", "by_kernel", "Operators by kernel")
    if _all_have(runs, "steps"):
        yield from _rows("Steps: error (floor), ms measured", [r["steps"]["steps"] for r in runs])
        yield from _table(runs, "steps", "by_batch", "Steps by batch")
        yield from _table(runs, "steps", "by_load", "Decode steps by load")
        yield from _table(runs, "steps", "by_kernel", "Kernels within steps")
    if _all_have(runs, "parallel"):
        yield from _pairs(runs)
    if _all_have(runs, "offload"):
        title = "Experts behind a cache: error (floor), ms measured"
        yield from _rows(title, [r["offload"]["rows"] for r in runs])


def _all_have(runs: Sequence[dict[str, Any]], part: str) -> bool:
    return all(part in run for run in runs)


def _summary(runs: Sequence[dict[str, Any]]) -> Iterable[tuple[str, list[str]]]:
    for name in ("operators", "steps", "parallel", "offload"):
        if not _all_have(runs, name):
            continue
        found = [r.get(name, {}).get("summary") for r in runs]
        yield f"{name}: error", [_errors(s) if s else "-" for s in found]
        counts = [f"{s['decidable']} / {s['undecidable']}" if s else "-" for s in found]
        yield f"{name}: decidable / undecidable rows", counts
    yield from _further(runs)


def _further(runs: Sequence[dict[str, Any]]) -> Iterable[tuple[str, list[str]]]:
    if _all_have(runs, "operators"):
        every = [_all(r["operators"]["rows"]) for r in runs]
        yield "operators, all rows, undecidable ones too", every
    if _all_have(runs, "steps"):
        yield from _of_steps(runs)
    if _all_have(runs, "parallel"):
        yield from _of_pairs(runs)
    if _all_have(runs, "offload"):
        found = [r["offload"] for r in runs]
        yield (
            "cache accesses that differ",
            [f"{o['differences']} of {o['accesses']}" for o in found],
        )


def _of_steps(runs: Sequence[dict[str, Any]]) -> Iterable[tuple[str, list[str]]]:
    decode = [[s for s in r["steps"]["steps"] if s["label"].startswith("decode")] for r in runs]
    yield "decode steps, all rows, undecidable ones too", [_all(rows) for rows in decode]


def _of_pairs(runs: Sequence[dict[str, Any]]) -> Iterable[tuple[str, list[str]]]:
    pairs = [[p["verdict"] for p in r["parallel"]["pairs"]] for r in runs]
    for verdict, title in (
        ("ok", "pairs of placements decided rightly"),
        ("off", "pairs decided wrongly"),
        ("equal", 'pairs answered "equal"'),
        ("undecidable", "pairs undecidable"),
    ):
        yield title, [str(p.count(verdict)) for p in pairs]


def _errors(summary: dict[str, Any]) -> str:
    shown = (summary[name] for name in ("median", "p90", "worst"))
    return " / ".join("-" if each is None else f"{each:.1%}".rstrip("%") for each in shown)


def _all(rows: Sequence[dict[str, Any]]) -> str:
    size = np.abs([row["error"] for row in rows])
    values = (np.median(size), np.quantile(size, 0.9), size.max())
    return " / ".join(f"{100 * value:.1f}" for value in values)


def _rows(title: str, tables: Sequence[Sequence[dict[str, Any]]]) -> Iterable[str]:
    yield from _head(title, len(tables))
    for rows in zip(*tables, strict=True):
        yield _line(rows[0]["label"], *(_row(row) for row in rows))


def _row(row: dict[str, Any]) -> str:
    error = f"{100 * row['error']:+.1f} ({100 * row['floor']:.1f}), {1e3 * row['measured_s']:.1f}"
    return error + (" undecidable" if row["verdict"] == "undecidable" else "")


def _table(runs: Sequence[dict[str, Any]], part: str, name: str, title: str) -> Iterable[str]:
    yield from _head(f"{title}: median / 90th percentile / worst, signed", len(runs))
    for rows in zip(*(r[part][name] for r in runs), strict=True):
        signed = ["-" if r["signed"] is None else f"{100 * r['signed']:+.1f}" for r in rows]
        cells = [f"{_errors(r)}, {s}" for r, s in zip(rows, signed, strict=True)]
        yield _line(rows[0]["label"], *cells)


def _pairs(runs: Sequence[dict[str, Any]]) -> Iterable[str]:
    yield from _head("Placements: predicted gap, measured gap (spread), verdict", len(runs))
    for pairs in zip(*(r["parallel"]["pairs"] for r in runs), strict=True):
        first = pairs[0]
        label = f"{first['batch']}, {first['load']}: {first['first']} / {first['second']}"
        yield _line(label, *(_pair(pair) for pair in pairs))


def _pair(pair: dict[str, Any]) -> str:
    gaps = f"{100 * pair['predicted_gap']:+.1f}, {100 * pair['measured_gap']:+.1f}"
    return f"{gaps} ({100 * pair['spread']:.1f}), {pair['verdict']}"


def _head(title: str, runs: int) -> Iterable[str]:
    yield ""
    yield f"## {title}"
    yield ""
    yield _line("", *(f"run {n + 1}" for n in range(runs)))
    yield _line(*["---"] * (runs + 1))


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
