"""`moeplan trace stats`: the answers follow from the figures, the page stands alone."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from moeplan.cli import main
from moeplan.trace_answers import answers
from moeplan.trace_report import render_statistics
from moeplan.trace_statistics import find_statistics
from traces.convert import write_npz
from traces.counts_trace import CountsTrace, write_counts
from traces.measures import coactivation
from traces.measures.base import About
from traces.measures.sample import chosen_requests
from traces.routing_trace import write_trace
from traces.synth import synthetic_trace, zipf_shares


def trace_of(exponent, *, tokens=1500, requests=30, reuse=0.0, experts=16, top_k=2, seed=0):
    shares = zipf_shares(experts, exponent, 4, seed)
    shares = np.minimum(shares, 0.9 / top_k)
    shares /= shares.sum(axis=1, keepdims=True)
    return synthetic_trace(
        shares, tokens=tokens, requests=requests, top_k=top_k, seed=seed, reuse=reuse
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A skewed and local trace as one file, as two, and an even one."""
    home = tmp_path_factory.mktemp("traces")
    skewed = trace_of(1.2, reuse=0.9)
    write_trace(skewed, home / "skewed.parquet")
    write_trace(trace_of(0.0), home / "even.parquet")
    (home / "parts").mkdir()
    first = skewed.request_id < 13
    write_trace(skewed.select(first), home / "parts" / "a.parquet")
    write_trace(skewed.select(~first), home / "parts" / "b.parquet")
    return home


@pytest.fixture(scope="module")
def skewed(folder):
    return find_statistics([folder / "skewed.parquet"])


@pytest.fixture(scope="module")
def even(folder):
    return find_statistics([folder / "even.parquet"])


def test_answers_tell_a_skewed_local_trace_from_an_even_one(skewed, even):
    words = [[answer.word for answer in answers(found)] for found in (skewed, even)]
    assert words[0][:2] == ["yes", "yes"]
    assert words[1][:3] == ["no", "no", "no"]


def test_each_answer_holds_the_figure_of_its_measure(skewed):
    skew, local, predictable, enough = answers(skewed)
    assert skew.figure == f"{skewed.load.loads.max_over_mean.mean():.2f}×"
    assert local.figure.startswith(f"{100 * skewed.reuse.observed[0].mean():.1f}")
    assert predictable.figure.startswith(f"{100 * skewed.flow.predictability.mean():.1f}")
    error = skewed.support.relative_standard_error.mean()
    assert float(re.search(r"[\d.]+", enough.figure)[0]) == pytest.approx(100 * error, abs=0.06)


def test_a_single_request_is_not_enough_and_says_what_is_missing(tmp_path, capsys):
    one = trace_of(1.0, tokens=60, requests=1)
    write_trace(one, tmp_path / "one.parquet")
    found = find_statistics([tmp_path / "one.parquet"])
    *_, predictable, enough = answers(found)
    assert (predictable.word, enough.word) == ("unknown", "unknown")
    assert "held-out scores" in enough.so
    assert enough.so.startswith("one request cannot tell how far requests differ: record several")
    json.dumps(found.to_dict(), allow_nan=False)
    assert "not known" in render_statistics(found, answers(found))
    assert main(["trace", "stats", str(tmp_path / "one.parquet")]) == 0
    text = capsys.readouterr().out
    assert re.search(r"placement by load +│ no +│ not known", text)
    assert not re.search(r"\bnan\b", text)


def test_a_folder_is_one_data_set(folder, skewed):
    parts = find_statistics([folder / "parts"])
    assert parts.files == ("a.parquet", "b.parquet")
    whole, split = skewed.to_dict(), parts.to_dict()
    del whole["files"], split["files"]
    assert split == whole


