"""`moeplan plan`: a placement, a parallel layout or an offload plan, as the scenario asks.

Whatever the question, DIR gets plan.json, report.html, timeline.json and the engines' files.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from basis.errors import InputError
from moeplan import console, layout_view, offload_view, views
from moeplan.asked import facts_of, write_json
from moeplan.engines import engines_for, export_plan
from moeplan.layout_file import layouts_to_dict
from moeplan.layout_report import render_layouts
from moeplan.offload_file import offload_to_dict
from moeplan.offload_report import render_offload
from moeplan.plan_file import to_dict
from moeplan.report import render_report
from moeplan.scenario import Scenario
from planner.layouts_plan import confirm_layouts, plan_layouts
from planner.layouts_score import score_layouts
from planner.offload_plan import make_offload_plan
from planner.offload_sample import OffloadFacts
from planner.plan import Progress, check_limits, make_plan
from planner.scoring import Score

Answer = dict[str, Any]
Show = Callable[[Any, Mapping[str, Any], Path, Mapping[str, str]], None]


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """One of the questions that a plan answers."""

    make: Callable[[Scenario, Progress], tuple[Answer, Score]]
    """From a scenario to the contents of plan.json and the prediction behind it."""
    report: Callable[[Answer], str]
    show: Show


def make_plan_files(scenario: Scenario, options: argparse.Namespace) -> Answer:
    """Plan a scenario, write everything into ``options.out``, and print the answer."""
    kind = _kind_of(scenario)
    screen = console.of(options)
    options.out.mkdir(parents=True, exist_ok=True)
    with console.progress(screen) as tell:
        answer, predicted = kind.make(scenario, tell)
        tell("write report and exports")
        write_json(options.out / "plan.json", answer)
        write_json(options.out / "timeline.json", predicted.results[0].timeline)
        (options.out / "report.html").write_text(kind.report(answer), encoding="utf-8")
        refused = _export(answer, options.out / "export")
    kind.show(screen, answer, options.out, refused)
    return answer


def _kind_of(scenario: Scenario) -> _Kind:
    wanted = scenario.file.plan
    if wanted.offload is not None:
        return _Kind(make=_offload, report=render_offload, show=offload_view.show_offload)
    if wanted.layouts == "all":
        return _Kind(make=_layouts, report=render_layouts, show=layout_view.show_layouts)
    return _Kind(make=_placement, report=render_report, show=views.show_plan)


def _placement(scenario: Scenario, tell: Progress) -> tuple[Answer, Score]:
    facts = facts_of(scenario, step=scenario.step)
    found = make_plan(facts, scenario.trace, "early_late", tell)
    other = make_plan(facts, scenario.trace, "interleaved", tell)
    return to_dict(scenario, found, other), found.predicted


def _layouts(scenario: Scenario, tell: Progress) -> tuple[Answer, Score]:
    asked = scenario.file.workload
    if asked.rate is not None:
        raise InputError(
            f"workload.rate {asked.rate:g} with plan.layouts all -- layouts are compared in decode "
            "steps: give concurrency (one or a list), or leave both out"
        )
    sweep = asked.sweep
    facts = facts_of(scenario, step=None if sweep else scenario.step)
    found = plan_layouts(facts, scenario.trace, "early_late", tell, sweep=sweep)
    tell("interleaved: place and compare the best two layouts again")
    said = confirm_layouts(facts, scenario.trace, "interleaved", found, sweep=sweep)
    tell("score the choice and what engines do by default")
    scores = score_layouts(facts, scenario.trace, found, sweep=sweep)
    return layouts_to_dict(scenario, found, said, scores), scores.predicted


def _offload(scenario: Scenario, tell: Progress) -> tuple[Answer, Score]:
    wanted = scenario.file.plan
    assert wanted.offload is not None
    facts = OffloadFacts(
        model=scenario.model,
        cluster=scenario.cluster,
        workload=scenario.step,
        options=wanted.offload,
    )
    found = make_offload_plan(facts, scenario.trace, "early_late", tell)
    check_limits(wanted.limits, facts.workload, found.predicted)
    other = make_offload_plan(facts, scenario.trace, "interleaved", tell)
    return offload_to_dict(scenario, facts, found, other), found.predicted


def _export(answer: Answer, out: Path) -> dict[str, str]:
    """Write the files of every engine that can run the plan; returns why the others cannot."""
    refused = {}
    for engine in engines_for(answer):
        try:
            export_plan(answer, engine, out / engine)
        except InputError as error:
            refused[engine] = str(error)
    return refused
