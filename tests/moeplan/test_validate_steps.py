"""Steps validated on one process: cases, prediction, measurement, and what they say together.

Real runs are of a model of two layers. No time is asserted: where errors matter, the measurement
is made from a prediction.
"""

import io
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

import kernels_ref
from basis.errors import InputError
from hwmodels.cluster import Cluster, load_cluster
from hwmodels.ops import Stage
from kernels_ref import StepSeconds
from moeplan.reference import import_kernels
from moeplan.validate_blame import suspects
from moeplan.validate_cases import Case, Cases, Window, make_cases
from moeplan.validate_charts import draw_steps
from moeplan.validate_predict import Predicted, predict_steps, with_limit
from moeplan.validate_result import StepsFound, compare_steps, validate_steps
from moeplan.validate_steps import DecoderRun, Measured, measure_steps, time_cases
from moeplan.validate_view import show_steps
from traces.model_spec import ModelSpec, load_model
from traces.routing_trace import RoutingTrace, TraceMeta, read_trace

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LAYERS, EXPERTS, TOP_K = 2, 8, 2


def tiny(**changes: Any) -> ModelSpec:
    """Return two MoE layers and a dense one."""
    fields: dict[str, Any] = {
        "name": "tiny",
        "family": "test",
        "num_layers": 3,
        "hidden_size": 16,
        "vocab_size": 29,
        "tie_embeddings": False,
        "moe_layer_ids": (1, 2),
        "num_experts": EXPERTS,
        "top_k": TOP_K,
        "expert_width": 12,
        "shared_expert_width": 4,
        "dense_width": 10,
        "attention": {
            "kind": "gqa",
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 8,
            "v_head_dim": 8,
        },
        "weight_dtype": "fp32",
        "expert_dtype": "fp32",
        "activation_dtype": "fp32",
        "kv_dtype": "fp32",
        "comm_size": 16,
    }
    return ModelSpec.model_validate(fields | changes)


