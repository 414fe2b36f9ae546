"""Measured runs in our nouns, and step tables against the exact pricing of steps."""

from dataclasses import replace

import numpy as np
import pytest

from hwmodels.cluster import load_cluster
from hwmodels.silicon.served_rows import Ranks, ServedRow, clean
from moeplan.served import lengths_of, profiles
from moeplan.served_models import (
    Setup,
    _with_experts,
    cache_of,
    kept_in,
    layout_of,
    model_of,
    policy_of,
    prices_of,
)
from moeplan.served_routing import drawn_routing, in_order, shortened
from moeplan.served_steps import Steps, StepTables, grid
from simulator.layout import Layout
from simulator.serving_scheduler import ServingStep
from simulator.step_cost import ClusterStepCost
from traces.model_spec import ModelSpec
from traces.request_source import draw_requests

pytest.importorskip("aiconfigurator_core")


TP2 = Ranks(2, 1, 2, 1)


def _row(ranks: Ranks = TP2, **changed: str) -> ServedRow:
    labels = dict(
        zip(
            ("tp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size"),
            map(str, ranks),
            strict=True,
        )
    )
    base = {
        "id": "a",
        "silicon_data_source": "x; silicon_concurrency=4",
        "backend": "vllm",
        "backend_version": "1",
        "model_path": "openai/gpt-oss-120b",
        "system": "h100_sxm",
        "precision": "fp4",
        "mode": "agg",
        "isl": "1024",
        "osl": "1024",
        "silicon_ttft_ms": "40",
        "silicon_tpot_ms": "5",
    }
    return clean([base | labels | changed]).rows[0]


@pytest.mark.parametrize(
    ("family", "precision", "total", "active", "kv"),
    [
        # parameters in billions as published (embeddings included), KV bytes of a token by hand
        ("deepseek", "fp8", 671.0, 37.5, 61 * 576 * 2),
        ("kimi", "int4", 1026.4, 32.9, 61 * 576 * 2),
        ("glm", "fp8", 743.2, 41.0, 78 * 576 * 2),
        ("minimax", "fp8", 228.7, 11.0, 62 * 2 * 8 * 128 * 2),
        ("qwen3-235b", "fp8", 235.1, 22.2, 94 * 2 * 4 * 128 * 2),
        ("gpt-oss", "fp4", 116.8, 5.7, 36 * 2 * 8 * 64 * 2),
    ],
)
def test_models_have_their_published_sizes(
    family: str, precision: str, total: float, active: float, kv: int
) -> None:
    model = model_of(family, precision, "h200_sxm")
    assert model.total_params / 1e9 == pytest.approx(total, rel=1e-3)
    assert model.active_params / 1e9 == pytest.approx(active, rel=5e-3)
    assert model.kv_bytes_per_token == kv


def test_formats_follow_the_checkpoint_and_the_gpu() -> None:
    def formats(family: str, precision: str, system: str) -> tuple[str, str, str]:
        m = model_of(family, precision, system)
        return m.expert_dtype, m.weight_dtype, m.kv_dtype

    assert formats("deepseek", "fp8", "h200_sxm") == ("fp8_block", "fp8_block", "bf16")
    assert formats("deepseek", "fp4", "b200_sxm") == ("nvfp4", "bf16", "fp8")
    assert formats("kimi", "int4", "h200_sxm") == ("int4", "bf16", "bf16")
    assert formats("gpt-oss", "fp4", "h100_sxm") == ("mxfp4", "bf16", "bf16")
    assert formats("gpt-oss", "fp4", "b200_sxm") == ("mxfp4_mxfp8", "bf16", "fp8")
    assert kept_in("deepseek", "fp4")["o"] == "nvfp4"
    assert not kept_in("deepseek", "fp8")


def test_windows() -> None:
    oss = model_of("gpt-oss", "fp4", "b200_sxm").attention.windows
    assert oss.count(128) == oss.count(None) == 18
    assert set(model_of("glm", "fp8", "h200_sxm").attention.windows) == {2048}


