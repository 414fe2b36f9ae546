"""`moeplan plan` with plan.offload, from scenario to plan.json, terminal, report and exports."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moeplan.cli import main
from moeplan.offload_file import _verdict
from moeplan.offload_report import render_offload

Plan = dict[str, Any]
OPTIONS = {
    "fast_memory": "30 MB",
    "planning_seeds": 8,
    "steps": 16,
    "seeds": 3,
    "time_limit": "1 s",
    "workers": 1,
}
FACTS = {"cluster": "workstation-rtx4090", "gpus": 1, "workload": {"decode_batch": 2}}
KEYS = {
    "schema",
    "moe_layer_ids",
    "physical_to_logical_map",
    "dispatch",
    "parallelism",
    "deployment",
    "certificate",
    "predicted",
    "baselines",
    "alternatives",
    "evidence",
    "offload",
}


@pytest.fixture(scope="module")
def planned(write_scenario: Callable[..., Path], tmp_path_factory: Any) -> tuple[Path, Path]:
    """Return scenario and output folder of a plan."""
    folder = tmp_path_factory.mktemp("offload")
    path = write_scenario(folder, **FACTS, plan={"offload": OPTIONS})
    assert main(["plan", str(path), "--out", str(folder / "out")]) == 0
    return path, folder / "out"


@pytest.fixture
def plan(planned: tuple[Path, Path]) -> Plan:
    return json.loads((planned[1] / "plan.json").read_text())


def test_the_contract_is_kept(plan: Plan, planned: tuple[Path, Path]) -> None:
    assert set(plan) >= KEYS
    assert plan["schema"] == "moeplan.plan/1"
    for proof in [plan["certificate"], *plan["offload"]["certificates"].values()]:
        assert proof["bound"] <= proof["objective"] * (1 + 1e-9)
        gap = (proof["objective"] - proof["bound"]) / proof["objective"]
        assert proof["gap"] == pytest.approx(gap)
        assert proof["status"] in {"optimal", "gap", "time_limit"}
    assert plan["certificate"] in plan["offload"]["certificates"].values()
    cached = plan["deployment"]["offload"]["cache"] is not None
    assert (plan["offload"]["certificate_of"] == "the plan") != cached
    assert any("has a cache" in warning for warning in plan["warnings"]) == cached
    for part in (plan, plan["other_split"]):
        for figures in part["baselines"].values():
            assert set(figures) == set(part["predicted"])
    assert plan["other_split"]["split"] == "interleaved"
    written = {p.name for p in planned[1].iterdir()}
    assert {"plan.json", "report.html", "timeline.json", "export"} <= written


def test_the_plan_is_the_fastest_on_the_requests_planned_on(plan: Plan) -> None:
    times = plan["offload"]["planned_on"]
    assert times[plan["chosen"]] == min(times.values())
    assert set(plan["baselines"]) <= set(times)


def test_ties_are_within_half_a_percent(plan: Plan) -> None:
    own = plan["predicted"]["step_time_s"]
    ties = [n for n, b in plan["baselines"].items() if abs(b["step_time_s"] / own - 1) <= 0.005]
    assert sorted(ties) == sorted(plan["offload"]["ties"])


def test_time_along_the_longest_path_is_the_step_time(plan: Plan) -> None:
    for name, figures in {"plan": plan["predicted"], **plan["baselines"]}.items():
        path = plan["details"][name]["critical_path_s"]
        assert sum(path.values()) == pytest.approx(figures["step_time_s"], rel=1e-6)


def test_site_shares_add_up_and_memory_is_kept(plan: Plan) -> None:
    names = ("pairs_resident", "pairs_copied_ahead", "pairs_fetched", "pairs_aside")
    for row in [plan["predicted"], *plan["baselines"].values()]:
        assert sum(row[name] for name in names) == pytest.approx(1)
    found = plan["offload"]
    assert found["slots"] == int(found["fast_bytes"] // found["bytes_per_expert"])
    kept = sum(len(row) for row in plan["deployment"]["offload"]["resident"] or [])
    assert kept <= found["slots"]


def test_simulate_reproduces_the_prediction(
    plan: Plan, planned: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    file = str(planned[1] / "plan.json")
    assert main(["simulate", str(planned[0]), "--deployment", file, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["summary"]
    by_seed = plan["offload"]["tokens_per_second_by_seed"]
    assert found["tokens_per_second"] == pytest.approx(by_seed[0], rel=1e-9)
    assert plan["predicted"]["tokens_per_second"] == pytest.approx(np.mean(by_seed))


def test_engines_get_files_and_others_are_refused(
    plan: Plan, planned: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(planned[1] / "plan.json")
    assert (planned[1] / "export" / "llama.cpp" / "flags.txt").is_file()
    for engine in ("sglang-kt", "llama.cpp"):
        if engine == "sglang-kt":
            pytest.importorskip("torch")
        out = tmp_path / engine
        assert main(["export", file, "--to", engine, "--out", str(out)]) == 0
        assert (out / "flags.txt").is_file()
    assert main(["export", file, "--to", "sglang", "--out", str(tmp_path / "x")]) == 2
    assert "export to sglang-kt, llama.cpp" in capsys.readouterr().err
    kept = plan["offload"]["engine"]["gpu_experts"]
    assert sum(map(len, kept)) <= plan["offload"]["slots"]


def test_the_report_is_whole_and_needs_no_network(plan: Plan, planned: tuple[Path, Path]) -> None:
    page = (planned[1] / "report.html").read_text()
    assert page == render_offload(plan)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<script", page)
    for words in ("Time per step by residency", "Later requests", "Same mix", "What is proved"):
        assert words in page
    assert page.count("moeplan export plan.json --to") == 2


def test_people_read_both_splits_the_proof_and_what_the_grain_costs(
    scenario: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = scenario(**FACTS, plan={"offload": OPTIONS})
    assert main(["plan", str(path), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for words in (
        "split early_late",
        "split interleaved",
        "hit rate",
        "fetched/token",
        "gap",
        "ties     within 0.5%",
        "coarser grain costs",
    ):
        assert words in printed


def test_without_a_processor_at_home_there_is_nothing_to_export(
    scenario: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = scenario(**FACTS, plan={"offload": {**OPTIONS, "processor": None}})
    assert main(["plan", str(path), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("a processor at the experts' home") == 2
    assert "No processor computes at host" in printed
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["predicted"]["pairs_aside"] == 0
    assert "Cannot be exported" in (tmp_path / "out" / "report.html").read_text()


def test_a_limit_that_cannot_be_kept_is_infeasible(
    scenario: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = {"tpot_p99": "1 us"}
    path = scenario(**FACTS, plan={"offload": OPTIONS, "limits": limits})
    assert main(["plan", str(path), "--out", str(tmp_path / "out")]) == 1
    assert "the limit 0.001 ms" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("baseline", "words", "worth", "tie"),
    [
        (0.0112, "takes 12.0% longer", True, False),
        (0.01003, "as good (a tie: +0.30% time per step)", False, True),
        (0.009, "Take Uniform", False, False),
        (None, "nothing else fits", True, False),
    ],
)
def test_the_verdict_says_who_wins(
    baseline: float | None, words: str, worth: bool, tie: bool
) -> None:
    def score(seconds: float) -> Any:
        return SimpleNamespace(step_times=np.full(4, seconds))

    plan: Any = SimpleNamespace(
        name="ilp_home",
        predicted=score(0.01),
        baselines={} if baseline is None else {"uniform": score(baseline), "all": score(0.02)},
        gain_over=lambda _: (0.0, 0.001),
    )
    found = _verdict(plan, plan)
    assert words in found["answer"]
    assert (found["worth_it"], found["tie"]) == (worth, tie)
