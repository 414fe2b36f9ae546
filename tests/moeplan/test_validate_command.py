"""`moeplan validate` and `moeplan calibrate --device`: what they refuse, and their exit codes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("torch")

from moeplan import validate_command
from moeplan.cli import main
from moeplan.demo import bundled

LINK = {
    "standard": "other",
    "direction": "one-way",
    "bandwidth": "2 GB/s",
    "costs": {"all_to_all": {"startup": "200 us", "efficiency": 0.9}},
}
PAGES = {"kind": "DRAM", "capacity": "20 GB", "bandwidth": "10 GB/s"}
COPY = {**LINK, "ends": ["pages", "host"], "costs": {"copy": {"startup": "4 us", "efficiency": 1}}}


@pytest.fixture
def machine(tmp_path):
    """Write a machine folder of so many ranks, with or without a slow tier."""

    def write(ranks: int = 2, *, tier: bool = True) -> Path:
        folder = tmp_path / "machine"
        folder.mkdir(exist_ok=True)
        device = {
            "name": "t",
            "memories": {"host": {"kind": "DRAM", "capacity": "20 GB", "bandwidth": "30 GB/s"}},
            "processors": {"cpu": {"memory": "host", "flops": {"bf16": "100 GFLOP/s"}}},
        }
        node: dict[str, Any] = {"devices": ranks}
        if ranks > 1:
            node["interconnect"] = LINK
        if tier:
            node |= {"memories": {"pages": PAGES}, "links": {"pages-host": COPY}}
        cluster = {"name": "t", "device": "device.yaml", "node": node}
        (folder / "device.yaml").write_text(yaml.safe_dump(device))
        (folder / "cluster.yaml").write_text(yaml.safe_dump(cluster))
        about = {"threads": 1, "kind": "cpu", "dtype": "fp32"}
        (folder / "machine.json").write_text(json.dumps(about))
        return folder

    return write


@dataclass
class _Section:
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        return {"passed": self.passed}


def _error(capsys, *arguments: str) -> str:
    assert main(["validate", *arguments]) == 2
    return capsys.readouterr().err


def test_a_machine_that_nobody_calibrated_is_named_with_the_command(tmp_path, capsys):
    said = _error(capsys, "--machine", str(tmp_path))
    assert f"{tmp_path}: no cluster.yaml in it -- a folder that calibrate wrote -- run: " in said
    assert f"moeplan calibrate --device cpu --out {tmp_path}" in said


def test_sections_that_a_machine_cannot_run_are_left_out_or_refused(machine, capsys, monkeypatch):
    folder = machine(1, tier=False)
    ran = []
    for name in validate_command.SECTIONS:
        monkeypatch.setitem(
            validate_command._RUN, name, lambda *_, name=name: ran.append(name) or _Section(True)
        )
    assert main(["validate", "--machine", str(folder)]) == 0
    assert ran == ["operators", "steps"]
    said = _error(capsys, "--machine", str(folder), "--only", "parallel")
    assert "--only parallel: the machine has one rank, expert parallel takes two" in said
    said = _error(capsys, "--machine", str(folder), "--only", "offload")
    assert "--only offload: no slow tier was measured on it" in said


def test_a_section_that_fails_makes_the_exit_code_one(machine, tmp_path, capsys, monkeypatch):
    passed = {"operators": True, "steps": False, "parallel": True, "offload": True}
    for name, good in passed.items():
        monkeypatch.setitem(validate_command._RUN, name, lambda *_, good=good: _Section(good))
    out = tmp_path / "out"
    folder = str(machine())
    assert main(["validate", "--machine", folder, "--out", str(out), "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert (result["passed"], result["failed"]) == (passed, ["steps"])
    assert json.loads((out / "validation.json").read_text()) == result
    assert main(["validate", "--machine", folder, "--only", "operators"]) == 0


def test_a_model_that_the_decoder_does_not_run_is_refused_before_measuring(
    machine, capsys, monkeypatch
):
    monkeypatch.setitem(validate_command._RUN, "operators", lambda *_: pytest.fail("measured"))
    said = _error(capsys, str(bundled("demo.yaml")), "--machine", str(machine()))
    assert said.startswith("error: demo: ")
    assert "bias" in said


def test_runs_need_a_scenario(tmp_path, capsys):
    assert "no scenario" in _error(capsys, "--runs", str(tmp_path / "x.json"))


def test_runs_of_others_stand_beside_their_prediction(tmp_path, capsys):
    runs = tmp_path / "runs.csv"
    runs.write_text("batch_size,step_ms\n8,1.5\n")
    assert main(["validate", str(bundled("demo.yaml")), "--runs", str(runs), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    (row,) = result["runs"][0]["rows"]
    assert row["measured"] == pytest.approx(1.5e-3)
    assert row["predicted"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing -- cpu or cuda measures this machine"),
        (("--device", "h200"), "h200 -- cpu or cuda measures this machine"),
        (("--device", "cpu", "--threads", "0"), "--threads: 0 -- 1 to the machine's"),
        (("--device", "cpu", "--engine", "vllm"), "--engine: belongs to --from silicon"),
    ],
)
def test_calibrate_says_what_it_measures(tmp_path, capsys, arguments, message):
    assert main(["calibrate", *arguments, "--out", str(tmp_path / "m")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "m").exists()
