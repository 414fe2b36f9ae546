"""Capacity limits against queues walked token by token, and expert choice against loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_ref.capacity import drop_over_capacity, reroute_over_capacity, route_expert_choice
from kernels_ref.router import route_top_p, route_topk


@st.composite
def queues(draw):
    """Candidate lists of distinct experts, some cut short by -1, their weights, and a capacity."""
    experts, tokens = draw(st.integers(1, 9)), draw(st.integers(0, 25))
    length = draw(st.integers(1, experts))
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    popular = rng.normal(size=experts) * draw(st.sampled_from([0.0, 2.0]))  # even or skewed
    order = np.argsort(-(popular + rng.gumbel(size=(tokens, experts))), axis=1)
    ids = np.where(np.arange(length) < rng.integers(1, length + 1, (tokens, 1)), order[:, :length],
                   -1)  # fmt: skip
    weights = np.where(ids < 0, 0, -np.sort(-rng.random((tokens, length)), axis=1))
    return ids, weights, experts, draw(st.integers(1, max(1, tokens)))


def tensors(*arrays):
    return tuple(torch.from_numpy(array) for array in arrays)


@settings(max_examples=40, deadline=None)
@given(queues())
def test_drop_equals_a_queue_walked_in_token_order(case):
    ids, weights, experts, capacity = case
    found = drop_over_capacity(*tensors(ids, weights), experts, capacity)
    load, lost = [0] * experts, np.zeros(len(ids))
    for t, row in enumerate(ids):
        for k, expert in enumerate(row):
            if expert < 0:
                keeps = False
            else:
                keeps = load[expert] < capacity
                load[expert] += keeps
                lost[t] += 0 if keeps else weights[t, k]
            assert found.topk_ids_TK[t, k] == (expert if keeps else -1)
            assert found.topk_weights_TK[t, k] == (weights[t, k] if keeps else 0)
    np.testing.assert_allclose(found.dropped_mass_T, lost, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(queues(), st.data())
def test_reroute_equals_a_walk_in_token_order(case, data):
    ids, weights, experts, capacity = case
    top_k = data.draw(st.integers(1, ids.shape[1]))
    found = reroute_over_capacity(*tensors(ids, weights), top_k, experts, capacity)
    load = [0] * experts
    for t, row in enumerate(ids):
        taken = []
        for j, expert in enumerate(row):
            if expert >= 0 and len(taken) < top_k and load[expert] < capacity:
                load[expert] += 1
                taken.append(j)
        padding = top_k - len(taken)
        assert found.topk_ids_TK[t].tolist() == [*row[taken], *[-1] * padding]
        kept = weights[t, taken]
        assert found.topk_weights_TK[t].tolist() == [*kept, *[0.0] * padding]
        lost = weights[t, :top_k].sum() - kept.sum()
        np.testing.assert_allclose(found.dropped_mass_T[t], lost, atol=1e-12)
        assert found.dropped_mass_T[t] >= -1e-12


def test_worked_by_hand():
    ids = torch.tensor([[0, 1, 2], [0, 2, 1], [0, 1, 2]])
    weights = torch.tensor([[0.5, 0.25, 0.125]]).expand(3, 3)
    dropped = drop_over_capacity(ids[:, :2], weights[:, :2], 3, 1)
    assert dropped.topk_ids_TK.tolist() == [[0, 1], [-1, 2], [-1, -1]]
    assert dropped.topk_weights_TK.tolist() == [[0.5, 0.25], [0, 0.25], [0, 0]]
    assert dropped.dropped_mass_T.tolist() == [0, 0.5, 0.75]
    # token 1 wants 0 and 2, gets 2 alone (1 is full); token 2 finds room nowhere
    rerouted = reroute_over_capacity(ids, weights, 2, 3, 1)
    assert rerouted.topk_ids_TK.tolist() == [[0, 1], [2, -1], [-1, -1]]
    rerouted = reroute_over_capacity(ids, weights, 2, 3, 2)
    assert rerouted.topk_ids_TK.tolist() == [[0, 1], [0, 2], [1, 2]]
    assert rerouted.topk_weights_TK[2].tolist() == [0.25, 0.125]
    assert rerouted.dropped_mass_T.tolist() == [0, 0, 0.375]


def test_enough_room_changes_nothing():
    torch.manual_seed(0)
    routing = route_topk(torch.randn(50, 8), torch.randn(12, 8), 6, renormalise=False)
    ids, weights = routing.topk_ids_TK, routing.topk_weights_TK
    for found in (
        drop_over_capacity(ids[:, :3], weights[:, :3], 12, 50),
        reroute_over_capacity(ids, weights, 3, 12, 50),
    ):
        assert torch.equal(found.topk_ids_TK, ids[:, :3])
        assert torch.equal(found.topk_weights_TK, weights[:, :3])
        assert found.dropped_mass_T.eq(0).all()


def test_reroute_over_all_experts_fills_every_place():
    """With K T = E C places and all experts on every list, only the last tokens can lose."""
    torch.manual_seed(0)
    routing = route_topk(torch.randn(48, 8), torch.randn(12, 8), 12, renormalise=False)
    found = reroute_over_capacity(routing.topk_ids_TK, routing.topk_weights_TK, 1, 12, 4)
    assert torch.bincount(found.topk_ids_TK.flatten(), minlength=12).eq(4).all()


def test_ragged_top_p_lists_are_limited_too():
    torch.manual_seed(0)
    routing = route_top_p(
        torch.randn(40, 8), torch.randn(6, 8), 0.8, max_experts=4, renormalise=False
    )
    found = drop_over_capacity(routing.topk_ids_TK, routing.topk_weights_TK, 6, 10)
    load = torch.bincount(found.topk_ids_TK.flatten() + 1, minlength=7)[1:]
    wanted = torch.bincount(routing.topk_ids_TK.flatten() + 1, minlength=7)[1:]
    assert torch.equal(load, wanted.clamp(max=10))
    total = routing.topk_weights_TK.sum(1)
    torch.testing.assert_close(found.topk_weights_TK.sum(1) + found.dropped_mass_T, total)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 25), st.integers(2, 9), st.integers(1, 8), st.integers(0, 9999), st.data())
def test_expert_choice_equals_loops(tokens, experts, width, seed, data):
    capacity = data.draw(st.integers(1, tokens))
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1.7, 1.7, size=(tokens, width))
    w = rng.uniform(-1, 1, size=(experts, width)) / width**0.5
    found = route_expert_choice(*tensors(x, w), capacity)
    powers = np.exp([[expert @ token for expert in w] for token in x])
    probs = powers / powers.sum(1, keepdims=True)
    for expert in range(experts):
        best = sorted(range(tokens), key=lambda t: -probs[t, expert])[:capacity]
        assert found.token_ids_EC[expert].tolist() == best
        np.testing.assert_allclose(found.weights_EC[expert], probs[best, expert], rtol=1e-10)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        rounded = [tensor.to(dtype) for tensor in tensors(x, w)]
        narrow = route_expert_choice(*rounded, capacity)
        wide = route_expert_choice(*(tensor.double() for tensor in rounded), capacity)
        expected = wide.probs_TE.T.gather(1, narrow.token_ids_EC)
        error = torch.linalg.norm(narrow.weights_EC.double() - expected)
        assert error < bound * torch.linalg.norm(expected)


@pytest.mark.parametrize("capacity", [0, 4])
def test_expert_choice_refuses_more_tokens_than_there_are(capacity):
    with pytest.raises(ValueError, match=f"capacity is {capacity} -- allowed is 1 to 3 tokens"):
        route_expert_choice(torch.zeros(3, 8), torch.zeros(6, 8), capacity)


@pytest.mark.parametrize("wrong", [-2, 6])
def test_unknown_ids_are_refused(wrong):
    ids, weights = torch.tensor([[0, wrong]]), torch.ones(1, 2)
    with pytest.raises(ValueError, match=f"expert id {wrong} for 6 experts -- allowed is -1"):
        drop_over_capacity(ids, weights, 6, 2)
    with pytest.raises(ValueError, match=f"expert id {wrong} for 6 experts -- allowed is -1"):
        reroute_over_capacity(ids, weights, 1, 6, 2)


def test_impossible_capacity_and_top_k_are_refused():
    ids, weights = torch.tensor([[0, 1]]), torch.ones(1, 2)
    with pytest.raises(ValueError, match="capacity is 0 -- allowed is 1 token or more"):
        drop_over_capacity(ids, weights, 6, 0)
    with pytest.raises(ValueError, match="top_k is 3 -- allowed is 1 to 2 candidates"):
        reroute_over_capacity(ids, weights, 3, 6, 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_decides_as_the_cpu_does():
    torch.manual_seed(0)
    x, w = torch.randn(60, 16).double(), torch.randn(10, 16).double()
    picked = route_expert_choice(x.cuda(), w.cuda(), 7)
    assert torch.equal(picked.token_ids_EC.cpu(), route_expert_choice(x, w, 7).token_ids_EC)
    routing = route_topk(x, w, 6, renormalise=False)
    here = routing.topk_ids_TK, routing.topk_weights_TK
    there = [tensor.cuda() for tensor in here]
    for found, expected in (
        (drop_over_capacity(*there, 10, 30), drop_over_capacity(*here, 10, 30)),
        (reroute_over_capacity(*there, 3, 10, 15), reroute_over_capacity(*here, 3, 10, 15)),
    ):
        assert torch.equal(found.topk_ids_TK.cpu(), expected.topk_ids_TK)
        torch.testing.assert_close(found.dropped_mass_T.cpu(), expected.dropped_mass_T)
