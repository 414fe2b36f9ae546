"""Duplex, MoE-Lens and Pre-gated MoE: what follows from their published figures, by hand.

The compositions in examples/systems are run as they are, with fewer steps.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hwmodels import Cluster, load_cluster
from hwmodels.cost import price
from hwmodels.ops import AttentionDecode, Copy, GroupedGemm
from moeplan.composition import Run, run
from moeplan.composition_file import Composition, Routing, read_composition
from planner.streaming_bound import StreamingBound
from simulator.deployment import Workload
from simulator.offload_result import OffloadResult
from simulator.program import Played
from traces.model_spec import load_model

SYSTEMS = Path(__file__).resolve().parents[2] / "examples" / "systems"
Runs = dict[tuple[str, int], Run]


def _runs(name: str, **changes: Any) -> Runs:
    composition = read_composition(SYSTEMS / f"{name}.yaml").model_copy(update=changes)
    return {(r.variant, r.workload.tokens): r for r in run(composition, SYSTEMS)}


def _seconds(done: Run) -> float:
    assert done.result is not None
    return float(done.result.step_times.mean())


# Duplex


def _expert(tokens: int) -> GroupedGemm:
    counts = np.array([[tokens]])
    return GroupedGemm(
        tokens_per_expert=counts,
        hidden=4096,
        width=14336,
        gated=True,
        weight_dtype="bf16",
        activation_dtype="bf16",
    )


def test_a_logic_pim_stack_computes_at_the_published_rate() -> None:
    """21.3 TFLOP/s: four times the bandwidth of an HBM3 stack, times 8 FLOP per byte."""
    cluster = load_cluster("duplex-4")
    pim = cluster.processor("pim")
    assert pim.compute_units is not None
    assert pim.bandwidth is not None
    stacks = pim.compute_units.value
    assert pim.flops["bf16"].value / stacks == pytest.approx(21.3e12)
    hbm = cluster.device.memory.bandwidth.value
    assert pim.bandwidth.value == pytest.approx(4 * hbm, rel=0.01)
    assert pim.flops["bf16"].value / pim.bandwidth.value == pytest.approx(8, rel=0.01)


def test_xpu_and_pim_tie_near_32_tokens() -> None:
    """Below, PIM is faster: 4 times as fast up to 8 tokens, 32 / n times from there."""
    cluster = load_cluster("duplex-4")
    ratio = {
        n: float(price(_expert(n), cluster).seconds[0])
        / float(price(_expert(n), cluster, on="pim").seconds[0])
        for n in (1, 4, 8, 16, 31, 33, 64)
    }
    assert ratio[1] == pytest.approx(4, rel=0.01)
    assert ratio[4] == pytest.approx(4, rel=0.01)
    assert ratio[16] == pytest.approx(2, rel=0.02)
    assert ratio[31] > 1 > ratio[33]
    assert ratio[64] == pytest.approx(0.5, rel=0.02)


@pytest.fixture(scope="module")
def duplex() -> Runs:
    return _runs("duplex", steps=4)


def _terms(played: Played) -> dict[str, float]:
    """Seconds of decode attention, of the experts' products and of the rest, mean over ranks."""
    busy = played.busy[0].mean(axis=1)
    names = np.array([item.name for item in played.items])
    attention, experts = (float(busy[names == n].sum()) for n in ("attention", "experts"))
    return {"attention": attention, "experts": experts, "rest": busy.sum() - attention - experts}


@pytest.mark.parametrize("batch", [32, 64, 128])
def test_duplex_is_its_terms_shrunk_by_the_published_ratios(duplex: Runs, batch: int) -> None:
    """Attention to a quarter; experts to 1 / min(4, 32 / n) on PIM, with both never below 1/5.

    By Amdahl no assignment is above total / (rest + (attention / 4) + (experts / 5)).
    """
    gpu = duplex["gpu", batch].result
    assert gpu is not None
    terms = _terms(gpu.first_step)
    total = _seconds(duplex["gpu", batch])
    assert sum(terms.values()) == pytest.approx(total, rel=0.01)
    stays = terms["rest"] + terms["attention"] / 4
    both = total / _seconds(duplex["co-processing", batch])
    assert both <= total / (stays + terms["experts"] / 5) * 1.01
    side = min(4.0, 32 / (batch * 2 / 8))
    by_terms = total / (stays + terms["experts"] / (1 + side))
    assert both == pytest.approx(by_terms, rel=0.08)  # eight experts cannot be cut evenly
    alone = total / _seconds(duplex["duplex", batch])  # a layer's experts on one processor
    assert alone == pytest.approx(total / (stays + terms["experts"] / side), rel=0.03)
    assert alone < both