def test_local_choices_are_those_of_the_plan(folder, tmp_path, capsys):
    slots = [[*range(0, 16, 2), *range(1, 16, 2)]] * 4  # even experts on rank 0
    plan = {"schema": "moeplan.plan/1", "physical_to_logical_map": slots, "num_experts": 16,
            "parallelism": {"experts": {"ep": 2, "tp": 1}}}  # fmt: skip
    (tmp_path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    trace = str(folder / "even.parquet")
    assert main(["trace", "stats", trace, "--plan", str(tmp_path / "plan.json"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["local_activation"]
    rows = trace_of(0.0)
    same = rows.experts % 2 == rows.request_id[:, None, None] % 2
    assert found["ranks"] == 2
    assert found["round_robin"] == pytest.approx(same.mean())
    del plan["parallelism"]
    (tmp_path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    assert main(["trace", "stats", trace, "--plan", str(tmp_path / "plan.json")]) == 2
    assert "no placement in it" in capsys.readouterr().err


def test_no_online_policy_beats_belady(skewed):
    for scope in ("layer", "global"):
        rates = {c.policy: c.hit_rate for c in skewed.caches if c.scope == scope}
        assert (rates["belady"] >= rates["lru"]).all()
        assert (rates["belady"] >= rates["lfu"]).all()


def test_the_page_stands_alone_and_says_synthetic(folder, skewed, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main(["trace", "stats", str(folder / "skewed.parquet"), "--out", str(out)]) == 0
    page = out.read_text(encoding="utf-8")
    assert page == render_statistics(skewed, answers(skewed))
    assert "<strong>Synthetic:</strong>" in page
    assert not re.search(r"<script|https?://(?!www\.w3\.org)|<link|src=", page)
    for question in ("skewed", "local", "predictable", "long enough"):
        assert f"Is it {question}?" in page
    text = capsys.readouterr().out
    assert "SYNTHETIC" in text
    assert "Is it skewed? yes" in text


def test_json_has_answers_and_every_part(folder, capsys):
    assert main(["trace", "stats", str(folder / "even.parquet"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["schema"] == "moeplan.trace-stats/1"
    assert answer["answers"][0]["question"] == "Is it skewed?"
    parts = {"load", "reuse", "flow", "coactivation", "drift", "support", "locality", "balance"}
    assert parts < set(answer)
    assert len(answer["caches"]) == 6


def test_counts_show_loads_and_refuse_the_rest(tmp_path, capsys):
    counts = np.array([[[1, 2, 3, 6], [3, 3, 3, 3]]])
    path = tmp_path / "counts.parquet"
    write_counts(CountsTrace(model="m", moe_layer_ids=(1, 2), counts=counts), path)
    assert main(["trace", "stats", str(path), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["kind"] == "counts"
    assert answer["load"]["max_over_mean"]["each"] == [2.0, 1.0]
    assert "need tokens" in answer["refused"]
    assert main(["trace", "stats", str(path), "--out", str(tmp_path / "x.html")]) == 2
    assert "loads without tokens" in capsys.readouterr().err
    assert main(["trace", "convert", str(path), str(tmp_path / "x.npz")]) == 2
    assert "loads without tokens -- requests, steps and caches need" in capsys.readouterr().err


def test_an_npz_does_not_go_to_a_scheduler(tmp_path, capsys):
    write_npz(trace_of(1.0, tokens=60, requests=3), tmp_path / "t.npz")
    assert main(["trace", "stats", str(tmp_path / "t.npz"), "--scheduler", "local"]) == 2
    assert "workers read Parquet" in capsys.readouterr().err


def test_files_of_two_models_are_refused(folder, tmp_path, capsys):
    other = trace_of(1.0, experts=8)
    write_trace(replace(other, meta=replace(other.meta, model="other")), tmp_path / "o.parquet")
    files = [str(folder / "even.parquet"), str(tmp_path / "o.parquet")]
    assert main(["trace", "stats", *files]) == 2
    assert "one model" in capsys.readouterr().err


def test_a_sample_without_decode_rows_is_played_whole(tmp_path):
    trace = trace_of(0.1, tokens=201_000, requests=201, experts=4, top_k=1)
    left_out = np.flatnonzero(~chosen_requests(About.of(trace)))
    write_trace(replace(trace, decode=np.isin(trace.request_id, left_out)), tmp_path / "t.parquet")
    found = find_statistics([tmp_path / "t.parquet"])
    assert found.support.decode_tokens == 1000
    assert {found.balance.phase, *(curve.phase for curve in found.caches)} == {"any"}


def test_names_are_shown_as_they_are(tmp_path, capsys):
    trace = trace_of(1.0, tokens=60, requests=3)
    named = replace(trace, meta=replace(trace.meta, model="gpt[/red] [bold]x"))
    write_trace(named, tmp_path / "t.parquet")
    assert main(["trace", "stats", str(tmp_path / "t.parquet")]) == 0
    assert "gpt[/red] [bold]x: 60 tokens" in capsys.readouterr().out
    counts = CountsTrace(model="gpt[/red]", moe_layer_ids=(1,), counts=np.array([[[1, 2, 3, 6]]]))
    write_counts(counts, tmp_path / "c.parquet")
    assert main(["trace", "stats", str(tmp_path / "c.parquet")]) == 0
    assert "gpt[/red]: counts only" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("experts", "exponent", "word", "so"),
    [(1, 0.0, "no", "little"), (7, 0.0, "no", "little"), (7, 1.5, "yes", "something")],
)
def test_what_follows_fits_the_answer_where_no_ranks_divide(experts, exponent, word, so, tmp_path):
    trace = trace_of(exponent, experts=experts, top_k=1) if experts > 1 else single_expert()
    write_trace(trace, tmp_path / "t.parquet")
    skew = answers(find_statistics([tmp_path / "t.parquet"]))[0]
    assert (skew.word, skew.so) == (word, f"a placement by load has {so} to even out")


def single_expert():
    trace = trace_of(0.0, experts=2, top_k=1)
    meta = replace(trace.meta, num_experts=1)
    return replace(trace, meta=meta, experts=np.zeros_like(trace.experts))


def test_pairs_of_too_many_experts_are_left_out(folder, skewed, monkeypatch, capsys):
    monkeypatch.setattr(coactivation, "MAX_BYTES", 1000)
    found = find_statistics([folder / "skewed.parquet"])
    assert "pairs of 16 experts in 4 layers take" in render_statistics(found, answers(found))
    assert found.to_dict()["coactivation"]["skipped"]
    assert main(["trace", "stats", str(folder / "skewed.parquet")]) == 0
    assert re.search("pairs unlike independent +│ +not known", capsys.readouterr().out)
    assert "pairs of 16 experts" not in render_statistics(skewed, answers(skewed))
