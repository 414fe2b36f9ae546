"""Invariants of composed batches: what a slot runs, who runs at once, and how often."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basis.errors import InputError
from traces.batches import Batches, decode_batches, prefill_batches
from traces.routing_trace import RoutingTrace

Make = Callable[..., RoutingTrace]
LENGTHS = st.lists(st.integers(3, 12), min_size=1, max_size=8).map(tuple)


def decode_order(trace: RoutingTrace) -> dict[int, list[int]]:
    """Rows of each request's decode phase by position, found the slow way."""
    rows: dict[int, list[int]] = {}
    for row in sorted(range(trace.num_tokens), key=lambda r: int(trace.position[r])):
        if trace.decode[row]:
            rows.setdefault(int(trace.request_id[row]), []).append(row)
    return rows


@settings(deadline=None)
@given(
    lengths=LENGTHS, batch=st.integers(1, 20), steps=st.integers(1, 25), seed=st.integers(0, 999)
)
def test_a_slot_walks_through_whole_requests(
    make_trace: Make, lengths: tuple[int, ...], batch: int, steps: int, seed: int
) -> None:
    trace = make_trace(lengths=lengths)
    batches = decode_batches(trace, batch=batch, steps=steps, seed=seed)
    assert batches.rows.shape == batches.context.shape == (steps, batch)
    assert batches.decode
    assert trace.decode[batches.rows].all()
    assert np.array_equal(batches.context, trace.position[batches.rows] + 1)
    order = decode_order(trace)
    following = {a: b for rows in order.values() for a, b in pairwise(rows)}
    firsts = {rows[0] for rows in order.values()}
    for slot in batches.rows.T.tolist():
        for row, after in pairwise(slot):
            if row in following:
                assert after == following[row]
            else:
                assert after in firsts
    if batch <= len(lengths):
        for step in batches.rows:
            assert len(set(trace.request_id[step].tolist())) == batch


@pytest.mark.parametrize("batch", [3, 4, 9])
def test_the_seed_decides(make_trace: Make, batch: int) -> None:
    trace = make_trace(lengths=(9, 8, 12, 11))

    def rows(seed: int) -> Any:
        return decode_batches(trace, batch=batch, steps=30, seed=seed).rows

    assert np.array_equal(rows(0), rows(0))
    assert not np.array_equal(rows(0), rows(1))


def test_all_requests_take_turns(make_trace: Make) -> None:
    # 6 requests of 3 decode tokens in 2 slots: every 18 slot-steps serve each of them once
    trace = make_trace(lengths=(5,) * 6)
    for seed in range(5):
        rows = decode_batches(trace, batch=2, steps=200, seed=seed).rows
        _, tokens = np.unique(trace.request_id[rows], return_counts=True)
        assert len(tokens) == 6
        assert tokens.max() - tokens.min() <= 2 * 3


def test_a_slot_starts_in_a_request_in_proportion_to_its_length(make_trace: Make) -> None:
    trace = make_trace(lengths=(8, 24), prompt=0)
    starts = [decode_batches(trace, batch=1, steps=1, seed=s).rows[0, 0] for s in range(400)]
    share = np.mean(trace.request_id[starts] == trace.request_id[trace.position == 20])
    assert abs(share - 0.75) < 4 * np.sqrt(0.75 * 0.25 / 400)


def test_with_replacement_every_token_is_equally_likely(make_trace: Make) -> None:
    # closed form: renewal process in its stationary state, p = 1 / tokens in each single step
    trace = make_trace(lengths=(3, 12, 5, 8))
    decode_rows = np.flatnonzero(trace.decode)
    batch, steps = 20_000, 15
    rows = decode_batches(trace, batch=batch, steps=steps, seed=1).rows
    expected = batch / len(decode_rows)
    for step in (0, 7, 14):
        counts = np.bincount(rows[step], minlength=trace.num_tokens)[decode_rows]
        chi2 = ((counts - expected) ** 2 / expected).sum()
        assert chi2 < 60  # 19 degrees of freedom: P < 1e-5
    assert not np.array_equal(rows[0], rows[1])


def test_copies_of_a_request_are_not_in_lock_step(make_trace: Make) -> None:
    trace = make_trace(lengths=(42,))
    rows = decode_batches(trace, batch=40, steps=5, seed=0).rows
    assert all(len(set(step.tolist())) > 10 for step in rows)


def test_a_trace_without_decode_rows(make_trace: Make) -> None:
    prompts = make_trace(prompt=99)
    with pytest.raises(InputError, match=r"no decode rows \(20 prefill rows\).*phase='any'"):
        decode_batches(prompts, batch=2, steps=2, seed=0)
    batches = decode_batches(prompts, batch=2, steps=50, seed=0, phase="any")
    assert not batches.decode
    assert set(batches.rows.ravel().tolist()) == set(range(20))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: decode_batches(t, batch=0, steps=1, seed=0), "batch 0 -- must be at least 1"),
        (lambda t: decode_batches(t, batch=1, steps=0, seed=0), "steps 0"),
        (lambda t: prefill_batches(t, tokens=0, steps=1, seed=0), "tokens 0"),
        (lambda t: decode_batches(t, batch=1, steps=1, seed=0, phase="both"), "unknown phase"),
    ],
)
def test_impossible_requests(
    make_trace: Make, call: Callable[[RoutingTrace], Batches], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        call(make_trace())


@settings(deadline=None)
@given(
    lengths=LENGTHS, prompt=st.integers(1, 9), tokens=st.integers(1, 40), seed=st.integers(0, 99)
)
def test_prefill_takes_whole_prompts_within_the_budget(
    make_trace: Make, lengths: tuple[int, ...], prompt: int, tokens: int, seed: int
) -> None:
    trace = make_trace(lengths=lengths, prompt=prompt)
    batches = prefill_batches(trace, tokens=tokens, steps=6, seed=seed)
    sizes = {
        int(r): int(((trace.request_id == r) & ~trace.decode).sum())
        for r in np.unique(trace.request_id)
    }
    served = []
    for batch in batches:
        assert batch.starts[0] == 0
        assert batch.starts[-1] == len(batch.rows)
        assert not trace.decode[batch.rows].any()
        assert np.array_equal(batch.context, trace.position[batch.rows] + 1)
        for start, stop in pairwise(batch.starts):
            prompt_rows = batch.rows[start:stop]
            request = int(trace.request_id[prompt_rows[0]])
            assert (trace.request_id[prompt_rows] == request).all()
            assert trace.position[prompt_rows].tolist() == list(range(sizes[request]))
            served.append(request)
        assert len(batch.rows) <= tokens or len(batch.starts) == 2
    whole_rounds = len(served) // len(sizes)
    counts = np.unique(served, return_counts=True)[1]
    assert counts.max() <= whole_rounds + 1
    if whole_rounds:
        assert counts.min() >= whole_rounds


def test_prefill_is_greedy(make_trace: Make) -> None:
    # prompts of 4 tokens and a budget of 11: two fit, the third waits
    trace = make_trace(lengths=(6, 7, 8, 9), prompt=4)
    for batch in prefill_batches(trace, tokens=11, steps=5, seed=3):
        assert batch.starts.tolist() == [0, 4, 8]


def test_prefill_needs_prompts(make_trace: Make) -> None:
    with pytest.raises(InputError, match=r"no prefill rows \(20 decode rows\)"):
        prefill_batches(make_trace(prompt=0), tokens=8, steps=1, seed=0)
