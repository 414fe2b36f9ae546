"""Measured runs beside predictions: the same figures as ``moeplan simulate``; runs are made up."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from moeplan.cli import main
from moeplan.runs import MeasuredRun, Times
from moeplan.runs_compare import Comparison, compare
from moeplan.runs_view import show_runs
from moeplan.scenario import Scenario, open_scenario
from simulator.deployment import Deployment
from simulator.offload import Offload, Site
from simulator.parallelism import Parallelism

Write = Callable[..., Path]
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
EVERY = Times(mean=1.0, median=1.0, p99=1.0)
SERVED: dict[str, Any] = {
    "source": "made up",
    "tool": "csv",
    "requests": 20,
    "concurrency": 4,
    "input_tokens": 60.0,
    "output_tokens": 12.0,
    "ttft": EVERY,
    "tpot": EVERY,
    "itl": EVERY,
    "e2e": EVERY,
    "output_tokens_per_s": 1.0,
    "total_tokens_per_s": 1.0,
}
STEP: dict[str, Any] = {"source": "made up", "tool": "csv", "batch_size": 32, "step": 1.0}


@pytest.fixture
def tiny(scenario: Write) -> Scenario:
    """Return the small scenario of the other tests; its workload is decode steps of 32."""
    return open_scenario(scenario())


@pytest.fixture
def simulated(scenario: Write, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Return a runner of ``moeplan simulate`` on a workload: the summary."""

    def run(workload: dict[str, Any]) -> dict[str, Any]:
        assert main(["simulate", str(scenario(workload=workload)), "--json"]) == 0
        return json.loads(capsys.readouterr().out)["summary"]

    return run


def _one(run: MeasuredRun, scenario: Scenario, deployment: str = "contiguous") -> Comparison:
    (found,) = compare([run], scenario, deployment)
    return found


def _predicted(run: MeasuredRun, scenario: Scenario) -> dict[str, float]:
    return {row.metric: row.predicted for row in _one(run, scenario).rows}


@pytest.mark.parametrize("load", [{"concurrency": 4}, {"rate": 50.0}])
def test_requests_are_predicted_as_simulate_does(
    tiny: Scenario, simulated: Callable[..., dict[str, Any]], load: dict[str, Any]
) -> None:
    rate = {"concurrency": None, "request_rate": load["rate"]} if "rate" in load else {}
    got = _predicted(MeasuredRun(**SERVED | rate), tiny)
    want = simulated({"requests": 20, "input_tokens": 60, "output_tokens": 12, **load})
    names = {"ttft": "ttft_s", "tpot": "tpot_s", "itl": "itl_s", "e2e": "latency_s"}
    ends = {"mean": "", "median": "_p50", "p99": "_p99"}
    expected = {f"{k}_{e}": want[v + s] for k, v in names.items() for e, s in ends.items()}
    expected["output_tokens_per_s"] = want["output_tokens_per_second"]
    expected["total_tokens_per_s"] = want["total_tokens_per_second"]
    assert got == pytest.approx(expected)


def test_decode_steps_are_predicted_as_simulate_does(
    tiny: Scenario, simulated: Callable[..., dict[str, Any]]
) -> None:
    found = _one(MeasuredRun(**STEP), tiny)
    want = simulated({"decode_batch": 32})["step_time_s"]
    assert [row.predicted for row in found.rows] == [pytest.approx(want)]
    assert "contexts are those of the trace" in found.remarks[0]


def test_the_error_is_predicted_over_measured(tiny: Scenario) -> None:
    truth = _predicted(MeasuredRun(**STEP), tiny)["step"]
    (row,) = _one(MeasuredRun(**STEP | {"step": truth / 2, "spread": 0.03}), tiny).rows
    assert row.error == pytest.approx(1.0)
    assert (row.unit, row.spread) == ("s", 0.03)


def test_longer_contexts_and_larger_batches_take_longer(tiny: Scenario) -> None:
    def step(**changes: Any) -> float:
        return _predicted(MeasuredRun(**STEP | changes), tiny)["step"]

    assert step(input_tokens=32768.0) > step(input_tokens=128.0)
    assert step(batch_size=256, input_tokens=128.0) > step(input_tokens=128.0)


def test_a_lone_prompt_is_cut_into_chunks_and_may_follow_others(tiny: Scenario) -> None:
    lone = {**SERVED, "requests": 1, "concurrency": 1, "output_tokens": 1.0}

    def first_token(**changes: Any) -> float:
        return _predicted(MeasuredRun(**lone | {"input_tokens": 1024.0} | changes), tiny)[
            "ttft_mean"
        ]

    whole = first_token(chunk_tokens=1024)
    assert first_token(chunk_tokens=128) > whole
    assert first_token(chunk_tokens=1024, cached_tokens=16384) > whole
    # The cached part and the rest are the whole prompt.
    all_of_it = first_token(chunk_tokens=256)
    second_half = first_token(chunk_tokens=256, cached_tokens=512, input_tokens=512.0)
    assert 0.4 * all_of_it < second_half < 0.6 * all_of_it