def test_the_published_ratio_lies_between_batch_32_and_128(duplex: Runs) -> None:
    """Up to 2.67: our ratios fall with the batch and pass it."""
    ratio = [
        _seconds(duplex["gpu", b]) / _seconds(duplex["co-processing", b]) for b in (32, 64, 128)
    ]
    assert ratio[0] > ratio[1] > ratio[2]
    assert ratio[0] > 2.67 > ratio[2]


def test_attention_of_four_queries_per_key_is_bound_by_pims_bandwidth() -> None:
    """Mixtral's grouped queries do 4 FLOP per byte, PIM is sized for 8."""
    cluster = load_cluster("duplex-4")
    op = AttentionDecode(
        tokens=np.array([16]),
        context=np.array([16 * 3000]),
        num_heads=8,
        num_kv_heads=2,
        head_dim=128,
        v_head_dim=128,
        kv_elements=512,
        kv_dtype="bf16",
        activation_dtype="bf16",
    )
    fast, side = (float(price(op, cluster, on=on).seconds[0]) for on in (None, "pim"))
    assert fast / side == pytest.approx(4, rel=0.01)


# MoE-Lens


def test_streamed_weights_are_never_beaten() -> None:
    """No batch is above the bound at the bytes that its pass streams; full buffers come near."""
    composition = read_composition(SYSTEMS / "moe-lens.yaml")
    batches = (1, 64, 512, 4664)
    wide = composition.model_copy(
        update={"workloads": tuple(Workload(decode_batch=b) for b in batches), "steps": 2}
    )
    for done in run(wide, SYSTEMS):
        if not isinstance(done.result, OffloadResult):
            assert done.variant == "gpu-attention"
            continue
        batch = done.workload.tokens
        link = done.facts.cluster.path("host", "hbm")[0]
        bound = StreamingBound(
            prompt=98,
            output=32,
            cached_tokens=batch * (98 + 32 / 2),
            streamed_bytes=done.result.fetched_bytes_per_token * batch,
            bandwidth=link.bandwidth.value * link.cost("copy").efficiency,
        )
        assert bound.sequences == pytest.approx(batch)
        reached = done.result.tokens_per_second / bound.generated_per_second
        assert reached <= 1
        if done.variant == "moe-lens":
            experts = 32 * 8 * done.facts.model.bytes_per_expert
            assert bound.streamed_bytes == pytest.approx(experts)
            assert reached > 0.999  # nothing but copies is on the longest path


# Pre-gated MoE


def _faster_link(cluster: Cluster, times: float) -> Cluster:
    links = {
        name: link.model_copy(update={"bandwidth": link.bandwidth.times(times)})
        for name, link in cluster.node.links.items()
    }
    return cluster.model_copy(update={"node": cluster.node.model_copy(update={"links": links})})


def _pre_gated(**changes: Any) -> Runs:
    return _runs("pre-gated-moe", steps=8, **changes)


def test_the_artifacts_experts() -> None:
    """18,874,368 and 33,554,432 bytes in fp32: 0.59 and 1.05 ms over 32 GB/s."""
    for name, size, milliseconds in (("base", 18_874_368, 0.59), ("large", 33_554_432, 1.05)):
        model = load_model(SYSTEMS / "models" / f"switch-{name}-128.yaml")
        assert model.bytes_per_expert == size
        assert size / 32e9 * 1e3 == pytest.approx(milliseconds, abs=0.005)


@pytest.fixture(scope="module")
def pre_gated() -> Runs:
    return _pre_gated()


