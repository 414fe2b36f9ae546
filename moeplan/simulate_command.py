"""`moeplan simulate`: steps, requests over time, or the variants of a published system.

The file decides which: a composition has ``system`` and ``variants``; a scenario's workload is the
tokens of a step, or requests.
"""

import argparse
from typing import Any

from basis.schema import read_data
from moeplan import console, views
from moeplan.asked import Steps, deployment_of, facts_of, steps_of, write_json
from moeplan.composition import composition_answer
from moeplan.composition import run as run_composition
from moeplan.composition_file import is_composition, read_composition
from moeplan.composition_view import show_composition
from moeplan.scenario import Scenario, open_scenario
from moeplan.serving_view import show_serving
from simulator.deployment import Deployment
from simulator.offload_simulate import simulate_offload
from simulator.result import Result
from simulator.serving import serve
from simulator.simulate import simulate as run_simulation
from traces.splits import split_requests


def simulate(options: argparse.Namespace) -> dict[str, Any]:
    """Predict one deployment of a scenario, or the variants of a published system."""
    if is_composition(read_data(options.scenario)):
        return _published(options)
    scenario = open_scenario(options.scenario, model=options.model, trace=options.trace)
    steps = steps_of(scenario, options.deployment)
    if steps is None:
        return _requests(scenario, options)
    return _steps(scenario, steps, options)


def _steps(scenario: Scenario, asked: Steps, options: argparse.Namespace) -> dict[str, Any]:
    """Simulate steps of the later half of the trace's requests."""
    screen = console.of(options)
    seen = split_requests(scenario.trace, "early_late")[0]
    deployment = deployment_of(options.deployment, facts_of(scenario), seen)
    with console.progress(screen) as tell:
        tell(f"simulate {options.deployment}")
        result = _run(scenario, asked, deployment)
    answer = {"deployment": options.deployment, **result.to_dict()}
    if options.out:
        write_json(options.out / "result.json", answer)
        write_json(options.out / "timeline.json", result.timeline)
    views.show_result(screen, scenario, options.deployment, result, options.out)
    return answer


def _run(scenario: Scenario, asked: Steps, deployment: Deployment) -> Result:
    facts = (scenario.model, asked.part, scenario.cluster, deployment, asked.workload)
    if deployment.offload is None:
        return run_simulation(*facts, steps=asked.count, seed=asked.seed)
    return simulate_offload(*facts, steps=asked.count, seed=asked.seed, warmup=asked.warmup)


def _requests(scenario: Scenario, options: argparse.Namespace) -> dict[str, Any]:
    """Serve requests over time, with the routing of the later half of the trace's requests."""
    screen = console.of(options)
    seen, unseen = split_requests(scenario.trace, "early_late")
    deployment = deployment_of(options.deployment, facts_of(scenario), seen)
    seed = scenario.file.plan.seed
    requests = scenario.file.workload.source(scenario.folder, seed)
    with console.progress(screen) as tell:
        tell(f"serve with {options.deployment}")
        result = serve(
            scenario.model,
            unseen,
            scenario.cluster,
            deployment,
            requests,
            scenario.file.serving,
            seed=seed,
        )
    answer = {"deployment": options.deployment, **result.to_dict()}
    if options.out:
        write_json(options.out / "result.json", answer)
    show_serving(screen, scenario.cluster.name, options.deployment, answer)
    return answer


def _published(options: argparse.Namespace) -> dict[str, Any]:
    """Run a composition and print its claims beside our figures."""
    composition = read_composition(options.scenario)
    screen = console.of(options)
    with console.progress(screen) as tell:
        runs = run_composition(
            composition,
            options.scenario.parent,
            model=options.model,
            trace=options.trace,
            progress=tell,
        )
    answer = composition_answer(composition, runs)
    if options.out:
        write_json(options.out / "result.json", answer)
    show_composition(screen, composition, answer)
    return answer
