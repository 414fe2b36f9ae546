import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels import GroupedGemm, load_cluster, price
from planner.layer import LayerSlots, Limits, Topology, spread
from planner.slot_cost import slot_seconds
from planner.straggler import busiest_work, relieve
from traces.model_spec import Attention, ModelSpec

MODEL = ModelSpec(
    name="m",
    family="mixtral",
    num_layers=1,
    hidden_size=2048,
    vocab_size=1000,
    tie_embeddings=False,
    moe_layer_ids=(0,),
    num_experts=8,
    top_k=2,
    expert_width=2048,
    shared_expert_width=0,
    dense_width=0,
    attention=Attention(
        kind="gqa", num_heads=8, num_kv_heads=2, head_dim=128, v_head_dim=128, windows=(None,)
    ),
    weight_dtype="bf16",
    expert_dtype="mxfp4",
    activation_dtype="bf16",
    kv_dtype="bf16",
    comm_size=2048,
)
CLUSTER = load_cluster("hgx-h100-8", gpus=4)
TILE = CLUSTER.device.kernel("grouped_gemm", "mxfp4")[0].tile_rows


def _tokens(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def test_nothing_costs_nothing_and_more_never_costs_less() -> None:
    cost = slot_seconds(MODEL, CLUSTER, 500, 12)(np.arange(501, dtype=np.float32))
    assert cost[0] == 0
    assert (np.diff(cost) >= 0).all()


def test_a_new_tile_costs_its_multiplications() -> None:
    cost = slot_seconds(MODEL, CLUSTER, 500, 12)(_tokens(TILE - 1, TILE, TILE + 1))
    within, beyond = cost[1] - cost[0], cost[2] - cost[1]
    free = CLUSTER.scaled(fixed=0.0)
    column = GroupedGemm(
        tokens_per_expert=np.array([[TILE], [TILE + 1]]),
        hidden=2048,
        width=2048,
        gated=True,
        weight_dtype="mxfp4",
        activation_dtype="bf16",
    )
    seconds = price(column, free).seconds
    assert beyond - within == pytest.approx(seconds[1] - seconds[0], rel=1e-2)
    assert beyond > 3 * within


def test_half_of_the_weight_is_on_tokens_at_the_mean_load() -> None:
    tokens, slots = 480, 12
    mean = tokens * MODEL.top_k // slots
    cost = slot_seconds(MODEL, CLUSTER, tokens, slots)(_tokens(mean, mean + 1))
    free = CLUSTER.scaled(fixed=0.0)
    column = GroupedGemm(
        tokens_per_expert=np.array([[mean]]),
        hidden=2048,
        width=2048,
        gated=True,
        weight_dtype="mxfp4",
        activation_dtype="bf16",
    )
    assert 2 * price(column, free).seconds[0] <= cost[0]
    assert cost[1] - cost[0] >= cost[0] / 2 / mean * 0.999


def test_fractions_round_up_and_long_slots_go_on() -> None:
    cost = slot_seconds(MODEL, CLUSTER, 100, 12)
    assert cost(_tokens(12.5)) == cost(_tokens(13.0))
    assert cost(_tokens(200.0))[0] == pytest.approx(2 * cost(_tokens(100.0))[0])


@given(st.integers(0, 10_000))
def test_relief_is_never_worse_and_keeps_the_limit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    steps = rng.integers(0, 3 * TILE, (12, 8)).astype(np.float32)
    loads = steps.sum(0) / steps.sum()
    topology = Topology.of(12, np.zeros(4, dtype=np.int64), "even")
    while True:
        experts = rng.permutation(np.concatenate([np.arange(8), rng.integers(0, 8, 4)]))
        if all(len(set(rank)) == 3 for rank in experts.reshape(4, 3).tolist()):
            break
    start = spread(experts, topology)
    peak = _rank_loads(start, loads).max()
    limits = Limits(loads=loads, rank_limit=1.1 * peak, block_loads=loads[None], node_limit=np.inf)
    cost = slot_seconds(MODEL, CLUSTER, 500, 12)
    relieved = relieve(start, topology, limits, steps, deadline=np.inf, cost=cost)
    before, after = (busiest_work(x, topology, steps, cost) for x in (start, relieved))
    assert after <= before * (1 + 1e-6)
    assert _rank_loads(relieved, loads).max() <= 1.1 * peak * (1 + 1e-9)
    assert set(relieved.experts.tolist()) == set(range(8))
    by_hand = [
        max(sum(cost(_tokens(s[e] * w))[0] for e, w in rank) for rank in _ranks(relieved))
        for s in steps
    ]
    assert after == pytest.approx(np.mean(by_hand), rel=1e-4)


def _ranks(layer: LayerSlots) -> list[list[tuple[int, float]]]:
    pairs = list(zip(layer.experts.tolist(), layer.share.tolist(), strict=True))
    return [pairs[i : i + 3] for i in range(0, 12, 3)]


def _rank_loads(layer: LayerSlots, loads: np.ndarray) -> np.ndarray:
    return np.array([sum(loads[e] * w for e, w in rank) for rank in _ranks(layer)])