@pytest.mark.parametrize("tokens", [1, 4, 256])
def test_order_of_the_methods(pre_gated: Runs, tokens: int) -> None:
    """GPU-only, pre-gated, then on demand and fetch-all, by the bytes that a step copies.

    On demand a step is at most the resident step, its copies, a launch for each copied expert;
    fetch-all at least its copies: E experts in every layer, of which a step of few tokens uses few.
    """
    by = {name: _seconds(pre_gated[name, tokens]) for name in ("gpu-only", "pre-gated")}
    by |= {name: _seconds(pre_gated[name, tokens]) for name in ("on-demand", "fetch-all")}
    assert by["gpu-only"] < by["pre-gated"] < by["on-demand"] < by["fetch-all"]
    every = pre_gated["fetch-all", tokens].result
    demand = pre_gated["on-demand", tokens].result
    assert isinstance(every, OffloadResult)
    assert isinstance(demand, OffloadResult)
    link = pre_gated["on-demand", tokens].facts.cluster.path("host", "hbm")[0]
    copy = link.cost("copy")
    one = copy.startup + every.expert_bytes / (link.bandwidth.value * copy.efficiency)
    copies = demand.decisions.fetched.sum() / len(demand.step_times)
    assert by["on-demand"] <= by["gpu-only"] + copies * (one + 60e-6)
    least = 6 * 128 * every.expert_bytes / (link.bandwidth.value * copy.efficiency)
    assert by["fetch-all"] >= least
    assert copies < 6 * 128


def test_fetching_all_is_faster_where_all_experts_are_used() -> None:
    """With the same bytes, one copy of a layer ahead of its use beats E copies behind its gate."""
    runs = _pre_gated(
        trace=Routing(tokens=16384, requests=8), workloads=(Workload(prefill_tokens=8192),)
    )
    demand, every = runs["on-demand", 8192].result, runs["fetch-all", 8192].result
    assert isinstance(demand, OffloadResult)
    assert isinstance(every, OffloadResult)
    assert demand.decisions.fetched.all()
    assert demand.fetched_bytes_per_token == every.fetched_bytes_per_token
    assert every.step_times.mean() < demand.step_times.mean()


def test_pre_gated_hides_its_copies_when_they_are_shorter_than_a_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All but the first layer's: no gate announces it.

    On a link so fast that a copy takes less than the compute between two layers, a pre-gated step
    is the GPU-only step and one exposed copy; the experts copied ahead are a call as before.
    """
    fast = _faster_link(load_cluster("pregated-a100"), 100)
    monkeypatch.setattr("moeplan.composition.open_cluster", lambda *_: fast)
    runs = _pre_gated(workloads=(Workload(decode_batch=1),))
    pre, gpu = runs["pre-gated", 1].result, runs["gpu-only", 1].result
    assert isinstance(pre, OffloadResult)
    assert gpu is not None
    way = Copy(bytes=np.array([pre.expert_bytes]), source="host", target="hbm")
    one = float(price(way, fast).seconds[0])
    assert one < gpu.step_times.mean() / 6
    np.testing.assert_allclose(pre.step_times, gpu.step_times + _exposed(pre, one), rtol=1e-9)


def _exposed(pre: OffloadResult, copy: float) -> float:
    """What of the first layer's copy its permutation does not cover, seconds."""
    names = [item.name for item in pre.played.items]
    permuted = float(pre.played.busy[0, names.index("permute"), 0])
    return copy - permuted


def test_an_exact_prefetch_is_late_where_copies_are_longer_than_a_block(pre_gated: Runs) -> None:
    """As published: the copies bind, so a step is about its copies: the ratio stays below 2."""
    one = {n: _seconds(pre_gated[n, 1]) for n in ("gpu-only", "pre-gated", "on-demand")}
    assert one["pre-gated"] > 3 * one["gpu-only"]
    assert 1 < one["on-demand"] / one["pre-gated"] < 2


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("mixtral-8x7b", 46.7),
        ("mixtral-8x22b", 140.6),
        ("deepseek-v2-lite", 15.7),
        ("deepspeed-moe-52b", 52),
        ("glam-143b", 143),
        ("grok-1", 314),
    ],
)
def test_a_geometry_adds_up_to_the_published_parameters(name: str, billions: float) -> None:
    model = load_model(SYSTEMS / "models" / f"{name}.yaml")
    assert model.total_params == pytest.approx(billions * 1e9, rel=0.015)


def test_nllb_with_its_encoder_has_54_billion() -> None:
    """The encoder has the decoder's layers without cross attention; embeddings are shared."""
    model = load_model(SYSTEMS / "models" / "nllb-moe-54b.yaml")
    embedding = model.vocab_size * model.hidden_size
    cross = model.num_layers * model.attention.matrix_parameters(model.hidden_size)
    both = 2 * (model.total_params - embedding) + embedding + cross
    assert both == pytest.approx(54.5e9, rel=0.02)


def test_a_composition_is_plain_data() -> None:
    for path in sorted(SYSTEMS.glob("*.yaml")):
        composition = read_composition(path)
        assert Composition.model_validate(composition.model_dump()) == composition
