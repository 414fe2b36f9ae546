"""Published systems as compositions: the order of Pre-gated MoE's baselines, from bytes."""

from typing import Any

import numpy as np
import pytest

from hwmodels import Cluster, load_cluster
from simulator import Deployment, Placement, Workload
from simulator.offload import Offload
from simulator.offload_result import OffloadResult
from simulator.offload_simulate import simulate_offload
from traces import Attention, ModelSpec, RoutingTrace, TraceMeta

BEAMS, STEPS = 4, 8


def _switch_base(experts: int) -> ModelSpec:
    """Decoder of Switch-base-E: 12 layers, every second one with experts, top-1, fp32."""
    return ModelSpec.model_validate(
        {
            "name": f"switch-base-{experts}",
            "family": "switch_transformers",
            "num_layers": 12,
            "hidden_size": 768,
            "vocab_size": 32128,
            "tie_embeddings": True,
            "moe_layer_ids": (1, 3, 5, 7, 9, 11),
            "num_experts": experts,
            "top_k": 1,
            "expert_width": 3072,
            "gated": False,
            "dense_width": 3072,
            "weight_dtype": "fp32",
            "expert_dtype": "fp32",
            "activation_dtype": "fp32",
            "kv_dtype": "fp32",
            "comm_size": 768,
            "attention": Attention(
                kind="gqa",
                num_heads=12,
                num_kv_heads=12,
                head_dim=64,
                v_head_dim=64,
                windows=(None,) * 12,
            ),
        }
    )


def _uniform(model: ModelSpec) -> RoutingTrace:
    """Uniform routing: the worst case for any cache."""
    requests, length = BEAMS, 64
    tokens = requests * length
    shape = (tokens, model.num_moe_layers, 1)
    return RoutingTrace(
        meta=TraceMeta(
            model=model.name,
            num_experts=model.num_experts,
            top_k=1,
            moe_layer_ids=model.moe_layer_ids,
            synthetic=True,
        ),
        request_id=np.repeat(np.arange(requests), length).astype(np.int32),
        position=np.tile(np.arange(length), requests).astype(np.int32),
        decode=np.ones(tokens, dtype=np.bool_),
        step=np.tile(np.arange(length), requests).astype(np.int32),
        domain=np.zeros(tokens, dtype=np.int16),
        domains=("test",),
        experts=np.random.default_rng(0).integers(model.num_experts, size=shape).astype(np.uint16),
    )


def _run(model: ModelSpec, cluster: Cluster, **offload: Any) -> OffloadResult:
    slots = np.tile(np.arange(model.num_experts, dtype=np.int32), (model.num_moe_layers, 1))
    placement = Placement(slots=slots, num_experts=model.num_experts, num_ranks=1)
    deployment = Deployment.of(placement).model_copy(
        update={"offload": Offload.model_validate(offload)}
    )
    workload = Workload(decode_batch=BEAMS)
    return simulate_offload(model, _uniform(model), cluster, deployment, workload, steps=STEPS)


def _systems(experts: int) -> dict[str, OffloadResult]:
    model, cluster = _switch_base(experts), load_cluster("pregated-a100")
    every = [list(range(experts))] * model.num_moe_layers
    return {
        "gpu only": _run(model, cluster, resident=every),
        "pre-gated": _run(model, cluster, predictor={"name": "exact"}),
        "on demand": _run(model, cluster),
        "fetch all": _run(model, cluster, predictor={"name": "all"}),
    }


def test_experts_have_the_artifacts_size() -> None:
    assert _switch_base(64).bytes_per_expert == 18_874_368


@pytest.mark.parametrize("experts", [8, 64, 128])
def test_order_of_the_pre_gated_baselines(experts: int) -> None:
    """GPU only, pre-gated, then on demand and fetch all.

    Of the last two, fetch all is the slower one: it copies all E experts of a layer, on demand at
    most min(4 beams, E) of them, and even hidden entirely behind compute no step is shorter than
    its copies, while on demand a step is its copies, their startups and the resident step.
    """
    runs = _systems(experts)
    mean = {name: run.step_times.mean() for name, run in runs.items()}
    assert mean["gpu only"] < mean["pre-gated"] < mean["on demand"]
    link = load_cluster("pregated-a100").path("host", "hbm")[0]
    cost = link.cost("copy")
    rate = cost.efficiency * link.bandwidth.value
    bound = {n: run.fetched_bytes_per_token * BEAMS / rate for n, run in runs.items()}
    startups = 6 * BEAMS * cost.startup
    launches = 6 * BEAMS * 30e-6
    assert bound["fetch all"] <= mean["fetch all"]
    at_most = bound["on demand"] + startups + launches + mean["gpu only"]
    assert mean["on demand"] <= at_most < bound["fetch all"]


@pytest.mark.parametrize("experts", [8, 64])
def test_buffers_of_the_pre_gated_baselines(experts: int) -> None:
    """On demand the active experts, pre-gated twice these, fetch all 2 E; GPU only none."""
    runs = _systems(experts)
    size = runs["on demand"].expert_bytes
    landing = {
        name: run.tiers["hbm"].terms.get("landing buffers", 0.0) / size
        for name, run in runs.items()
    }
    active = (runs["on demand"].decisions.tokens > 0).sum(axis=-1)
    assert landing["gpu only"] == 0
    assert landing["on demand"] == active.max()
    assert active.max() < landing["pre-gated"] <= 2 * active.max()
    assert landing["fetch all"] == 2 * experts
    assert runs["gpu only"].tiers["hbm"].terms["resident experts"] == 6 * experts * size
