"""Oracles of the send model: counting by hand, the simulator's own dispatch, exhaustive search."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.layer import Limits, Topology, busiest_node, spread
from planner.node_partition import partition
from planner.observed import TokenSets, token_sets
from planner.sends import SendCost
from simulator.dispatch import Dispatch, Dispatcher, remote_sends, touched_ranks
from simulator.placement import Placement


def random_tokens(
    seed: int, tokens: int, experts: int, top_k: int
) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Distinct experts per token, with skew and favourite pairs, so that there is affinity."""
    rng = np.random.default_rng(seed)
    taste = rng.gamma(0.7, size=(4, experts)) + 0.02
    score = rng.exponential(size=(tokens, experts)) / taste[rng.integers(4, size=tokens)]
    return np.argsort(score, axis=1)[:, :top_k]


def random_slots(seed: int, experts: int, slots: int, ranks: int) -> np.ndarray:
    """Every expert at least once, never twice on a rank."""
    rng = np.random.default_rng(seed)
    extra = rng.permutation(experts)[: slots - experts]
    order = np.sort(np.concatenate([np.arange(experts), extra]))
    return order.reshape(-1, ranks).T.ravel()


def test_token_sets_merge_equal_sets() -> None:
    sets = token_sets(np.array([[0, 1], [1, 0], [2, 3], [0, 1]]), np.random.default_rng(0))
    merged = dict(zip(map(tuple, sets.members.tolist()), sets.weight.tolist(), strict=True))
    assert merged == {(0, 1): 0.75, (2, 3): 0.25}


def test_token_sets_are_sampled_above_the_limit() -> None:
    experts = random_tokens(1, 3000, 32, 4)
    sets = token_sets(experts, np.random.default_rng(0), most=100)
    assert len(sets.members) <= 100
    assert sets.weight.sum() == pytest.approx(1)


def test_sends_without_replicas_are_remote_distinct_nodes() -> None:
    topology = Topology.of(4, np.array([0, 0, 1, 1]), "even")
    sets = TokenSets(members=np.array([[0, 1], [0, 3]]), weight=np.array([0.25, 0.75]))
    cost = SendCost(sets=sets, topology=topology, num_experts=4)
    # Experts 0, 1 on node 0 and 2, 3 on node 1: one or two distinct nodes, half of them remote.
    assert cost.value(spread(np.arange(4), topology)) == pytest.approx(0.25 * 0.5 + 0.75 * 1.0)


@pytest.mark.parametrize("dispatch", ["even", "nearest"])
def test_sends_agree_with_the_dispatch_of_the_simulator(dispatch: Dispatch) -> None:
    """With replicas on one node at most, or on all, no chance is left: the counts are exact."""
    node_of = np.array([0, 0, 1, 1])
    slots = np.array(
        [0, 1, 2, 3, 0, 4, 5, 2] if dispatch == "nearest" else [0, 1, 2, 3, 4, 5, 6, 7]
    )
    experts = random_tokens(2, 400, int(slots.max()) + 1, 3)
    every = np.repeat(experts, 4, axis=0)  # each token once at home on each rank
    home = np.tile(np.arange(4), len(experts))
    place = Placement(slots=slots[None], num_experts=int(slots.max()) + 1, num_ranks=4)
    chooser = Dispatcher(placement=place, dispatch=dispatch, node_of=node_of)
    touched = touched_ranks(chooser.assign(every[:, None], home), place)
    counted = remote_sends(touched, home, node_of)[0][0] / len(every)
    topology = Topology.of(8, node_of, dispatch)
    cost = SendCost(
        sets=token_sets(experts, np.random.default_rng(0)),
        topology=topology,
        num_experts=place.num_experts,
    )
    assert cost.value(spread(slots, topology)) == pytest.approx(counted)


