"""What the reports of all kinds of plans share: the page around them, tables, and bars of time.

A report is one HTML file made from plan.json alone; pictures are inline, there is no script and
no network. Times in seconds.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from moeplan import charts, figures
from moeplan.engines import exports_for_people
from moeplan.report_tables import METRICS, NAMES, Metric, comparison

STATUS = {
    "optimal": "optimal: proved best",
    "gap": "stopped within the stated gap",
    "time_limit": "stopped at the time limit",
}
"""Status of a certificate, for people."""
_SPLITS = {
    "early_late": ("Later requests", "planned on the first half of the requests, scored on the "
                   "second: shows drift"),
    "interleaved": ("Same mix", "planned on every other request, scored on the others"),
}  # fmt: skip


def render(template: str, plan: dict[str, Any], view: Mapping[str, Any]) -> str:
    """Write a report from a template of the folder ``templates``.

    Parameters
    ----------
    plan : dict
        plan.json.
    view : mapping
        What the template shows besides: ``badge``, ``tiles`` and its own parts.
    """
    shared = {
        "plan": plan,
        "scenario": plan["scenario"],
        "verdict": plan["verdict"],
        "exports": exports_for_people(plan),
        "warnings": plan.get("warnings", []),
        "alternatives": plan.get("alternatives", []),
        "evidence": plan.get("evidence", []),
        "version": plan.get("moeplan_version", ""),
    }
    return page(template, {**shared, **view})


def page(template: str, view: Mapping[str, Any]) -> str:
    """Write a page from a template of the folder ``templates`` and what it shows."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=figures.number, seconds=figures.seconds, size=figures.data_size,
        percent=figures.percent, fixed=figures.fixed, count=figures.count,
    )  # fmt: skip
    css = {theme: charts.scale_css(theme) for theme in ("light", "dark")}
    return environment.get_template(template).render({"css": css, **view})


def badge(verdict: dict[str, Any]) -> tuple[str, str]:
    """Return the style and the text of the verdict's badge."""
    if verdict.get("tie"):
        return "tie", "Tie"
    return ("yes", "Worth it") if verdict.get("worth_it") else ("no", "Not worth it")


def split_tables(
    plan: dict[str, Any], metrics: Sequence[Metric] = METRICS, noise: float | None = None
) -> list[dict[str, Any]]:
    """Return the comparison with the baselines on each split that the plan has, as text."""
    if noise is None:
        noise = float(plan["verdict"].get("noise") or 0.0)
    parts = [plan, plan["other_split"]] if plan.get("other_split") else [plan]
    return [
        {"name": _SPLITS.get(part["split"], (part["split"], ""))[0],
         "meaning": _SPLITS.get(part["split"], ("", ""))[1],
         **comparison(part["predicted"], part["baselines"], noise, metrics)}
        for part in parts
    ]  # fmt: skip


def breakdown(details: Mapping[str, Any], key: str) -> dict[str, Any] | None:
    """Return bars of the seconds by cause under ``key`` of plan and baselines; None without any.

    Causes below zero (what overlaps) are no part of a bar, but of its total.
    """
    rows = {n: details[n][key] for n in NAMES if n in details}
    stages = charts.stage_order(rows.values())
    if not stages:
        return None
    longest = max(sum(row.values()) for row in rows.values())
    return {
        "stages": [(stage, *charts.stage_colour(stage)) for stage in stages],
        "rows": [
            {"name": NAMES[name], "total": sum(row.values()),
             "seconds": {stage: row.get(stage, 0.0) for stage in stages},
             "parts": [(stage, row.get(stage, 0.0), 100 * row.get(stage, 0.0) / longest,
                        *charts.stage_colour(stage)) for stage in stages]}
            for name, row in rows.items()
        ],
    }  # fmt: skip