def recorded(*, requests: int = 12, length: int = 20, decode: bool = True) -> RoutingTrace:
    """Return requests of which the earlier half uses experts 0..3 and the later half 4..7."""
    rng = np.random.default_rng(5)
    tokens = requests * length
    request = np.repeat(np.arange(requests), length)
    position = np.tile(np.arange(length), requests)
    ids = np.argsort(rng.random((tokens, LAYERS, EXPERTS // 2)), axis=-1)[..., :TOP_K]
    late = request >= requests // 2
    return RoutingTrace(
        meta=TraceMeta(model="tiny", num_experts=EXPERTS, top_k=TOP_K, moe_layer_ids=(1, 2)),
        request_id=request.astype(np.int32),
        position=position.astype(np.int32),
        decode=(position >= 4) & decode,
        step=position.astype(np.int32),
        domain=np.zeros(tokens, dtype=np.int16),
        domains=("test",),
        experts=(ids + 4 * late[:, None, None]).astype(np.uint16),
    )


def few_cases(**options: Any) -> Cases:
    asked: dict[str, Any] = {"batches": (1, 6), "prompts": (9,), "context": 16} | options
    return make_cases(tiny(), recorded(), **asked)


@pytest.fixture
def machine(tmp_path: Path) -> Cluster:
    """Return one rank whose kernels are rooflines that reach the peaks."""
    cost = {"compute_efficiency": 1.0, "memory_efficiency": 1.0, "source": "made up"}
    names = ("gemm", "grouped_gemm", "attention_decode", "attention_prefill", "route")
    kernels = {name: {"bf16": cost | {"launch": "20 us"}} for name in (*names, "permute", "stream")}
    device = {
        "name": "made-up",
        "memories": {"host": {"kind": "DRAM", "capacity": "20 GiB", "bandwidth": "30 GB/s"}},
        "processors": {
            "cpu": {
                "memory": "host",
                "flops": {"fp32": "100 GFLOP/s", "bf16": "100 GFLOP/s"},
                "kernels": kernels,
            }
        },
    }
    (tmp_path / "device.yaml").write_text(yaml.safe_dump(device))
    cluster = {"name": "made-up", "device": "device.yaml", "node": {"devices": 1}}
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(cluster))
    return load_cluster(tmp_path / "cluster.yaml")


def as_measured(
    predicted: Sequence[Predicted], *, noise: float = 0.0, lap_cost: float = 0.02
) -> tuple[Measured, ...]:
    """Pretend that predictions were measured, with rounds that spread evenly by ``noise``."""
    rounds = 1 + noise * np.linspace(-1, 1, 5)[:, None]
    return tuple(
        Measured(
            total_s=rounds * p.total_s,
            lapped_s=rounds * p.total_s * (1 + lap_cost),
            stage_s={name: rounds * s for name, s in p.stage_s.items()},
            kernel_s={name: rounds * s for name, s in p.kernel_s.items()},
        )
        for p in predicted
    )


# --- cases ---


def test_every_case_has_its_tokens_and_distinct_experts() -> None:
    cases = few_cases()
    assert [case.label for case in cases.all] == [
        "decode 1, balanced",
        "decode 1, trace",
        "decode 1, power law 1.2",
        "decode 6, balanced",
        "decode 6, trace",
        "decode 6, power law 1.2",
        "prefill 9, trace",
    ]
    rows = np.concatenate([w.batch.rows for case in cases.all for w in case.windows])
    assert rows.tolist() == list(range(cases.trace.num_tokens))  # no two windows share a row
    for case in cases.all:
        assert len(case.windows) >= 2
        for window in case.windows:
            ids = cases.experts(window)
            assert ids.shape == (LAYERS, case.tokens, TOP_K)
            assert 0 <= ids.min() <= ids.max() < EXPERTS
            assert all(len(set(choice)) == TOP_K for choice in ids.reshape(-1, TOP_K).tolist())


def test_the_trace_load_is_of_later_requests_only() -> None:
    for case in few_cases().all:
        if case.load == "trace":
            assert all(few_cases().experts(w).min() >= EXPERTS // 2 for w in case.windows)


def test_a_prompt_is_consecutive_tokens_and_windows_differ() -> None:
    trace, cases = recorded(), few_cases()
    late = trace.experts[trace.request_id >= 6]
    first, second = cases.all[-1].windows
    assert (cases.experts(first).swapaxes(0, 1) == late[:9]).all()
    assert (cases.experts(second).swapaxes(0, 1) == late[9:18]).all()
    assert first.batch.context.tolist() == list(range(1, 10))
    assert first.batch.last.tolist() == [False] * 8 + [True]


@pytest.mark.parametrize("tokens", [1, 4, 8, 21])
def test_balanced_loads_differ_by_at_most_one_turn(tokens: int) -> None:
    cases = few_cases(batches=(tokens,), loads=("balanced",), prompts=())
    for window in cases.all[0].windows:
        for ids in cases.experts(window):
            counts = np.bincount(ids.ravel(), minlength=EXPERTS)
            assert counts.max() - counts.min() <= 1
            assert counts.sum() == tokens * TOP_K


def test_power_law_popularity_falls_as_rank_to_the_power() -> None:
    cases = few_cases(batches=(4000,), loads=("power law 1.2",), prompts=(), windows=1)
    ids = cases.experts(cases.all[0].windows[0])
    weights = np.arange(1, EXPERTS + 1) ** -1.2
    weights /= weights.sum()
    # two draws without replacement: P(i) = w_i + sum over j != i of w_j w_i / (1 - w_j)
    chance = [
        w + sum(weights[j] * w / (1 - weights[j]) for j in range(EXPERTS) if j != i)
        for i, w in enumerate(weights)
    ]
    for layer in ids:
        share = np.sort(np.bincount(layer.ravel(), minlength=EXPERTS))[::-1] / 4000
        assert share == pytest.approx(chance, abs=0.03)


def test_contexts_are_the_traces_and_within_the_limit() -> None:
    cases = few_cases(batches=(64,), prompts=(), context=12)
    # decode rows of the trace stand at positions 4 to 19: with themselves 5 to 20 keys
    assert cases.contexts.min() == 5
    assert cases.contexts.max() == 12
    for case in cases.all:
        for window in case.windows:
            assert len(set(window.requests.tolist())) == case.tokens
            assert (window.batch.context == cases.contexts[window.requests]).all()


def test_a_trace_without_decode_rows_lends_the_others() -> None:
    cases = make_cases(tiny(), recorded(decode=False), batches=(3,), prompts=(), context=16)
    assert len(cases.all) == 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batches": (0,)}, "batch 0 -- at least 1"),
        ({"prompts": (-3,)}, "prompt -3 -- at least 1"),
        ({"windows": 0}, "windows 0 -- at least 1"),
        ({"loads": ("zipf",)}, "load 'zipf' -- one of balanced, trace, power law 1.2"),
        ({"batches": (), "prompts": ()}, "no steps to validate"),
        ({"prompts": (500,)}, "prefill of 500 tokens -- the later half of the trace has 120"),
    ],
)
def test_bad_questions_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        few_cases(**options)


# --- prediction ---


def test_stages_and_kernels_sum_to_the_step(machine: Cluster) -> None:
    cases = few_cases()
    for case, found in zip(cases.all, predict_steps(tiny(), machine, cases), strict=True):
        assert found.total_s.shape == (len(case.windows),)
        for parts in (found.stage_s, found.kernel_s):
            assert sum(parts.values()) == pytest.approx(found.total_s)
        for name, seconds in found.kernel_s.items():
            assert sum(found.limit_s[name].values()) == pytest.approx(seconds)


def test_a_step_without_bytes_and_flops_is_its_launches(machine: Cluster) -> None:
    fast = with_limit(with_limit(machine, "bandwidth", 1e9), "FLOP/s", 1e9)
    found = predict_steps(tiny(), fast, few_cases())
    # attention: norm, qkv, rope, scores, o; MoE: norm, router, shared experts (three), permute,
    # experts, unpermute; dense: norm and three; embedding, final norm and head
    kernels = 3 * 5 + 2 * 8 + 4 + 3
    for each in found:
        assert each.total_s == pytest.approx(kernels * 20e-6, rel=1e-3)
        assert all(limits["fixed time"].all() for limits in each.limit_s.values())


def test_prediction_depends_on_contexts_and_experts_of_the_window(machine: Cluster) -> None:
    cases = few_cases(batches=(6,), prompts=(), loads=("balanced",))
    (case,) = cases.all
    window = case.windows[0]
    same = cases.trace.experts.copy()
    same[window.batch.rows] = [[0, 1], [0, 1]]  # two experts do all the work
    one = replace(cases, trace=replace(cases.trace, experts=same))
    longer = replace(window.batch, context=window.batch.context + 100)
    two = replace(cases, all=(replace(case, windows=(replace(window, batch=longer),)),))
    base, few, long = (predict_steps(tiny(), machine, c)[0].kernel_s for c in (cases, one, two))
    spread = len(np.unique(cases.experts(window)[0]))
    assert spread == EXPERTS
    per_expert = 3 * 16 * 12 * 4 / 30e9  # bytes of its three matrices over the bandwidth
    saved = base["experts"][0] - few["experts"][0]
    assert saved == pytest.approx(LAYERS * (EXPERTS - 2) * per_expert)
    keys = 6 * 100 * 3 * (2 * 16) * 4 / 30e9  # tokens, more keys, layers, kv elements, bytes
    assert long["attention"][0] - base["attention"][0] == pytest.approx(keys)


def test_more_ranks_are_refused(machine: Cluster) -> None:
    two = machine.model_copy(update={"nodes": 2})
    with pytest.raises(InputError, match=r"2 ranks -- these steps run on one"):
        predict_steps(tiny(), two, few_cases())


# --- measurement ---


def lap(total: float) -> StepSeconds:
    half = {Stage.EXPERTS: total / 2, Stage.HEAD: total / 2}
    return StepSeconds(
        total_s=total, stage_s=half, kernel_s={"experts": total / 2, "lm head": total / 2}
    )


def test_rounds_are_interleaved_and_each_window_counts_once() -> None:
    cases = few_cases().all
    calls: list[tuple[str, int, bool]] = []

    def run(case: Case, window: Window, laps: bool) -> StepSeconds:
        calls.append((case.label, case.windows.index(window), laps))
        return lap(float(case.tokens + 100 * case.windows.index(window)))

    found = time_cases(cases, run, rounds=5, lap_rounds=6, seed=3)
    for case, taken in zip(cases, found, strict=True):
        expected = [case.tokens + 100.0 * w for w in range(len(case.windows))]
        assert taken.total_s.tolist() == [expected] * 5
        assert taken.lapped_s.tolist() == [expected] * 6
        assert (2 * taken.stage_s["experts"] == taken.lapped_s).all()
        assert (2 * taken.kernel_s["lm head"] == taken.lapped_s).all()
        assert taken.lap_cost == 0
    per_round = sum(len(case.windows) + 1 for case in cases)
    assert len(calls) == len(cases) + 11 * per_round
    rest = calls[len(cases) :]
    rounds = [rest[at : at + per_round] for at in range(0, len(rest), per_round)]
    orders = [list(dict.fromkeys(label for label, _, _ in each)) for each in rounds]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert len({tuple(order) for order in orders}) > 5
    kinds = [{laps for _, _, laps in each} for each in rounds]
    assert (kinds.count({False}), kinds.count({True})) == (5, 6)


def test_too_few_rounds_are_refused() -> None:
    with pytest.raises(InputError, match="4 rounds and 5 with laps -- at least 5 each"):
        time_cases(few_cases().all, lambda *_: lap(1.0), rounds=4)


def test_the_real_run_is_forced_to_the_cases_experts_at_their_contexts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cases, seen = few_cases(), []
    for name in ("decode", "prefill"):
        inner = getattr(kernels_ref.Decoder, name)

        def spied(self: Any, tokens: Any, requests: Any, slots: Any, inner: Any = inner) -> Any:
            seen.append((slots, [self.lengths[request] for request in requests]))
            return inner(self, tokens, requests, slots)

        monkeypatch.setattr(kernels_ref.Decoder, name, spied)
    run = DecoderRun(tiny(), cases, device="cpu", seed=0)
    for _ in range(2):  # a step leaves the caches as they were
        for case in cases.all:
            for window in case.windows:
                run(case, window, False)
                slots, past = seen[-1]
                assert (slots == cases.experts(window)).all()
                keys = window.batch.context if case.phase == "decode" else window.batch.context[:1]
                assert past == (keys - 1).tolist()


def test_laps_of_a_real_step_have_the_names_of_its_prediction(machine: Cluster) -> None:
    cases, model = few_cases(), tiny()
    taken = measure_steps(model, cases, threads=1, rounds=5, lap_rounds=5)
    predicted = predict_steps(model, machine, cases)
    for case, real, ours in zip(cases.all, taken, predicted, strict=True):
        assert real.total_s.shape == real.lapped_s.shape == (5, len(case.windows))
        assert real.kernel_s.keys() == ours.kernel_s.keys()
        assert real.stage_s.keys() == ours.stage_s.keys()
        assert (sum(real.kernel_s.values()) <= real.lapped_s).all()
        assert sum(real.stage_s.values()) == pytest.approx(sum(real.kernel_s.values()))


def test_other_geometries_and_formats_are_refused() -> None:
    mixed = tiny(weight_dtype="bf16")
    with pytest.raises(InputError, match="numbers in bf16, fp32 -- the decoder runs one of"):
        DecoderRun(mixed, few_cases(), device="cpu", seed=0)
    biased = tiny(router_bias=True)
    with pytest.raises(InputError, match="a router bias"):
        DecoderRun(biased, few_cases(), device="cpu", seed=0)


def test_without_torch_one_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "kernels_ref"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"pip install 'moeplan\[torch\]'"):
        import_kernels()


