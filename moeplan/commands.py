"""What each command does: opens its inputs, calls the packages, writes files, returns plain data.

Every function takes the parsed arguments and returns what ``--json`` prints; tables for people go
to the console of `moeplan.console`, which is stderr when stdout carries JSON.
"""

import argparse
from pathlib import Path
from typing import Any

from basis.errors import InputError
from hwmodels import catalog_names, check_hardware, load_hardware
from moeplan import console, views
from moeplan.asked import facts_of
from moeplan.compare_view import render_comparison
from moeplan.demo import bundled
from moeplan.engines import export_plan
from moeplan.plan_command import make_plan_files
from moeplan.plan_file import read_plan
from moeplan.scenario import Scenario, open_cluster, open_scenario
from moeplan.simulate_command import simulate
from planner.plan import make_plan
from simulator.deployment import Workload

__all__ = [
    "calibrate",
    "compare",
    "demo",
    "export",
    "hardware_check",
    "hardware_list",
    "hardware_show",
    "plan",
    "simulate",
    "trace_convert",
    "trace_stats",
]


def plan(options: argparse.Namespace) -> dict[str, Any]:
    """Plan a scenario and write plan.json, report.html, timeline.json and the exports."""
    return make_plan_files(open_scenario(options.scenario), options)


def demo(options: argparse.Namespace) -> dict[str, Any]:
    """Plan the bundled example."""
    return make_plan_files(open_scenario(bundled("demo.yaml")), options)


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Place the experts of the same work on several clusters, side by side."""
    scenario = open_scenario(options.scenario)
    step = _only_placement(scenario)
    screen = console.of(options)
    here = Path.cwd()
    asked = scenario.file
    clusters = [
        open_cluster(name, here, asked.gpus, asked.engine, asked.prices)
        for name in options.clusters
    ]
    rows = []
    with console.progress(screen) as tell:
        for cluster in clusters:
            tell(cluster.name)
            facts = facts_of(scenario, cluster, step)
            found = make_plan(facts, scenario.trace, "early_late", tell)
            rows.append(views.comparison_row(cluster, found))
    files = render_comparison(rows, options.out) if options.out else []
    views.show_comparison(screen, scenario, rows, files)
    return {"scenario": scenario.name, "clusters": rows, "files": [str(f) for f in files]}


def _only_placement(scenario: Scenario) -> Workload:
    """Return the step whose placements are compared.

    Raises
    ------
    InputError
        If the scenario asks for another kind of plan.
    """
    wanted = scenario.file.plan
    other = "offload" if wanted.offload else "layouts: all" if wanted.layouts == "all" else None
    if other is not None:
        raise InputError(
            f"compare with plan.{other} -- compare places experts over all GPUs: leave it out, or "
            "plan each cluster by itself"
        )
    return scenario.step


def trace_record(options: argparse.Namespace) -> dict[str, Any]:
    """Run prompts through a model and record its routing."""
    from moeplan import record_command  # what nothing else needs

    return record_command.record(options)


def trace_import(options: argparse.Namespace) -> dict[str, Any]:
    """Read what another tool recorded."""
    from moeplan import trace_commands  # what nothing else needs

    return trace_commands.import_(options)


def trace_stats(options: argparse.Namespace) -> dict[str, Any]:
    """Answer what a trace can tell."""
    from moeplan import trace_commands  # what nothing else needs

    return trace_commands.stats(options)


def trace_convert(options: argparse.Namespace) -> dict[str, Any]:
    """Rewrite a trace or a workload in another format."""
    from moeplan import trace_commands  # what nothing else needs

    return trace_commands.convert_(options)


def trace_synth(options: argparse.Namespace) -> dict[str, Any]:
    """Fit a generator of traces, draw from it, or both."""
    from moeplan import synth_command  # what nothing else needs

    return synth_command.synth(options)


def hardware_list(options: argparse.Namespace) -> dict[str, Any]:
    """Names in the catalog."""
    names = catalog_names()
    views.show_catalog(console.of(options), names)
    return dict(names)


def hardware_show(options: argparse.Namespace) -> dict[str, Any]:
    """Every figure of a device, a memory or a cluster with its source."""
    answer: dict[str, Any] = load_hardware(options.name).model_dump(mode="json")
    answer = {"name": options.name} | answer
    views.show_hardware(console.of(options), answer)
    return answer


def hardware_check(options: argparse.Namespace) -> dict[str, Any]:
    """Run the guards on some files or on the whole catalog; errors make the exit code 2."""
    names = options.name or [name for kind in catalog_names().values() for name in kind]
    found = [(name, finding) for name in names for finding in check_hardware(name)]
    views.show_findings(console.of(options), "catalog" if not options.name else "", found)
    levels = [finding.level for _, finding in found]
    return {
        "findings": [{"file": name} | vars(finding) for name, finding in found],
        "errors": levels.count("error"),
        "warnings": levels.count("warning"),
    }


def calibrate(options: argparse.Namespace) -> dict[str, Any]:
    """Fit cost models to this machine, or on measured tables."""
    from moeplan import calibrate_command, calibrate_machine  # what nothing else needs

    if options.origin == "silicon":
        return calibrate_command.calibrate(options)
    return calibrate_machine.calibrate_machine(options)


def validate(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and predict the same work, or compare with others' runs."""
    from moeplan import validate_command  # what nothing else needs

    return validate_command.validate(options)


def export(options: argparse.Namespace) -> dict[str, Any]:
    """Write the files that an engine loads."""
    files = export_plan(read_plan(options.plan), options.engine, options.out)
    screen = console.of(options)
    for file in files:
        screen.print(f"wrote {file}")
    return {"engine": options.engine, "files": [str(f) for f in files]}
