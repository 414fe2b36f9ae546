"""Fits recover what made the times, a tampered log is found, and a tiny decoder agrees."""

import io
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from basis import InputError, validate
from hwmodels.cluster import Cluster, load_cluster
from hwmodels.cost import price
from hwmodels.cost_compute import price_compute
from hwmodels.figures import Figure
from hwmodels.ops import Copy
from kernels_ref.expert_cache import Access
from kernels_ref.expert_file import ExpertFile, write_expert_file
from kernels_ref.tier_sweep import NearUse
from moeplan import calibrate_tier, validate_offload
from moeplan.calibrate_tier import SIZES, fit_fetches, node_parts
from moeplan.reference import import_kernels
from moeplan.validate_offload import (
    LOOKUP,
    OffloadCase,
    OffloadQuestion,
    OffloadReport,
    OffloadRow,
    cases_of,
    differences,
    sequence_of,
    show_offload,
    simulated,
)
from traces.caches import replay
from traces.model_spec import ModelSpec
from traces.synth import synthetic_trace, zipf_shares

LAYERS, EXPERTS, TOP_K = 2, 8, 2


@pytest.fixture(scope="module")
def model():
    attention = {"kind": "gqa", "num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "v_head_dim": 4}
    formats = dict.fromkeys(("weight_dtype", "expert_dtype", "activation_dtype", "kv_dtype"))
    fields = {
        "name": "tiny",
        "family": "test",
        "num_layers": LAYERS,
        "hidden_size": 16,
        "vocab_size": 32,
        "tie_embeddings": False,
        "moe_layer_ids": tuple(range(LAYERS)),
        "num_experts": EXPERTS,
        "top_k": TOP_K,
        "expert_width": 8,
        "attention": attention,
        "comm_size": 16,
        **dict.fromkeys(formats, "fp32"),
    }
    return ModelSpec.model_validate(fields)


@pytest.fixture(scope="module")
def trace():
    shares = zipf_shares(EXPERTS, 0.7, LAYERS, seed=3)
    return synthetic_trace(shares, tokens=200, requests=5, top_k=TOP_K, seed=4, reuse=0.5)


def timed(tier, startup, rate, sizes=SIZES, spread=0.0):
    """Fetches that take what the line says, times 1 +- spread at sizes in turn."""
    random = np.random.default_rng(1)
    return [
        SimpleNamespace(
            tier=tier,
            bytes=size,
            timing=SimpleNamespace(
                seconds=(startup + size / rate) * (1 + spread * random.uniform(-1, 1)), floor=0.02
            ),
        )
        for size in sizes
    ]


def machine(tmp_path, tiers=("pages", "disk")):
    """Write a machine of one rank with fitted tiers, and load it."""
    fits = fit_fetches([f for t in tiers for f in timed(t, 1e-5, 2e9)])
    experts = {"launch": "9 us", "compute_efficiency": 0.6, "memory_efficiency": 0.5}
    device = {
        "name": "test",
        "memories": {"host": {"kind": "DRAM", "capacity": "20 GiB", "bandwidth": "30 GB/s"}},
        "processors": {
            "cpu": {
                "memory": "host",
                "flops": {"bf16": "10 TFLOP/s"},
                "kernels": {"grouped_gemm": {"bf16": experts}},
            }
        },
    }
    node = {"devices": 1, **node_parts(fits, "host", tmp_path)}
    return validate({"name": "test", "device": device, "node": node}, Cluster, "test")


def file_tier(tmp_path):
    """Tell what files of this folder are: tmpfs, for one, is a page cache."""
    write_expert_file(tmp_path / "probe", [torch.ones(4)])
    with ExpertFile(tmp_path / "probe") as file:
        tier = file.tier
    (tmp_path / "probe").unlink()
    return tier


def question(model, trace, tmp_path, **changes):
    fields = {
        "cluster": machine(tmp_path, ("pages", file_tier(tmp_path))),
        "folder": tmp_path,
        "batches": (1, 3),
        "warmup": 4,
        "steps": 3,
        "rounds": 5,
    }
    return OffloadQuestion(model=model, trace=trace, **(fields | changes))


@settings(deadline=None, max_examples=30)
@given(startup=st.floats(0, 1e-3), rate=st.floats(1e8, 1e11))
def test_a_fit_recovers_the_line_that_made_the_times(startup, rate):
    (fit,) = fit_fetches(timed("disk", startup, rate))
    assert fit.seconds(3e6) == pytest.approx(startup + 3e6 / rate, rel=1e-6)
    assert fit.held_out.median < 1e-6
    assert fit.held_out.rows == len(SIZES) // 2
    assert (fit.low, fit.high) == pytest.approx((1, 1))


def test_the_error_is_that_of_sizes_that_the_fit_did_not_see():
    fetches = timed("disk", 1e-5, 2e9)
    for fetch in fetches[1::2]:
        fetch.timing.seconds *= 1.25
    (fit,) = fit_fetches(fetches)
    assert fit.rate == pytest.approx(2e9)
    assert fit.held_out.median == pytest.approx(0.2)
    assert fit.high == pytest.approx(1.25)


def test_bad_sweeps_are_refused():
    with pytest.raises(InputError, match="3 sizes -- at least 4"):
        fit_fetches(timed("disk", 1e-5, 2e9, SIZES[:3]))
    same = timed("disk", 1e-3, 1e30)
    for fetch in same:
        fetch.timing.seconds = 1 / fetch.bytes
    with pytest.raises(InputError, match="take no longer for more bytes"):
        fit_fetches(same)


def test_the_written_tier_prices_a_fetch_as_fitted(tmp_path):
    cluster = machine(tmp_path, ("pages", "page cache"))
    assert list(cluster.node.memories) == ["pages", "page_cache"]
    for home in cluster.node.memories:
        found = price(Copy(bytes=np.array([3e6]), source=home, target="host"), cluster)
        assert found.seconds == pytest.approx([1e-5 + 3e6 / 2e9], rel=1e-3)
        assert found.evidence == "fitted"
        assert cluster.path(home, "host")[0].copy_cost().held_out.rows == len(SIZES) // 2


@pytest.mark.parametrize("factor", [0.8, 3.0, 11.0])
def test_the_rate_of_the_cache_is_the_one_that_made_the_times(tmp_path, factor):
    device = machine(tmp_path).device
    memory = device.memory.bandwidth
    parts = {"cache": Figure[float].model_construct(value=2**25, evidence="assumed", source="")}
    near = device.processor.model_copy(update={**parts, "cache_bandwidth": memory.times(factor)})
    uses = []
    for hidden, width in calibrate_tier.SHAPES:
        use = NearUse(hidden=hidden, width=width, seconds=0.0, floor=0.01)
        took = float(price_compute(calibrate_tier._near(use), near, memory).seconds[0])
        uses.append(replace(use, seconds=took))
    known = device.model_copy(
        update={"processors": {"cpu": device.processor.model_copy(update=parts)}}
    )
    rate, held_out = calibrate_tier.fit_cache(known, uses)
    assert rate == pytest.approx(factor * memory.value, rel=0.02)
    assert held_out.median < 0.02
    assert held_out.rows == len(uses) // 2


def test_only_what_fits_and_was_copied_is_read_from_the_cache(tmp_path):
    device = machine(tmp_path).device
    memory, own = device.memory.bandwidth, device.processor
    size = Figure[float].model_construct(value=4e6, evidence="assumed", source="")
    near = own.model_copy(update={"cache": size, "cache_bandwidth": memory.times(4)})
    cost, _ = own.kernel("grouped_gemm", "fp32")
    for hidden, cached, faster in ((512, True, 4), (512, False, 1), (1024, True, 1)):
        op = calibrate_tier._near(NearUse(hidden=hidden, width=512, seconds=1.0, floor=0.0))
        op = replace(op, cached=cached)
        read = op.bytes_moved() / (cost.memory_efficiency * memory.value * faster)
        assert price_compute(op, near, memory).seconds == pytest.approx(cost.launch + read)
        assert price_compute(op, own, memory).seconds == pytest.approx(cost.launch + read * faster)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: .*must be a folder that can be written"):
        calibrate_tier.calibrate_tier(tmp_path / "nowhere", "host", sizes=SIZES[:4])


def test_without_torch_the_extra_is_named(monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "kernels_ref"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"pip install 'moeplan\[torch\]'"):
        import_kernels()


def test_a_real_run_does_in_every_access_what_was_simulated(model, trace, tmp_path):
    told = []
    report = validate_offload.validate_offload(question(model, trace, tmp_path), told.append)
    assert len(report.rows) == 2 * 2 * 3 * 2  # homes, batches, sizes, policies
    assert len({row.label for row in report.rows}) == len(report.rows)
    assert report.accesses == len(report.rows) * (4 + 3) * LAYERS
    assert report.differences == 0
    for row in report.rows:
        hits = row.kernels["experts"]
        assert row.kernels[LOOKUP][0] > 0
        assert row.kernels[LOOKUP][1] > 0
        assert (hits[0] > 0) == (row.hit_rate > 0)
        assert (row.kernels.get("fetched expert", (0, 0))[1] > 0) == (row.hit_rate < 1)
        total = sum(seconds for seconds, _ in row.kernels.values())
        assert row.predicted_s == pytest.approx(total)
    assert not list(tmp_path.iterdir())
    assert any("round 5 of 5" in text for text in told)
    json.dumps(report.to_dict())


@pytest.mark.parametrize("home", ["pages", "disk"])
def test_copies_and_kernels_take_turns(model, trace, tmp_path, home):
    q = question(model, trace, tmp_path, cluster=machine(tmp_path))
    result = simulated(q, OffloadCase(home=home, slots=3, score="lru", batch=3))
    assert result.step_times == pytest.approx(result.played.busy.sum(axis=(1, 2)))
    fetches = result.decisions.fetched.sum()
    each = 1e-5 + model.bytes_per_expert / 2e9
    names = np.array([item.name for item in result.played.items])
    assert result.played.busy[:, names == "fetch"].sum() == pytest.approx(fetches * each, rel=1e-3)


def log_of(played):
    """Write the log that a correct run leaves."""
    after = np.concatenate([played.resident[1:], played.final[None]])
    log = []
    for step, layer in np.ndindex(*played.active.shape[:2]):
        at = step, layer
        gone = (played.resident[at] | played.active[at]) & ~after[at]
        log.append(
            Access(
                step=step,
                layer=layer,
                hits=tuple(np.flatnonzero(played.hit[at])),
                misses=tuple(np.flatnonzero(played.miss[at])),
                evicted=tuple((layer, e) for e in np.flatnonzero(gone)),
            )
        )
    return log


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**20), slots=st.integers(1, 5), score=st.sampled_from(["lru", "lfu"]))
def test_every_tampered_access_is_found(seed, slots, score):
    random = np.random.default_rng(seed)
    played = replay(random.random((5, 2, 6)) < 0.5, slots=slots, score=score)
    log = log_of(played)
    assert differences(log, played) == set()
    place = int(random.integers(len(log)))
    access = log[place]
    at = {(access.step, access.layer)}
    assert differences([*log[:place], *log[place + 1 :]], played) == at
    for change in ({"hits": (99,)}, {"misses": (99,)}, {"evicted": ((access.layer, 99),)}):
        log[place] = replace(access, **change)
        assert differences(log, played) == at


