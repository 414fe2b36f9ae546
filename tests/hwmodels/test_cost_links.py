"""Links with richer cost models: what a file may say, prices through a cluster, copies."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basis import InputError, validate
from hwmodels import AllReduce, AllToAll, Cluster, Copy, price
from hwmodels.kernels.base import Limits
from hwmodels.kernels.collective import CollectiveCost
from hwmodels.link import Link
from hwmodels.ops import AllGather

TOKENS = {
    "model": "tokens", "launch": "9 us", "share": 0.5, "token": "2 us", "expert": "10 ns",
    "spread": "experts", "low": 0.9, "high": 1.1, "evidence": "fitted",
}  # fmt: skip
RING = {"model": "ring", "launch": "5 us", "hop": "1 us", "share": 0.8, "own": 2, "fill": "1 us"}
DIRECT = {
    "model": "direct", "launch": "3 us", "hop": "0 us", "one_shot": 0.5, "two_shot": 0.8,
    "second": "4 us", "ring_launch": "20 us", "share": 0.9, "own": 2, "fill": "1 us",
    "limit": "8 MB",
}  # fmt: skip


def with_costs(data: dict[str, Any], **costs: dict[str, Any]) -> Cluster:
    link = data["node"]["interconnect"]
    node = data["node"] | {"interconnect": link | {"costs": link["costs"] | costs}}
    return validate(data | {"node": node}, Cluster, "test")


def uniform(size: float, **said: Any) -> AllToAll:
    return AllToAll(traffic=np.full((1, 4, 4), size), ranks=(0, 1, 2, 3), **said)


def test_the_halves_of_an_exchange_take_their_own_parameters(cluster_data: dict[str, Any]) -> None:
    cluster = with_costs(cluster_data, dispatch=TOKENS)
    there = price(uniform(1e6, phase="dispatch", tokens=10, experts=64), cluster)
    moving = ((10 / 64 * 2e-6) ** 4 + (3e6 / 50e9) ** 4) ** 0.25
    assert there.seconds[0] == pytest.approx(9e-6 + 64 * 10e-9 + moving)
    assert (there.low[0] / there.seconds[0], there.evidence) == (pytest.approx(0.9), "assumed")
    for phase in (None, "combine"):  # neither stated: those of any all-to-all
        back = price(uniform(1e6, phase=phase), cluster).seconds[0]
        assert back == pytest.approx(5e-6 + 3e6 / 50e9)


def test_a_ring_inside_a_node_and_a_plain_link_across(cluster_data: dict[str, Any]) -> None:
    cluster = with_costs(cluster_data, all_gather=RING)
    took = price(AllGather(bytes=8_000_000, ranks=tuple(range(8))), cluster).seconds[0]
    inside = 6e6 / 80e9 + 2e6 / 200e9
    across = 0.5 * 2e6 / 20e9
    start = max(5e-6 + 3e-6, 20e-6)
    assert took == pytest.approx(start + inside + 2 * np.sqrt(1e-6 * inside) + across)


def test_half_an_all_reduce_takes_a_rings_parameters_but_not_an_engines(
    cluster_data: dict[str, Any],
) -> None:
    halves = with_costs(cluster_data, all_reduce=RING).intra.cost("all_gather")
    assert halves.model_dump()["launch"] == pytest.approx(5e-6)
    assert (
        with_costs(cluster_data, all_reduce=RING | {"evidence": "fitted"})
        .intra.cost("reduce_scatter")
        .evidence
        == "transfer"
    )
    assumed = with_costs(cluster_data, all_reduce=DIRECT).intra.cost("all_gather")
    assert "round figures" in assumed.source


@pytest.mark.parametrize(
    ("name", "cost", "said"),
    [
        ("all_reduce", TOKENS, "costs.all_reduce: model 'tokens' .* allowed are transfer, ring"),
        ("dispatch", RING, "costs.dispatch: model 'ring' .* allowed are transfer, peers"),
        ("all_gather", DIRECT, "costs.all_gather: model 'direct'"),
        ("copy", RING, "costs.copy: model 'ring' .* allowed are transfer, copy"),
        ("all_reduce", RING | {"share": 1.2}, "share"),
        ("all_reduce", RING | {"hop": 1}, "unit missing"),
        ("all_reduce", RING | {"model": "torus"}, "torus"),
    ],
)
def test_models_that_price_something_else_are_refused(
    name: str, cost: dict[str, Any], said: str, cluster_data: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match=said):
        with_costs(cluster_data, **{name: cost})


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), extra=st.floats(0, 1e8))
def test_a_skewed_matrix_costs_more_than_an_even_one(seed: int, extra: float) -> None:
    rng = np.random.default_rng(seed)
    even = np.full((4, 4), 1e6)
    skewed = even.copy()
    skewed[:, int(rng.integers(4))] += extra
    link = validate(
        {"standard": "other", "direction": "one-way", "bandwidth": "100 GB/s",
         "costs": {"dispatch": TOKENS}}, Link, "test",
    )  # fmt: skip
    cost = link.cost("dispatch")
    assert isinstance(cost, CollectiveCost)
    op = AllToAll(traffic=np.stack([even, skewed]), tokens=10, experts=64)
    first, second = cost.seconds(op, Limits(flops=0.0, bandwidth=100e9, units=132.0))
    assert second >= first


def test_tokens_are_one_for_each_row_or_one_for_all() -> None:
    traffic = np.ones((3, 2, 2))
    assert AllToAll(traffic=traffic, tokens=4).tokens.tolist() == [4, 4, 4]  # type: ignore[union-attr]
    with pytest.raises(InputError, match="2 numbers for 3 rows"):
        AllToAll(traffic=traffic, tokens=[1, 2])  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"AllToAll\.tokens: smallest -1"):
        AllToAll(traffic=traffic, tokens=-1)


def test_without_fixed_times_and_over_an_endless_link_nothing_is_left(
    cluster_data: dict[str, Any],
) -> None:
    cluster = with_costs(cluster_data, dispatch=TOKENS, all_reduce=DIRECT, all_gather=RING)
    free = cluster.scaled(communication=float("inf"), fixed=0)
    for op in (
        uniform(1e9, phase="dispatch", tokens=100, experts=64),
        AllReduce(bytes=10**9, ranks=(0, 1, 2, 3)),
        AllGather(bytes=10**9, ranks=tuple(range(8))),
    ):
        assert price(op, free).seconds[0] == 0


def copy_link(data: dict[str, Any], **said: Any) -> Cluster:
    """Replace the copies of the 25 GB/s link between ``hbm`` and ``host``."""
    link = data["node"]["links"]["pcie"]
    cost = {"model": "copy", "startup": "8 us", "efficiency": 0.8} | said
    node = data["node"] | {"links": {"pcie": link | {"costs": {"copy": cost}}}}
    return validate(data | {"node": node}, Cluster, "test")


@pytest.mark.parametrize(
    ("said", "rate"),
    [
        ({}, 20e9),
        ({"in_flight": "128 kB", "latency": "80 us"}, 1.6e9),  # one request of 128 kB at a time
        ({"in_flight": "4 MB", "latency": "80 us"}, 20e9),  # enough of them for the link
        ({"pinned": False, "staging": "6 GB/s"}, 6e9),
        ({"pinned": True, "staging": "6 GB/s"}, 20e9),
    ],
)
def test_copies_reach_what_is_under_way(
    said: dict[str, Any], rate: float, cluster_data: dict[str, Any]
) -> None:
    cluster = copy_link(cluster_data, **said)
    took, none = price(
        Copy(bytes=np.array([10**8, 0]), source="host", target="hbm"), cluster
    ).seconds
    assert took == pytest.approx(8e-6 + 1e8 / rate)
    assert none == 0


def test_copies_at_twice_the_rates_take_half(cluster_data: dict[str, Any]) -> None:
    op = Copy(bytes=10**8, source="host", target="hbm")
    for said in (
        {"in_flight": "128 kB", "latency": "80 us"},
        {"pinned": False, "staging": "6 GB/s"},
    ):
        cluster = copy_link(cluster_data, **said).scaled(fixed=0)
        half = price(op, cluster.scaled(rates=2)).seconds[0]
        assert half == pytest.approx(price(op, cluster).seconds[0] / 2)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"in_flight": "1 MB"}, "both or neither"),
        ({"latency": "1 us"}, "both or neither"),
        ({"pinned": False}, "state staging"),
    ],
)
def test_half_told_copies_are_refused(
    said: dict[str, Any], message: str, cluster_data: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match=message):
        copy_link(cluster_data, **said)
