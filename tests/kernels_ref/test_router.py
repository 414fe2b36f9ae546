"""Router against a float64 softmax written out in numpy."""

import numpy as np
import pytest
import torch

from kernels_ref import route_topk


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
