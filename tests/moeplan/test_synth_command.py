"""`moeplan trace synth` fits, keeps and draws, and says everywhere that it is synthetic."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from basis.errors import InputError
from moeplan.cli import build_parser
from moeplan.synth_command import synth
from traces.routing_trace import read_trace, write_trace
from traces.synth import synthetic_trace

HEADER = "layer,gpqa_max_over_mean,gpqa_top32_share_pct,{0}0.01_2.0,{0}2.0_4.0,{0}4.0_6.0".format(
    "gpqa_experts_with_load_over_mean_in_"
)


def run(*words: object) -> dict[str, Any]:
    return synth(build_parser().parse_args(["trace", "synth", *map(str, words)]))


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    shares = np.tile(np.arange(1, 7) / 21, (2, 1))
    path = tmp_path / "recorded.parquet"
    trace = synthetic_trace(shares, tokens=2000, requests=10, top_k=2, seed=0, reuse=0.5)
    write_trace(trace, path)
    return path


def test_a_trace_like_another(recorded: Path, tmp_path: Path) -> None:
    out, kept, again = (tmp_path / name for name in ("a.parquet", "fit.npz", "b.parquet"))
    answer = run(
        "--like", recorded, "--tokens", 500, "--requests", 4, "--out", out, "--save-fit", kept
    )
    trace = read_trace(out)
    assert (trace.num_tokens, trace.num_requests) == (500, 4)
    assert trace.meta.synthetic
    assert trace.meta.note.startswith("synthetic: fitted to")
    assert answer["synthetic"] is True
    assert answer["note"] == trace.meta.note
    assert answer["files"] == [str(kept), str(out)]
    assert sum(p["common_variance"] + p["own_variance"] for p in answer["processes"]) == (
        pytest.approx(1, abs=1e-3)
    )
    # the kept generator draws the same trace, without the recorded one
    run("--fit", kept, "--tokens", 500, "--requests", 4, "--out", again)
    assert np.array_equal(read_trace(again).experts, trace.experts)
    other = run("--fit", kept, "--tokens", 500, "--out", again, "--seed", 1)
    assert other["requests"] == 2  # 200 tokens each
    assert not np.array_equal(read_trace(again).experts, trace.experts)


def test_loads_of_a_table(recorded: Path, tmp_path: Path) -> None:
    table, out = tmp_path / "stats.csv", tmp_path / "x.parquet"
    table.write_text(f"{HEADER}\n3,5.0,67.0,50,8,6\n4,3.0,65.0,52,12,0\n")
    words = ("--loads", table, "--num-experts", 64, "--top-k", 4, "--model", "mine")
    answer = run(*words, "--tokens", 300, "--requests", 3, "--out", out)
    trace = read_trace(out)
    assert trace.meta.model == answer["model"] == "mine"
    assert trace.meta.moe_layer_ids == (3, 4)
    assert (trace.meta.num_experts, trace.meta.top_k) == (64, 4)
    assert "loads of stats.csv; all else from assumptions" in trace.meta.note
    run(*words, "--like", recorded, "--tokens", 300, "--requests", 3, "--out", out)
    assert "all else from a generator fitted to a synthetic trace" in read_trace(out).meta.note


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "x.parquet", "--tokens", 5], "nothing to fit"),
        (["--like", "a", "--fit", "b", "--save-fit", "c"], "--like and --fit together"),
        (["--like", "a"], "nothing to write"),
        (["--like", "a", "--out", "x"], "--out without --tokens"),
        (["--like", "a", "--out", "x", "--tokens", 0], "--tokens 0 -- at least one"),
        (["--like", "a", "--out", "x", "--tokens", 5, "--requests", 6], "--tokens 5"),
        (["--loads", "a", "--save-fit", "x"], "--loads without --num-experts"),
        (["--like", "a", "--top-k", 3, "--save-fit", "x"], "only with --loads"),
        (["--like", "a", "--model", "b", "--save-fit", "x"], "--model -- only with --loads"),
        (["--fit", "a", "--tokens", 5, "--requests", 2, "--save-fit", "x"], "without --out"),
        (["--like", "a", "--out", "x", "--tokens", 9, "--requests", -1], "^--requests -1 -- at"),
        (["--like", "a", "--out", "x", "--tokens", 9, "--requests", 0], "^--requests 0 -- at"),
        (["--fit", "a", "--out", "z", "--tokens", 9, "--save-fit", "z"], "z: named twice"),
        (["--like", "a", "--out", ".", "--tokens", 9], ".: a folder -- name a file"),
        (["--like", ".", "--out", "x", "--tokens", 9], ".: a folder -- give a trace"),
        (["--like", "a", "--save-fit", "absent/x", "--seed", -1], "--seed -1.*no such folder"),
        (["--fit", "absent.npz", "--save-fit", "x"], "absent.npz: no such file"),
        (["--like", "absent.parquet", "--save-fit", "x"], "absent.parquet: no such file"),
    ],
)
def test_what_cannot_be_asked(
    words: list[object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        run(*words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["--like", "a", "--out", "a", "--tokens", 9],
        ["--like", "a", "--save-fit", "./a"],
        ["--fit", "a", "--out", "a", "--tokens", 9],
        ["--loads", "a", "--num-experts", 4, "--top-k", 2, "--save-fit", "a"],
    ],
)
def test_no_input_is_overwritten(
    words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_text("before")
    with pytest.raises(InputError, match=r"^a: source and target are the same file"):
        run(*words)
    assert (tmp_path / "a").read_text() == "before"
