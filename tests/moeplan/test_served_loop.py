"""The clock-free closed loop against the simulator's event loop, and closed forms."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moeplan.served_loop import Schedule, play
from moeplan.served_models import Policy
from simulator.serving import run
from simulator.serving_scheduler import Scheduler, ServingStep
from traces.arrivals import Arrivals

PLAIN = Policy(budget=64, mixed=True, chunked=True, overlapped=False)
Ints = NDArray[np.int64]


class _Linear:
    """Seconds that are linear in what the ranks do: then the middle step of a run is its mean."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    def seconds(self, steps: Sequence[ServingStep]) -> NDArray[np.float64]:
        return np.array([self._one(step) for step in steps])

    def _one(self, s: ServingStep) -> float:
        def each(rank: Ints, weight: Ints) -> NDArray[np.float64]:
            return np.bincount(rank, weights=weight, minlength=self.ranks).astype(np.float64)

        def before(stop: Ints) -> Ints:
            return stop * (stop + 1) // 2

        chunk = each(s.chunk_rank, s.chunk_stop - s.chunk_start)
        pairs = each(s.chunk_rank, before(s.chunk_stop) - before(s.chunk_start))
        ends = each(s.chunk_rank, s.chunk_ends.astype(np.int64))
        decodes = each(s.decode_rank, np.ones_like(s.decode))
        context = each(s.decode_rank, s.decode_context)
        return float(_cost(decodes, context, chunk, pairs, ends).sum())


def _cost(
    decodes: NDArray[np.float64],
    context: NDArray[np.float64],
    prompts: NDArray[np.float64],
    pairs: NDArray[np.float64],
    ends: NDArray[np.float64],
) -> NDArray[np.float64]:
    return 1 + 0.01 * decodes + 1e-3 * context + 0.02 * prompts + 3e-4 * pairs + 0.1 * ends


def _seconds(schedule: Schedule) -> NDArray[np.float64]:
    s = schedule.steps
    return _cost(s.decodes, s.context, s.prompts, s.pairs, s.ends).sum(axis=1)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    concurrency=st.integers(1, 20),
    ranks=st.sampled_from([1, 2, 4]),
    capacity=st.sampled_from([1e9, 700.0]),
)
def test_times_are_those_of_the_event_loop(
    seed: int, concurrency: int, ranks: int, capacity: float
) -> None:
    rng = np.random.default_rng(seed)
    inputs, outputs = rng.integers(1, 150, 40), rng.integers(1, 60, 40)
    scheduler = Scheduler(
        inputs=inputs,
        outputs=outputs,
        num_ranks=ranks,
        max_batch_tokens=PLAIN.budget,
        max_running=PLAIN.budget,
        admission="reserve",
        kv_bytes=lambda tokens: tokens.astype(np.float64),
        kv_capacity=capacity,
        concurrency=concurrency,
    )
    arrivals = Arrivals(seconds=np.zeros(40), inputs=inputs, outputs=outputs, source="test")
    served = run(arrivals, scheduler, _Linear(ranks)).requests
    schedule = play(inputs, outputs, concurrency, PLAIN, ranks=ranks, capacity=capacity)
    ttft, tpot = schedule.times(_seconds(schedule))
    # users whose requests end in one step may send theirs in either order
    np.testing.assert_allclose(np.sort(ttft), np.sort(served.ttft), rtol=1e-9)
    np.testing.assert_allclose(tpot, served.tpot, rtol=1e-9)


def _alone(per_step: float = 1.0) -> Schedule:
    return play(np.full(3, 10), np.full(3, 5), 1, PLAIN, ranks=1, per_step=per_step)


def test_a_user_alone_waits_for_a_prefill_and_then_decodes() -> None:
    schedule = _alone()
    assert schedule.repeats.tolist() == [1, 4] * 3
    assert schedule.steps.prompts.ravel().tolist() == [10, 0] * 3
    # contexts 11, 12, 13, 14: the middle one
    assert schedule.steps.context.ravel().tolist() == [0, 12.5] * 3
    ttft, tpot = schedule.times(np.where(schedule.steps.prompts[:, 0] > 0, 2.0, 0.5))
    assert ttft.tolist() == [2.0] * 3
    assert tpot.tolist() == [0.5] * 3