@pytest.mark.parametrize(
    ("ranks", "fused", "exchanged", "gathered"),
    [
        (Ranks(8, 1, 8, 1), True, 1, 8),  # tensor parallel: two all-reduces
        (Ranks(8, 1, 1, 8), True, 1, 8),  # experts whole on a rank, tokens on all
        (Ranks(1, 8, 1, 8), False, 8, 1),  # attention data parallel: exchange
        (Ranks(1, 4, 4, 1), False, 1, 4),  # data parallel, experts cut: all ranks' tokens
    ],
)
def test_layouts(ranks: Ranks, fused: bool, exchanged: int, gathered: int) -> None:
    layout = Layout.of(layout_of(_row(ranks)), ranks.gpus)
    layout.check(model_of("gpt-oss", "fp4", "h100_sxm"))
    assert (layout.fused, layout.exchanged) == (fused, exchanged)
    assert fused or layout.gathered == gathered


def test_budgets_have_room_for_a_prompt_beside_all_decodes() -> None:
    row = _row(backend="trtllm", isl="8192", silicon_data_source="x; silicon_concurrency=256")
    assert policy_of(row).budget == 8512
    assert policy_of(row).budget >= row.inputs + row.concurrency
    assert policy_of(_row()).budget == 8192


def test_lengths() -> None:
    inputs, outputs = lengths_of(_row())
    assert len(inputs) == 40
    assert 819 <= inputs.min() <= inputs.max() <= 1024
    assert outputs.min() < 900
    fixed, _ = lengths_of(_row(isl="2000", osl="500"))
    assert set(fixed.tolist()) == {2000}


def test_a_short_model_stands_for_all_layers() -> None:
    for family in ("gpt-oss", "deepseek"):
        model = model_of(family, "fp4", "b200_sxm")
        short, times = shortened(model)
        moe = sum(times[n] for n in short.moe_layer_ids)
        assert moe == pytest.approx(model.num_moe_layers)
        inner = sum(times[n] for n in range(short.num_layers))
        assert inner == pytest.approx(model.num_layers)
        assert short.num_layers <= 6


def test_drawn_routing_has_the_measured_skew() -> None:
    short, _ = shortened(model_of("deepseek", "fp8", "h200_sxm"))
    experts = drawn_routing(short, 0).experts
    assert np.all(np.diff(np.sort(experts, axis=2), axis=2) > 0)  # distinct

    def touched(tokens: int) -> float:
        parts = [experts[at : at + tokens, 0] for at in range(0, 1024, tokens)]
        return float(np.mean([len(np.unique(part)) for part in parts]))

    assert touched(16) == pytest.approx(92, abs=6)  # measured loads: 92 and 191
    assert touched(64) == pytest.approx(191, abs=8)


@pytest.fixture(scope="module")
def small() -> ModelSpec:
    """Return gpt-oss with as many layers as stand for it: nothing is left out."""
    model = model_of("gpt-oss", "fp4", "h100_sxm")
    windows = (128, None)
    return model.model_copy(
        update={
            "num_layers": 2,
            "moe_layer_ids": (0, 1),
            "attention": model.attention.model_copy(update={"windows": windows}),
        }
    )


@pytest.mark.parametrize(
    "ranks", [Ranks(2, 1, 2, 1), Ranks(2, 1, 1, 2), Ranks(1, 2, 1, 2), Ranks(1, 2, 2, 1)]
)
def test_tables_agree_with_steps_priced_exactly(small: ModelSpec, ranks: Ranks) -> None:
    cluster, parallelism = load_cluster("hgx-h100-8", gpus=2), layout_of(_row(ranks))
    tables = StepTables(small, cluster, parallelism, decodes=256, prompts=2048, context=4096)
    dp, each = ranks.dp, 24
    chunk = 700  # off the grid, as the decode tokens
    exact = _exact(small, cluster, parallelism, dp, each, context=900, chunk=chunk)
    pairs = chunk * (chunk + 1) / 2
    steps = Steps(
        decodes=np.full((2, dp), float(each)),
        context=np.full((2, dp), each * 900.0),
        prompts=np.array([[0.0], [chunk]]) * np.ones(dp),
        pairs=np.array([[0.0], [pairs]]) * np.ones(dp),
        ends=np.array([[0.0], [1.0]]) * np.ones(dp),
    )
    np.testing.assert_allclose(tables.seconds(steps).sum(axis=1), exact, rtol=0.05)


