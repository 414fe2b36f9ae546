"""Communication prices: closed forms for uniform traffic, brute force for the busiest port."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basis import InputError
from hwmodels import AllReduce, AllToAll, Cluster, Copy, load_cluster, price
from hwmodels.cost_comm import busiest_port

INSIDE, ACROSS = 0.5 * 100e9, 20e9


def one_node(cluster: Cluster) -> Cluster:
    return cluster.model_copy(update={"gpus": 4})


def uniform(ranks: int, size: float) -> AllToAll:
    return AllToAll(traffic=np.full((1, ranks, ranks), size))


def test_uniform_all_to_all_on_one_node_is_alpha_beta(cluster: Cluster) -> None:
    seconds = price(uniform(4, 1e6), one_node(cluster)).seconds[0]
    assert seconds == pytest.approx(5e-6 + 3 * 1e6 / INSIDE)


def test_uniform_all_to_all_across_nodes_is_bound_by_the_network_port(cluster: Cluster) -> None:
    seconds = price(uniform(8, 1e6), cluster).seconds[0]
    assert seconds == pytest.approx(20e-6 + 4 * 1e6 / ACROSS)


def test_traffic_inside_can_be_the_slower_part(cluster: Cluster) -> None:
    traffic = np.zeros((1, 8, 8))
    traffic[0, 0, 1] = 50e6
    traffic[0, 0, 4] = 1e6
    assert price(AllToAll(traffic=traffic), cluster).seconds[0] == pytest.approx(
        20e-6 + 50e6 / INSIDE
    )


def test_many_senders_to_one_rank_share_its_port(cluster: Cluster) -> None:
    traffic = np.zeros((1, 4, 4))
    traffic[0, :, 2] = 1e6  # its own row is free
    assert price(AllToAll(traffic=traffic), one_node(cluster)).seconds[0] == pytest.approx(
        5e-6 + 3e6 / INSIDE
    )


def test_one_rank_sends_nothing(cluster: Cluster) -> None:
    alone = cluster.model_copy(update={"gpus": 1})
    assert price(uniform(1, 1e9), alone).seconds[0] == 0
    assert price(AllReduce(bytes=10**9, ranks=(3,)), cluster).seconds[0] == 0


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), ranks=st.integers(2, 12), per_node=st.integers(1, 5))
def test_busiest_port_by_brute_force(seed: int, ranks: int, per_node: int) -> None:
    traffic = np.random.default_rng(seed).integers(0, 100, (2, ranks, ranks))
    node_of = np.arange(ranks) // per_node
    inside, across = busiest_port(traffic, node_of)
    for step in range(2):
        ports = {"inside": [0] * (2 * ranks), "across": [0] * (2 * ranks)}
        for g in range(ranks):
            for h in range(ranks):
                if g != h:
                    kind = "inside" if node_of[g] == node_of[h] else "across"
                    ports[kind][g] += traffic[step, g, h]
                    ports[kind][ranks + h] += traffic[step, g, h]
        assert (inside[step], across[step]) == (max(ports["inside"]), max(ports["across"]))


def test_all_reduce_on_one_node_is_a_ring(cluster: Cluster) -> None:
    seconds = price(AllReduce(bytes=10**8, ranks=(0, 1, 2, 3)), cluster).seconds[0]
    assert seconds == pytest.approx(5e-6 + 2 * 3 / 4 * 1e8 / INSIDE)


def test_all_reduce_across_nodes_sends_each_ranks_share(cluster: Cluster) -> None:
    seconds = price(AllReduce(bytes=10**8, ranks=tuple(range(8))), cluster).seconds[0]
    inside, across = 2 * 3 / 4 * 1e8 / INSIDE, 2 * 1 / 2 * 1e8 / 4 / ACROSS
    assert seconds == pytest.approx(20e-6 + inside + across)


def test_all_reduce_of_one_rank_per_node_uses_only_the_network(cluster: Cluster) -> None:
    seconds = price(AllReduce(bytes=10**8, ranks=(1, 5)), cluster).seconds[0]
    assert seconds == pytest.approx(20e-6 + 1e8 / ACROSS)


def test_copies_use_the_link_between_the_memories(cluster: Cluster) -> None:
    up, none = price(Copy(bytes=np.array([10**9, 0]), source="host", target="hbm"), cluster).seconds
    assert up == pytest.approx(8e-6 + 1e9 / 12.5e9)
    assert none == 0


def test_copy_within_a_memory_reads_and_writes(cluster: Cluster) -> None:
    seconds = price(Copy(bytes=10**9, source="hbm", target="hbm"), cluster).seconds[0]
    assert seconds == pytest.approx(10e-6 + 2e9 / (0.8 * 2e12))


def test_free_communication(cluster: Cluster) -> None:
    free = cluster.scaled(communication=float("inf"), fixed=0)
    assert price(uniform(8, 1e9), free).seconds[0] == 0
    assert price(AllReduce(bytes=10**9, ranks=(0, 7)), free).seconds[0] == 0


def test_doubling_rates_halves_the_time_without_fixed_parts() -> None:
    cluster = load_cluster("hgx-h100-8x2")
    once, twice = cluster.scaled(fixed=0), cluster.scaled(rates=2, fixed=0)
    for op in (uniform(16, 1e6), AllReduce(bytes=10**7, ranks=(0, 1, 9))):
        np.testing.assert_allclose(price(op, twice).seconds, price(op, once).seconds / 2)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32 - 1))
def test_more_bytes_are_never_cheaper(seed: int) -> None:
    rng = np.random.default_rng(seed)
    traffic = rng.random((1, 16, 16)) * 1e7
    more = traffic + rng.random((1, 16, 16)) * 1e7
    cluster = load_cluster("hgx-h200-8x2")
    few, many = price(AllToAll(traffic=np.concatenate([traffic, more])), cluster).seconds
    assert few <= many


def test_interval_is_the_outermost_links(cluster: Cluster) -> None:
    told = price(uniform(16, 1e6), load_cluster("hgx-h200-8x2"))
    network = load_cluster("hgx-h200-8x2").network
    assert network is not None
    np.testing.assert_allclose(told.low / told.seconds, network.cost("all_to_all").low)
    assert told.evidence == "fitted"


@pytest.mark.parametrize(
    ("op", "said"),
    [
        (uniform(4, 1.0), "for 4 ranks -- round-4 has 8"),
        (AllReduce(bytes=1, ranks=(0, 8)), "ranks 0 to 7"),
        (Copy(bytes=1, source="hbm", target="nvme"), "no memory 'nvme'"),
        (Copy(bytes=1, source="host", target="disk"), "no memory 'disk'"),
    ],
)
def test_strangers_are_refused(op, said: str, cluster: Cluster) -> None:
    with pytest.raises(InputError, match=said):
        price(op, cluster)


def test_memories_without_an_edge_are_refused(cluster: Cluster) -> None:
    node = cluster.node.model_copy(update={"links": {}})
    with pytest.raises(InputError, match="no path from 'hbm' to 'host' -- edges: none"):
        price(Copy(bytes=1, source="hbm", target="host"), cluster.model_copy(update={"node": node}))
