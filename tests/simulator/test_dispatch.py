import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from basis import InputError
from simulator.dispatch import (
    Dispatcher,
    expected_rank_load,
    homes,
    remote_sends,
    tokens_per_slot,
    touched_ranks,
    traffic,
)
from simulator.placement import Placement

NODES = np.array([0, 0, 1, 1])


def _random(seed: int, tokens: int = 24, layers: int = 2, experts: int = 6, extra: int = 2):
    """A random placement on 2 nodes of 2 ranks (distinct replicas per rank), and random tokens."""
    rng = np.random.default_rng(seed)
    while True:
        rows = [
            rng.permutation(np.concatenate([np.arange(experts), rng.integers(0, experts, extra)]))
            for _ in range(layers)
        ]
        place = Placement(slots=np.array(rows, dtype=np.int32), num_experts=experts, num_ranks=4)
        if place.hosts.max() == 1:
            break
    ids = np.argsort(rng.random((tokens, layers, experts)), axis=-1)[..., :3]
    return place, ids, homes(tokens, 4)


def _dispatcher(place: Placement, dispatch: str) -> Dispatcher:
    return Dispatcher(placement=place, dispatch=dispatch, node_of=NODES)  # type: ignore[arg-type]


@given(st.integers(0, 10_000), st.sampled_from(["even", "nearest"]))
def test_every_token_reaches_its_expert(seed: int, dispatch: str) -> None:
    place, ids, home = _random(seed)
    slot = _dispatcher(place, dispatch).assign(ids, home, seed)
    layers = np.arange(ids.shape[1])[None, :, None]
    assert (place.slots[layers, slot] == ids).all()


@given(st.integers(0, 10_000))
def test_even_replicas_differ_by_at_most_one_token(seed: int) -> None:
    place, ids, home = _random(seed)
    slot = _dispatcher(place, "even").assign(ids, home, seed)
    count = tokens_per_slot(slot, place.num_slots)
    for layer in range(place.num_layers):
        for expert in range(place.num_experts):
            mine = count[layer, place.slots[layer] == expert]
            assert mine.max() - mine.min() <= 1


@given(st.integers(0, 10_000))
def test_nearest_never_passes_a_nearer_replica(seed: int) -> None:
    place, ids, home = _random(seed)
    slot = _dispatcher(place, "nearest").assign(ids, home, seed)
    rank = place.rank_of_slot[slot]
    for token, layer, k in np.ndindex(*ids.shape):
        hosts = np.flatnonzero(place.hosts[layer, ids[token, layer, k]])
        near = [
            0 if h == home[token] else 1 if NODES[h] == NODES[home[token]] else 2 for h in hosts
        ]
        mine = near[list(hosts).index(rank[token, layer, k])]
        assert mine == min(near)


def test_shares_are_kept_in_the_long_run() -> None:
    place = Placement(slots=np.array([[0, 1, 0, 2]], dtype=np.int32), num_experts=3, num_ranks=4)
    share = np.array([[0.8, 1.0, 0.2, 1.0]])
    rule = Dispatcher(placement=place, dispatch="shares", node_of=NODES, slot_share=share)
    ids = np.zeros((1000, 1, 1), dtype=np.int64)
    count = tokens_per_slot(rule.assign(ids, homes(1000, 4)), 4)
    assert abs(count[0, 0] - 800) <= 3
    assert count[0, 0] + count[0, 2] == 1000


def test_shares_must_sum_to_one() -> None:
    place = Placement(slots=np.array([[0, 1, 0, 2]], dtype=np.int32), num_experts=3, num_ranks=4)
    with pytest.raises(InputError, match="sum to 1"):
        Dispatcher(
            placement=place,
            dispatch="shares",
            node_of=NODES,
            slot_share=np.array([[0.8, 1.0, 0.1, 1.0]]),
        )
    with pytest.raises(InputError, match="belongs to dispatch 'shares'"):
        Dispatcher(placement=place, dispatch="shares", node_of=NODES)


@given(st.integers(0, 10_000))
def test_expected_load_is_the_mean_of_assignments(seed: int) -> None:
    place, ids, home = _random(seed)
    loads = np.stack([np.bincount(ids[:, i].ravel(), minlength=6) for i in range(2)])
    expected = expected_rank_load(loads, place)
    assert np.allclose(expected.sum(-1), loads.sum(-1))
    slot = _dispatcher(place, "even").assign(ids, home)
    actual = tokens_per_slot(slot, place.num_slots).reshape(2, 4, -1).sum(-1)
    # each slot is within one token of its fluid share
    assert (np.abs(actual - expected) <= place.slots_per_rank).all()


@given(st.integers(0, 10_000))
def test_expected_nearest_load_is_the_mean_over_homes(seed: int) -> None:
    place, _, _ = _random(seed)
    rule = _dispatcher(place, "nearest")
    loads = np.random.default_rng(seed).integers(1, 9, (2, 6)).astype(float)
    expected = rule.expected_rank_load(loads)
    assert np.allclose(expected.sum(-1), loads.sum(-1))
    # many tokens of every expert from every home, as often as its load says
    ids = np.repeat(np.tile(np.arange(6), 4 * 60), 1).reshape(-1, 1, 1).repeat(2, axis=1)
    home = np.repeat(np.arange(4), 6 * 60)
    slot = rule.assign(ids, home)
    for layer in range(2):
        part = np.zeros((6, 4))
        np.add.at(part, (ids[:, layer, 0], place.rank_of_slot[slot[:, layer, 0]]), 1 / (4 * 60))
        assert np.allclose(loads[layer] @ part, expected[layer])


@given(st.integers(0, 10_000))
def test_traffic_and_sends_against_a_loop(seed: int) -> None:
    place, ids, home = _random(seed)
    slot = _dispatcher(place, "even").assign(ids, home, seed)
    touched = touched_ranks(slot, place)
    sent = traffic(touched, home, NODES, 10.0)
    node_sends, rank_sends = remote_sends(touched, home, NODES)
    want = np.zeros_like(sent)
    want_node, want_rank = np.zeros(2, dtype=int), np.zeros(2, dtype=int)
    for token, layer in np.ndindex(*ids.shape[:2]):
        here = home[token]
        ranks = set(place.rank_of_slot[slot[token, layer]].tolist())
        want_rank[layer] += len(ranks - {here})
        want_node[layer] += len({NODES[r] for r in ranks} - {NODES[here]})
        for node in {int(NODES[r]) for r in ranks}:
            entry = here if node == NODES[here] else node * 2 + here % 2
            want[layer, here, entry] += 10.0
            for rank in ranks:
                if NODES[rank] == node:
                    want[layer, entry, rank] += 10.0
    want[:, np.arange(4), np.arange(4)] = 0
    assert np.allclose(sent, want)
    assert node_sends.tolist() == want_node.tolist()
    assert rank_sends.tolist() == want_rank.tolist()


def test_homes_are_balanced() -> None:
    assert np.bincount(homes(16, 8)).tolist() == [2] * 8
    spread = np.bincount(homes(19, 8), minlength=8)
    assert spread.max() - spread.min() <= 1


def test_a_placement_for_another_cluster_is_refused() -> None:
    place, _, _ = _random(1)
    with pytest.raises(InputError, match="4 ranks, the cluster 2"):
        Dispatcher(placement=place, dispatch="even", node_of=np.array([0, 0]))
