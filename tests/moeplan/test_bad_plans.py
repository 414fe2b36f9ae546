"""Questions about layouts, tiers and requests that have no answer: one clear message each."""

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml

from moeplan.cli import main
from traces.routing_trace import write_trace
from traces.synth import synthetic_trace, zipf_shares

Write = Callable[..., Path]
WORKSTATION = {"cluster": "workstation-rtx4090", "gpus": 1}
ALL = {"layouts": "all", "steps": 2, "seeds": 2, "layouts_time_limit": "2 s"}


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a runner of the command line that must fail with one message, which it gives."""

    def run(*arguments: object, code: int = 2) -> str:
        assert main([str(a) for a in arguments]) == code
        printed = capsys.readouterr().err
        word = "error: " if code == 2 else "infeasible: "
        assert printed.count(word) == 1
        assert "Traceback" not in printed
        return printed[printed.index(word) :]

    return run


def _deployment(folder: Path, ranks: int, **changes: Any) -> Path:
    path = folder / "deployment.yaml"
    content: dict[str, Any] = {
        "parallelism": {"attention": {"dp": ranks}, "experts": {"ep": ranks}},
        "physical_to_logical_map": [list(range(8))] * 4,
    }
    path.write_text(yaml.safe_dump(content | changes))
    return path


def test_a_score_whose_candidates_the_trace_lacks(
    scenario: Write, tmp_path: Path, fails: Callable[..., str]
) -> None:
    offload = {"home": "host", "cache": {"slots": 2, "score": "mrs"}}
    mine = _deployment(tmp_path, 1, offload=offload)
    message = fails("simulate", scenario(**WORKSTATION), "--deployment", mine)
    assert "mrs" in message
    assert "candidates" in message


@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_a_tier_graph_without_a_path(
    scenario: Write, tmp_path: Path, fails: Callable[..., str], command: str
) -> None:
    catalog = files("hwmodels").joinpath("catalog", "clusters")
    mine = yaml.safe_load(catalog.joinpath("workstation-rtx4090.yaml").read_text())
    mine["node"]["memories"]["island"] = dict(mine["node"]["memories"]["nvme"])
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(mine))
    facts = {"cluster": "./mine.yaml", "gpus": 1}
    if command == "plan":
        path = scenario(**facts, plan={"offload": {"home": "island", "fast_memory": "40 MB"}})
        message = fails("plan", path, "--out", tmp_path / "out")
    else:
        deployment = _deployment(tmp_path, 1, offload={"home": "island"})
        message = fails("simulate", scenario(**facts), "--deployment", deployment)
    assert "island" in message
    assert "path" in message


def test_a_layout_that_does_not_divide_the_ranks(
    scenario: Write, tmp_path: Path, fails: Callable[..., str]
) -> None:
    layout = {"attention": {"dp": 2, "tp": 3}, "experts": {"ep": 8}}
    mine = _deployment(tmp_path, 8, parallelism=layout)
    path = scenario(gpus=8, plan={})
    message = fails("simulate", path, "--deployment", mine)
    assert "attention dp 2 x tp 3 x pp 1 = 6 on 8 ranks" in message


def test_a_layout_that_does_not_divide_the_model(
    scenario: Write, tmp_path: Path, fails: Callable[..., str]
) -> None:
    layout = {"attention": {"dp": 1, "tp": 3}, "experts": {"ep": 1, "tp": 3}}
    path = scenario(gpus=3, plan=ALL)  # 8 heads and 1,024 columns of an expert over 3 ranks
    message = fails("simulate", path, "--deployment", _deployment(tmp_path, 3, parallelism=layout))
    assert "8" in message
    assert "3" in message


def _deepseek_like(folder: Path) -> tuple[str, str]:
    """Write geometry and trace of a model of DeepSeek-V3's size, with Mixtral's attention."""
    layers = 58
    geometry = {
        "model_type": "mixtral",
        "hidden_size": 7168,
        "intermediate_size": 2048,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "num_hidden_layers": layers,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
        "vocab_size": 129280,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "sliding_window": None,
        "head_dim": 128,
    }
    (folder / "large.json").write_text(json.dumps(geometry))
    shares = zipf_shares(256, 0.5, layers=layers, seed=0)
    trace = synthetic_trace(shares, tokens=200, requests=8, top_k=8, seed=0)
    write_trace(trace, folder / "large.parquet")
    return "large.json", "large.parquet"


@pytest.mark.parametrize(
    ("plan", "levers"),
    [
        (ALL, ("a GPU with at least 1.49 TB", "experts in host memory")),
        ({"offload": {}}, ("a memory host of at least 1.45 TB",)),
    ],
    ids=["layouts", "offload"],
)
def test_a_model_that_fits_nowhere_says_what_would_make_it_fit(
    scenario: Write,
    tmp_path: Path,
    fails: Callable[..., str],
    plan: dict[str, Any],
    levers: tuple[str, ...],
) -> None:
    model, trace = _deepseek_like(tmp_path)
    path = scenario(
        **WORKSTATION, model=model, trace=trace, plan=plan, workload={"decode_batch": 1}
    )
    message = fails("plan", path, "--out", tmp_path / "out", code=1)
    assert "would make it fit" in message
    for lever in levers:
        assert lever in message
    assert not (tmp_path / "out" / "plan.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plan": {"layouts": "all", "offload": {}}}, "layouts: all together with offload"),
        (
            {"plan": {"offload": {}, "redundant_experts": 4}},
            "redundant_experts 4 together with offload",
        ),
        ({"plan": {"offload": {}}}, "an offload plan is for one rank: set gpus: 1"),
        (
            {"plan": ALL, "workload": {"prefill_tokens": 64}},
            "layouts are compared in decode",
        ),
        (
            {"plan": ALL, "workload": {"rate": 2.0, "input_tokens": 8, "output_tokens": 8}},
            "workload.rate 2 with plan.layouts all",
        ),
        (
            {"workload": {"input_tokens": 8, "output_tokens": 8}},
            "this question needs the tokens of a step",
        ),
        (
            {**WORKSTATION, "plan": {"offload": {"fast_memry": "2 GB"}}},
            "plan.offload.fast_memry: unknown key -- did you mean 'fast_memory'?",
        ),
        (
            {**WORKSTATION, "plan": {"offload": {"fast_memory": 2}}},
            "plan.offload.fast_memory: unit missing in 2",
        ),
        ({**WORKSTATION, "plan": {"offload": {"home": "hots"}}}, "host"),
        (
            {**WORKSTATION, "plan": {"offload": {"processor": "gpu"}}},
            "cpu",
        ),
        ({"plan": {"layout": "all"}}, "did you mean 'layouts'?"),
        ({"plan": {"layouts": "al"}}, "plan.layouts"),
    ],
)
def test_plans_that_cannot_be_asked_for(
    scenario: Write,
    tmp_path: Path,
    fails: Callable[..., str],
    changes: dict[str, Any],
    message: str,
) -> None:
    assert message in fails("plan", scenario(**changes), "--out", tmp_path / "out")


def test_compare_places_experts_only(scenario: Write, fails: Callable[..., str]) -> None:
    path = scenario(plan=ALL)
    assert "compare with plan.layouts: all" in fails("compare", path, "--clusters", "hgx-h100-8")


def test_requests_are_not_served_with_tiers(
    scenario: Write, tmp_path: Path, fails: Callable[..., str]
) -> None:
    workload = {"concurrency": 2, "requests": 4, "input_tokens": 8, "output_tokens": 8}
    path = scenario(**WORKSTATION, workload=workload)
    mine = _deployment(tmp_path, 1, offload={"home": "host"})
    assert "no offload" in fails("simulate", path, "--deployment", mine)
