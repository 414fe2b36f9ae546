"""Routers against float64 decisions written out in numpy, token by token.

Ids are compared in float64, where random scores do not tie; weights in float32 and bfloat16.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_ref.router import (
    route_group_limited,
    route_sigmoid,
    route_top_p,
    route_topk,
    route_topk_logits,
)


def oracle(x, w, top_k, renormalise):
    logits = np.einsum("td,ed->te", x, w)
    probs = np.exp(logits - logits.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    ids = np.argsort(-probs, axis=1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(probs, ids, axis=1)
    return ids, weights / weights.sum(1, keepdims=True) if renormalise else weights


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("top_k", [1, 4, 32])
def test_equals_float64_softmax(renormalise, top_k):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(50, 16)), rng.normal(size=(32, 16))
    routing = route_topk(torch.from_numpy(x), torch.from_numpy(w), top_k, renormalise=renormalise)
    ids, weights = oracle(x, w, top_k, renormalise)
    np.testing.assert_array_equal(routing.topk_ids_TK.numpy(), ids)
    np.testing.assert_allclose(routing.topk_weights_TK.numpy(), weights, rtol=1e-12)
    np.testing.assert_allclose(routing.probs_TE.sum(1).numpy(), 1.0, rtol=1e-12)


def test_float32_is_near_float64():
    rng = np.random.default_rng(1)
    x, w = rng.normal(size=(200, 16)), rng.normal(size=(32, 16))
    routing = route_topk(
        torch.from_numpy(x).float(), torch.from_numpy(w).float(), 4, renormalise=True
    )
    weights = oracle(x, w, 4, True)[1]
    np.testing.assert_allclose(routing.topk_weights_TK.numpy(), weights, atol=1e-5)


def test_bfloat16_softmax_runs_in_float32():
    x, w = torch.randn(5, 8, dtype=torch.bfloat16), torch.randn(6, 8, dtype=torch.bfloat16)
    assert route_topk(x, w, 2, renormalise=True).probs_TE.dtype == torch.float32


@pytest.mark.parametrize("top_k", [0, 7])
def test_impossible_top_k_is_refused(top_k):
    with pytest.raises(ValueError, match=f"top_k is {top_k} -- allowed is 1 to 6"):
        route_topk(torch.zeros(3, 8), torch.zeros(6, 8), top_k, renormalise=True)


PRECISION = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@st.composite
def grouped_cases(draw):
    """Inputs, router matrix and correction, with the groups, the kept groups and the top k."""
    groups, per_group = draw(st.integers(1, 5)), draw(st.integers(2, 6))
    kept = draw(st.integers(1, groups))
    top_k = draw(st.integers(1, kept * per_group))
    tokens, width = draw(st.integers(0, 12)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    # bounded, so that logits stay small: bfloat16 keeps about 0.002 of a logit
    x = rng.uniform(-1.7, 1.7, size=(tokens, width))
    w = rng.uniform(-1, 1, size=(groups * per_group, width)) / width**0.5
    return x, w, rng.normal(size=len(w)) * 0.3, groups, kept, top_k


def softmax(logits):
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def best_first(scores, candidates):
    return sorted(candidates, key=lambda expert: -scores[expert])


def loop_group_choice(choice, group_score, groups, kept, top_k):
    """Ids of one token: rank the groups, pool the experts of the best, rank those."""
    members = np.arange(len(choice)).reshape(groups, -1)
    ranked = best_first([group_score(choice[group]) for group in members], range(groups))
    pool = [expert for group in ranked[:kept] for expert in members[group]]
    return best_first(choice, pool)[:top_k]


def tensors(*arrays, dtype=torch.float64):
    return tuple(torch.from_numpy(array).to(dtype) for array in arrays)


def relative(found, expected):
    """Relative Frobenius norm of the difference; 0 for two empty arrays."""
    size = np.linalg.norm(expected)
    return np.linalg.norm(found.double().numpy() - expected) / size if size else 0.0


@settings(max_examples=30, deadline=None)
@given(grouped_cases())
def test_topk_logits_equals_loops(case):
    x, w, bias, *_, top_k = case
    x_t, w_t, bias_t = tensors(x, w, bias)
    routing = route_topk_logits(x_t, w_t, top_k, bias_E=bias_t)
    for t, row in enumerate(x):
        logits = np.array([expert @ row for expert in w]) + bias
        ids = best_first(logits, range(len(w)))[:top_k]
        assert routing.topk_ids_TK[t].tolist() == ids
        np.testing.assert_allclose(routing.topk_weights_TK[t], softmax(logits[ids]), rtol=1e-10)
        np.testing.assert_allclose(routing.probs_TE[t], softmax(logits), rtol=1e-10)


def test_topk_logits_without_bias_is_the_renormalised_softmax():
    torch.manual_seed(0)
    x, w = torch.randn(40, 16).double(), torch.randn(24, 16).double()
    found, expected = route_topk_logits(x, w, 4), route_topk(x, w, 4, renormalise=True)
    assert torch.equal(found.topk_ids_TK, expected.topk_ids_TK)
    torch.testing.assert_close(found.topk_weights_TK, expected.topk_weights_TK)


@settings(max_examples=30, deadline=None)
@given(grouped_cases(), st.booleans())
def test_sigmoid_equals_loops(case, renormalise):
    x, w, correction, groups, kept, top_k = case
    x_t, w_t, correction_t = tensors(x, w, correction)
    routing = route_sigmoid(
        x_t, w_t, top_k, correction_E=correction_t, num_groups=groups, kept_groups=kept,
        renormalise=renormalise, scaling=2.5,
    )  # fmt: skip
    for t, row in enumerate(x):
        scores = np.array([1 / (1 + np.exp(-expert @ row)) for expert in w])
        best_two = lambda group: sum(sorted(group)[-2:])  # noqa: E731
        ids = loop_group_choice(scores + correction, best_two, groups, kept, top_k)
        assert routing.topk_ids_TK[t].tolist() == ids
        weights = 2.5 * scores[ids] / (scores[ids].sum() if renormalise else 1)
        np.testing.assert_allclose(routing.topk_weights_TK[t], weights, rtol=1e-10)
        np.testing.assert_allclose(routing.probs_TE[t], scores, rtol=1e-10)


def test_sigmoid_correction_and_groups_worked_by_hand():
    # scores 0.9 0.1 | 0.6 0.7: the best expert's group has the smaller sum of two
    logits = torch.tensor([0.9, 0.1, 0.6, 0.7], dtype=torch.float64).logit()

    def route(correction, kept):
        return route_sigmoid(
            torch.ones(1, 1, dtype=torch.float64), logits.unsqueeze(1), 2,
            correction_E=torch.tensor(correction), num_groups=2, kept_groups=kept,
            renormalise=False, scaling=1.0,
        )  # fmt: skip

    assert route([0.0, 0.0, 0.0, 0.0], 2).topk_ids_TK.tolist() == [[0, 3]]
    assert route([0.0, 0.0, 0.0, 0.0], 1).topk_ids_TK.tolist() == [[3, 2]]
    corrected = route([0.0, 0.5, 0.0, 0.0], 1)
    assert corrected.topk_ids_TK.tolist() == [[0, 1]]
    np.testing.assert_allclose(corrected.topk_weights_TK, [[0.9, 0.1]])  # not 0.6


def test_sigmoid_scores_that_underflow_weigh_nothing():
    routing = route_sigmoid(
        torch.ones(1, 1), torch.full((4, 1), -200.0), 2, correction_E=torch.zeros(4),
        num_groups=1, kept_groups=1, renormalise=True, scaling=1.0,
    )  # fmt: skip
    assert routing.topk_weights_TK.tolist() == [[0.0, 0.0]]


@settings(max_examples=30, deadline=None)
@given(grouped_cases())
def test_group_limited_equals_loops(case):
    x, w, _, groups, kept, top_k = case
    routing = route_group_limited(
        *tensors(x, w), top_k, num_groups=groups, kept_groups=kept, scaling=16.0
    )
    for t, row in enumerate(x):
        probs = softmax(np.array([expert @ row for expert in w]))
        ids = loop_group_choice(probs, max, groups, kept, top_k)
        assert routing.topk_ids_TK[t].tolist() == ids
        np.testing.assert_allclose(routing.topk_weights_TK[t], 16 * probs[ids], rtol=1e-10)
        np.testing.assert_allclose(routing.probs_TE[t], probs, rtol=1e-10)


@settings(max_examples=30, deadline=None)
@given(grouped_cases(), st.floats(0.05, 0.95), st.booleans())
def test_top_p_equals_loops(case, p, renormalise):
    x, w, *_, most = case
    routing = route_top_p(*tensors(x, w), p, max_experts=most, renormalise=renormalise)
    assert routing.topk_ids_TK.shape == (len(x), most)
    for t, row in enumerate(x):
        probs = softmax(np.array([expert @ row for expert in w]))
        ids, reached = [], 0.0
        for expert in best_first(probs, range(len(w)))[:most]:
            if reached < p:
                ids.append(expert)
                reached += probs[expert]
        weights = probs[ids] / (reached if renormalise else 1)
        padding = most - len(ids)
        assert routing.counts_T[t] == len(ids)
        assert routing.topk_ids_TK[t].tolist() == ids + [-1] * padding
        expected = np.concatenate([weights, np.zeros(padding)])
        np.testing.assert_allclose(routing.topk_weights_TK[t], expected, rtol=1e-10)


def test_top_p_from_one_expert_to_all_that_are_allowed():
    torch.manual_seed(0)
    x, w = torch.randn(30, 8), torch.randn(12, 8)
    few = route_top_p(x, w, 1e-9, max_experts=5, renormalise=False)
    many = route_top_p(x, w, 1.0, max_experts=5, renormalise=False)
    assert few.counts_T.eq(1).all()
    assert many.counts_T.eq(5).all()
    assert torch.equal(many.topk_ids_TK, route_topk(x, w, 5, renormalise=False).topk_ids_TK)


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@settings(max_examples=30, deadline=None)
@given(case=grouped_cases(), renormalise=st.booleans())
def test_weights_are_near_float64(dtype, case, renormalise):
    """Weights of the experts that each router chose, from float64 scores of the rounded inputs."""
    x_t, w_t, correction_t = tensors(*case[:3], dtype=dtype)
    groups, kept, top_k = case[3:]
    x, w, correction = (tensor.double().numpy() for tensor in (x_t, w_t, correction_t))
    logits = np.einsum("td,ed->te", x, w)
    soft = np.array([softmax(row) for row in logits]).reshape(logits.shape)
    biased = np.array([softmax(row + correction) for row in logits]).reshape(logits.shape)
    limits = {"num_groups": groups, "kept_groups": kept, "scaling": 1.5}
    sigmoid = route_sigmoid(
        x_t, w_t, top_k, correction_E=correction_t, renormalise=renormalise, **limits
    )
    routings = [
        (route_topk(x_t, w_t, top_k, renormalise=renormalise), soft, renormalise, 1),
        (route_topk_logits(x_t, w_t, top_k, bias_E=correction_t), biased, True, 1),
        (sigmoid, 1 / (1 + np.exp(-logits)), renormalise, 1.5),
        (route_group_limited(x_t, w_t, top_k, **limits), soft, False, 1.5),
        (route_top_p(x_t, w_t, 0.7, max_experts=top_k, renormalise=renormalise), soft,
         renormalise, 1),
    ]  # fmt: skip
    for routing, scores, normed, scaling in routings:
        ids = routing.topk_ids_TK.numpy()
        chosen = np.where(ids < 0, 0, np.take_along_axis(scores, ids.clip(0), axis=1))
        weights = scaling * chosen / (chosen.sum(1, keepdims=True) if normed else 1)
        assert relative(routing.topk_weights_TK, weights) < PRECISION[dtype]
        assert relative(routing.probs_TE, scores) < PRECISION[dtype]
    for routing, scores, *_ in routings[:2]:  # nothing better was left out, rounding apart
        chosen = np.take_along_axis(scores, routing.topk_ids_TK.numpy(), axis=1)
        best = -np.sort(-scores, axis=1)[:, :top_k]
        assert relative(torch.from_numpy(chosen), best) < PRECISION[dtype]


@pytest.mark.parametrize(
    ("groups", "kept", "top_k", "message"),
    [
        (5, 1, 1, "num_groups is 5 for 12 experts -- allowed are equal groups"),
        (0, 1, 1, "num_groups is 0"),
        (4, 5, 1, "kept_groups is 5 -- allowed is 1 to 4"),
        (4, 2, 7, "top_k is 7 -- allowed is 1 to 6"),
    ],
)
def test_impossible_groups_are_refused(groups, kept, top_k, message):
    x, w = torch.zeros(3, 8), torch.zeros(12, 8)
    limits = {"num_groups": groups, "kept_groups": kept, "scaling": 1.0}
    with pytest.raises(ValueError, match=message):
        route_group_limited(x, w, top_k, **limits)
    with pytest.raises(ValueError, match=message):
        route_sigmoid(x, w, top_k, correction_E=w[:, 0], renormalise=True, **limits)


def test_groups_of_one_expert_have_no_best_two():
    with pytest.raises(ValueError, match="equal groups of at least 2 experts"):
        route_sigmoid(
            torch.zeros(3, 8), torch.zeros(4, 8), 1, correction_E=torch.zeros(4), num_groups=4,
            kept_groups=2, renormalise=True, scaling=1.0,
        )  # fmt: skip


@pytest.mark.parametrize("p", [0.0, 1.1, float("nan")])
def test_impossible_p_is_refused(p):
    with pytest.raises(ValueError, match=f"p is {p} -- allowed is above 0, up to 1"):
        route_top_p(torch.zeros(3, 8), torch.zeros(6, 8), p, max_experts=2, renormalise=True)


def test_impossible_max_experts_is_refused():
    with pytest.raises(ValueError, match="max_experts is 7 -- allowed is 1 to 6"):
        route_top_p(torch.zeros(3, 8), torch.zeros(6, 8), 0.5, max_experts=7, renormalise=True)


def test_impossible_top_k_of_logits_is_refused():
    with pytest.raises(ValueError, match="top_k is 7 -- allowed is 1 to 6"):
        route_topk_logits(torch.zeros(3, 8), torch.zeros(6, 8), 7)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_decides_as_the_cpu_does():
    torch.manual_seed(0)
    x, w, bias = torch.randn(64, 32).double(), torch.randn(24, 32).double(), torch.randn(24)
    limits = {"num_groups": 4, "kept_groups": 2, "scaling": 1.0}
    for route in (
        lambda x, w, bias: route_topk_logits(x, w, 4, bias_E=bias.double()),
        lambda x, w, bias: route_sigmoid(x, w, 4, correction_E=bias, renormalise=True, **limits),
        lambda x, w, bias: route_group_limited(x, w, 4, **limits),
        lambda x, w, bias: route_top_p(x, w, 0.6, max_experts=6, renormalise=True),
    ):
        found, expected = route(x.cuda(), w.cuda(), bias.cuda()), route(x, w, bias)
        assert torch.equal(found.topk_ids_TK.cpu(), expected.topk_ids_TK)
        torch.testing.assert_close(found.topk_weights_TK.cpu(), expected.topk_weights_TK)
