"""The bundled example trace: its size, its labels, and the statistics stated of it."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from traces import read_trace
from traces.stats import trace_statistics

ROOT = Path(__file__).parents[2]
DATA = ROOT / "examples" / "data"


@pytest.fixture(scope="module")
def trace():
    return read_trace(DATA / "example-moe-12x32.parquet")


@pytest.fixture(scope="module")
def facts():
    return json.loads((DATA / "trace_statistics.json").read_text())


def test_size_and_labels(trace):
    assert sum(file.stat().st_size for file in DATA.iterdir()) <= 3_000_000
    assert (trace.num_layers, trace.meta.num_experts, trace.meta.top_k) == (12, 32, 4)
    assert trace.num_tokens >= 50_000
    assert trace.num_requests >= 100
    assert np.unique(trace.domain).size >= 4
    assert trace.decode.mean() > 0.5
    assert not trace.meta.synthetic
    assert "not a production model" in trace.meta.note


def test_stated_statistics_are_those_of_the_file(trace, facts):
    stated = facts["statistics"][trace.meta.model]
    found = trace_statistics(trace).to_dict()
    assert stated.keys() == found.keys()
    for name, value in found.items():
        is_number = isinstance(value, float | list)
        assert stated[name] == (pytest.approx(value) if is_number else value), name


def test_routing_is_not_random(trace):
    found = trace_statistics(trace)
    assert found.reuse.mean() > 1.3 * found.reuse_independent.mean()
    assert found.predictability.mean() > 1.3 * found.predictability_unconditional.mean()
    assert found.load_max_over_mean.min() > 1 + 10 * found.load_standard_error


def test_held_out_loss_is_below_the_unigram_baseline(facts):
    with (DATA / "training_log.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    for domain, baseline in facts["training"]["unigram_loss"].items():
        assert float(last[f"held_out_{domain}"]) < baseline - 1, domain


def test_manifest_splits_by_file():
    manifest = json.loads((DATA / "manifest.json").read_text())
    held_out = {d["sha256"] for d in manifest if d["split"] == "held_out"}
    train = {d["sha256"] for d in manifest if d["split"] == "train"}
    assert held_out
    assert train
    assert not held_out & train
    assert not any(d["path"].startswith("/") for d in manifest)


def test_config_is_that_of_the_trace(trace):
    config = json.loads((DATA / "example-moe-config.json").read_text())
    assert config["num_hidden_layers"] == trace.num_layers
    assert config["num_experts"] == trace.meta.num_experts
    assert config["num_experts_per_tok"] == trace.meta.top_k


def test_background_page_shows_the_stated_tables():
    page = (ROOT / "docs" / "background" / "example-trace.md").read_text()
    for line in (DATA / "trace_statistics.md").read_text().splitlines():
        assert line in page