def test_what_was_measured_but_not_predicted_is_told(tiny: Scenario) -> None:
    found = _one(MeasuredRun(**SERVED | {"output_tokens": 1.0}), tiny)
    assert {row.metric for row in found.rows} >= {"ttft_mean", "e2e_mean"}
    assert not any(row.metric.startswith("tpot") for row in found.rows)
    assert "tpot_mean was measured, but is not predicted for such a run" in found.remarks


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"incomparable": "ramped up"}, "not predicted: ramped up"),
        ({"concurrency": None}, "neither concurrency nor request rate is known"),
        ({"input_tokens": None}, "lengths of prompts and answers are not known"),
        ({"requests": 10**12}, "at most 67108864 are simulated"),
        ({"input_tokens": 60_000_000.0}, "tokens in all -- at most"),
    ],
)
def test_runs_that_are_not_predicted_say_why(
    tiny: Scenario, changes: dict[str, Any], words: str
) -> None:
    found = _one(MeasuredRun(**SERVED | changes), tiny)
    assert not found.rows
    assert words in found.remarks[-1]


def test_a_batch_that_does_not_fit_is_a_remark_and_the_others_go_on(tiny: Scenario) -> None:
    runs = [MeasuredRun(**STEP | {"batch_size": n, "input_tokens": 1e6}) for n in (60_000, 10**9)]
    full, huge, fine = compare([*runs, MeasuredRun(**STEP)], tiny)
    assert "not predicted: " in full.remarks[-1]
    assert "does not fit" in full.remarks[-1]
    assert "batch_size 1000000000 -- at most 65536 are simulated" in huge.remarks[-1]
    assert not full.rows
    assert fine.rows


def test_means_other_models_and_open_numbers_are_remarked(tiny: Scenario) -> None:
    changes = {"input_tokens": 60.4, "model": "org/other-7B", "requests": None}
    remarks = " ".join(_one(MeasuredRun(**SERVED | changes), tiny).remarks)
    assert "the file names the model 'org/other-7B', the scenario 'tiny'" in remarks
    assert "lengths varied (mean 60.4 input and 12.0 output tokens)" in remarks
    assert "requests not stated: simulated 300" in remarks
    same = _one(MeasuredRun(**SERVED | {"model": "org/Tiny-Instruct"}), tiny)
    assert not same.remarks


def test_offloaded_experts_are_predicted_step_by_step(scenario: Write, tmp_path: Path) -> None:
    opened = open_scenario(scenario(cluster="workstation-rtx4090", gpus=1))
    deployment = Deployment(
        parallelism=Parallelism.dp_ep(1),
        physical_to_logical_map=(tuple(range(8)),) * 4,
        offload=Offload(resident=((0,),) * 4, site=Site(name="fetch")),
    )
    file = tmp_path / "offload.yaml"
    file.write_text(yaml.safe_dump(deployment.model_dump(mode="json")))
    step = MeasuredRun(**STEP | {"batch_size": 1})
    decode, prompt = compare([step, MeasuredRun(**SERVED)], opened, str(file))
    assert decode.rows[0].predicted > _predicted(step, opened)["step"]
    assert not prompt.rows
    assert "not predicted: serving with offload" in prompt.remarks[-1]


def test_a_bundled_example_is_compared_and_is_plain_json() -> None:
    opened = open_scenario(EXAMPLES / "requests.yaml")
    found = _one(MeasuredRun(**SERVED | {"input_tokens": 512.0}), opened)
    answer = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [row["metric"] for row in answer["rows"]] == list(MeasuredRun(**SERVED).metrics)
    for row in answer["rows"]:
        assert row["error"] == pytest.approx(row["predicted"] / row["measured"] - 1)


def test_people_read_a_table(tiny: Scenario) -> None:
    truth = _predicted(MeasuredRun(**STEP), tiny)["step"]
    runs = [
        MeasuredRun(**STEP | {"step": truth / 2, "spread": 0.03}),
        MeasuredRun(**SERVED | {"incomparable": "[bold] ramp", "concurrency": None}),
    ]
    with io.StringIO() as out:
        show_runs(Console(file=out, width=100), compare(runs, tiny))
        printed = out.getvalue()
    assert "decode steps of 32 requests, unknown lengths" in printed
    assert "+100.0%" in printed
    assert "3.0%" in printed
    assert "concurrency unknown, 60 input and 12 output tokens" in printed
    assert "not predicted: [bold] ramp" in printed
