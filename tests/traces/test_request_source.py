"""Routing of served requests: which rows of the trace stand for which tokens."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from basis.errors import InputError
from traces.arrivals import Lengths
from traces.request_source import Walks, draw_requests
from traces.routing_trace import RoutingTrace

Make = Callable[..., RoutingTrace]


def test_tokens_walk_round_one_request_of_the_trace(make_trace: Make) -> None:
    trace = make_trace(lengths=(7, 4, 9), prompt=2)
    source = draw_requests(trace, 50, seed=3)
    for request in range(50):
        rows = source.token_rows(request, inputs=5, start=0, stop=40)
        prompt, answer = rows[:5], rows[5:]
        assert len(set(trace.request_id[rows])) == 1
        assert not trace.decode[prompt].any()
        assert trace.decode[answer].all()
        for part in (prompt, answer):
            position = trace.position[part]
            size = len(np.unique(position))
            low = position.min()
            steps = np.diff(position)
            assert ((steps == 1) | (steps == 1 - size)).all()  # on, or round to the start
            assert low == (0 if part is prompt else 2)


def test_draws_are_uniform_over_requests_with_replacement_and_seeded(make_trace: Make) -> None:
    trace = make_trace(lengths=(7, 4, 90))
    source = draw_requests(trace, 9000, seed=0)
    drawn = trace.request_id[source.rows[source.answer.first]]
    _, counts = np.unique(drawn, return_counts=True)
    assert counts / 9000 == pytest.approx([1 / 3] * 3, abs=0.02)  # not by length
    offset = source.answer.offset / source.answer.length
    uniform = np.mean([(n - 1) / (2 * n) for n in (5, 2, 88)])
    assert offset.mean() == pytest.approx(uniform, abs=0.01)
    again = draw_requests(trace, 9000, seed=0)
    assert (again.prompt.offset == source.prompt.offset).all()


def test_a_missing_phase_is_lent_and_said(make_trace: Make) -> None:
    only_decode = make_trace(prompt=0)
    source = draw_requests(only_decode, 4, seed=0)
    assert source.stand_in
    assert "decode tokens stand in for the prefill of 4 of them" in source.statement
    assert len(source.token_rows(0, 3, 0, 6)) == 6
    only_prefill = make_trace(prompt=100)
    said = draw_requests(only_prefill, 4, seed=0).statement
    assert "prefill tokens stand in for the decode of 4" in said
    both = draw_requests(make_trace(prompt=2), 4, seed=0)
    assert not both.stand_in
    assert "stand in" not in both.statement
    assert "with replacement" in both.statement
    assert "seed 0" in both.statement


@given(
    first=st.integers(0, 5), length=st.integers(1, 9), offset=st.integers(0, 8),
    start=st.integers(0, 40), more=st.integers(0, 40), seed=st.integers(0, 99),
)  # fmt: skip
def test_span_ends_give_the_sum_over_the_span(
    first: int, length: int, offset: int, start: int, more: int, seed: int
) -> None:
    walks = Walks(
        first=np.array([first]), length=np.array([length]), offset=np.array([offset % length])
    )
    values = np.random.default_rng(seed).integers(0, 100, 20)
    running = np.concatenate(([0], np.cumsum(values)))
    who = np.zeros(1, dtype=np.int64)
    place, weight = walks.span_ends(who, np.array([start]), np.array([start + more]))
    by_sums = (weight * running[place]).sum()
    one_by_one = values[walks.places(np.int64(0), np.arange(start, start + more))].sum()
    assert by_sums == one_by_one


def test_the_statement_says_what_repeats(make_trace: Make) -> None:
    trace = make_trace(lengths=(7, 4, 9), prompt=2)  # 6 prefill and 14 decode tokens
    lengths = Lengths(inputs=np.full(40, 5), outputs=np.full(40, 8))
    source = draw_requests(trace, 40, 0, lengths)
    drawn = trace.request_id[source.rows[source.answer.first]]
    most = np.unique(drawn, return_counts=True)[1].max()
    said = f"3 recorded requests serve, 3 of them more than once (at most {most} times)"
    assert said in source.statement
    # 5 prompt tokens and 7 decode steps each; together they come by all of the 20 recorded tokens
    assert "of 480 tokens 460 (95.8 %) repeat the routing of a recorded token" in source.statement
    once = draw_requests(make_trace(lengths=(90,), prompt=50), 1, 0, Lengths.fixed(50, 41))
    assert "1 recorded requests serve, 0 of them more than once (at most 1 times)" in once.statement
    assert "of 90 tokens 0 (0.0 %) repeat" in once.statement
    assert "repeat" not in draw_requests(trace, 40, seed=0).statement
    with pytest.raises(InputError, match="40 lengths for 39 requests"):
        draw_requests(trace, 39, 0, lengths)


@given(
    pairs=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=12),
    prompt=st.sampled_from([0, 2, 100]), seed=st.integers(0, 99),
)  # fmt: skip
def test_distinct_rows_are_those_that_tokens_take(
    make_trace: Make, pairs: list[tuple[int, int]], prompt: int, seed: int
) -> None:
    source = draw_requests(make_trace(lengths=(7, 4, 19), prompt=prompt), len(pairs), seed)
    taken: set[int] = set()
    for request, (inputs, outputs) in enumerate(pairs):
        rows = source.token_rows(request, inputs, 0, inputs + outputs - 1)
        assert len(rows) == inputs + outputs - 1  # the workload's lengths, not the recorded ones
        taken |= {*rows.tolist()}
    inputs, outputs = np.array(pairs).T
    assert source.distinct_rows(Lengths(inputs=inputs, outputs=outputs)) == len(taken)


def test_nothing_to_draw(make_trace: Make) -> None:
    with pytest.raises(InputError, match="at least 1"):
        draw_requests(make_trace(), 0, seed=0)