# --- what they say together ---


def compared(machine: Cluster, real: Cluster, **options: Any) -> StepsFound:
    cases = few_cases()
    taken = as_measured(predict_steps(tiny(), real, cases), **options)
    blamed = suspects(tiny(), machine, cases, taken)
    return compare_steps(cases.all, predict_steps(tiny(), machine, cases), taken, blamed)


def test_a_right_prediction_passes(machine: Cluster) -> None:
    found = compared(machine, machine, noise=0.02)
    assert found.passed
    assert [row.verdict for row in found.steps] == ["ok"] * 7
    assert found.summary.worst == pytest.approx(0, abs=1e-9)
    assert found.lap_cost == pytest.approx(0.02)
    assert [each.label for each in found.by_batch] == ["decode 1", "decode 6", "prefill 9"]
    assert [each.label for each in found.by_load] == ["balanced", "trace", "power law 1.2"]
    assert len(found.kernels) == 7 * len(found.by_kernel)
    assert found.suspects[0].wrong == pytest.approx(0, abs=1e-9)


def test_a_noisy_measurement_is_undecidable_and_fails(machine: Cluster) -> None:
    found = compared(machine, machine, noise=0.2)
    assert not found.passed
    assert {row.verdict for row in found.steps} == {"undecidable"}
    assert found.suspects == ()
    assert "Not passed." in shown(found)