@pytest.mark.parametrize("dispatch", ["even", "nearest"])
def test_spread_agrees_with_the_simulator_in_expectation(dispatch: Dispatch) -> None:
    node_of = np.array([0, 0, 1, 1, 2, 2])
    slots = random_slots(3, 8, 12, 6)
    place = Placement(slots=slots[None], num_experts=8, num_ranks=6)
    loads = np.arange(1.0, 9.0)
    expected = Dispatcher(placement=place, dispatch=dispatch, node_of=node_of).expected_rank_load(
        loads[None]
    )[0]
    layer = spread(slots, Topology.of(12, node_of, dispatch))
    mine = np.bincount(np.arange(12) // 2, weights=loads[layer.experts] * layer.share)
    np.testing.assert_allclose(mine, expected)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    redundant=st.sampled_from([0, 4]),
    dispatch=st.sampled_from(["even", "nearest"]),
    nodes=st.sampled_from([2, 4]),
)
def test_tables_of_changes_are_exact(
    seed: int, redundant: int, dispatch: Dispatch, nodes: int
) -> None:
    """Every exchange and replacement costs what the table says."""
    experts, ranks = 8, 4
    topology = Topology.of(experts + redundant, np.arange(ranks) * nodes // ranks, dispatch)
    cost = SendCost(
        sets=token_sets(random_tokens(seed, 60, experts, 3), np.random.default_rng(0)),
        topology=topology,
        num_experts=experts,
    )
    layer = spread(random_slots(seed, experts, experts + redundant, ranks), topology)
    at = cost.derivatives(layer)
    assert at.value == pytest.approx(cost.value(layer))
    change = cost.swap_changes(layer, at)
    for s, t in combinations(range(len(layer.experts)), 2):
        if layer.experts[s] != layer.experts[t]:
            after = cost.value(layer.swapped(s, t, topology))
            assert change[s, t] == pytest.approx(after - at.value, abs=1e-9)
    spare = np.flatnonzero(np.bincount(layer.experts)[layer.experts] > 1)
    replaced = cost.replacement_changes(layer, at, spare)
    for row, s in enumerate(spare):
        for expert in set(range(experts)) - {int(layer.experts[s])}:
            after = cost.value(layer.replaced(int(s), expert, topology))
            assert replaced[row, expert] == pytest.approx(after - at.value, abs=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_partition_of_eight_experts_is_the_exhaustive_optimum(seed: int) -> None:
    tokens = random_tokens(seed, 300, 8, 3)
    topology = Topology.of(8, np.array([0, 0, 0, 0, 1, 1, 1, 1]), "even")
    cost = SendCost(
        sets=token_sets(tokens, np.random.default_rng(0)), topology=topology, num_experts=8
    )
    loads = np.bincount(tokens.ravel(), minlength=8) / tokens.size
    limits = Limits(loads=loads, rank_limit=loads.max(), block_loads=loads[None], node_limit=0.6)
    every = [
        spread(np.array([*left, *sorted(set(range(8)) - set(left))]), topology)
        for left in combinations(range(8), 4)
    ]
    start = spread(np.argsort(-loads), topology)
    allowed = [e for e in every if busiest_node(e, topology, limits) <= limits.node_limit]
    found = partition(start, cost, limits, steps=400, deadline=np.inf, rng=np.random.default_rng(0))
    assert busiest_node(found, topology, limits) <= limits.node_limit
    assert cost.value(found) == pytest.approx(min(cost.value(e) for e in allowed))


def test_partition_puts_replicas_of_the_busiest_pair_on_both_nodes() -> None:
    """Nearest dispatch, tokens use {0, 1} only: two replicas each leave nothing to send."""
    topology = Topology.of(6, np.array([0, 1]), "nearest")
    sets = TokenSets(members=np.array([[0, 1]]), weight=np.ones(1))
    cost = SendCost(sets=sets, topology=topology, num_experts=4)
    loads = np.array([0.5, 0.5, 0.0, 0.0])
    limits = Limits(loads=loads, rank_limit=1.0, block_loads=loads[None], node_limit=1.0)
    start = spread(np.array([0, 2, 3, 1, 2, 3]), topology)
    found = partition(start, cost, limits, steps=50, deadline=np.inf, rng=np.random.default_rng(0))
    assert cost.value(start) == pytest.approx(1.0)
    assert cost.value(found) == pytest.approx(0.0)
    assert sorted(found.experts) == [0, 0, 1, 1, 2, 3]
