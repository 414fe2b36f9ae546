"""Layouts: numbering of ranks by brute force, groups that partition them, what is refused."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from basis import InputError, validate
from simulator.layout import Layout
from simulator.parallelism import Parallelism
from traces import ModelSpec

ModelOf = Callable[..., ModelSpec]


def parallelism(
    dp: int, tp: int = 1, pp: int = 1, *, ep: int = 1, etp: int = 1, exchange: str = "all_to_all"
) -> Parallelism:
    data = {
        "attention": {"dp": dp, "tp": tp, "pp": pp},
        "experts": {"ep": ep, "tp": etp, "exchange": exchange},
    }
    return validate(data, Parallelism, "test")


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Any layout of up to 16 ranks per stage and 3 stages."""
    dp, tp, pp = (draw(st.sampled_from(s)) for s in ([1, 2, 3, 4], [1, 2, 4], [1, 2, 3]))
    lanes = dp * tp
    ep = draw(st.sampled_from([n for n in range(1, lanes + 1) if lanes % n == 0]))
    rest = lanes // ep
    etp = draw(st.sampled_from([n for n in range(1, rest + 1) if rest % n == 0]))
    how = draw(st.sampled_from(["all_to_all", "all_gather"]))
    return Layout.of(parallelism(dp, tp, pp, ep=ep, etp=etp, exchange=how), lanes * pp)


@given(layouts())
def test_ranks_are_numbered_as_nested_loops(layout: Layout) -> None:
    attention = itertools.product(range(layout.pp), range(layout.dp), range(layout.tp))
    experts = itertools.product(
        range(layout.pp), range(layout.edp), range(layout.ep), range(layout.etp)
    )
    for rank, ((stage, dp, tp), (same, edp, ep, etp)) in enumerate(
        zip(attention, experts, strict=True)
    ):
        assert (layout.stage[rank], layout.dp_index[rank], layout.tp_index[rank]) == (stage, dp, tp)
        assert stage == same
        found = (layout.edp_index[rank], layout.ep_index[rank], layout.etp_index[rank])
        assert found == (edp, ep, etp)


@given(layouts())
def test_groups_partition_the_lanes_and_share_what_they_should(layout: Layout) -> None:
    lanes = np.arange(layout.lanes)
    shared = {
        "tp": (layout.groups(layout.tp), [layout.dp_index]),
        "etp": (layout.groups(layout.etp), [layout.edp_index, layout.ep_index]),
        "block": (layout.groups(layout.block), [layout.edp_index]),
        "exchange": (layout.exchange_groups, [layout.edp_index, layout.etp_index]),
    }
    for groups, indices in shared.values():
        assert sorted(groups.ravel().tolist()) == lanes.tolist()
        for index in indices:
            assert (index[groups] == index[groups[:, :1]]).all()
    assert (layout.ep_index[layout.exchange_groups] == np.arange(layout.ep)).all()


@given(st.integers(1, 20), st.integers(1, 20))
def test_layers_of_stages_are_contiguous_and_even(layers: int, pp: int) -> None:
    layout = Layout.of(parallelism(1, pp=pp), pp)
    stages = layout.stage_layers(layers)
    assert [layer for stage in stages for layer in stage] == list(range(layers))
    sizes = [len(stage) for stage in stages]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(layouts())
def test_a_layout_survives_as_data(layout: Layout) -> None:
    assert Layout.of(layout.parallelism, layout.num_ranks) == layout


def test_a_layout_says_what_it_is() -> None:
    layout = Layout.of(parallelism(2, 2, 2, ep=2, etp=2), 8)
    assert str(layout) == "attention DP2 x TP2 x PP2, experts EP2 x TP2"
    assert str(Layout.data_parallel(4)) == "attention DP4, experts EP4"


def test_everything_that_does_not_multiply_is_said_at_once() -> None:
    with pytest.raises(InputError) as error:
        Layout.of(parallelism(3, 2, ep=4), 8)
    message = str(error.value)
    assert (
        "attention dp 3 x tp 2 x pp 1 = 6 on 8 ranks -- the product must be 8, so dp 4" in message
    )
    assert "experts ep 4 x tp 1 = 4 do not divide the 6 ranks of a stage" in message
    assert "one of 1, 2, 3, 6" in message


def test_everything_that_does_not_divide_the_model_is_said_at_once(make_model: ModelOf) -> None:
    model = make_model(  # 8 heads, 2 KV heads, 2 layers
        num_experts=9, expert_width=50, shared_expert_width=20, moe_layer_ids=(1,), dense_width=10
    )
    layout = Layout.of(parallelism(1, 3, 3, etp=3), 9)
    with pytest.raises(InputError) as error:
        layout.check(model, 10)
    for part in (
        "attention tp 3 does not divide the attention heads (8) -- attention tp must be one of 1,",
        "attention tp 3 and 2 KV heads",
        "attention tp 3 does not divide the width of dense layers (10)",
        "experts tp 3 does not divide the width of an expert (50)",
        "attention tp 3 does not divide the width of shared experts (20)",
        "attention pp 3 stages for 2 layers -- pp must be at most 2",
    ):
        assert part in str(error.value)
    with pytest.raises(InputError, match=r"experts ep 4 does not divide the slots of a layer \(10"):
        Layout.of(parallelism(4, ep=4), 4).check(model, 10)


def test_slices_of_quantised_experts_are_whole_blocks(make_model: ModelOf) -> None:
    model = make_model(expert_width=2880, expert_dtype="mxfp4")
    widths = {
        etp: Layout.of(parallelism(etp, etp=etp), etp).slice_width(model) for etp in (1, 2, 4, 8)
    }
    assert widths == {1: 2880, 2: 1440, 4: 736, 8: 384}


def test_kv_heads_are_replicated_beyond_their_number(make_model: ModelOf) -> None:
    heads = {tp: Layout.of(parallelism(1, tp), tp).attention(make_model()) for tp in (1, 2, 4, 8)}
    assert {tp: (a.num_heads, a.num_kv_heads) for tp, a in heads.items()} == {
        1: (8, 2),
        2: (4, 1),
        4: (2, 1),
        8: (1, 1),
    }
