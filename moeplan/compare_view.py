"""A comparison of clusters as a table for the terminal, as JSON, and as one picture.

One row is one cluster that does the same work: throughput in tokens per second with its interval,
time of a step and its causes in seconds, memory of the fullest rank in bytes.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from basis.errors import InputError
from moeplan import charts, figures

Row = Mapping[str, Any]
_NEEDED = ("cluster", "tokens_per_second", "low", "high", "step_time_s", "memory_bytes_per_rank",
           "seconds_by_cause", "evidence")  # fmt: skip
_TITLE = "Same work on several clusters"


def _longest(row: Row) -> str:
    """Name the cause that takes the most of a step, with its share."""
    seconds = row["seconds_by_cause"]
    cause = max(seconds, key=lambda name: seconds[name])
    return f"{cause.replace('_', ' ')} {figures.percent(seconds[cause] / sum(seconds.values()))}"


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "cluster": lambda row: str(row["cluster"]),
    "tokens/s": lambda row: figures.number(row["tokens_per_second"]),
    "interval": lambda row: figures.interval(row["low"], row["high"]),
    "relative": lambda row: f"{row['relative']:.2f}×",
    "step time": lambda row: figures.seconds(row["step_time_s"]),
    "TPOT": lambda row: figures.seconds(row["tpot_s"]),
    "memory/rank": lambda row: figures.data_size(row["memory_bytes_per_rank"]),
    "longest cause": _longest,
    "rests on": lambda row: str(row["evidence"]),
}
_WORDS = ("cluster", "longest cause", "rests on")


def comparison_table(rows: Sequence[Row], title: str = _TITLE) -> Table:
    """Return the comparison as text, one line per cluster, relative to the first.

    Raises
    ------
    InputError
        If there is no row, or one lacks a figure.
    """
    data = comparison_data(rows)["rows"]
    table = Table(title=title, title_justify="left")
    given = {n: w for n, w in _COLUMNS.items() if any(w(row) != figures.MISSING for row in data)}
    for name in given:
        table.add_column(name, justify="left" if name in _WORDS else "right", overflow="fold")
    for row in data:
        table.add_row(*(write(row) for write in given.values()))
    return table


def comparison_data(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the comparison as plain JSON data, with each throughput relative to the first.

    Raises
    ------
    InputError
        If there is no row, or one lacks a figure.
    """
    if not rows:
        raise InputError("no cluster to compare -- give at least one")
    for row in rows:
        missing = [key for key in _NEEDED if row.get(key) is None]
        if missing:
            raise InputError(f"{row.get('cluster', 'a row')} lacks {', '.join(missing)}")
    first = rows[0]["tokens_per_second"]
    keys = (*_NEEDED, "tpot_s")
    return {
        "baseline": rows[0]["cluster"],
        "rows": [
            {key: row.get(key) for key in keys} | {"relative": row["tokens_per_second"] / first}
            for row in rows
        ],
    }


def render_comparison(rows: Sequence[Row], out: Path, title: str = _TITLE) -> list[Path]:
    """Write the picture of a comparison as ``comparison.svg`` and ``comparison.png``.

    Parameters
    ----------
    rows : sequence of mapping
        One per cluster, drawn from top to bottom.
    out : Path
        Folder; made if missing.

    Raises
    ------
    InputError
        If there is no row, or one lacks a figure.
    """
    comparison_data(rows)
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / "comparison.svg", out / "comparison.png"]
    with mpl.rc_context({"svg.hashsalt": "moeplan", "font.size": 10, "hatch.linewidth": 0.6}):
        picture = _picture(rows, title)
        picture.savefig(paths[0], metadata={"Date": None})
        picture.savefig(paths[1], dpi=150)
    return paths


def _picture(rows: Sequence[Row], title: str) -> Figure:
    stages = charts.stage_order([row["seconds_by_cause"] for row in rows])
    picture = Figure(figsize=(11, 1.9 + 0.55 * len(rows)), layout="constrained")
    left, right = picture.subplots(1, 2, sharey=True, width_ratios=(1, 1.15))
    _draw_throughput(left, rows)
    _draw_steps(right, rows, stages)
    left.set_yticks(range(len(rows)), [str(row["cluster"]) for row in rows])
    left.invert_yaxis()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", linewidth=0.4, alpha=0.6)
        axes.set_axisbelow(True)
    picture.suptitle(title, x=0.01, ha="left", weight="bold")
    keys = [Patch(label=stage.replace("_", " "), **_fill(stage)) for stage in stages]
    picture.legend(handles=keys, loc="outside lower right", ncols=8, frameon=False, fontsize=9)
    return picture


def _draw_throughput(axes: Axes, rows: Sequence[Row]) -> None:
    speed = np.array([row["tokens_per_second"] for row in rows], dtype=float)
    low = np.array([row["low"] for row in rows], dtype=float)
    high = np.array([row["high"] for row in rows], dtype=float)
    ends = np.maximum(np.stack([speed - low, high - speed]), 0)
    axes.barh(range(len(rows)), speed, xerr=ends, height=0.6, color="#8FA3B8", capsize=4)
    for i, value in enumerate(speed):
        axes.text(max(value, high[i]) + 0.02 * high.max(), i, figures.number(value), va="center")
    axes.set_xlim(0, 1.22 * max(high.max(), speed.max()))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(lambda value, _: figures.number(value, 3))
    axes.set_title("Throughput, tokens/s", loc="left", fontsize=10)


def _draw_steps(axes: Axes, rows: Sequence[Row], stages: Sequence[str]) -> None:
    begin = np.zeros(len(rows))
    for stage in stages:
        part = 1e3 * np.array([row["seconds_by_cause"].get(stage, 0.0) for row in rows])
        axes.barh(range(len(rows)), part, left=begin, height=0.6, **_fill(stage))
        begin += part
    for i, total in enumerate(begin):
        text = figures.seconds(total / 1e3)
        axes.text(total + 0.01 * begin.max(), i, text, va="center")
    axes.set_xlim(0, 1.15 * begin.max())
    axes.set_title("Where a step's time goes, ms", loc="left", fontsize=10)
    axes.tick_params(axis="y", length=0)


def _fill(stage: str) -> dict[str, Any]:
    hatch = "////" if stage == "wait" else None
    return {"facecolor": charts.stage_colour(stage)[0], "hatch": hatch, "edgecolor": "#555555",
            "linewidth": 0.3}  # fmt: skip