def test_a_policy_that_is_not_the_simulated_one_is_found(model, trace, tmp_path):
    q = question(model, trace, tmp_path)
    case = OffloadCase(home="pages", slots=3, score="lfu", batch=1)
    active = sequence_of(q, 1).active
    other = replay(active, slots=3, score="lru")
    ran = validate_offload.Measured(
        samples=np.full((5, 3), 1.0), kernel_s={}, logs=[log_of(other)] * 5
    )
    row = validate_offload.compare(q, case, simulated(q, case), ran, 1e-5)
    assert 0 < row.differences <= row.accesses
    assert OffloadReport(rows=(row,), bound=0.15).verdict == "off"
    own = replace_log(ran, log_of(replay(active, slots=3, score="lfu")))
    assert validate_offload.compare(q, case, simulated(q, case), own, 1e-5).differences == 0


def replace_log(ran, log):
    return ran._replace(logs=[log] * len(ran.logs))


def row(error, floor=0.01, differing=0):
    return OffloadRow(
        label="a",
        predicted_s=1 + error,
        measured_s=1.0,
        floor=floor,
        bound=0.15,
        home="pages",
        slots=2,
        score="lru",
        batch=1,
        hit_rate=0.5,
        accesses=4,
        differences=differing,
        kernels={},
    )


