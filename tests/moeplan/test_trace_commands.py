"""`moeplan trace stats`, `import` and `convert` check what is asked before they work on it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplan.cli import main
from traces.convert import write_npz
from traces.counts_trace import CountsTrace, write_counts
from traces.routing_trace import write_trace
from traces.synth import synthetic_trace

Refused = Callable[..., str]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a trace of 2 layers of 6 experts, a plan of it, loads, and a folder of logs."""
    monkeypatch.chdir(tmp_path)
    trace = synthetic_trace(np.full((2, 6), 1 / 6), tokens=200, requests=10, top_k=2, seed=0)
    write_trace(trace, tmp_path / "y.parquet")
    write_npz(trace, tmp_path / "y.npz")
    (tmp_path / "plan.json").write_text(json.dumps(plan()))
    counts = np.ones((1, 2, 6), np.int64)
    write_counts(
        CountsTrace(model="m", moe_layer_ids=(0, 1), counts=counts), tmp_path / "loads.parquet"
    )
    (tmp_path / "c.csv").write_text("layer,expert,count\n0,0,1\n0,1,2\n")
    (tmp_path / "logs").mkdir()
    return tmp_path


def plan(layers: int = 2, experts: int = 6) -> dict[str, Any]:
    return {
        "schema": "moeplan.plan/1",
        "num_experts": experts,
        "physical_to_logical_map": [list(range(experts))] * layers,
        "parallelism": {"experts": {"ep": 2}},
    }


@pytest.fixture
def refused(home: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run, and return the message; every file must be as it was."""

    def run(*words: str) -> str:
        before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
        assert main(["trace", *words]) == 2
        assert {p: p.read_bytes() for p in home.rglob("*") if p.is_file()} == before
        said = capsys.readouterr().err
        assert said.count("error:") == 1
        return said

    return run


@pytest.mark.parametrize(
    "words",
    [
        "stats y.parquet --out y.parquet",
        "stats . --out ./y.parquet",
        "stats y.npz --out logs/../y.npz",
        "stats y.parquet --plan plan.json --out plan.json",
        "import c.csv c.csv",
        "convert y.parquet y.parquet",
    ],
)
def test_no_input_is_overwritten(refused: Refused, words: str) -> None:
    assert "source and target are the same file -- name another target" in refused(*words.split())


def test_nothing_is_imported_into_its_own_folder(refused: Refused) -> None:
    assert "logs/0.npz: the target lies in logs" in refused("import", "logs", "logs/0.npz")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("stats absent.parquet --out absent/x.html", "absent: no such folder -- make it first"),
        ("stats absent.parquet --out logs", "logs: a folder -- name a file to write"),
        ("import absent logs", "logs: a folder -- name a file to write"),
        ("convert absent.parquet logs.npz", "absent.parquet: no such file"),
        ("stats y.parquet logs", "logs: a folder beside files"),
        ("stats y.parquet --plan logs", "logs: a folder -- give a plan.json"),
        ("stats y.parquet --plan absent.json", "absent.json: no such file -- give a plan.json"),
        ("convert c.csv x.jsonl", "c.csv: header 'layer,expert,count' -- known are"),
        ("convert c.csv x.parquet", "c.csv: header 'layer,expert,count' -- known are"),
        ("convert c.txt x.jsonl", "one of .parquet, .npz, .jsonl; a workload is read from .csv"),
        ("stats loads.parquet --plan absent.json", "no use for --plan"),
        ("stats loads.parquet --scheduler local", "no use for --scheduler"),
        ("stats loads.parquet --out x.html", "no use for --out"),
    ],
)
def test_what_cannot_be_asked(refused: Refused, words: str, message: str) -> None:
    assert message in refused(*words.split())


@pytest.mark.parametrize("trace", ["y.parquet", "y.npz"])
def test_the_plan_of_another_model(home: Path, refused: Refused, trace: str) -> None:
    (home / "plan.json").write_text(json.dumps(plan(layers=12, experts=32)))
    assert (
        "plan.json: a plan of another model: 12 MoE layers of 32 experts, the trace of synthetic "
        "has 2 of 6 -- give the plan of that model"
    ) in refused("stats", trace, "--plan", "plan.json")
    (home / "plan.json").write_text(json.dumps(plan() | {"num_experts": 7}))
    assert "plan.json: 6 slots for 7 experts" in refused("stats", trace, "--plan", "plan.json")


def test_files_are_named_as_they_are(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "convert", "y.parquet", "x[a].npz"]) == 0
    assert capsys.readouterr().out == "wrote x[a].npz\n"
    assert (home / "x[a].npz").is_file()


def test_a_page_beside_the_traces_it_is_of(home: Path) -> None:
    (home / "loads.parquet").unlink()
    assert main(["trace", "stats", ".", "--out", "page.html"]) == 0
    assert main(["trace", "stats", ".", "--out", "page.html"]) == 0
    assert "<html" in (home / "page.html").read_text()
