"""Programs: the evaluator equals the event engine, streams overlap, resources queue."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hwmodels import Stage
from simulator.engine import Schedule, run
from simulator.program import Item, Played, Stream, evaluate, play, simulate_events


def _item(stream: Stream = Stream.COMPUTE, **fields: object) -> Item:
    return Item(name="x", stage=Stage.OTHER, layer=0, stream=stream, **fields)  # type: ignore[arg-type]


def _times(items: list[Item], seconds: list[list[float]]) -> Played:
    return play(items, np.array([seconds]))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_the_evaluator_equals_the_event_engine(
    count: int, ranks: int, steps: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    items = []
    for i in range(count):
        earlier = rng.choice(i, size=min(i, int(rng.integers(4))), replace=False).tolist()
        after = tuple(earlier) if rng.random() < 0.7 else None
        groups = tuple(rng.integers(ranks, size=ranks).tolist()) if rng.random() < 0.3 else None
        items.append(_item(Stream(rng.integers(len(Stream))), after=after, groups=groups))
    seconds = rng.random((steps, count, ranks)) * (rng.random((steps, count, ranks)) < 0.8)
    fast, events = evaluate(items, seconds), simulate_events(items, seconds)
    for name in ("ready", "start", "end"):
        assert getattr(fast, name) == pytest.approx(getattr(events, name), abs=1e-9)


def test_items_follow_one_another_unless_they_say_otherwise() -> None:
    items = [_item(), _item(Stream.FETCH, after=()), _item(after=(0, 1)), _item()]
    played = _times(items, [[1.0], [5.0], [2.0], [1.0]])
    assert played.end[0, :, 0].tolist() == [1, 5, 7, 8]
    assert played.idle.tolist() == [[0]]


def test_groups_of_ranks_do_not_wait_for_each_other() -> None:
    items = [_item(), _item(Stream.COMMUNICATION, groups=(0, 0, 1, 1))]
    played = _times(items, [[1.0, 4.0, 2.0, 1.0], [1.0, 1.0, 3.0, 1.0]])
    assert played.end[0, 1].tolist() == [5, 5, 5, 5]
    assert played.start[0, 1].tolist() == [4, 4, 2, 2]
    assert played.idle[0].tolist() == [3, 0, 0, 1]


def test_ranks_queue_at_a_shared_resource() -> None:
    items = [_item(Stream.FETCH, after=(), resource="pcie"), _item()]
    played = _times(items, [[2.0, 3.0], [1.0, 1.0]])
    assert played.start[0, 0].tolist() == [0, 2]
    assert played.end[0, 1].tolist() == [3, 6]
    assert played.ready[0, 0].tolist() == [0, 0]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 25), st.integers(0, 2**32 - 1))
def test_idle_time_is_what_no_stream_covers(count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    items = [
        _item(
            Stream(rng.integers(3)),
            after=tuple(rng.choice(i, size=min(i, 1), replace=False).tolist()),
            groups=(0, 0) if rng.random() < 0.4 else None,
        )
        for i in range(count)
    ]
    played = evaluate(items, rng.integers(0, 5, size=(1, count, 2)).astype(float))
    busy: NDArray[np.bool_] = np.zeros((int(played.step_times[0]), 2), dtype=np.bool_)
    for i in range(count):
        for rank in range(2):
            busy[int(played.start[0, i, rank]) : int(played.end[0, i, rank]), rank] = True
    assert played.idle[0] == pytest.approx((~busy).sum(axis=0), abs=1e-9)


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_a_resource_with_poisson_arrivals_is_an_m_d_1_queue(load: float) -> None:
    """Mean wait rho / (2 (1 - rho)) service times (Pollaczek 1930, Khinchine 1932)."""
    tasks = 150_000
    rng = np.random.default_rng(3)
    arrival = np.cumsum(rng.exponential(1 / load, size=tasks))
    schedule = Schedule(
        rank=np.arange(tasks),
        stream=np.zeros(tasks, dtype=np.int64),
        after=((),) * tasks,
        collective=np.full(tasks, -1),
        resource=np.zeros(tasks, dtype=np.int64),
        release=arrival,
    )
    times = run(schedule, np.ones(tasks))
    assert (times.start - times.ready).mean() == pytest.approx(load / (2 * (1 - load)), rel=0.02)
    assert (np.sort(times.start)[1:] - np.sort(times.start)[:-1]).min() >= 1 - 1e-9


def test_urgent_tasks_go_first_and_running_ones_go_on() -> None:
    schedule = Schedule(
        rank=np.arange(3),
        stream=np.zeros(3, dtype=np.int64),
        after=((),) * 3,
        collective=np.full(3, -1),
        resource=np.zeros(3, dtype=np.int64),
        release=np.array([0.0, 1.0, 2.0]),
        urgency=np.array([0, 0, 1]),
    )
    assert run(schedule, np.full(3, 5.0)).start.tolist() == [0, 10, 5]