def test_the_kernel_that_is_wrong_is_pointed_at(machine: Cluster) -> None:
    cases = few_cases()
    predicted = predict_steps(tiny(), machine, cases)
    slow = [
        replace(each, kernel_s=each.kernel_s | {"router": 50 * each.kernel_s["router"]})
        for each in predicted
    ]
    found = compare_steps(cases.all, predicted, as_measured(slow))
    worst = found.kernels_to_blame[0]
    assert worst.name == "router"
    assert worst.relative == pytest.approx(1 / 50 - 1)
    expected = sum(49 * float(each.kernel_s["router"].mean()) for each in predicted)
    assert worst.seconds == pytest.approx(-expected)


@pytest.mark.parametrize(
    ("limit", "better", "factor"),
    [("bandwidth", 2.0, 0.5), ("FLOP/s", 2.0, 0.5), ("fixed time", 0.1, 2.0**-3.5)],
)
def test_a_wrong_figure_of_the_machine_is_found(
    machine: Cluster, limit: Any, better: float, factor: float
) -> None:
    """Bandwidth or FLOP/s twice, fixed times ten times the truth; at the size of the example."""
    model = load_model(EXAMPLES / "data" / "mixtral-keys-12-layers.json")
    trace = read_trace(EXAMPLES / "data" / "example-moe-12x32.parquet")
    cases = make_cases(model, trace, batches=(1, 8, 64), prompts=(512,))
    taken = as_measured(predict_steps(model, machine, cases))
    wrong = with_limit(machine, limit, better)
    blamed = suspects(model, wrong, cases, taken)
    found = compare_steps(cases.all, predict_steps(model, wrong, cases), taken, blamed)
    first = found.suspects[0]
    assert first.limit == limit
    assert first.factor == pytest.approx(factor)
    assert first.named
    assert "off" in {each.verdict(0.1) for each in found.by_batch}
    assert not found.passed or limit == "FLOP/s"  # which only the larger steps answer to
    assert first.left < 0.1 * first.wrong or limit == "fixed time"
    assert f"{factor:.2g} times the value in the file" in shown(found)


