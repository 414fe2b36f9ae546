"""`moeplan simulate` with requests over time, and the bundled examples of every question."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplan.cli import main

Write = Callable[..., Path]
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LENGTHS = {"input_tokens": 60, "output_tokens": 12}


@pytest.fixture
def served(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Return a runner of ``moeplan simulate`` that gives the summary."""

    def run(path: Path, *more: str) -> dict[str, Any]:
        assert main(["simulate", str(path), *more, "--json"]) == 0
        return json.loads(capsys.readouterr().out)["summary"]

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a runner of ``moeplan simulate`` that must fail; it gives the one message."""

    def run(path: Path) -> str:
        assert main(["simulate", str(path)]) == 2
        message = capsys.readouterr().err
        assert message.count("error: ") == 1
        return message

    return run


def test_an_azure_trace_is_served_at_another_rate(
    scenario: Write, tmp_path: Path, served: Callable[..., dict[str, Any]]
) -> None:
    rows = [f"2023-11-16 18:15:{i:02d}.500,{40 + i},{4 + i % 3}" for i in range(20)]
    text = "\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows])
    (tmp_path / "azure.csv").write_text(text + "\n")
    path = scenario(workload={"arrivals": "azure.csv", "rate": 100.0, "requests": 12})
    found = served(path, "--out", str(tmp_path / "out"))
    outputs = sum(4 + i % 3 for i in range(12))
    made = found["output_tokens_per_second"] * found["makespan_s"]
    assert made == pytest.approx(outputs)
    assert found["requests_per_second"] * found["makespan_s"] == pytest.approx(12)
    assert 11 / 100 <= found["makespan_s"] < 12  # 12 requests at 100/s, not at 1/s
    assert (tmp_path / "out" / "result.json").is_file()


def test_poisson_arrivals_have_their_rate(
    scenario: Write, served: Callable[..., dict[str, Any]]
) -> None:
    path = scenario(workload={"rate": 50.0, "requests": 200, **LENGTHS})
    found = served(path)
    span = 200 / 50
    assert found["makespan_s"] == pytest.approx(span, rel=4 / np.sqrt(200))
    made = found["output_tokens_per_second"] * found["makespan_s"]
    assert made == pytest.approx(200 * LENGTHS["output_tokens"])
    assert found["ttft_s"] <= found["ttft_s_p99"]


def _spread_of_gaps(folder: Path) -> tuple[float, str]:
    """Return the coefficient of variation of the gaps between requests, and what is said."""
    result = json.loads((folder / "result.json").read_text())
    gaps = np.diff([0.0, *result["requests"]["arrival_s"]])
    return float(gaps.std() / gaps.mean()), " ".join(result["statements"])


@pytest.mark.parametrize(
    ("cv", "said"),
    [
        (2.5, "gamma gaps with a coefficient of variation of 2.5, 50 requests/s"),
        (1, "Poisson, 50 requests/s"),
        (0, "evenly spaced, 50 requests/s"),
    ],
)
def test_arrivals_are_as_bursty_as_asked(
    scenario: Write, tmp_path: Path, served: Callable[..., dict[str, Any]], cv: float, said: str
) -> None:
    path = scenario(workload={"rate": 50.0, "cv": cv, "requests": 300, **LENGTHS})
    served(path, "--out", str(tmp_path / "out"))
    spread, statements = _spread_of_gaps(tmp_path / "out")
    of_deviation = ((2 + 6 * cv**2) / 300) ** 0.5 / 2 + cv / 300**0.5
    assert spread == pytest.approx(cv, rel=4 * of_deviation, abs=1e-6)
    assert said in statements


@pytest.mark.parametrize("load", [{"rate": 50.0}, {"concurrency": 4}])
def test_lengths_come_from_a_file(
    scenario: Write, tmp_path: Path, served: Callable[..., dict[str, Any]], load: dict[str, Any]
) -> None:
    lines = [{"prompt": "..", "prompt_len": 40, "output_tokens": 7}] * 3
    (tmp_path / "custom.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    found = served(scenario(workload={**load, "lengths": "custom.jsonl", "requests": 20}))
    made = found["output_tokens_per_second"] * found["makespan_s"]
    assert made == pytest.approx(20 * 7)


def test_a_closed_loop_keeps_its_users_busy(
    scenario: Write, served: Callable[..., dict[str, Any]]
) -> None:
    """Little: requests in the system = rate x latency, up to the last users' end."""
    path = scenario(workload={"concurrency": 6, "requests": 60, **LENGTHS})
    found = served(path, "--deployment", "eplb")
    inside = found["requests_per_second"] * found["latency_s"]
    assert inside == pytest.approx(6, rel=0.05)
    assert inside <= 6 * (1 + 1e-9)


