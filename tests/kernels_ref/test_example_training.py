"""The miniature of the example training, end to end: corpus, tokenizer, training, recording."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from traces import read_trace

pytest.importorskip("tokenizers")

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "train_example_moe.py"


def run(*arguments):
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    work = tmp_path_factory.mktemp("miniature")
    done = run("all", "--miniature", "--work", work, "--data", work / "data")
    assert done.returncode == 0, done.stderr
    return work


@pytest.mark.slow
def test_loss_falls_below_the_unigram_baseline(miniature):
    with (miniature / "training_log.csv").open(newline="") as file:
        log = [float(row["held_out_mean"]) for row in csv.DictReader(file)]
    baseline = json.loads((miniature / "training.json").read_text())["unigram_loss"]
    assert log[-1] < log[0] - 1
    assert log[-1] < np.mean(list(baseline.values())) - 0.5


@pytest.mark.slow
def test_the_recorded_trace_is_valid_and_not_random(miniature):
    trace = read_trace(miniature / "data" / "example-moe-12x32.parquet")
    assert (trace.num_layers, trace.meta.num_experts, trace.meta.top_k) == (12, 32, 4)
    assert not trace.meta.synthetic
    assert "not a production model" in trace.meta.note
    assert trace.num_requests == 28
    assert len(np.unique(trace.domain)) >= 4
    facts = json.loads((miniature / "data" / "trace_statistics.json").read_text())
    found = facts["statistics"][trace.meta.model]
    assert found["num_tokens"] == trace.num_tokens
    assert found["reuse_mean"] > found["reuse_independent_mean"]
    assert found["predictability_mean"] > found["predictability_unconditional_mean"]


@pytest.mark.slow
def test_requests_are_a_prompt_and_then_one_token_a_step(miniature):
    trace = read_trace(miniature / "data" / "example-moe-12x32.parquet")
    for request in np.unique(trace.request_id):
        rows = np.flatnonzero(trace.request_id == request)
        np.testing.assert_array_equal(trace.position[rows], np.arange(len(rows)))
        prompt = np.count_nonzero(~trace.decode[rows])
        assert 1 <= prompt < len(rows)
        expected = np.maximum(np.arange(len(rows)) - prompt + 1, 0)
        np.testing.assert_array_equal(trace.step[rows], expected)
        np.testing.assert_array_equal(trace.decode[rows], expected > 0)


@pytest.mark.slow
def test_no_text_is_on_both_sides_of_the_split(miniature):
    manifest = json.loads((miniature / "manifest.json").read_text())
    sides = {"train": set(), "held_out": set()}
    for document in manifest:
        sides[document["split"]].add(document["sha256"])
    assert sides["train"]
    assert sides["held_out"]
    assert not sides["train"] & sides["held_out"]


def test_miniature_never_overwrites_the_bundled_trace():
    done = run("all", "--miniature")
    assert done.returncode == 2
    assert "add --data" in done.stderr