def shown(found: StepsFound) -> str:
    screen = Console(file=io.StringIO(), width=200)
    show_steps(screen, found)
    text: str = screen.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_tables_json_and_pictures(machine: Cluster, tmp_path: Path) -> None:
    found = compared(with_limit(machine, "bandwidth", 1.5), machine)
    text = shown(found)
    for words in ("decode 6, power law 1.2", "rope and kv write", "experts: fixed time", "floor"):
        assert words in text
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["passed"] == found.passed
    assert data["steps"][0]["verdict"] in ("ok", "off")
    assert {row["part"] for row in data["stages"]} >= {"experts", "attention", "dense_ffn"}
    for path in draw_steps(found, tmp_path / "new"):
        assert path.stat().st_size > 1000


def test_a_step_with_other_kernels_than_predicted_is_refused(machine: Cluster) -> None:
    cases = few_cases()
    predicted = predict_steps(tiny(), machine, cases)
    odd = [replace(p, kernel_s=p.kernel_s | {"surprise": p.total_s}) for p in predicted]
    with pytest.raises(ValueError, match="surprise: only predicted or only measured"):
        compare_steps(cases.all, predicted, as_measured(odd))


def test_the_whole_way_on_a_tiny_model(machine: Cluster) -> None:
    told: list[str] = []
    found = validate_steps(tiny(), machine, few_cases(batches=(2,)), threads=1, tell=told.append)
    assert len(found.steps) == 4
    assert (found.rounds, found.lap_rounds) == (5, 5)
    assert told[0].startswith("making tiny")
    assert told[-1] == "real steps: round 10 of 10"
