"""Steps keep requests on their ranks, prompts whole, and say how they came about."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from simulator import Workload
from simulator.batches import compose
from traces import ModelSpec, RoutingTrace

ModelOf = Callable[..., ModelSpec]
TraceOf = Callable[..., RoutingTrace]


def _prefill(trace: RoutingTrace) -> RoutingTrace:
    return replace(trace, decode=np.zeros(trace.num_tokens, dtype=np.bool_))


def test_a_running_request_keeps_its_rank(make_model: ModelOf, make_trace: TraceOf) -> None:
    trace = make_trace(make_model(), requests=20, length=30)
    work = compose(trace, Workload(decode_batch=8), 4, steps=6, seed=1)
    assert work.decode
    assert not work.stand_in
    assert len(work.batches) == 6
    rank_of: dict[int, int] = {}
    before: dict[int, int] = {}
    for batch in work.batches:
        assert np.bincount(batch.home).tolist() == [2, 2, 2, 2]
        assert batch.last.all()
        assert (batch.context == trace.position[batch.rows] + 1).all()
        running = trace.request_id[batch.rows].tolist()
        for request, home, row in zip(running, batch.home, batch.rows, strict=True):
            if before.get(request) == row - 1:
                assert rank_of[request] == home
            rank_of[request], before[request] = home, row


def test_a_prompt_is_whole_and_on_one_rank(make_model: ModelOf, make_trace: TraceOf) -> None:
    whole = make_trace(make_model(), requests=12, length=10)
    keep = whole.position < 3 + whole.request_id % 7  # prompts of 3 to 9 tokens
    trace = _prefill(whole.select(keep))
    work = compose(trace, Workload(prefill_tokens=40), 4, steps=3, seed=1)
    assert not work.decode
    lengths = np.bincount(trace.request_id)
    for batch in work.batches:
        assert len(batch.rows) <= 40
        for request in np.unique(trace.request_id[batch.rows]):
            mine = trace.request_id[batch.rows] == request
            assert mine.sum() == lengths[request]
            assert len(np.unique(batch.home[mine])) == 1
            assert batch.context[mine].tolist() == list(range(1, lengths[request] + 1))
            assert batch.last[mine].tolist() == [False] * (lengths[request] - 1) + [True]
        own = np.bincount(batch.home, minlength=4)
        assert own.max() - own.min() <= lengths.max()  # longest first, to the emptiest


def test_the_other_phase_stands_in_and_is_named(make_model: ModelOf, make_trace: TraceOf) -> None:
    decode = make_trace(make_model())
    forced = compose(_prefill(decode), Workload(decode_batch=4), 2, steps=2, seed=0)
    assert forced.stand_in
    assert "no decode tokens, the others stand in" in forced.statement
    prompts = compose(decode, Workload(prefill_tokens=32), 2, steps=2, seed=0)
    assert prompts.stand_in
    assert "no prefill tokens, the others stand in" in prompts.statement


def test_the_statement_gives_the_composition(make_model: ModelOf, make_trace: TraceOf) -> None:
    trace = make_trace(make_model(), requests=8, length=16)
    few = compose(trace, Workload(decode_batch=8), 2, steps=3, seed=5).statement
    assert "3 decode steps of 8 tokens from 8 requests taking turns" in few
    assert few.endswith("seed 5")
    many = compose(trace, Workload(decode_batch=9), 2, steps=3, seed=5).statement
    assert "drawn with replacement" in many