def test_drafts_shorten_decoding() -> None:
    schedule = _alone(per_step=2.0)
    assert schedule.repeats.tolist() == [1, 2] * 3
    _, tpot = schedule.times(np.ones(6))
    assert tpot.tolist() == [0.5] * 3


def test_who_comes_while_a_step_is_composed_misses_it() -> None:
    inputs, outputs = np.full(4, 10), np.array([3, 9, 3, 3])
    steps = [
        play(inputs, outputs, 2, replace(PLAIN, overlapped=late), ranks=1) for late in (False, True)
    ]
    # request 2 comes when request 0 ends, after the prefill and two decode steps
    ttft = [s.times(np.ones(len(s.repeats)))[0][2] for s in steps]
    assert ttft == [1.0, 2.0]


def test_prompts_go_first_where_steps_are_not_mixed() -> None:
    policy = Policy(budget=10, mixed=False, chunked=True, overlapped=False)
    schedule = play(np.full(4, 10), np.full(4, 4), 2, policy, ranks=1)
    prompts, decodes = schedule.steps.prompts[:, 0], schedule.steps.decodes[:, 0]
    assert not np.any((prompts > 0) & (decodes > 0))
    assert prompts.sum() == 40


@pytest.mark.parametrize(("chunked", "largest"), [(True, 16), (False, 20)])
def test_whole_prompts_wait_for_room_or_run_alone(chunked: bool, largest: int) -> None:
    policy = Policy(budget=16, mixed=True, chunked=chunked, overlapped=False)
    schedule = play(np.array([20, 10, 4]), np.full(3, 2), 3, policy, ranks=1)
    prompts = schedule.steps.prompts[:, 0]
    assert prompts.max() == largest
    assert prompts.sum() == 34
    whole = set(prompts[prompts > 0].tolist())
    assert whole == ({16, 2} if chunked else {20, 14})


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    mixed=st.booleans(),
    chunked=st.booleans(),
    overlapped=st.booleans(),
    ranks=st.integers(1, 3),
)
def test_every_token_is_computed_once_in_order(
    seed: int, mixed: bool, chunked: bool, overlapped: bool, ranks: int
) -> None:
    rng = np.random.default_rng(seed)
    inputs, outputs = rng.integers(1, 90, 25), rng.integers(1, 20, 25)
    policy = Policy(budget=40, mixed=mixed, chunked=chunked, overlapped=overlapped)
    s = play(inputs, outputs, 7, policy, ranks=ranks)
    assert s.steps.prompts.sum() == inputs.sum()
    assert (s.steps.decodes * s.repeats[:, None]).sum() == (outputs - 1).sum()
    assert s.steps.pairs.sum() == (inputs * (inputs + 1) // 2).sum()
    assert np.all(s.arrival < s.first)
    assert np.all(s.first <= s.last)
    assert s.steps.ends.sum() == 25


def test_prompts_wait_for_each_other_but_not_for_ever() -> None:
    policy = Policy(budget=64, mixed=True, chunked=True, overlapped=False, patience=6)
    inputs, outputs = np.full(5, 10), np.array([40, 3, 40, 40, 5])
    s = play(inputs, outputs, 4, policy, ranks=2)
    starts = np.cumsum(s.repeats) - s.repeats
    begins = starts[s.steps.prompts.sum(axis=1) > 0]
    # four at once; the fifth comes after two decode steps and finds both ranks decoding
    assert begins.tolist() == [0, 3 + 6]
    none = play(inputs, outputs, 4, replace(policy, patience=0), ranks=2)
    starts = np.cumsum(none.repeats) - none.repeats
    assert starts[none.steps.prompts.sum(axis=1) > 0].tolist() == [0, 3]