@pytest.mark.parametrize(
    ("rows", "verdict"),
    [
        ([row(0.1), row(-0.14), row(0.3)], "ok"),
        ([row(0.1), row(-0.2), row(0.3)], "off"),
        ([row(0.0, floor=0.06)], "undecidable"),
        ([row(0.0), row(0.0, differing=1)], "off"),
    ],
)
def test_the_verdict(rows, verdict):
    report = OffloadReport(rows=tuple(rows), bound=0.15)
    assert report.verdict == verdict
    stream = io.StringIO()
    show_offload(Console(file=stream, width=160), report)
    text = stream.getvalue()
    assert f"{report.accesses} accesses" in text
    assert f"{report.differences} differ" in text
    assert text.count("│ pages") == len(rows)  # undecidable ones too
    assert text.rstrip().endswith(verdict)


def test_bad_questions_are_refused(model, trace, tmp_path):
    q = question(model, trace, tmp_path)
    bare = q.cluster.model_copy(update={"node": q.cluster.node.model_copy(update={"memories": {}})})
    with pytest.raises(InputError, match="none of the memories pages, disk, page_cache"):
        cases_of(replace(q, cluster=bare))
    for change, said in (
        ({"rounds": 4}, "rounds 4 -- at least 5"),
        ({"warmup": 1}, "warmup 1 -- at least 2"),
        ({"steps": 0}, "steps 0 -- at least 1"),
    ):
        with pytest.raises(InputError, match=said):
            validate_offload.validate_offload(replace(q, **change))
    wide = load_cluster("hgx-h100-8")
    with pytest.raises(InputError, match="8 ranks -- experts behind a cache run on one"):
        validate_offload.validate_offload(replace(q, cluster=wide))
    mixed = model.model_copy(update={"kv_dtype": "bf16"})
    with pytest.raises(InputError, match="all of them fp32 or all bf16"):
        validate_offload.validate_offload(replace(q, model=mixed))


def test_a_folder_of_another_tier_is_refused(model, trace, tmp_path, monkeypatch):
    q = question(model, trace, tmp_path, cluster=machine(tmp_path, ("pages", "disk")))
    monkeypatch.setattr("kernels_ref.expert_file._bypasses_cache", lambda *_: False)
    with pytest.raises(InputError, match="read from tier page_cache, the cluster has disk"):
        validate_offload.validate_offload(q)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match="1 kB free -- the experts take"):
        validate_offload.validate_offload(q)


def test_slots_follow_the_shares(model, trace, tmp_path):
    q = question(model, trace, tmp_path, shares=(0.01, 0.25, 1.0))
    assert sorted({case.slots for case in cases_of(q)}) == [1, 2, 8]