def _exact(
    model: ModelSpec,
    cluster: object,
    parallelism: object,
    dp: int,
    each: int,
    context: int,
    chunk: int,
) -> np.ndarray:
    """Seconds of a decode step and of one with a prompt on every rank, by the simulator."""
    trace = drawn_routing(model, 5)
    tokens = np.arange(len(trace.position), dtype=np.int32)
    trace = replace(trace, request_id=0 * tokens, position=tokens)  # one request, walked along
    count = dp * (each + 1)
    inputs = np.full(count, context - 1)
    inputs[dp * each :] = chunk
    none = np.zeros(0, dtype=np.int64)
    cost = ClusterStepCost(
        model,
        trace,
        cluster,  # type: ignore[arg-type]
        in_order(model, parallelism),  # type: ignore[arg-type]
        draw_requests(trace, count, 0),
        inputs,
    )
    decode = np.arange(dp * each)

    def step(number: int, chunks: np.ndarray) -> ServingStep:
        return ServingStep(
            number=number,
            decode=decode,
            decode_rank=decode % dp,
            decode_context=np.full(len(decode), context),
            chunk=chunks,
            chunk_rank=chunks % dp,
            chunk_start=np.zeros_like(chunks),
            chunk_stop=np.full_like(chunks, chunk),
            chunk_ends=np.ones(len(chunks), dtype=np.bool_),
            emitting=none,
            nth=none,
            admitted=none,
            preempted=none,
            finished=none,
            kv_tokens=none,
            kv_bytes=np.zeros(dp),
            waiting=0,
        )

    prompts = dp * each + np.arange(dp)
    return np.concatenate([cost.seconds([step(0, none)]), cost.seconds([step(1, prompts)])])


def test_more_tokens_and_more_context_take_longer(small: ModelSpec) -> None:
    cluster = load_cluster("hgx-h100-8", gpus=2)
    tables = StepTables(small, cluster, layout_of(_row()), decodes=64, prompts=512, context=2048)
    n = np.arange(1, 65, dtype=np.float64)[:, None]
    zero = np.zeros_like(n)

    def total(context: float) -> np.ndarray:
        steps = Steps(decodes=n, context=n * context, prompts=zero, pairs=zero, ends=zero)
        return tables.seconds(steps).sum(axis=1)

    assert np.all(total(2000) > total(200))
    assert total(500)[-1] > total(500)[0]
    idle = Steps(decodes=zero, context=zero, prompts=zero, pairs=zero, ends=zero)
    assert np.all(tables.seconds(idle) == 0)


def test_grids_reach_their_ends() -> None:
    points = grid(1000)
    assert (points[0], points[-1]) == (1, 1000)
    assert np.all(np.diff(points) > 0)
    assert grid(1).tolist() == [1, 2]


@pytest.mark.parametrize("rate", [0.5, 2.0, 3.0])
def test_the_cluster_passed_in_decides(rate: float) -> None:
    base = load_cluster("hgx-h100-8", gpus=2)
    faster = base.scaled(rates=rate, fixed=1 / rate)
    here, there = (profiles([_row()], lambda *_, c=c: (c, ""))[0] for c in (base, faster))
    assert sum(there.parts) == pytest.approx(sum(here.parts) / rate, rel=1e-6)
    assert there.sums.kernels.tolist() == here.sums.kernels.tolist()


def test_experts_kernels_are_put_into_another_cluster() -> None:
    base = load_cluster("hgx-b200-8")
    faster = base.scaled(fixed=0.5)
    mixed = _with_experts(faster, base).device.processor.kernels
    neutral, other = base.device.processor.kernels, faster.device.processor.kernels
    assert mixed["grouped_gemm"] == neutral["grouped_gemm"]
    assert mixed["permute"] == neutral["permute"]
    assert mixed["gemm"] == other["gemm"] != neutral["gemm"]


def test_clusters_of_a_run_have_its_gpus() -> None:
    row = _row(Ranks(4, 1, 4, 1))
    cluster, _ = prices_of()(Setup.of(row), row.ranks.gpus)
    assert cluster.num_ranks == 4
    assert cluster.device.name == "h100"


def test_caches() -> None:
    assert cache_of("vllm", 100e9, 60e9) == pytest.approx(30e9)
    assert cache_of("trtllm", 100e9, 60e9) == pytest.approx(32e9)
    assert cache_of("sglang", 100e9, 95e9) == np.inf
