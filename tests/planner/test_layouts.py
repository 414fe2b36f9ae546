import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels import load_cluster
from planner.layouts import enumerate_layouts, redundant_for
from traces.model_spec import Attention, ModelSpec

H200 = load_cluster("hgx-h200-8x2")


def model(num_experts: int = 16, *, heads: int = 8, width: int = 512) -> ModelSpec:
    return ModelSpec(
        name="tiny",
        family="mixtral",
        num_layers=3,
        hidden_size=256,
        vocab_size=1000,
        tie_embeddings=False,
        moe_layer_ids=(0, 1, 2),
        num_experts=num_experts,
        top_k=2,
        expert_width=width,
        attention=Attention(
            kind="gqa", num_heads=heads, num_kv_heads=2, head_dim=64, v_head_dim=64,
            windows=(None,) * 3,
        ),
        weight_dtype="bf16",
        expert_dtype="bf16",
        activation_dtype="bf16",
        kv_dtype="bf16",
        comm_size=256,
    )  # fmt: skip


def test_every_factorisation_of_four_ranks_is_there() -> None:
    found = enumerate_layouts(model(), load_cluster("hgx-h100-8", gpus=4))
    wanted = {
        (dp, tp, pp, ep, etp, how)
        for dp, tp, pp, ep, etp in itertools.product((1, 2, 4), repeat=5)
        if dp * tp * pp == 4 and 4 // pp % (ep * etp) == 0
        for how in (("all_to_all", "all_gather") if ep > 1 else ("all_to_all",))
        if pp <= 3  # layers
    }
    layouts = [c.layout for c in found]
    assert {(x.dp, x.tp, x.pp, x.ep, x.etp, x.exchange) for x in layouts} == wanted
    assert len(found) == len(wanted)
    assert all(c.redundant_experts == 0 for c in found)


@given(st.integers(1, 300), st.integers(1, 80), st.integers(0, 20))
def test_redundant_experts_are_the_fewest_that_divide(experts: int, ep: int, wanted: int) -> None:
    found = redundant_for(experts, ep, wanted)
    if ep == 1:
        assert found == 0
        return
    tried = next(r for r in itertools.count(wanted) if (experts + r) % ep == 0)
    assert found == tried


def test_72_ranks_of_256_experts_need_288_slots() -> None:
    found = enumerate_layouts(model(256), load_cluster("gb200-nvl72"))
    wide = [c for c in found if c.layout.ep == 72]
    assert wide
    assert {c.redundant_experts for c in wide} == {32}
    assert "32 redundant" in wide[0].name


def test_tensor_parallelism_stays_inside_a_node() -> None:
    inside = enumerate_layouts(model(heads=16), H200)
    assert max(max(c.layout.tp, c.layout.etp) for c in inside) == 8
    across = enumerate_layouts(model(heads=16), H200, across_nodes=True)
    assert max(c.layout.tp for c in across) == 16


def test_pipeline_stages_lie_alike_on_nodes() -> None:
    found = enumerate_layouts(model(), load_cluster("hgx-h200-8x2", gpus=12))
    assert {c.layout.pp for c in found} == {1, 3}  # 2 x 6 would put one stage on two nodes


def test_slices_of_experts_are_whole_blocks() -> None:
    quantised = model().model_copy(update={"expert_dtype": "fp8_block", "expert_width": 256})
    found = enumerate_layouts(quantised, load_cluster("hgx-h100-8"))
    assert {c.layout.etp for c in found} == {1, 2}  # blocks of 128


@pytest.mark.parametrize("redundant", [0, 3])
def test_slots_divide(redundant: int) -> None:
    for candidate in enumerate_layouts(model(10), H200, redundant=redundant):
        assert (10 + candidate.redundant_experts) % candidate.layout.ep == 0
