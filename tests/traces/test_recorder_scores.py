"""Candidates against plain definitions: which function of the logits a router uses is found."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from basis.errors import InputError  # noqa: E402
from traces.record_scores import Candidates  # noqa: E402

T, E, K, M = 6, 8, 2, 4
PLAIN = {
    "softmax": lambda row: [math.exp(x) / sum(math.exp(y) for y in row) for x in row],
    "sigmoid": lambda row: [1 / (1 + math.exp(-x)) for x in row],
    "sqrtsoftplus": lambda row: [math.sqrt(math.log(1 + math.exp(x))) for x in row],
    "as returned": lambda row: [abs(x) for x in row],
}


def case(rule, seed, *, normalised, factor, bias):
    """Logits, ids, weights and scores of a router that uses ``rule``."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(T, E))
    if rule == "as returned":
        logits = np.abs(logits)
    scores = np.array([PLAIN[rule](row) for row in logits.tolist()])
    ids = np.argsort(-(scores + bias * rng.normal(size=E)), axis=1)[:, :K]
    weights = np.take_along_axis(scores, ids, axis=1)
    if normalised:
        weights = weights / weights.sum(1, keepdims=True)
    return logits, ids, weights * factor, scores


def read(candidates, logits, ids, weights):
    return candidates.read(
        (torch.tensor(logits).float(), None), torch.tensor(ids), torch.tensor(weights).float(), 0
    )


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(list(PLAIN)), st.integers(0, 10**6), st.booleans(),
    st.sampled_from([1.0, 2.5]), st.sampled_from([0.0, 0.3]),
)  # fmt: skip
def test_the_best_scores_whatever_is_done_to_the_weights(rule, seed, normalised, factor, bias):
    logits, ids, weights, scores = case(rule, seed, normalised=normalised, factor=factor, bias=bias)
    real = np.array([True, False, True, True, True, True])
    weights[1] = np.nan  # padding may hold anything
    candidates = Candidates(M, E)
    best = read(candidates, logits, ids, weights)
    found, their = candidates.scored([best], weights[real][:, None], real)
    for row, at in enumerate(np.flatnonzero(real)):
        order = sorted(range(E), key=lambda e: -logits[at, e])[:M]
        assert found[row, 0].tolist() == order
        np.testing.assert_allclose(their[row, 0], scores[at, order], rtol=2e-3)


def test_a_rule_found_once_must_go_on_to_fit():
    candidates, real = Candidates(M, E), np.ones(T, np.bool_)
    for rule, message in (("softmax", None), ("sigmoid", "none of them gives")):
        logits, ids, weights, _ = case(rule, 0, normalised=True, factor=1, bias=0)
        best = read(candidates, logits, ids, weights)
        if message is None:
            candidates.scored([best], weights[:, None], real)
        else:
            with pytest.raises(InputError, match=f"of softmax of its output {message}"):
                candidates.scored([best], weights[:, None], real)


def test_weights_that_say_nothing_of_the_scores_are_refused():
    real = np.ones(T, np.bool_)
    logits, ids, _, _ = case("softmax", 0, normalised=True, factor=1, bias=0)
    same = np.zeros_like(logits)  # all experts alike: every function fits
    for values, message in ((logits, "none of them gives"), (same + 1e-9, "each of softmax, sig")):
        candidates = Candidates(M, E)
        weights = np.full((T, K), 0.5)
        best = read(candidates, values, ids, weights)
        with pytest.raises(InputError, match=message):
            candidates.scored([best], weights[:, None], real)


def test_of_one_weight_no_factor_is_allowed():
    real = np.ones(T, np.bool_)
    logits, _, _, scores = case("sigmoid", 0, normalised=False, factor=1, bias=0)
    ids = logits.argmax(1)[:, None]
    weights = np.take_along_axis(scores, ids, axis=1)
    for factor, fits in ((1.0, True), (2.0, False)):
        candidates = Candidates(M, E)
        best = read(candidates, logits, ids, weights * factor)
        if fits:
            candidates.scored([best], (weights * factor)[:, None], real)
        else:
            with pytest.raises(InputError, match="none of them gives"):
                candidates.scored([best], (weights * factor)[:, None], real)


@pytest.mark.parametrize(
    "routed",
    [None, torch.zeros(T, E - 1), torch.zeros(T, E, dtype=torch.int64), (torch.eye(T, E),)],
    ids=["nothing", "another width", "whole numbers", "0 outside the choice"],
)
def test_a_router_that_does_not_return_scores_is_refused(routed):
    with pytest.raises(InputError, match="does not return the scores of all 8"):
        Candidates(M, E).read(routed, torch.zeros(T, K).long(), torch.ones(T, K), 3)
