from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels import Cluster, load_cluster
from hwmodels.engines import priced_by
from planner.baselines import contiguous, round_robin
from planner.layouts import Candidate, enumerate_layouts
from planner.layouts_bound import BoundMaker, Thin
from simulator.batches import compose
from simulator.deployment import Deployment, Workload
from simulator.simulate import simulate
from traces.model_spec import Attention, ModelSpec
from traces.routing_trace import RoutingTrace
from traces.synth import synthetic_trace, zipf_shares

EXPERTS, LAYERS = 12, 4
GQA = Attention(
    kind="gqa", num_heads=8, num_kv_heads=2, head_dim=64, v_head_dim=64,
    windows=(None, 16, None, 16),
)  # fmt: skip
MLA = Attention(
    kind="mla", num_heads=8, num_kv_heads=8, head_dim=96, v_head_dim=64, q_lora_rank=128,
    kv_lora_rank=64, qk_rope_head_dim=32, qk_nope_head_dim=64, windows=(None,) * LAYERS,
)  # fmt: skip
MODELS = {
    "gqa": {"attention": GQA, "moe_layer_ids": (0, 1, 2, 3)},
    "mla": {
        "attention": MLA,
        "moe_layer_ids": (1, 2, 3),
        "dense_width": 1024,
        "shared_expert_width": 512,
    },
}
CLUSTERS = (
    load_cluster("hgx-h100-8", gpus=4),
    load_cluster("hgx-h200-8x2"),
    load_cluster("hgx-h200-8x2", gpus=12),
    load_cluster("gb200-nvl72", gpus=18),
    priced_by(load_cluster("hgx-h100-8", gpus=4), "sglang"),
    priced_by(load_cluster("hgx-h200-8x2", gpus=12), "vllm"),
    priced_by(load_cluster("gb200-nvl72", gpus=18), "trtllm"),
)


def spec(kind: str) -> ModelSpec:
    return ModelSpec(
        name=kind, family="mixtral", num_layers=LAYERS, hidden_size=512, vocab_size=2000,
        tie_embeddings=False, num_experts=EXPERTS, top_k=3, expert_width=512,
        weight_dtype="bf16", expert_dtype="bf16", activation_dtype="bf16", kv_dtype="bf16",
        comm_size=512, **MODELS[kind],
    )  # fmt: skip


def trace_of(model: ModelSpec, skew: float, seed: int) -> RoutingTrace:
    shares = zipf_shares(EXPERTS, skew, layers=model.num_moe_layers, seed=seed)
    made = synthetic_trace(shares, tokens=600, requests=20, top_k=3, seed=seed)
    return replace(made, meta=replace(made.meta, moe_layer_ids=model.moe_layer_ids))


def both(
    model: ModelSpec,
    trace: RoutingTrace,
    cluster: Cluster,
    candidate: Candidate,
    batch: int,
    place: str,
) -> tuple[float, float]:
    """Bound and simulated mean step time over two seeds, s."""
    work = Workload(decode_batch=batch)
    made = [compose(trace, work, 1, steps=3, seed=seed) for seed in (0, 1)]
    maker = BoundMaker(model, trace, cluster, [made])
    bound = maker.seconds(candidate.layout, candidate.redundant_experts, [0])[0]
    slots = EXPERTS + candidate.redundant_experts
    rule = {"contiguous": contiguous, "round_robin": round_robin}[place]
    placement = rule(model.num_moe_layers, EXPERTS, slots, candidate.layout.ep)
    deployment = Deployment.of(placement, parallelism=candidate.parallelism)
    times = [
        simulate(model, trace, cluster, deployment, work, steps=3, seed=seed).step_times
        for seed in (0, 1)
    ]
    return float(bound), float(np.mean(times))


@given(st.data())
@settings(max_examples=100)
def test_never_above_the_simulated_time(data: st.DataObject) -> None:
    model = spec(data.draw(st.sampled_from(sorted(MODELS))))
    cluster = data.draw(st.sampled_from(CLUSTERS))
    candidates = enumerate_layouts(model, cluster)
    candidate = data.draw(st.sampled_from(candidates))
    batch = data.draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 96, 144, 300])))
    trace = trace_of(model, data.draw(st.sampled_from([0.0, 0.9])), data.draw(st.integers(0, 3)))
    place = data.draw(st.sampled_from(["contiguous", "round_robin"]))
    bound, simulated = both(model, trace, cluster, candidate, batch, place)
    assert 0 < bound <= simulated * (1 + 1e-9)


@pytest.mark.parametrize("kind", sorted(MODELS))
@pytest.mark.parametrize("batch", [1, 37, 256])
def test_exact_on_one_rank(kind: str, batch: int) -> None:
    model, cluster = spec(kind), load_cluster("hgx-h100-8", gpus=1)
    (only,) = enumerate_layouts(model, cluster)
    bound, simulated = both(model, trace_of(model, 0.7, 0), cluster, only, batch, "contiguous")
    assert bound == pytest.approx(simulated, rel=2e-3)  # Jensen over steps is all that is left


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_close_under_plain_tensor_parallelism(kind: str) -> None:
    """Every rank of a plain TP group does the same: nothing but the mean over steps is lost."""
    model, cluster = spec(kind), load_cluster("hgx-h100-8", gpus=4)
    plain = next(
        c
        for c in enumerate_layouts(model, cluster)
        if (c.layout.tp, c.layout.etp, c.layout.ep) == (4, 4, 1)
    )
    bound, simulated = both(model, trace_of(model, 0.7, 0), cluster, plain, 64, "contiguous")
    assert bound == pytest.approx(simulated, rel=5e-3)


def test_one_layer_of_each_kind() -> None:
    thin = Thin.of(spec("mla"))
    assert thin.model.num_layers == 2
    assert thin.model.moe_layer_ids == (1,)
    assert thin.count.tolist() == [1, 3]
    assert Thin.of(spec("gqa")).count.tolist() == [2, 2]