def test_people_read_percentiles(scenario: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = scenario(
        workload={"concurrency": 4, "requests": 12, **LENGTHS},
        serving={"slo": {"ttft": "1 s", "tpot": "1 s"}},
    )
    assert main(["simulate", str(path)]) == 0
    printed = capsys.readouterr().out
    for words in ("TTFT", "TPOT", "p99", "requests/s", "goodput", "(100.0%)"):
        assert words in printed


@pytest.mark.parametrize(
    ("workload", "message"),
    [
        ({"decode_batch": 8, "prefill_tokens": 8}, "give exactly one of decode_batch"),
        ({}, "give exactly one of decode_batch"),
        ({"decode_batch": 8, "rate": 2.0}, "rate does not go with this workload"),
        ({"decode_batch": 8, "requests": 9}, "requests does not go with this workload"),
        ({"concurrency": 4}, "give exactly one of"),
        ({"input_tokens": 8}, "belong together -- give both"),
        ({**LENGTHS, "concurrency": 4, "rate": 2.0}, "rate does not go with this workload"),
        ({"arrivals": "a.csv", "concurrency": 4}, "concurrency does not go with"),
        ({"arrivals": "a.csv", "decode_batch": 4}, "give exactly one of"),
        ({**LENGTHS, "concurrency": [4, 8]}, "give one concurrency, or a rate; a list of them"),
        (LENGTHS, "give one concurrency, or a rate"),
        ({"arrivals": "none.csv"}, "none.csv does not exist"),
        ({**LENGTHS, "concurency": 4}, "did you mean 'concurrency'?"),
        ({**LENGTHS, "cv": 2.0}, "cv does not go with this workload"),
        ({**LENGTHS, "concurrency": 4, "cv": 2.0}, "cv does not go with this workload"),
        ({"arrivals": "a.csv", "rate": 2.0, "cv": 2.0}, "cv does not go with this workload"),
        ({**LENGTHS, "rate": 2.0, "cv": -1.0}, "greater than or equal to 0"),
        ({**LENGTHS, "rate": 2.0, "cv": 1e9}, "0.001 to 100 for gamma gaps"),
        ({**LENGTHS, "rate": 2.0, "lengths": "a.csv"}, "leave one out"),
        ({"lengths": "a.csv"}, "give one concurrency, or a rate"),
        ({"lengths": "none.csv", "rate": 2.0}, "lengths: "),
        ({"lengths": "tiny.json", "rate": 2.0}, "known are"),
        ({**LENGTHS, "concurrency": 0}, "concurrency 0 -- must be at least 1"),
        ({**LENGTHS, "concurrency": []}, "concurrency [] -- give at least one"),
    ],
)
def test_workloads_that_contradict_themselves_are_refused(
    scenario: Write, refused: Callable[..., str], workload: dict[str, Any], message: str
) -> None:
    assert message in refused(scenario(workload=workload))


def test_serving_keys_are_checked(scenario: Write, refused: Callable[..., str]) -> None:
    path = scenario(workload={"concurrency": 4, **LENGTHS}, serving={"max_batch_token": 9})
    assert "did you mean 'max_batch_tokens'?" in refused(path)


def test_the_request_example_is_served(served: Callable[..., dict[str, Any]]) -> None:
    found = served(EXAMPLES / "requests.yaml")
    made = found["output_tokens_per_second"] * found["makespan_s"]
    assert made == pytest.approx(200 * 128)


@pytest.mark.parametrize("name", ["layouts", pytest.param("offload", marks=pytest.mark.slow)])
def test_the_planning_examples_run(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["plan", str(EXAMPLES / f"{name}.yaml"), "--out", str(out)]) == 0
    plan = json.loads((out / "plan.json").read_text())
    assert name in plan
    assert plan["verdict"]["answer"] in capsys.readouterr().out
