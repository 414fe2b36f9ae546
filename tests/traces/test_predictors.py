"""Predictors against plain loops and their stated accuracy."""

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basis.errors import InputError
from traces.predictors import PREDICTORS, most_used, predict


def routed(steps: int, layers: int, experts: int, used: int, seed: int = 0) -> np.ndarray:
    """Return bool [S, L, E] with ``used`` experts in each access."""
    clocks = np.random.default_rng(seed).random((steps, layers, experts))
    return clocks.argsort(axis=-1).argsort(axis=-1) < used


def test_none_all_and_exact() -> None:
    active = routed(10, 4, 6, 2)
    assert not predict("none", active).any()
    assert predict("all", active, depth=3).all()
    for depth in (1, 3, 9):
        exact = predict("exact", active, depth=depth)
        assert not exact[:, :depth].any()
        assert np.array_equal(exact[:, depth:], active[:, depth:])


@settings(max_examples=40)
@given(accuracy=st.floats(0, 1), depth=st.integers(1, 4), seed=st.integers(0, 99))
def test_gate_reuse_predicts_as_many_as_are_used(accuracy: float, depth: int, seed: int) -> None:
    active = routed(30, 4, 8, 3, seed)
    guess = predict("gate_reuse", active, depth=depth, accuracy=accuracy, seed=seed)
    assert not guess[:, :depth].any()
    assert (guess[:, depth:].sum(axis=2) == 3).all()
    again = predict("gate_reuse", active, depth=depth, accuracy=accuracy, seed=seed)
    assert np.array_equal(guess, again)


def test_gate_reuse_has_its_accuracy_and_errs_by_frequency() -> None:
    active = routed(20_000, 2, 16, 2)
    active[:, :, 5] = np.random.default_rng(1).random((20_000, 2)) < 0.5  # a busy expert
    guess = predict("gate_reuse", active, accuracy=0.8)[:, 1]
    truth = active[:, 1]
    right = (guess & truth).sum() / truth.sum()
    error = np.sqrt(0.8 * 0.2 / truth.sum())
    assert abs(right - 0.8) < 5 * error
    idle = ~truth[:, 5]  # accesses in which the busy expert could be a wrong guess
    wrong = (guess & ~truth)[idle].sum(axis=0) / (~truth)[idle].sum(axis=0)
    used = truth.sum(axis=0)
    assert wrong[5] / np.delete(wrong, 5).mean() == pytest.approx(
        used[5] / np.delete(used, 5).mean(), rel=0.15
    )
    assert np.array_equal(predict("gate_reuse", active, accuracy=1.0)[:, 1], truth)
    assert not (predict("gate_reuse", active, accuracy=0.0)[:, 1] & truth).any()


def test_a_trace_of_the_same_seed_does_not_guide_the_errors() -> None:
    active = routed(2000, 2, 16, 2, seed=0)
    guess = predict("gate_reuse", active, accuracy=0.5, seed=0)[:, 1]
    assert abs((guess & active[:, 1]).sum() / active[:, 1].sum() - 0.5) < 0.05


def test_gate_reuse_where_too_few_are_left_to_be_wrong() -> None:
    active = routed(50, 2, 4, 3)
    guess = predict("gate_reuse", active, accuracy=0.0)
    assert (guess[:, 1] == ~active[:, 1]).all()


@pytest.mark.parametrize("count", [1, 3])
def test_frequent_looks_at_the_past_only(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("traces.predictors._CHUNK_CELLS", 100)  # several chunks
    active = routed(40, 3, 6, 2)
    active &= np.random.default_rng(3).random(active.shape) < 0.8
    guess = predict("frequent", active, count=count)
    for step, layer in np.ndindex(40, 3):
        past = active[:step, layer].sum(axis=0)
        best = sorted(np.flatnonzero(past), key=lambda e, past=past: (-past[e], e))[:count]
        assert set(np.flatnonzero(guess[step, layer])) == set(best)
    changed = active.copy()
    changed[20:] = ~changed[20:]
    assert np.array_equal(predict("frequent", changed, count=count)[:21], guess[:21])


@pytest.mark.parametrize("count", [1, 2, 9])
def test_a_limit_keeps_what_was_used_most(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("traces.predictors._CHUNK_CELLS", 100)
    active, chosen = routed(40, 3, 6, 2), routed(40, 3, 6, 3, seed=1)
    kept = most_used(chosen, active, count)
    for step, layer in np.ndindex(40, 3):
        past = active[:step, layer].sum(axis=0)
        wanted = np.flatnonzero(chosen[step, layer])
        best = sorted(wanted, key=lambda e, past=past: (-past[e], e))[:count]
        assert set(np.flatnonzero(kept[step, layer])) == set(best)
    with pytest.raises(InputError, match="count 0 -- must be at least 1"):
        most_used(chosen, active, 0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("oracle", {}, f"unknown predictor 'oracle' -- one of {', '.join(PREDICTORS)}"),
        ("exact", {"depth": 0}, "predictor depth 0 -- must be at least 1 MoE layer ahead"),
        ("gate_reuse", {"accuracy": 1.1}, "predictor accuracy 1.1 -- a probability, 0 to 1"),
        ("gate_reuse", {"accuracy": float("nan")}, "predictor accuracy nan"),
        ("frequent", {}, "count None -- give the experts to predict per layer, 1 to 6"),
        ("frequent", {"count": 7}, "count 7 -- give the experts"),
    ],
)
def test_bad_input(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        predict(name, routed(3, 2, 6, 2), **options)
    with pytest.raises(InputError, match="active is"):
        predict("none", np.ones((2, 3)))  # type: ignore[arg-type]
