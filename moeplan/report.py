"""The report of a plan: one HTML file that answers "should I deploy this placement?".

It reads plan.json and nothing else, so a report can be made again from the file; numbers are
those of the plan, only formatted. Pictures are inline SVG, there is no script and no network.
"""

from typing import Any

import numpy as np

from basis.errors import InputError
from moeplan import charts, figures
from moeplan.page import STATUS, badge, breakdown, render, split_tables
from moeplan.report_tables import NAMES, headline

_NEEDED = ("scenario", "moe_layer_ids", "physical_to_logical_map", "dispatch", "parallelism",
           "certificate", "predicted", "baselines", "split", "details", "verdict")  # fmt: skip


def render_report(plan: dict[str, Any]) -> str:
    """Write the report of a plan as one self-contained HTML page.

    Parameters
    ----------
    plan : dict
        The content of plan.json (schema moeplan.plan/1).

    Raises
    ------
    InputError
        If ``plan`` is not of that schema or lacks a part.
    """
    if plan.get("schema") != "moeplan.plan/1":
        raise InputError(
            f"schema {plan.get('schema')!r} -- the report reads moeplan.plan/1 -- give a plan.json "
            "that `moeplan plan` wrote"
        )
    missing = [key for key in _NEEDED if key not in plan]
    if missing:
        raise InputError(f"the plan lacks {', '.join(missing)} -- plan again")
    return render("report.html.j2", plan, _view(plan))


def _view(plan: dict[str, Any]) -> dict[str, Any]:
    """Return everything that the template shows."""
    scenario, parallelism = plan["scenario"], plan["parallelism"]
    slots, ranks = len(plan["physical_to_logical_map"][0]), int(parallelism["experts"]["ep"])
    per_node = scenario.get("ranks_per_node")
    return {
        "badge": badge(plan["verdict"]),
        "tiles": headline(plan),
        "splits": split_tables(plan),
        "load": _load_maps(plan, per_node),
        "traffic": _traffic_maps(plan, per_node),
        "steps": breakdown(plan["details"], "seconds_by_cause"),
        "certificate": _certificate(plan),
        "second_stage": _second_stage(plan.get("second_stage")),
        "layout": {"slots": slots, "ranks": ranks, "per_rank": slots // ranks,
                   "attention": parallelism["attention"], "nodes": ranks // (per_node or ranks)},
    }  # fmt: skip


def _panels(plan: dict[str, Any], key: str) -> dict[str, charts.Matrix]:
    """Return one matrix per placement that has it: baselines first, the plan last."""
    details = plan["details"]
    order = [name for name in ("contiguous", "eplb", "plan") if name in details]
    return {
        name: np.asarray(details[name][key], dtype=float)
        for name in order
        if details[name].get(key) is not None
    }


def _load_maps(plan: dict[str, Any], per_node: int | None) -> dict[str, Any] | None:
    panels = _panels(plan, "rank_load")
    if not panels:
        return None
    span = charts.load_span(list(panels.values()))
    titles = charts.with_titles(list(panels.values()))
    layers = plan["moe_layer_ids"]
    return {
        "low": figures.fixed(max(0.0, 1 - span), 2),
        "high": figures.fixed(1 + span, 2),
        "levels": range(21),
        "panels": [
            {"name": NAMES[name],
             "mean": figures.fixed(float(load.max(axis=1).mean()), 2),
             "worst": figures.fixed(float(load.max()), 2),
             "layer": layers[int(load.max(axis=1).argmax())],
             "svg": charts.load_map(load, span, name=NAMES[name], layer_ids=layers,
                                    ranks_per_node=per_node, titles=titles)}
            for name, load in panels.items()
        ],
    }  # fmt: skip


def _traffic_maps(plan: dict[str, Any], per_node: int | None) -> dict[str, Any] | None:
    panels = _panels(plan, "traffic")
    if not panels:
        return None
    top = max(float(t.max()) for t in panels.values())
    titles = charts.with_titles(list(panels.values()))
    return {
        "top": figures.data_size(top),
        "levels": range(11),
        "panels": [
            {"name": NAMES[name],
             "total": figures.data_size(float(traffic.sum())),
             "across": _across_nodes(traffic, per_node),
             "svg": charts.traffic_map(traffic, top, name=NAMES[name], ranks_per_node=per_node,
                                       titles=titles)}
            for name, traffic in panels.items()
        ],
    }  # fmt: skip


def _across_nodes(traffic: charts.Matrix, per_node: int | None) -> str:
    """Return the share of the bytes that leaves its node; empty on one node."""
    total = float(traffic.sum())
    if not per_node or per_node >= len(traffic) or not total:
        return ""
    node = np.arange(len(traffic)) // per_node
    return figures.percent(float(traffic[node[:, None] != node].sum()) / total)


def _certificate(plan: dict[str, Any]) -> dict[str, Any]:
    given = plan["certificate"]
    layers, chart = given.get("per_layer"), None
    if layers:
        mean = np.asarray(layers["mean"], dtype=float)
        chart = charts.certificate_chart(
            np.asarray(layers["objective"]) / mean,
            np.asarray(layers["bound"]) / mean,
            plan["moe_layer_ids"],
        )
    mean_bound = given.get("mean_bound")
    objective = given["objective"]
    return {
        "chart": chart,
        "status": STATUS.get(given["status"], given["status"]),
        "mean_gap": None if not mean_bound else (objective - mean_bound) / objective,
    }


def _second_stage(stage: dict[str, Any] | None) -> dict[str, Any] | None:
    if not stage:
        return None
    before, after = stage.get("before", {}), stage.get("after", {})

    def text(value: object) -> str:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return figures.number(value) if number else str(value)  # type: ignore[arg-type]

    rows = [
        (key.replace("_", " "), text(before[key]), text(after[key]))
        for key in before
        if key in after
    ]
    return {"order": stage.get("order", ""), "tolerance": stage.get("tolerance"), "rows": rows}
