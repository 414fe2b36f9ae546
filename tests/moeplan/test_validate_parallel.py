"""Comparing placements: the steps that run are those predicted, and pairs are judged by the rule.

Processes are replaced by arithmetic, but for one run of a tiny model, of which no time is asserted.
"""

import json
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from basis.errors import InputError
from hwmodels.cluster import load_cluster
from moeplan.validate_parallel import (
    ParallelFound,
    ParallelRow,
    predict_parallel,
    validate_parallel,
)
from moeplan.validate_parallel_cases import (
    LOADS,
    PLACEMENTS,
    ParallelCase,
    hot_together,
    make_parallel_cases,
    neighbours_trace,
)
from moeplan.validate_parallel_view import order_conclusion, show_parallel
from simulator.batches import compose
from simulator.deployment import Deployment, Workload
from simulator.simulate import simulate
from traces.model_spec import ModelSpec

EXPERTS, TOP_K, LAYERS = 8, 2, 2
MODEL = ModelSpec.model_validate({
    "name": "tiny",
    "family": "test",
    "num_layers": LAYERS,
    "hidden_size": 64,
    "vocab_size": 32,
    "tie_embeddings": False,
    "moe_layer_ids": (0, 1),
    "num_experts": EXPERTS,
    "top_k": TOP_K,
    "expert_width": 64,
    "attention": {
        "kind": "gqa", "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "v_head_dim": 8,
    },
    "weight_dtype": "fp32",
    "expert_dtype": "fp32",
    "activation_dtype": "fp32",
    "kv_dtype": "fp32",
    "comm_size": 64,
})  # fmt: skip
COST = {"launch": "1 us", "compute_efficiency": 0.5, "memory_efficiency": 0.5}
KERNELS = (
    "gemm", "grouped_gemm", "attention_decode", "attention_prefill", "route", "permute", "stream",
)  # fmt: skip
DEVICE = {
    "name": "small",
    "title": "made up",
    "memories": {"host": {"kind": "DRAM", "capacity": "8 GiB", "bandwidth": "30 GB/s"}},
    "processors": {
        "cpu": {
            "memory": "host",
            "compute_units": 1,
            "flops": {"fp32": "1 GFLOP/s", "bf16": "1 GFLOP/s"},
            "kernels": {name: {"bf16": COST} for name in KERNELS},
        }
    },
}
CLUSTER = {
    "name": "small",
    "device": "device.yaml",
    "node": {
        "devices": 2,
        "interconnect": {"standard": "other", "direction": "one-way", "bandwidth": "2 GB/s"},
    },
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("machine")
    Path(folder / "device.yaml").write_text(yaml.safe_dump(DEVICE))
    Path(folder / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER))
    return load_cluster(folder / "cluster.yaml")


@pytest.fixture(scope="module")
def trace():
    return neighbours_trace(MODEL, seed=5)


def row(placement, predicted, measured, floor=0.01, load="trace", batch=64):
    return ParallelRow(
        label=placement, predicted_s=predicted, measured_s=measured, floor=floor,
        load=load, batch=batch, placement=placement,
    )  # fmt: skip


def found(*rows):
    return ParallelFound(ranks=2, rounds=7, bound=0.1, rows=rows, planned_as={"trace": "eplb"})


@pytest.mark.parametrize(
    ("second", "floor", "answer", "verdict"),
    [
        ((1.2, 1.3), 0.01, "a", "ok"),
        ((1.2, 0.9), 0.01, "a", "off"),
        ((0.8, 0.7), 0.01, "b", "ok"),
        ((1.02, 3.0), 0.01, "equal", "equal"),  # 2 % against three times 1 %
        ((1.12, 1.3), 0.04, "equal", "equal"),  # 11.3 % against three times 4 %
        ((2.0, 2.0), 0.06, "a", "undecidable"),  # the measurement is too noisy for any claim
        ((1.0, 1.0), 0.06, "equal", "undecidable"),
    ],
)
def test_a_pair_is_judged_by_gap_and_spread(second, floor, answer, verdict):
    (pair,) = found(row("a", 1.0, 1.0), row("b", *second, floor=floor)).pairs
    assert (pair.answer, pair.verdict) == (answer, verdict)
    assert pair.decided == (verdict in ("ok", "off"))
    assert pair.predicted_gap == pytest.approx((second[0] - 1) / ((second[0] + 1) / 2))


def test_only_placements_on_the_same_steps_are_paired():
    rows = [row(n, 1, 1, load=load, batch=b) for load in "xy" for b in (1, 2) for n in "abc"]
    pairs = found(*rows).pairs
    assert len(pairs) == 4 * 3
    for pair in pairs:
        assert (pair.first.load, pair.first.batch) == (pair.second.load, pair.second.batch)


def test_one_wrong_order_fails_and_none_decided_is_not_passed():
    right = [row("a", 1.0, 1.0), row("b", 1.2, 1.3)]
    assert found(*right).order == "ok"
    assert found(*right, row("c", 1.4, 0.9)).order == "off"
    equal = found(row("a", 1.0, 1.0), row("b", 1.01, 1.3))
    assert equal.order == "undecidable"
    assert "Undecidable order of placements: 0 of 0" in order_conclusion(equal)


def test_hot_experts_are_put_together():
    rng = np.random.default_rng(1)
    loads = rng.integers(100, size=(3, 6))
    slots = hot_together(loads, 2).slots
    for layer in range(3):
        first = sorted(loads[layer][expert] for expert in slots[layer, :3])
        assert first == sorted(loads[layer])[3:]


