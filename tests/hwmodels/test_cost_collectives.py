"""Ring collectives and groups of ranks: closed forms, and groups priced as if alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basis import InputError
from hwmodels import Cluster, load_cluster, price
from hwmodels.ops import AllGather, AllReduce, AllToAll, ReduceScatter

INSIDE, ACROSS = 0.5 * 100e9, 20e9


@pytest.mark.parametrize("kind", [AllGather, ReduceScatter])
def test_half_an_all_reduce_passes_half_its_bytes(
    kind: type[AllGather] | type[ReduceScatter], cluster: Cluster
) -> None:
    inside = price(kind(bytes=10**8, ranks=(0, 1, 2, 3)), cluster).seconds[0]
    assert inside == pytest.approx(5e-6 + 3 / 4 * 1e8 / INSIDE)
    both = price(kind(bytes=10**8, ranks=tuple(range(8))), cluster).seconds[0]
    assert both == pytest.approx(20e-6 + 3 / 4 * 1e8 / INSIDE + 1 / 2 * 1e8 / 4 / ACROSS)
    assert price(kind(bytes=10**8, ranks=(5,)), cluster).seconds[0] == 0


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 10**9), st.sets(st.integers(0, 15), min_size=2))
def test_scattering_and_gathering_are_an_all_reduce_but_for_a_startup(
    size: int, ranks: set[int]
) -> None:
    cluster = load_cluster("hgx-h100-8x2").scaled(fixed=0)
    group = tuple(sorted(ranks))
    scatter, gather, reduce = (
        price(kind(bytes=size, ranks=group), cluster).seconds[0]
        for kind in (ReduceScatter, AllGather, AllReduce)
    )
    if "all_gather" not in cluster.intra.costs:
        assert scatter + gather == pytest.approx(reduce, rel=1e-12)
    assert 0 < gather < reduce


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 3, 4]), st.integers(1, 6))
def test_groups_take_turns_in_the_rows_and_cost_what_each_does_alone(
    seed: int, size: int, per_node: int
) -> None:
    rng = np.random.default_rng(seed)
    cluster = load_cluster("hgx-h100-8x4", gpus=24)
    node = cluster.node.model_copy(update={"devices": per_node})
    cluster = cluster.model_copy(update={"node": node, "nodes": 24})
    groups = tuple(tuple(g) for g in rng.permutation(24).reshape(-1, size).tolist())
    rows = 3 * len(groups)
    sizes, traffic = rng.random(rows) * 1e7, rng.random((rows, size, size)) * 1e7
    reduced = price(AllReduce(bytes=sizes, ranks=groups), cluster)
    exchanged = price(AllToAll(traffic=traffic, ranks=groups), cluster)
    for row in range(rows):
        group = groups[row % len(groups)]
        ring = price(AllReduce(bytes=sizes[row : row + 1], ranks=group), cluster)
        one = price(AllToAll(traffic=traffic[row : row + 1], ranks=group), cluster)
        for together, alone in ((reduced, ring), (exchanged, one)):
            for end in ("seconds", "low", "high"):
                assert getattr(together, end)[row] == pytest.approx(getattr(alone, end)[0])


def test_a_group_of_all_ranks_is_the_whole_cluster(cluster: Cluster) -> None:
    traffic = np.random.default_rng(0).random((2, 8, 8)) * 1e6
    whole = price(AllToAll(traffic=traffic), cluster).seconds
    named = price(AllToAll(traffic=traffic, ranks=tuple(range(8))), cluster).seconds
    np.testing.assert_array_equal(whole, named)


def test_without_a_fit_a_gather_takes_the_all_reduces_parameters(cluster: Cluster) -> None:
    link = cluster.intra
    fitted = link.cost("all_reduce").model_copy(update={"evidence": "fitted"})
    link = link.model_copy(update={"costs": {"all_reduce": fitted}})
    for name in ("all_gather", "reduce_scatter"):
        assert link.cost(name) == fitted.model_copy(update={"evidence": "transfer"})
        own = link.model_copy(update={"costs": link.costs | {name: fitted}})
        assert own.cost(name).evidence == "fitted"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: AllGather(bytes=1, ranks=()), "at least one"),
        (lambda: AllGather(bytes=1, ranks=((0, 1), (2, 2))), "distinct ranks"),
        (lambda: AllGather(bytes=[1, 1], ranks=((0, 1), (2,))), "all groups of equal ranks"),
        (lambda: AllGather(bytes=[1, 1, 1], ranks=((0, 1), (2, 3))), "3 rows for 2 groups"),
        (
            lambda: AllToAll(traffic=np.ones((2, 2, 2)), ranks=((0, 1, 2), (3, 4, 5))),
            "all groups of 2 ranks",
        ),
    ],
)
def test_groups_that_do_not_fit_the_rows_are_refused(make, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make()


def test_a_rank_that_the_cluster_lacks_is_refused(cluster: Cluster) -> None:
    with pytest.raises(InputError, match=r"ReduceScatter\.ranks: 9 -- round-4 has ranks 0 to 7"):
        price(ReduceScatter(bytes=1, ranks=(0, 9)), cluster)
