"""The sample of whole requests: the same from any parts, spread and within bounds."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from basis.errors import InputError
from traces.measures.base import About, measure
from traces.measures.sample import Sample, chosen_requests
from traces.routing_trace import RoutingTrace, request_order
from traces.trace_set import chunks_of

Make = Callable[..., RoutingTrace]


def about(lengths: list[int]) -> About:
    meta = object()
    total = sum(lengths)
    return About(meta=meta, domains=(), num_tokens=total, lengths=np.array(lengths))  # type: ignore[arg-type]


def splitmix(number: int) -> int:
    """Scramble with Python's integers."""
    mask = 2**64 - 1
    z = ((number + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40), tokens=st.integers(1, 600))
def test_the_first_in_hash_order_that_fit(lengths: list[int], tokens: int) -> None:
    chosen = chosen_requests(about(lengths), tokens)
    expected: set[int] = set()
    room = tokens
    for request in sorted(range(len(lengths)), key=splitmix):
        if lengths[request] > room:
            break
        expected.add(request)
        room -= lengths[request]
    if not expected:
        expected = {lengths.index(min(lengths))}
    assert set(np.flatnonzero(chosen).tolist()) == expected
    if sum(lengths) <= tokens:
        assert chosen.all()


def test_splitmix_is_the_published_generator() -> None:
    # first outputs of SplitMix64 with seed 1234567 (Rosetta Code): the state grows by the constant
    seed = 1234567
    mask = 2**64 - 1
    for place, output in enumerate((6457827717110365317, 3203168211198807973, 9817491932198370423)):
        z = (seed + (place + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        assert z ^ (z >> 31) == output


def test_no_limit_takes_all() -> None:
    assert chosen_requests(about([5, 7, 9]), None).all()


def test_a_sample_is_spread_over_the_requests() -> None:
    chosen = np.flatnonzero(chosen_requests(about([10] * 1000), 3000))
    assert len(chosen) == 300
    assert np.histogram(chosen, bins=4, range=(0, 1000))[0].min() > 50


@given(
    lengths=st.lists(st.integers(1, 12), min_size=2, max_size=8).map(tuple),
    tokens=st.integers(1, 60),
    rows=st.integers(1, 20),
    cut=st.integers(0, 8),
)
def test_the_same_from_any_chunks_and_parts(
    make_trace: Make, lengths: tuple[int, ...], tokens: int, rows: int, cut: int
) -> None:
    trace = make_trace(lengths=lengths)
    known = About.of(trace)
    whole = Sample(known, tokens)
    measure(trace, [whole])
    first, second = Sample(known, tokens), Sample(known, tokens)
    for chunk in chunks_of(trace, rows):
        for part, rows_of in (
            (first, chunk.request_id < cut),
            (second, chunk.request_id >= cut),
        ):
            if rows_of.any():
                part.add(chunk.select(rows_of))
    second.merge(first)
    one, other = whole.result(), second.result()
    assert one.to_dict() == other.to_dict()
    for name, column in one.trace.columns.items():
        assert np.array_equal(column, other.trace.columns[name])
    taken = np.flatnonzero(chosen_requests(known, tokens))
    order = request_order(trace)
    assert one.trace.num_tokens == np.isin(order, taken).sum()
    assert one.trace.weights is None
    place = list(zip(one.trace.request_id.tolist(), one.trace.position.tolist(), strict=True))
    assert place == sorted(place)
    for row, (request, position) in enumerate(place):
        original = np.flatnonzero((order == request) & (trace.position == position))[0]
        assert np.array_equal(one.trace.experts[row], trace.experts[original])


def test_a_small_trace_is_taken_whole(make_trace: Make) -> None:
    trace = make_trace()
    sample = Sample(About.of(trace))
    measure(trace, [sample])
    assert sample.result().to_dict() == {
        "tokens": 20, "requests": 3, "tokens_share": 1.0, "whole": True,
    }  # fmt: skip


def test_bad_input(make_trace: Make) -> None:
    known = About.of(make_trace())
    with pytest.raises(InputError, match="sample of 0 tokens -- must be at least 1"):
        Sample(known, 0)
    with pytest.raises(InputError, match="no tokens were given"):
        Sample(known).result()
