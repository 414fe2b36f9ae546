"""Scenarios that name an engine, and `moeplan calibrate`: what changes, and one message each."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moeplan.cli import main

Write = Callable[..., Path]


def _simulated(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["simulate", str(path), "--json"]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def test_the_engine_changes_the_prices(scenario: Write, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {
        engine: _simulated(scenario(**({"engine": engine} if engine else {})), capsys)
        for engine in (None, "trtllm", "sglang", "vllm")
    }
    times = {engine: answer["summary"]["step_time_s"] for engine, answer in seconds.items()}
    assert len(set(times.values())) == 4
    assert max(times.values()) < 3 * min(times.values())


def test_a_plan_under_an_engine_keeps_its_promises(
    scenario: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    path = scenario(engine="sglang")
    assert main(["plan", str(path), "--out", str(out), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    proof = plan["certificate"]
    assert proof["bound"] <= proof["objective"] * (1 + 1e-9)
    assert plan["scenario"]["engine"] == "sglang"
    assert plan["scenario"]["cluster_summary"].endswith("kernels of sglang (fitted)")
    assert "kernels of sglang (fitted)" in (out / "report.html").read_text()
    causes = {item["what"]: item["evidence"] for item in plan["evidence"]}
    assert causes["grouped_gemm: experts"] == "fitted"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "sgl"}, "engine: 'sgl' on device h100 -- fitted are sglang, trtllm, vllm"),
        ({"prices": "auto"}, "prices: 'auto' without an engine"),
        ({"engine": "vllm", "prices": "best"}, "prices: Input should be 'fitted', 'measured'"),
        ({"engine": "vllm", "cluster": "mi300x-8"}, "no engine is fitted for it"),
    ],
)
def test_a_wrong_engine_gets_one_message(
    changes: dict[str, Any], message: str, scenario: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", str(scenario(**changes))]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("error") in (1, 2)  # "1 error" of a file's list
    assert "Traceback" not in said


def test_hardware_that_nobody_measured_has_a_wider_interval(
    scenario: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = _simulated(scenario(engine="vllm", prices="transfer", cluster="mi300x-8"), capsys)
    narrow = _simulated(scenario(engine="vllm"), capsys)

    def width(answer: dict[str, Any]) -> float:
        result = answer["summary"]
        return float(result["tokens_per_second_high"] / result["tokens_per_second_low"])

    assert width(wide) > width(narrow)


def test_a_shape_that_no_table_holds_is_refused(
    scenario: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("aiconfigurator_core")
    assert main(["simulate", str(scenario(engine="sglang", prices="measured"))]) == 2
    assert "price with fitted parameters" in capsys.readouterr().err
    answer = _simulated(scenario(engine="sglang", prices="auto"), capsys)
    assert answer["summary"]["step_time_s"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "h999"], "no measured tables of device 'h999'"),
        (["--engine", "tgi"], "no measured tables of engine 'tgi'"),
    ],
)
def test_calibrate_knows_what_was_measured(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "fits")]
    assert main(["calibrate", "--from", "silicon", *arguments, *out]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "fits").exists()


def test_calibrate_writes_what_pricing_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiconfigurator_core")
    from hwmodels.engines import load_fitted
    from hwmodels.fitting import silicon

    monkeypatch.setattr(silicon, "SOURCES", silicon.SOURCES[:1])  # products only: seconds
    out, rows = tmp_path / "fits", tmp_path / "rows"
    command = ["calibrate", "--from", "silicon", "--device", "b60", "--engine", "vllm"]
    assert main([*command, "--out", str(out), "--rows", str(rows), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["kernels"]
    made = load_fitted(out / "b60.yaml").engines["vllm"]
    products = {s["dtype"]: s for s in scores if s["op"] == "gemm"}
    assert set(products) <= set(made.kernels["gemm"])
    for dtype, score in products.items():
        stated = made.kernels["gemm"][dtype].held_out
        assert stated is not None
        assert stated.median == pytest.approx(score["held_out"]["median"])
        assert score["fitted"]["rows"] > score["held_out"]["rows"] > 0
    assert (rows / "b60-vllm.parquet").is_file()
    assert not (out / "transfer.yaml").exists()  # one device teaches nothing of others
