"""Loads of the wide-EP tables: brute force, and the rows of the installed wheel."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.silicon.wideep import evened, tokens_reaching, uniform, wideep_tables


@given(st.integers(1, 30), st.integers(1, 3), st.integers(0, 10_000))
def test_tokens_reaching_against_dealing_them_out(tokens, top_k, seed):
    rng = np.random.default_rng(seed)
    counts = np.zeros(6, dtype=np.int64)
    while counts.sum() < tokens * top_k:
        expert = rng.integers(6)
        counts[expert] += counts[expert] < tokens
    order = np.argsort(-counts, kind="stable")
    dealt = np.repeat(order, counts[order]).reshape(top_k, tokens)  # slot by slot, token by token
    expected = int((dealt < 2).any(axis=0).sum())
    assert tokens_reaching(counts.reshape(3, 2), tokens) == expected


def test_uniform_rows():
    assert list(uniform(64, 8, 256, 64, masked=True)) == [2, 2, 2, 2]
    # 4 tokens on 4 ranks: one a rank, 8 pairs a rank, less than one for an expert
    assert uniform(4, 8, 256, 4, masked=True).sum() == 8
    assert uniform(4, 8, 256, 4, masked=False).sum() == 0


@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 10_000))
def test_evened_counts_sum_up_and_stay_within_the_tokens(tokens, top_k, seed):
    drawn = np.random.default_rng(seed).integers(0, 3 * tokens, (3, 8)).clip(max=tokens)
    counts = evened(drawn, tokens, top_k)
    assert (counts.sum(axis=1) == tokens * top_k).all()
    assert counts.min() >= 0
    assert counts.max() <= tokens


def test_a_lone_token_puts_all_its_experts_on_one_rank():
    counts = evened(np.zeros((1, 16), dtype=np.int64), 1, 4)[0]
    assert list(counts) == [0] * 12 + [1] * 4
    # two too many are taken from the least used that have any
    assert list(evened(np.array([[3, 1, 2, 0]]), 4, 1)[0]) == [2, 0, 2, 0]


def test_tables_of_the_wheel():
    pytest.importorskip("aiconfigurator_core")
    (table,) = wideep_tables("rtxpro6000-server", ("trtllm",))
    frame = table.frame
    assert table.dtype == "nvfp4"
    assert set(frame["distribution"]) == {"power_law_1.01", "power_law_1.2"}
    assert len(frame) == sum(len(part) for part in table.parts)
    rows = np.concatenate([part.rows() for part in table.parts])
    shown = np.concatenate([part.shown() for part in table.parts])
    pairs = (frame["num_tokens"] * frame["topk"]).to_numpy()
    assert (rows <= pairs).all()
    assert (shown <= frame["num_tokens"]).all()
    # the busiest rank holds at least the mean rank's pairs
    assert (rows >= np.floor(pairs / frame["moe_ep_size"])).all()
    # a token with an expert on the rank shows itself once and brings one to k pairs
    assert np.median(rows / shown) >= 1