def test_drawn_experts_are_distinct_and_low_ids_hot(trace):
    ids = np.sort(trace.experts, axis=2)
    assert (ids[..., 1:] > ids[..., :-1]).all()
    low = (trace.experts < EXPERTS // 2).mean()
    assert 0.55 < low < 0.95


def test_prediction_is_the_simulator_s(cluster, trace):
    """With the simulator's own contexts the two are one path."""
    deployment = Deployment.of(hot_together(np.arange(16).reshape(2, 8), 2))
    composition = compose(trace, Workload(decode_batch=12), 2, steps=3, seed=4)
    case = ParallelCase(load=LOADS[1], batch=12, trace=trace, composition=composition)
    whole = simulate(MODEL, trace, cluster, deployment, Workload(decode_batch=12), steps=3, seed=4)
    predicted = predict_parallel(MODEL, cluster, case, deployment)
    assert predicted == pytest.approx(whole.step_times, rel=1e-12)


def fake_processes(monkeypatch, seconds):
    """Replace the processes; returns what they were given."""
    given = {}

    def fake(model, placed, lengths, *, threads, rounds, seed, crowded):
        given.update(placed=placed, lengths=lengths)
        shake = np.array([0.98, 1.02, 0.98, 1.02, 1.0])[:, None]  # a floor of 2 %
        assert rounds == len(shake)
        return tuple(shake * seconds(p) for p in placed)

    monkeypatch.setattr("kernels_ref.parallel_steps.time_parallel_steps", fake)
    return given


def work(placed):
    """What a step costs if nothing but the busier rank's (token, expert) pairs counts."""
    per_rank = placed.slot_map_LS.shape[1] // 2
    pairs = [np.concatenate([ids.reshape(LAYERS, -1) for ids in s], axis=1) for s in placed.steps]
    first = [(each < per_rank).sum(axis=1) for each in pairs]
    total = pairs[0].shape[1]
    return [np.maximum(f, total - f).sum() * 1e-4 for f in first]


def run(cluster, trace, **more):
    return validate_parallel(
        MODEL, trace, cluster, batches=(48,), windows=3, rounds=5, crowded=True, seed=2, **more
    )


def test_the_steps_that_run_are_those_of_the_trace(monkeypatch, cluster, trace):
    given = fake_processes(monkeypatch, work)
    run(cluster, trace, loads=("trace",))
    cases = make_parallel_cases(
        MODEL, cluster, trace, batches=(48,), loads=("trace",), windows=3, seed=2
    )
    (case,) = cases.cases
    assert len(given["placed"]) == len(PLACEMENTS)
    assert given["lengths"] == [(each - 1).tolist() for each in cases.contexts]
    for placed, deployment in zip(
        given["placed"], cases.deployments["trace"].values(), strict=True
    ):
        assert placed.slot_map_LS.tolist() == [*map(list, deployment.physical_to_logical_map)]
        for step, batch in zip(placed.steps, case.composition.batches, strict=True):
            for rank, slots in enumerate(step):
                rows = batch.rows[batch.home == rank]
                assert slots.shape == (LAYERS, len(rows), TOP_K)
                for layer in range(LAYERS):
                    experts = placed.slot_map_LS[layer][slots[layer]]
                    assert np.array_equal(experts, case.trace.experts[rows, layer])
                assert batch.context[batch.home == rank].tolist() == [
                    length + 1 for length in given["lengths"][rank][: len(rows)]
                ]


def test_a_machine_that_follows_the_work_confirms_the_order(monkeypatch, cluster, trace):
    fake_processes(monkeypatch, work)
    said = run(cluster, trace)
    assert len(said.rows) == 2 * len(PLACEMENTS)
    assert said.order == "ok"
    assert said.count("off") == 0
    assert all(each.floor == pytest.approx(0.02) for each in said.rows)
    decided = {(p.first.placement, p.second.placement) for p in said.pairs if p.decided}
    assert ("contiguous", "planned") in decided


def test_a_machine_that_does_the_reverse_is_found(monkeypatch, cluster, trace):
    fake_processes(monkeypatch, lambda placed: [1e-3 / each for each in work(placed)])
    said = run(cluster, trace)
    assert said.order == "off"
    screen = Console(width=160, file=StringIO())
    show_parallel(screen, said)
    text = screen.file.getvalue()
    assert "Failed order of placements: 0 of" in text
    assert "contiguous / planned" in text
    told = json.loads(json.dumps(said.to_dict()))
    assert told["order"] == "off"
    assert len(told["pairs"]) == 2 * 6
    assert len(told["steps"]) == 2 * 4


def test_it_runs_for_real(cluster, trace):
    said = validate_parallel(
        MODEL, trace, cluster, batches=(3,), loads=("trace",), windows=1, rounds=5, crowded=True
    )
    assert [each.placement for each in said.rows] == list(PLACEMENTS)
    assert all(each.measured_s > 0 and each.predicted_s > 0 for each in said.rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": (1,)}, "a token for every rank"),
        ({"loads": ()}, "0 loads"),
        ({"loads": ("evening",)}, "load 'evening' -- one of trace, power law"),
        ({"threads": 4096}, "2 processes of 4096 thread.*give fewer ranks or threads"),
    ],
)
def test_questions_without_an_answer_are_refused(cluster, trace, change, message):
    with pytest.raises(InputError, match=message):
        validate_parallel(MODEL, trace, cluster, **{"crowded": "threads" not in change} | change)


def test_one_rank_and_other_formats_are_refused(cluster, trace):
    one = cluster.model_copy(update={"gpus": 1})
    with pytest.raises(InputError, match="expert parallel on 1 rank -- at least 2"):
        validate_parallel(MODEL, trace, one)
    narrow = MODEL.model_copy(update={"weight_dtype": "bf16"})
    with pytest.raises(InputError, match="bf16, fp32 -- processes run fp32"):
        validate_parallel(narrow, trace, cluster, crowded=True)
