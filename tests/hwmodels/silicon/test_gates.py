"""Group-limited gates on equal logits, against a token-by-token gate and counts by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.silicon.gates import GROUPS, KEPT, group_limited, kinds
from hwmodels.silicon.loads import rank_loads


def one_by_one(chosen: list[int], experts: int) -> list[int]:
    """DeepSeek's gate for one token, ties to the lower index."""
    scores = np.where(np.isin(np.arange(experts), chosen), 1.0, 0.5)
    groups = scores.reshape(GROUPS, -1)
    best = np.sort(groups, axis=1)[:, -2:].sum(axis=1)
    kept = sorted(range(GROUPS), key=lambda g: (-best[g], g))[:KEPT]
    size = experts // GROUPS
    allowed = [e for e in range(experts) if e // size in kept]
    return sorted(allowed, key=lambda e: (-scores[e], e))[: len(chosen)]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_as_one_token_after_another(data: st.DataObject) -> None:
    experts, k = data.draw(st.sampled_from([(32, 4), (64, 8), (128, 8)]))
    distinct = st.lists(st.integers(0, experts - 1), min_size=k, max_size=k, unique=True)
    chosen = data.draw(st.lists(distinct, min_size=1, max_size=5))
    weight = data.draw(st.lists(st.integers(1, 9), min_size=len(chosen), max_size=len(chosen)))
    expected = np.zeros(experts, dtype=int)
    for token, times in zip(chosen, weight, strict=True):
        expected[one_by_one(token, experts)] += times
    found = group_limited(np.array(chosen), np.array(weight), experts)
    assert found.tolist() == expected.tolist()
    assert found.sum() == k * sum(weight)


def test_balanced_choices_by_hand() -> None:
    """32 tokens, one singled-out expert in each of 8 groups: the first four groups are kept."""
    loads = rank_loads(32, 8, 256, 1, "balanced", grouped=True)[0]
    assert np.count_nonzero(loads) == 128
    assert not loads[128:].any()
    # each token has one of its group, and the lowest four others: 0 to 3, or 4 for one of these
    assert loads[:6].tolist() == [32, 32, 32, 32, 5, 1]
    assert loads[32:128].tolist() == [1] * 96
    # of eight ranks the first has five of every token's eight pairs
    assert rank_loads(32, 8, 256, 8, "balanced", grouped=True).sum() == 5 * 32


@pytest.mark.parametrize("k", [1, 2, 4])
def test_few_choices_pass_the_gate(k: int) -> None:
    """At most as many groups as are kept: the limit changes nothing."""
    plain = rank_loads(200, k, 64, 4, "power_law_1.2")
    assert (rank_loads(200, k, 64, 4, "power_law_1.2", grouped=True) == plain).all()


@settings(deadline=None, max_examples=40)
@given(tokens=st.integers(1, 60), k=st.integers(1, 8), exponent=st.sampled_from(["1.01", "1.2"]))
def test_kinds_have_the_loads(tokens: int, k: int, exponent: str) -> None:
    counts = rank_loads(tokens, k, 64, 1, f"power_law_{exponent}")[0].astype(np.int64)
    chosen, weight = kinds(counts, tokens, k)
    assert weight.sum() == tokens
    assert (weight > 0).all()
    assert all(len(set(row)) == k for row in chosen.tolist())
    found = np.zeros(64, dtype=int)
    np.add.at(found, chosen, weight[:, None])
    assert found.tolist() == counts.tolist()
