"""Continuous batching: what a step may hold, and that everybody is served, in order."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from basis.errors import InfeasibleError, InputError
from simulator.serving_scheduler import Admission, Scheduler, ServingStep

Ints = NDArray[np.int64]
WINDOW = 6


def _bytes(tokens: Ints) -> NDArray[np.float64]:
    """One layer that sees everything, one with a window."""
    return np.asarray(2.0 * tokens + 1.0 * np.minimum(tokens, WINDOW))


def _scheduler(inputs: list[int], outputs: list[int], **changes: object) -> Scheduler:
    fields: dict[str, object] = {
        "inputs": np.array(inputs, dtype=np.int64),
        "outputs": np.array(outputs, dtype=np.int64),
        "num_ranks": 1,
        "max_batch_tokens": 8,
        "max_running": 4,
        "admission": "reserve",
        "kv_bytes": _bytes,
        "kv_capacity": 1e9,
    }
    return Scheduler(**(fields | changes))  # type: ignore[arg-type]


@dataclass
class _Played:
    steps: list[ServingStep] = field(default_factory=list)
    come: list[int] = field(default_factory=list)


def _play(scheduler: Scheduler, come_per_step: int = 10**9) -> _Played:
    """Let a few requests come before each step, until all are served."""
    played, state, count = _Played(), scheduler.start, len(scheduler.inputs)
    for _ in range(100_000):
        if scheduler.concurrency is None:
            state = scheduler.submit(state, min(state.tail + come_per_step, count))
        played.come.append(state.tail)
        planned = scheduler.plan(state)
        if planned is None:
            assert state.head == state.tail == count
            played.come.pop()
            return played
        step, state = planned
        played.steps.append(step)
    raise AssertionError("some request never finishes")


requests = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=20)


@given(
    lengths=requests,
    ranks=st.integers(1, 3),
    budget=st.integers(1, 20),
    running=st.integers(1, 6),
    room=st.floats(1.0, 4.0),
    admission=st.sampled_from(["reserve", "preempt"]),
    come=st.integers(1, 5),
    concurrency=st.one_of(st.none(), st.integers(1, 8)),
)
@settings(max_examples=200)
def test_invariants(
    lengths: list[tuple[int, int]],
    ranks: int,
    budget: int,
    running: int,
    room: float,
    admission: Admission,
    come: int,
    concurrency: int | None,
) -> None:
    inputs, outputs = (list(column) for column in zip(*lengths, strict=True))
    capacity = room * float(_bytes(np.array(inputs) + np.array(outputs)).max())
    rules = _scheduler(
        inputs, outputs, num_ranks=ranks, max_batch_tokens=budget, admission=admission,
        max_running=min(running, budget), kv_capacity=capacity, concurrency=concurrency,
    )  # fmt: skip
    played = _play(rules, come)
    _check_budget_and_cache(rules, played)
    _check_tokens(rules, played)
    _check_order(rules, played)
    if admission == "reserve":
        assert not any(len(step.preempted) for step in played.steps)
    if concurrency is not None:
        _check_concurrency(rules, played)


def _check_budget_and_cache(rules: Scheduler, played: _Played) -> None:
    for step in played.steps:
        assert step.tokens > 0  # no step without work
        count = np.bincount(step.decode_rank, minlength=rules.num_ranks)
        count += np.bincount(step.chunk_rank, minlength=rules.num_ranks)
        assert (count <= rules.max_running).all()
        tokens = np.bincount(step.decode_rank, minlength=rules.num_ranks)
        np.add.at(tokens, step.chunk_rank, step.chunk_stop - step.chunk_start)
        assert (tokens <= rules.max_batch_tokens).all()
        assert (step.kv_bytes <= rules.kv_capacity * (1 + 1e-12)).all()


def _check_tokens(rules: Scheduler, played: _Played) -> None:
    """Follow each request: nothing skipped, nothing twice but after it gave way."""
    cached, emitted = np.zeros_like(rules.inputs), np.zeros_like(rules.inputs)
    rank_of = np.full(len(cached), -1)
    finished: list[int] = []
    for step in played.steps:
        cached[step.preempted] = 0
        ends = step.chunk[step.chunk_ends]
        assert sorted(step.emitting) == sorted([*step.decode, *ends])
        assert (step.nth == emitted[step.emitting]).all()
        assert (cached[step.chunk] == step.chunk_start).all()
        assert (step.decode_context == cached[step.decode] + 1).all()
        assert (step.decode_context == (rules.inputs + emitted)[step.decode]).all()
        assert not set(step.decode) & set(step.chunk)
        for who, rank in ((step.decode, step.decode_rank), (step.chunk, step.chunk_rank)):
            assert ((rank_of[who] == rank) | (rank_of[who] == -1)).all()  # a home for life
            rank_of[who] = rank
        cached[step.decode] += 1
        cached[step.chunk] = step.chunk_stop
        assert (cached[ends] == (rules.inputs + emitted)[ends]).all()
        emitted[step.emitting] += 1
        live = np.setdiff1d(np.flatnonzero(cached), finished)
        assert step.kv_tokens.sum() == cached[live].sum()
        finished += step.finished.tolist()
    assert (emitted == rules.outputs).all()
    assert sorted(finished) == list(range(len(rules.inputs)))


def _check_order(rules: Scheduler, played: _Played) -> None:
    """Admission in the order of arrival; first tokens of a rank too."""
    admitted = [r for step in played.steps for r in step.admitted.tolist()]
    assert admitted == list(range(len(rules.inputs)))
    for rank in range(rules.num_ranks):
        first = [request for step in played.steps for request in _first_tokens(step, rank)]
        assert first == sorted(first)
    for step, come in zip(played.steps, played.come, strict=True):
        assert max(step.admitted, default=-1) < come


def _first_tokens(step: ServingStep, rank: int) -> list[int]:
    here = set(step.chunk[step.chunk_rank == rank].tolist())
    return [
        r for r, n in zip(step.emitting.tolist(), step.nth, strict=True) if n == 0 and r in here
    ]


def _check_concurrency(rules: Scheduler, played: _Played) -> None:
    gone = 0
    for step, come in zip(played.steps, played.come, strict=True):
        assert come == min(rules.concurrency + gone, len(rules.inputs))  # type: ignore[operator]
        gone += len(step.finished)


def test_decodes_come_first_and_the_rest_of_the_budget_goes_to_chunks() -> None:
    rules = _scheduler([4, 20], [10, 3])
    steps = _play(rules).steps
    assert steps[0].chunk.tolist() == [0, 1]
    assert steps[0].chunk_stop.tolist() == [4, 4]
    assert steps[1].decode.tolist() == [0]
    assert steps[1].chunk_start.tolist() == [4]
    assert steps[1].chunk_stop.tolist() == [11]  # 8 less one decode
    assert [s.chunk_ends.tolist() for s in steps[2:4]] == [[False], [True]]


def test_a_request_goes_to_the_rank_with_the_fewest_tokens() -> None:
    rules = _scheduler([8, 3, 3, 1], [1, 1, 1, 1], num_ranks=2)
    step = _play(rules).steps[0]
    assert dict(zip(step.chunk.tolist(), step.chunk_rank.tolist(), strict=True)) == {
        0: 0, 1: 1, 2: 1, 3: 1,
    }  # fmt: skip


def test_nobody_overtakes_the_head_of_the_queue() -> None:
    capacity = float(_bytes(np.array([20]))[0])
    rules = _scheduler([10, 15, 1], [2, 2, 1], max_batch_tokens=30, kv_capacity=capacity)
    steps = _play(rules).steps
    assert steps[0].chunk.tolist() == [0]
    assert steps[0].waiting == 2  # the third would fit beside the first
    assert steps[2].chunk.tolist() == [1, 2]


def test_the_newest_gives_way_and_is_computed_anew() -> None:
    """Three prompts of 4 fit into 3 x (4 + 1) tokens, not their second tokens."""

    def plain(tokens: Ints) -> NDArray[np.float64]:
        return tokens.astype(np.float64)

    rules = _scheduler(
        [4, 4, 4], [3, 3, 3], admission="preempt", kv_bytes=plain, kv_capacity=15.0,
        max_batch_tokens=12,
    )  # fmt: skip
    steps = _play(rules).steps
    assert steps[0].chunk.tolist() == [0, 1, 2]
    assert steps[1].decode.tolist() == [0, 1, 2]
    assert steps[1].finished.tolist() == []
    assert steps[2].preempted.tolist() == [2]
    assert steps[2].decode.tolist() == [0, 1]
    assert steps[3].chunk.tolist() == [2]
    assert steps[3].chunk_stop.tolist() == [6]  # its prompt and both tokens
    assert steps[3].nth.tolist() == [2]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_batch_tokens": 0, "max_running": 0}, "max_batch_tokens 0"),
        ({"max_running": 9}, "max_running 9 is above max_batch_tokens 8"),
        ({"concurrency": 0}, "concurrency 0"),
    ],
)
def test_impossible_limits(changes: dict[str, int], said: str) -> None:
    with pytest.raises(InputError, match=said):
        _scheduler([1], [1], **changes)


def test_a_request_larger_than_the_cache() -> None:
    with pytest.raises(InfeasibleError, match="request 1 of 30 input and 5 output") as caught:
        _scheduler([3, 30], [5, 5], kv_capacity=50.0)
    assert caught.value.levers
