"""What a command is about: the facts of a scenario, the deployment that a name stands for."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from basis.errors import InputError
from basis.schema import read_data, validate
from hwmodels.cluster import Cluster
from moeplan.plan_file import SCHEMA
from moeplan.scenario import Scenario
from planner.layouts_question import at_lengths, effort
from planner.plan import baseline_deployments
from planner.scoring import Facts
from simulator.deployment import Deployment, Workload
from traces.routing_trace import RoutingTrace
from traces.splits import split_requests


def facts_of(
    scenario: Scenario, cluster: Cluster | None = None, step: Workload | None = None
) -> Facts:
    """Return what a deployment is scored on.

    Without a ``step`` it is one token per rank: for requests step sizes are found, not given.
    """
    cluster = cluster or scenario.cluster
    return Facts(
        model=scenario.model,
        cluster=cluster,
        workload=step or Workload(decode_batch=cluster.num_ranks),
        options=scenario.file.plan,
    )


def deployment_of(name: str, facts: Facts, seen: RoutingTrace) -> Deployment:
    """Resolve a baseline's name, a plan.json or a deployment file.

    Raises
    ------
    InputError
        If it is none of these.
    """
    if not _is_file(name):
        known = baseline_deployments(facts, seen)
        if name in known:
            return known[name]
        raise InputError(
            f"--deployment {name!r} -- one of {', '.join(known)}, or the path of a plan.json or "
            "deployment file (.json, .yaml)"
        )
    data = read_data(Path(name))
    if isinstance(data, dict) and data.get("schema") == SCHEMA:
        data = data["deployment"]
    return validate(data, Deployment, name)


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Steps to simulate: those that a plan of the same scenario is scored on."""

    part: RoutingTrace
    """Requests, not planned on."""
    workload: Workload
    count: int
    """Steps."""
    seed: int
    warmup: int | None = None
    """Steps before them that only fill caches; None = as the deployment needs."""


def steps_of(scenario: Scenario, deployment: str) -> Steps | None:
    """Return the steps that a simulation plays; None where the workload is one of requests.

    A plan of layouts over several batch sizes has decided how many requests run: its plan.json is
    simulated at these.
    """
    part = split_requests(scenario.trace, "early_late")[1]
    workload = scenario.file.workload.step
    if workload is None:
        size, sweep = _planned_size(scenario, deployment), scenario.file.workload.sweep
        if size is None or sweep is None:
            return None
        part, workload = at_lengths(part, sweep), Workload(decode_batch=size)
    wanted = scenario.file.plan
    if wanted.offload is not None:
        count, seed = wanted.offload.steps, wanted.offload.seed
        return Steps(part=part, workload=workload, count=count, seed=seed, warmup=count)
    if wanted.layouts == "all":
        wanted = effort(wanted, scenario.model, scenario.cluster.num_ranks, workload.tokens)
    return Steps(part=part, workload=workload, count=wanted.steps, seed=wanted.seed)


def _planned_size(scenario: Scenario, deployment: str) -> int | None:
    """Return the requests that a plan of layouts lets run, where the workload leaves that open."""
    asked = scenario.file.workload
    if asked.rate is not None or isinstance(asked.concurrency, int) or not _is_file(deployment):
        return None
    data = read_data(Path(deployment))
    if not isinstance(data, dict) or "layouts" not in data:
        return None
    return int(data["layouts"]["chosen"]["running_requests"])


def _is_file(deployment: str) -> bool:
    return deployment.endswith((".json", ".yaml", ".yml"))


def write_json(path: Path, data: Any) -> None:
    """Write plain data, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=None, allow_nan=False) + "\n", encoding="utf-8")
