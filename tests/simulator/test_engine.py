"""The event engine against schedules worked out by hand and against closed forms."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.engine import Schedule, run


def _schedule(rows: list[tuple[int, int, tuple[int, ...], int]]) -> Schedule:
    """Rows of (rank, stream, after, collective)."""
    rank, stream, after, collective = zip(*rows, strict=True)
    return Schedule(
        rank=np.array(rank), stream=np.array(stream), after=after, collective=np.array(collective)
    )


def test_a_stream_works_in_order() -> None:
    times = run(_schedule([(0, 0, (), -1)] * 3), np.array([1.0, 2.0, 4.0]))
    assert times.start.tolist() == [0, 1, 3]
    assert times.end.tolist() == [1, 3, 7]


def test_streams_of_a_rank_overlap_until_one_waits_for_the_other() -> None:
    rows = [(0, 0, (), -1), (0, 1, (), -1), (0, 0, (1,), -1)]
    times = run(_schedule(rows), np.array([1.0, 5.0, 2.0]))
    assert times.end.tolist() == [1, 5, 7]


def test_a_task_may_wait_for_one_that_ended_long_ago() -> None:
    rows = [(0, 0, (), -1), (0, 1, (), -1), (0, 1, (0,), -1)]
    assert run(_schedule(rows), np.array([1.0, 5.0, 2.0])).end.tolist() == [1, 5, 7]


def test_a_collective_starts_with_the_last_and_ends_for_all() -> None:
    rows = [(r, 0, (), -1) for r in range(3)] + [(r, 1, (r,), 7) for r in range(3)]
    times = run(_schedule(rows), np.array([1.0, 4.0, 2.0, 10.0, 10.0, 10.0]))
    assert times.ready[3:].tolist() == [1, 4, 2]
    assert times.start[3:].tolist() == [4, 4, 4]
    assert times.end[3:].tolist() == [14, 14, 14]


def test_a_collective_takes_its_longest_part() -> None:
    rows = [(0, 0, (), 0), (1, 0, (), 0)]
    for seconds in ([1.0, 3.0], [3.0, 1.0]):
        assert run(_schedule(rows), np.array(seconds)).end.tolist() == [3, 3]


def test_independent_collectives_do_not_wait_for_each_other() -> None:
    rows = [(0, 0, (), 0), (1, 0, (), 0), (2, 0, (), 1), (3, 0, (), 1)]
    assert run(_schedule(rows), np.array([5.0, 5.0, 1.0, 1.0])).end.tolist() == [5, 5, 1, 1]


def test_a_circle_is_an_error() -> None:
    rows = [(0, 0, (1,), -1), (0, 1, (0,), -1), (1, 0, (), -1)]
    with pytest.raises(ValueError, match="2 of 3 tasks never ran"):
        run(_schedule(rows), np.ones(3))


def test_collectives_joined_in_opposite_orders_are_an_error() -> None:
    rows = [(0, 0, (), 0), (0, 0, (), 1), (1, 0, (), 1), (1, 0, (), 0)]
    with pytest.raises(ValueError, match="4 of 4 tasks never ran"):
        run(_schedule(rows), np.ones(4))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_phases_between_collectives_equal_the_sum_of_maxima(
    ranks: int, phases: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    compute, together = rng.random((phases, ranks)), rng.random(phases)
    rows, seconds = [], []
    for phase in range(phases):
        base = len(rows)
        rows += [(r, 0, (base - ranks + r,) if phase else (), -1) for r in range(ranks)]
        rows += [(r, 1, (base + r,), phase) for r in range(ranks)]
        seconds += [*compute[phase], *([together[phase]] * ranks)]
    times = run(_schedule(rows), np.array(seconds))
    assert times.end.max() == pytest.approx((compute.max(axis=1) + together).sum(), rel=1e-12)
    waited = (times.start - times.ready).reshape(phases, 2, ranks)[:, 1]
    assert waited == pytest.approx(compute.max(axis=1, keepdims=True) - compute, abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_random_graphs_equal_the_longest_path(
    tasks: int, ranks: int, streams: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rank, stream = rng.integers(ranks, size=tasks), rng.integers(streams, size=tasks)
    after = tuple(
        tuple(rng.choice(t, size=min(t, int(rng.integers(3))), replace=False).tolist())
        for t in range(tasks)
    )
    seconds = rng.random(tasks)
    schedule = Schedule(
        rank=rank, stream=stream, after=after, collective=np.full(tasks, -1, dtype=np.int64)
    )
    ends = np.zeros(tasks)
    for t in range(tasks):
        before = [i for i in range(t) if (rank[i], stream[i]) == (rank[t], stream[t])]
        ends[t] = max((ends[i] for i in [*before, *after[t]]), default=0.0) + seconds[t]
    assert run(schedule, seconds).end == pytest.approx(ends, rel=1e-12)
