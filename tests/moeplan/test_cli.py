"""The command line from end to end on a small scenario: files, JSON, exit codes."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moeplan.cli import build_parser, main
from simulator.timeline import check_timeline

Write = Callable[..., Path]

OPTIONS = {
    "plan": {"--json", "scenario", "--out"},
    "simulate": {"--json", "scenario", "--deployment", "--model", "--trace", "--out"},
    "compare": {"--json", "scenario", "--clusters", "--out"},
    "trace record": {
        "--json",
        "model",
        "--prompts",
        "--out",
        "--max-new-tokens",
        "--batch",
        "--candidates",
        "--domain-key",
        "--device",
        "--dtype",
    },
    "trace import": {
        "--json",
        "source",
        "target",
        "--format",
        "--model",
        "--domain",
        "--licence",
        "--list",
    },
    "trace stats": {"--json", "trace", "--out", "--plan", "--scheduler"},
    "trace synth": {
        "--json",
        "--like",
        "--fit",
        "--loads",
        "--num-experts",
        "--top-k",
        "--model",
        "--tokens",
        "--requests",
        "--seed",
        "--out",
        "--save-fit",
    },
    "trace convert": {"--json", "source", "target"},
    "hardware list": {"--json"},
    "hardware show": {"--json", "name"},
    "hardware check": {"--json", "name"},
    "calibrate": {
        "--json",
        "--from",
        "--device",
        "--engine",
        "--out",
        "--rows",
        "--threads",
        "--dtype",
        "--noisy",
    },
    "validate": {
        "--json",
        "scenario",
        "--machine",
        "--only",
        "--bound",
        "--rounds",
        "--runs",
        "--deployment",
        "--out",
    },
    "export": {"--json", "plan", "--to", "--out"},
    "demo": {"--json", "--out"},
}


def _options(parser: argparse.ArgumentParser, prefix: str = "") -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    mine = set()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                found |= _options(inner, f"{prefix}{name} ")
        elif action.dest != "help":
            mine.add((action.option_strings or [action.dest])[-1])
    return found or {prefix.strip(): mine}


def test_no_new_options() -> None:
    """Everything else lives in the scenario file; a new flag changes this list on purpose."""
    assert _options(build_parser()) == OPTIONS


def _json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_plan_writes_everything(
    scenario: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    answer = _json(capsys, "plan", str(scenario()), "--out", str(out))
    assert answer == json.loads((out / "plan.json").read_text())
    assert answer["schema"] == "moeplan.plan/1"
    proof = answer["certificate"]
    assert proof["bound"] <= proof["objective"] * (1 + 1e-9)
    assert proof["gap"] == pytest.approx((proof["objective"] - proof["bound"]) / proof["objective"])
    assert set(answer["predicted"]) == set(answer["baselines"]["eplb"])
    for row in answer["physical_to_logical_map"]:
        ranks = [row[i : i + 3] for i in range(0, 12, 3)]
        assert all(len(set(rank)) == 3 for rank in ranks)
        assert set(row) == set(range(8))
    assert "<html" in (out / "report.html").read_text()
    timeline = json.loads((out / "timeline.json").read_text())
    assert check_timeline(timeline["traceEvents"]) == []
    assert (out / "export" / "sglang").is_dir()
    assert (out / "export" / "trtllm").is_dir()


def test_a_plan_can_be_simulated_and_exported(
    scenario: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = scenario(), tmp_path / "out"
    plan = _json(capsys, "plan", str(path), "--out", str(out))
    again = _json(capsys, "simulate", str(path), "--deployment", str(out / "plan.json"))
    assert again["summary"]["tokens_per_second"] == pytest.approx(
        plan["predicted"]["tokens_per_second"], rel=0.2
    )
    exported = _json(
        capsys, "export", str(out / "plan.json"), "--to", "trtllm", "--out", str(tmp_path / "e")
    )
    assert all(Path(f).is_file() for f in exported["files"])


@pytest.mark.parametrize("name", ["contiguous", "round_robin", "eplb"])
def test_baselines_can_be_simulated(
    scenario: Write, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = _json(capsys, "simulate", str(scenario()), "--deployment", name)
    assert answer["deployment"] == name
    assert answer["summary"]["tokens_per_second"] > 0


def test_compare_shows_every_cluster(
    scenario: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clusters = ["hgx-a100-8", "hgx-h100-8"]
    answer = _json(
        capsys, "compare", str(scenario()), "--out", str(tmp_path / "c"), "--clusters", *clusters
    )
    assert [row["cluster"] for row in answer["clusters"]] == clusters
    assert answer["clusters"][0]["tokens_per_second"] < answer["clusters"][1]["tokens_per_second"]
    assert all(Path(f).is_file() for f in answer["files"])


@pytest.mark.parametrize("dispatch", ["nearest", "shares"])
def test_other_dispatch_rules_are_planned(
    scenario: Write, tmp_path: Path, dispatch: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"redundant_experts": 4, "steps": 2, "seeds": 2, "time_limit": "5 s"}
    path = scenario(plan={**options, "dispatch": dispatch})
    answer = _json(capsys, "plan", str(path), "--out", str(tmp_path / "out"))
    assert answer["dispatch"] == dispatch
    assert ("slot_share" in answer) == (dispatch == "shares")
    proof = answer["certificate"]
    assert proof["bound"] <= proof["objective"] * (1 + 1e-9)


def test_prefill_is_planned(
    scenario: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = scenario(workload={"prefill_tokens": 200})
    answer = _json(capsys, "plan", str(path), "--out", str(tmp_path / "out"))
    assert answer["scenario"]["workload"] == {"phase": "prefill", "tokens_per_step": 200}


def test_people_read_a_table(
    scenario: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(scenario()), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for word in ("contiguous", "eplb", "plan", "proof", "report.html"):
        assert word in printed


def test_trace_and_hardware_commands(
    scenario: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenario()
    trace = tmp_path / "tiny.parquet"
    stats = _json(capsys, "trace", "stats", str(trace))
    assert stats["tokens"] == 1200
    _json(capsys, "trace", "convert", str(trace), str(tmp_path / "tiny.npz"))
    again = _json(capsys, "trace", "stats", str(tmp_path / "tiny.npz"))
    assert again == stats | {"files": ["tiny.npz"]}
    assert "hgx-h100-8" in _json(capsys, "hardware", "list")["clusters"]
    assert _json(capsys, "hardware", "show", "h100")["name"] == "h100"
    assert _json(capsys, "hardware", "show", "hgx-h100-8x2")["name"] == "hgx-h100-8x2"
    assert _json(capsys, "hardware", "check")["findings"] == []
    for arguments in (["hardware", "list"], ["hardware", "show", "h100"], ["hardware", "check"]):
        assert main(arguments) == 0
    assert "datasheet" in capsys.readouterr().out
