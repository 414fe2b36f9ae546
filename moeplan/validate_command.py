"""`moeplan validate`: the same work predicted and measured, here or from others' files.

Sections run one after the other on the machine that `moeplan calibrate --device` described:
operators on fresh shapes, steps of a real decoder, expert parallel over processes, experts behind a
cache. Each prints its rows with the measurement's own spread; one that fails makes the exit code 1.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from basis.errors import InputError
from hwmodels.cluster import Cluster, load_cluster
from moeplan import console
from moeplan.calibrate_tier import NAMES as TIERS
from moeplan.reference import import_kernels
from moeplan.scenario import Scenario, open_scenario
from moeplan.sections import SECTIONS
from traces.splits import split_requests


@dataclass(frozen=True, kw_only=True)
class _Question:
    """What all sections share."""

    scenario: Scenario
    machine: Path
    """The cluster file that calibrate wrote."""
    threads: int
    device: str
    dtype: str
    bound: float
    rounds: int | None
    tell: Callable[[str], None]

    def cluster(self, ranks: int) -> Cluster:
        """Return so many ranks of the machine."""
        return load_cluster(self.machine, gpus=ranks)


def validate(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and predict; or compare with runs that others measured.

    Raises
    ------
    InputError
        Without torch, or on a machine that nobody calibrated.
    """
    return _compare_runs(options) if options.runs else _measure(options)


def _compare_runs(options: argparse.Namespace) -> dict[str, Any]:
    from moeplan.runs_compare import compare
    from moeplan.runs_read import read_runs
    from moeplan.runs_view import show_runs

    if options.scenario is None:
        raise InputError("validate --runs: no scenario -- name the YAML that describes the run")
    runs = read_runs(options.runs)  # a bad file is told before anything is simulated
    scenario = open_scenario(options.scenario)
    found = compare(runs, scenario, options.deployment)
    show_runs(console.of(options), found)
    return {"scenario": scenario.name, "runs": [each.to_dict() for each in found]}


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    screen, machine = console.of(options), _machine(options.machine)
    sections = _sections(options, machine)
    found: dict[str, Any] = {}
    with console.progress(screen) as tell:
        question = _Question(
            scenario=_scenario(options, machine / "cluster.yaml"),
            machine=machine / "cluster.yaml",
            tell=tell,
            bound=options.bound,
            rounds=options.rounds,
            **_calibrated(machine),
        )
        if sections != ["operators"]:
            _check_model(question.scenario)
        for name in sections:
            found[name] = _RUN[name](question, screen, options.out)
    passed = {name: bool(section.passed) for name, section in found.items()}
    result = {
        "machine": json.loads((machine / "machine.json").read_text(encoding="utf-8")),
        "passed": passed,
        "failed": [name for name, good in passed.items() if not good],
        **{name: section.to_dict() for name, section in found.items()},
    }
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "validation.json").write_text(json.dumps(result, indent=1) + "\n")
        screen.print(f"wrote {options.out / 'validation.json'}")
    return result


def _machine(folder: Path) -> Path:
    for name in ("cluster.yaml", "machine.json"):
        if not (folder / name).is_file():
            raise InputError(
                f"{folder}: no {name} in it -- a folder that calibrate wrote -- run: moeplan "
                f"calibrate --device cpu --out {folder}"
            )
    return folder


def _sections(options: argparse.Namespace, machine: Path) -> list[str]:
    """Return the sections that are asked for and can run on this machine.

    Raises
    ------
    InputError
        If one was asked for that cannot.
    """
    cluster, why = load_cluster(machine / "cluster.yaml"), {}
    if cluster.num_ranks < 2:
        why["parallel"] = "the machine has one rank, expert parallel takes two"
    if not any(name in cluster.node.memories for name in TIERS.values()):
        why["offload"] = "no slow tier was measured on it"
    for name in options.only or []:
        if name in why:
            raise InputError(f"validate --only {name}: {why[name]} -- leave it out")
    return [name for name in SECTIONS if name in (options.only or SECTIONS) and name not in why]


def _check_model(scenario: Scenario) -> None:
    """Refuse a model that the reference decoder does not run, before anything is measured."""
    try:
        import_kernels().check_runs(scenario.model)
    except ValueError as error:
        raise InputError(f"{scenario.name}: {error}") from error


def _calibrated(machine: Path) -> dict[str, Any]:
    """Return how the machine was calibrated, which is how it is measured again."""
    about = json.loads((machine / "machine.json").read_text(encoding="utf-8"))
    return {"threads": about["threads"], "device": about["kind"], "dtype": about["dtype"]}


def _scenario(options: argparse.Namespace, cluster: Path) -> Scenario:
    """Open the scenario, the bundled one without; its cluster is this machine."""
    from moeplan.demo import bundled

    path = options.scenario or bundled("validate.yaml")
    return open_scenario(path, cluster=cluster)


def _operators(q: _Question, screen: Console, out: Path | None) -> Any:
    from moeplan.validate_operators import ROUNDS, show_operators, validate_operators

    found = validate_operators(
        q.cluster(1),
        threads=q.threads,
        device=q.device,
        dtype=q.dtype,
        rounds=q.rounds or ROUNDS,
        bound=q.bound,
        tell=q.tell,
    )
    show_operators(screen, found)
    return found


def _steps(q: _Question, screen: Console, out: Path | None) -> Any:
    from moeplan.validate_cases import make_cases
    from moeplan.validate_charts import draw_steps
    from moeplan.validate_result import validate_steps
    from moeplan.validate_view import show_steps

    rounds = {} if q.rounds is None else {"rounds": q.rounds, "lap_rounds": q.rounds}
    found = validate_steps(
        q.scenario.model,
        q.cluster(1),
        make_cases(q.scenario.model, q.scenario.trace),
        threads=q.threads,
        device=q.device,
        bound=q.bound,
        tell=q.tell,
        **rounds,
    )
    show_steps(screen, found)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        draw_steps(found, out)
    return found


def _parallel(q: _Question, screen: Console, out: Path | None) -> Any:
    from moeplan.validate_parallel import ROUNDS, validate_parallel
    from moeplan.validate_parallel_view import show_parallel

    found = validate_parallel(
        q.scenario.model,
        q.scenario.trace,
        q.cluster(2),
        threads=q.threads,
        rounds=q.rounds or ROUNDS,
        bound=q.bound,
        tell=q.tell,
    )
    show_parallel(screen, found)
    return found


def _offload(q: _Question, screen: Console, out: Path | None) -> Any:
    from moeplan.validate_offload import OffloadQuestion, show_offload, validate_offload

    with tempfile.TemporaryDirectory(dir=q.machine.parent) as folder:  # the calibrated disk
        found = validate_offload(
            OffloadQuestion(
                model=q.scenario.model,
                trace=split_requests(q.scenario.trace, "early_late")[1],
                cluster=q.cluster(1),
                folder=Path(folder),
                threads=q.threads,
                rounds=q.rounds or OffloadQuestion.rounds,
            ),
            q.tell,
        )
    show_offload(screen, found)
    return found


_RUN: dict[str, Callable[[_Question, Console, Path | None], Any]] = {
    "operators": _operators,
    "steps": _steps,
    "parallel": _parallel,
    "offload": _offload,
}
