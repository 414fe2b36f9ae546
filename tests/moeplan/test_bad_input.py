"""Every kind of bad input: one clear message, exit code 2 (or 1: infeasible), no traceback."""

import dataclasses
import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from moeplan.cli import main
from traces.routing_trace import RoutingTrace, write_trace

Write = Callable[..., Path]
PLAN = {"redundant_experts": 4, "steps": 2, "seeds": 2, "time_limit": "5 s"}


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a runner of ``moeplan plan`` that must fail; it gives the message."""

    def run(path: Path, code: int = 2) -> str:
        out = tmp_path / "out"
        assert main(["plan", str(path), "--out", str(out)]) == code
        printed = capsys.readouterr()
        message = printed.err[printed.err.find("error: " if code == 2 else "infeasible: ") :]
        assert message
        assert "Traceback" not in printed.err
        assert message.count("error: ") == (code == 2)
        assert not (out / "plan.json").exists()
        return message

    return run


def test_missing_files(scenario: Write, refused: Callable[..., str], tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "none.yaml")
    assert "model: " in refused(scenario(model="none.json"))
    assert "none.parquet does not exist" in refused(scenario(trace="none.parquet"))


def test_truncated_parquet(scenario: Write, refused: Callable[..., str], tmp_path: Path) -> None:
    path = scenario()
    trace = tmp_path / "tiny.parquet"
    trace.write_bytes(trace.read_bytes()[:-100])
    message = refused(path)
    assert "tiny.parquet" in message
    assert "Parquet" in message


def test_dirty_trace(scenario: Write, refused: Callable[..., str], moeplan_data: Path) -> None:
    dirty = moeplan_data / "traces" / "dirty-mixtral-8x7b-humaneval.parquet"
    assert "199 cells missing" in refused(scenario(trace=str(dirty)))


def test_partial_layers(scenario: Write, refused: Callable[..., str], moeplan_data: Path) -> None:
    partial = moeplan_data / "traces" / "qwen1.5-moe-gsm8k.parquet"
    with pytest.warns(UserWarning, match="836"):
        message = refused(scenario(trace=str(partial)))
    assert "layers" in message


@pytest.mark.parametrize("what", ["layers", "experts", "top_k", "partial"])
def test_trace_and_config_that_disagree(
    scenario: Write,
    refused: Callable[..., str],
    tiny_trace: RoutingTrace,
    tmp_path: Path,
    what: str,
) -> None:
    path = scenario()
    if what == "partial":
        meta = dataclasses.replace(tiny_trace.meta, moe_layer_ids=(0, 2))
        part = dataclasses.replace(tiny_trace, meta=meta, experts=tiny_trace.experts[:, ::2])
        write_trace(part, tmp_path / "tiny.parquet")
        assert "records 2 of 4 MoE layers" in refused(path)
        return
    key = {
        "layers": "num_hidden_layers",
        "experts": "num_local_experts",
        "top_k": "num_experts_per_tok",
    }
    config = json.loads((tmp_path / "tiny.json").read_text())
    config[key[what]] += 1
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    message = refused(path)
    assert str(config[key[what]]) in message


def test_unknown_keys_and_missing_units(scenario: Write, refused: Callable[..., str]) -> None:
    message = refused(scenario(plan={"redundant_expert": 4, "limits": {"tpot_p99": 50}}))
    assert "plan.redundant_expert: unknown key -- did you mean 'redundant_experts'?" in message
    assert "plan.limits.tpot_p99: unit missing in 50" in message


def test_sparse_flops(scenario: Write, refused: Callable[..., str], tmp_path: Path) -> None:
    device = files("hwmodels").joinpath("catalog", "devices", "h100.yaml").read_text()
    sparse = device.replace("989.4 TFLOP/s", "1979 TFLOP/s")
    assert sparse != device
    (tmp_path / "gpu.yaml").write_text(sparse)
    node = files("hwmodels").joinpath("catalog", "clusters", "hgx-h100-8.yaml").read_text()
    cluster = yaml.safe_load(node) | {"device": "gpu.yaml"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(cluster))
    message = refused(scenario(cluster="mine.yaml"))
    assert "sparse" in message


def test_cluster_without_units(
    scenario: Write, refused: Callable[..., str], tmp_path: Path
) -> None:
    node = files("hwmodels").joinpath("catalog", "clusters", "hgx-h100-8.yaml").read_text()
    assert "450 GB/s" in node
    (tmp_path / "mine.yaml").write_text(node.replace("450 GB/s", "450"))
    assert "unit missing" in refused(scenario(cluster="mine.yaml"))


def test_unknown_cluster_and_too_many_gpus(scenario: Write, refused: Callable[..., str]) -> None:
    assert "did you mean 'hgx-h100-8'" in refused(scenario(cluster="hgx-h100"))
    assert "9" in refused(scenario(gpus=9))


def test_slots_that_do_not_divide(scenario: Write, refused: Callable[..., str]) -> None:
    message = refused(scenario(plan={**PLAN, "redundant_experts": 3}))
    assert "8 experts + 3 redundant = 11 slots do not divide over 4 ranks" in message
    assert "set redundant_experts to 0 or 4" in message


def test_a_model_that_does_not_fit_is_infeasible(
    scenario: Write, refused: Callable[..., str], tmp_path: Path
) -> None:
    path = scenario()
    config = json.loads((tmp_path / "tiny.json").read_text())
    (tmp_path / "tiny.json").write_text(
        json.dumps(config | {"hidden_size": 32768, "intermediate_size": 262144, "head_dim": 128})
    )
    message = refused(path, code=1)
    assert "would make it fit" in message


def test_a_limit_that_cannot_be_kept_is_infeasible(
    scenario: Write, refused: Callable[..., str]
) -> None:
    message = refused(scenario(plan={**PLAN, "limits": {"tpot_p99": "1 us"}}), code=1)
    assert "tpot_p99" in message


def test_bad_plan_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.json").write_text('{"schema": "other/1"}')
    arguments = ["export", str(tmp_path / "p.json"), "--to", "sglang", "--out", str(tmp_path / "o")]
    assert main(arguments) == 2
    assert "expected a plan.json" in capsys.readouterr().err


def test_bad_deployment_names(scenario: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(scenario()), "--deployment", "epbl"]) == 2
    assert "one of contiguous, round_robin, eplb" in capsys.readouterr().err


def test_out_that_cannot_be_written(
    scenario: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["plan", str(scenario()), "--out", str(tmp_path / "file")]) == 2
    assert "file" in capsys.readouterr().err
