"""What each command does: opens its inputs, calls the packages, writes files, returns plain data.

Every function takes the parsed arguments and returns what ``--json`` prints; tables for people go
to the console of `moeplan.console`, which is stderr when stdout carries JSON.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from basis.errors import InputError
from basis.schema import read_data, validate
from hwmodels import catalog_names, check_catalog, check_cluster, check_device
from hwmodels.cluster import load_cluster, load_device
from moeplan import console, views
from moeplan.compare_view import render_comparison
from moeplan.demo import demo_scenario
from moeplan.exports import export_plan
from moeplan.plan_file import SCHEMA, read_plan, to_dict
from moeplan.report import render_report
from moeplan.scenario import Scenario, open_cluster, open_scenario
from planner.plan import baseline_deployments, make_plan
from planner.scoring import Facts
from simulator.deployment import Deployment
from simulator.simulate import simulate as run_simulation
from traces.convert import convert, read_npz
from traces.routing_trace import read_trace
from traces.splits import split_requests
from traces.stats import trace_statistics


def plan(options: argparse.Namespace) -> dict[str, Any]:
    """Plan a scenario and write plan.json, report.html, timeline.json and the exports."""
    return _plan(open_scenario(options.scenario), options)


def demo(options: argparse.Namespace) -> dict[str, Any]:
    """Plan the bundled example."""
    return _plan(open_scenario(demo_scenario()), options)


def simulate(options: argparse.Namespace) -> dict[str, Any]:
    """Predict one deployment on the later half of a scenario's requests."""
    scenario = open_scenario(options.scenario)
    screen = console.of(options)
    seen, unseen = split_requests(scenario.trace, "early_late")
    facts = _facts(scenario)
    deployment = _deployment(options.deployment, facts, seen)
    with console.progress(screen) as tell:
        tell(f"simulate {options.deployment}")
        wanted = scenario.file.plan
        result = run_simulation(
            scenario.model,
            unseen,
            scenario.cluster,
            deployment,
            scenario.file.workload,
            steps=wanted.steps,
            seed=wanted.seed,
        )
    answer = {"deployment": options.deployment, **result.to_dict()}
    if options.out:
        _write_json(options.out / "result.json", answer)
        _write_json(options.out / "timeline.json", result.timeline)
    views.show_result(screen, scenario, options.deployment, result, options.out)
    return answer


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Plan the same work on several clusters, side by side."""
    scenario = open_scenario(options.scenario)
    screen = console.of(options)
    here = Path.cwd()
    clusters = [open_cluster(name, here, scenario.file.gpus) for name in options.clusters]
    rows = []
    with console.progress(screen) as tell:
        for cluster in clusters:
            tell(cluster.name)
            found = make_plan(_facts(scenario, cluster), scenario.trace, "early_late", tell)
            rows.append(views.comparison_row(cluster, found))
    files = render_comparison(rows, options.out) if options.out else []
    views.show_comparison(screen, scenario, rows, files)
    return {"scenario": scenario.name, "clusters": rows, "files": [str(f) for f in files]}


def trace_stats(options: argparse.Namespace) -> dict[str, Any]:
    """Load skew, reuse and predictability of a trace."""
    screen = console.of(options)
    trace = read_npz(options.trace) if options.trace.suffix == ".npz" else read_trace(options.trace)
    with console.progress(screen) as tell:
        tell(f"statistics of {options.trace.name}")
        answer = trace_statistics(trace).to_dict()
    views.show_statistics(screen, trace, answer)
    return answer


def trace_convert(options: argparse.Namespace) -> dict[str, Any]:
    """Rewrite a trace in another format."""
    convert(options.source, options.target)
    console.of(options).print(f"wrote {options.target}")
    return {"source": str(options.source), "target": str(options.target)}


def hardware_list(options: argparse.Namespace) -> dict[str, Any]:
    """Names in the catalog."""
    names = catalog_names()
    views.show_catalog(console.of(options), names)
    return dict(names)


def hardware_show(options: argparse.Namespace) -> dict[str, Any]:
    """Every figure of a device or a cluster with its source."""
    entry = _hardware(options.name)
    answer: dict[str, Any] = entry.model_dump(mode="json")
    views.show_hardware(console.of(options), answer)
    return answer


def hardware_check(options: argparse.Namespace) -> dict[str, Any]:
    """Run the guards on one file or on the whole catalog."""
    if options.name is None:
        findings = check_catalog()
    else:
        entry = _hardware(options.name)
        findings = check_device(entry) if hasattr(entry, "memories") else check_cluster(entry)
    answer = {"findings": [vars(f) for f in findings]}
    views.show_findings(console.of(options), options.name or "catalog", findings)
    return answer


def export(options: argparse.Namespace) -> dict[str, Any]:
    """Write the files that an engine loads."""
    files = export_plan(read_plan(options.plan), options.engine, options.out)
    screen = console.of(options)
    for file in files:
        screen.print(f"wrote {file}")
    return {"engine": options.engine, "files": [str(f) for f in files]}


def _plan(scenario: Scenario, options: argparse.Namespace) -> dict[str, Any]:
    screen = console.of(options)
    facts = _facts(scenario)
    options.out.mkdir(parents=True, exist_ok=True)
    with console.progress(screen) as tell:
        found = make_plan(facts, scenario.trace, "early_late", tell)
        other = make_plan(facts, scenario.trace, "interleaved", tell)
        tell("write report and exports")
        answer = to_dict(scenario, found, other)
        _write_json(options.out / "plan.json", answer)
        _write_json(options.out / "timeline.json", found.predicted.results[0].timeline)
        (options.out / "report.html").write_text(render_report(answer), encoding="utf-8")
        if answer["dispatch"] != "shares":  # no engine takes shares per slot
            for engine in ("sglang", "trtllm"):
                export_plan(answer, engine, options.out / "export" / engine)
    views.show_plan(screen, answer, options.out)
    return answer


def _facts(scenario: Scenario, cluster: Any = None) -> Facts:
    return Facts(
        model=scenario.model,
        cluster=cluster or scenario.cluster,
        workload=scenario.file.workload,
        options=scenario.file.plan,
    )


def _deployment(name: str, facts: Facts, seen: Any) -> Deployment:
    """Resolve a baseline's name, a plan.json or a deployment file."""
    known = baseline_deployments(facts, seen)
    if name in known:
        return known[name]
    if not name.endswith((".json", ".yaml", ".yml")):
        raise InputError(
            f"--deployment {name!r} -- one of {', '.join(known)}, or the path of a plan.json or "
            "deployment file (.json, .yaml)"
        )
    data = read_data(Path(name))
    if isinstance(data, dict) and data.get("schema") == SCHEMA:
        data = data["deployment"]
    return validate(data, Deployment, name)


def _hardware(name: str) -> Any:
    known = catalog_names()
    if name in known["devices"]:
        return load_device(name)
    if name.endswith((".yaml", ".yml")):
        data = read_data(Path(name))
        if not (isinstance(data, dict) and "device" in data):
            return load_device(Path(name))
    return load_cluster(name)


def _write_json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=None, allow_nan=False) + "\n", encoding="utf-8")
