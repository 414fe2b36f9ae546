"""Pictures of predicted against measured steps: one point per step, and where the time goes.

Both axes of the first are logarithmic, with lines at the bound; undecidable steps are hollow. The
second draws each size of step twice, measured above predicted, split into stages.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter

from moeplan import charts, figures
from moeplan.validate_result import StepRow, StepsFound

_COLOURS = ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#777777")
_MARKS = {"decode": "o", "prefill": "s"}
_MARGIN = 1.3  # factor beyond the outermost points


def draw_steps(found: StepsFound, out: Path) -> list[Path]:
    """Write ``steps`` and ``step-stages`` as SVG and PNG.

    Parameters
    ----------
    found
    out
        Folder; made if missing.
    """
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    with mpl.rc_context({"svg.hashsalt": "moeplan", "font.size": 10}):
        for name, picture in (("steps", _scatter(found)), ("step-stages", _stacks(found))):
            paths += [out / f"{name}.svg", out / f"{name}.png"]
            picture.savefig(paths[-2], metadata={"Date": None})
            picture.savefig(paths[-1], dpi=150)
    return paths


def _scatter(found: StepsFound) -> Figure:
    picture = Figure(figsize=(7, 6), layout="constrained")
    axes = picture.subplots()
    loads = list(dict.fromkeys(row.load for row in found.steps))
    colours = dict(zip(loads, _COLOURS, strict=False))
    for row in found.steps:
        axes.plot(
            1e3 * row.measured_s,
            1e3 * row.predicted_s,
            _MARKS[row.phase],
            color=colours[row.load],
            fillstyle="full" if row.decidable else "none",
            markersize=4 + 0.6 * np.log2(row.tokens),
            alpha=0.8,
        )
    times = [1e3 * t for row in found.steps for t in (row.measured_s, row.predicted_s)]
    ends = np.array([min(times) / _MARGIN, max(times) * _MARGIN])
    axes.plot(ends, ends, color="#555555", linewidth=0.8)
    for side in (1 - found.bound, 1 + found.bound):
        axes.plot(ends, side * ends, color="#555555", linewidth=0.8, linestyle="--")
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(lambda value, _: figures.number(value, 2))
        axis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="measured step, ms", ylabel="predicted step, ms")
    axes.grid(linewidth=0.4, alpha=0.6)
    axes.legend(handles=_keys(colours, found.steps), frameon=False, fontsize=9)
    axes.set_title(
        f"Steps of one process: median |error| {figures.percent(found.summary.median)}, "
        f"lines at {figures.percent(found.bound)}",
        loc="left",
        fontsize=10,
    )
    return picture


def _keys(colours: dict[str, str], rows: Sequence[StepRow]) -> list[Line2D]:
    plain: dict[str, Any] = {"linestyle": "none"}
    keys = [Line2D([], [], color=c, marker="o", label=load, **plain) for load, c in colours.items()]
    for phase in dict.fromkeys(row.phase for row in rows):
        keys.append(Line2D([], [], color="#333333", marker=_MARKS[phase], label=phase, **plain))
    hollow = {"marker": "o", "fillstyle": "none", "label": "undecidable"} | plain
    keys.append(Line2D([], [], color="#333333", **hollow))
    return keys


def _stacks(found: StepsFound) -> Figure:
    groups = list(dict.fromkeys(row.group for row in found.stages))
    picture = Figure(figsize=(9, 1.5 + 0.55 * len(groups)), layout="constrained")
    axes = picture.subplots()
    stages = charts.stage_order([{row.part: row.measured_s} for row in found.stages])
    _draw_stacks(axes, found.stages, groups, stages)
    axes.set_yticks(range(len(groups)), groups)
    axes.invert_yaxis()
    axes.set_xlabel("share of the measured step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        "Where a step's time goes: measured above, predicted below (hatched), mean over loads",
        loc="left",
        fontsize=10,
    )
    keys = [Patch(label=stage.replace("_", " "), **_fill(stage)) for stage in stages]
    picture.legend(handles=keys, loc="outside lower right", ncols=8, frameon=False, fontsize=9)
    return picture


def _draw_stacks(
    axes: Axes, rows: Sequence[StepRow], groups: Sequence[str], stages: Sequence[str]
) -> None:
    """Draw two bars a group, both over what was measured of it: steps differ a hundredfold."""
    whole = {group: sum(r.measured_s for r in rows if r.group == group) for group in groups}
    for side, hatch in ((-0.2, None), (0.2, "////")):
        begin = np.zeros(len(groups))
        for stage in stages:
            part = np.array(
                [
                    sum(
                        r.predicted_s if hatch else r.measured_s
                        for r in rows
                        if (r.group, r.part) == (group, stage)
                    )
                    / whole[group]
                    for group in groups
                ]
            )
            places = np.arange(len(groups)) + side
            axes.barh(places, part, left=begin, height=0.36, hatch=hatch, **_fill(stage))
            begin += part


def _fill(stage: str) -> dict[str, Any]:
    return {
        "facecolor": charts.stage_colour(stage)[0],
        "edgecolor": "#555555",
        "linewidth": 0.3,
    }
