"""Splits are partitions by whole requests, in order of first appearance."""

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basis.errors import InputError
from traces.routing_trace import RoutingTrace
from traces.splits import Split, split_requests

Make = Callable[..., RoutingTrace]


def appearance(trace: RoutingTrace) -> list[int]:
    return list(dict.fromkeys(trace.request_id.tolist()))


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=2, max_size=9),
    how=st.sampled_from(get_args(Split)),
    prompt=st.integers(1, 5),
)
def test_parts_are_a_partition_by_request(
    make_trace: Make, lengths: list[int], how: Split, prompt: int
) -> None:
    trace = make_trace(lengths=tuple(lengths), prompt=prompt)
    plan, score = split_requests(trace, how)
    assert plan.num_tokens + score.num_tokens == trace.num_tokens
    assert not set(plan.request_id.tolist()) & set(score.request_id.tolist())
    for part in (plan, score):  # rows keep their order and their cells
        rows = np.flatnonzero(np.isin(trace.request_id, part.request_id))
        assert np.array_equal(part.experts, trace.experts[rows])
    order = appearance(trace)
    half = (len(order) + 1) // 2
    expected = order[:half] if how == "early_late" else order[::2]
    assert appearance(plan) == expected


def test_one_request_cannot_be_split(make_trace: Make) -> None:
    with pytest.raises(InputError, match="1 request\\(s\\) -- a split needs at least 2"):
        split_requests(make_trace(lengths=(5,)), "interleaved")


def test_unknown_split(make_trace: Make) -> None:
    wrong: Any = "random"
    with pytest.raises(InputError, match="unknown split 'random' -- one of early_late"):
        split_requests(make_trace(), wrong)
