"""Timelines obey the viewer's rules, show what was simulated, and the checker sees faults."""

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hwmodels import Cluster
from simulator import Deployment, Placement, Result, Workload, check_timeline, simulate
from simulator.program import Played
from simulator.timeline import timeline
from traces import ModelSpec, RoutingTrace

Event = dict[str, Any]


@pytest.fixture(scope="module")
def result(
    make_model: Callable[..., ModelSpec],
    make_trace: Callable[..., RoutingTrace],
    contiguous: Callable[[ModelSpec, int], Placement],
    cluster_of: Callable[[int], Cluster],
) -> Result:
    model = make_model()
    deployment = Deployment.of(contiguous(model, 4))
    return simulate(
        model, make_trace(model), cluster_of(4), deployment, Workload(decode_batch=64), steps=2
    )


def _slices(events: list[Event], **match: object) -> list[Event]:
    return [e for e in events if e["ph"] == "X" and match.items() <= e.items()]


def test_a_simulated_step_is_drawn_without_fault(result: Result) -> None:
    drawn = json.loads(json.dumps(result.timeline))
    assert drawn["displayTimeUnit"] == "ms"
    events = drawn["traceEvents"]
    assert check_timeline(events) == []
    named = {e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "process_name"}
    assert named == {f"rank {r}" for r in range(4)}


def test_slices_cover_the_whole_time_of_every_rank(result: Result) -> None:
    events = result.timeline["traceEvents"]
    step = result.first_step
    for rank in range(4):
        total = sum(e["dur"] for e in _slices(events, pid=rank + 1))
        ends = max(e["ts"] + e["dur"] for e in _slices(events, pid=rank + 1))
        count = len(_slices(events, pid=rank + 1))
        assert total == pytest.approx(ends, abs=1e-3 * count)  # rounded to nanoseconds each
    latest = max(e["ts"] + e["dur"] for e in _slices(events))
    assert latest == pytest.approx(step.step_times[0] * 1e6, abs=1e-3)


def test_every_collective_is_one_slice_on_each_rank_at_one_time(result: Result) -> None:
    events = result.timeline["traceEvents"]
    for layer in range(2):
        for name in ("dispatch", "combine"):
            slices = _slices(events, name=f"{name} L{layer}", tid=2)
            assert [e["pid"] for e in slices] == [1, 2, 3, 4]
            assert len({(e["ts"], e["dur"]) for e in slices}) == 1


def test_waits_are_drawn(result: Result) -> None:
    events = result.timeline["traceEvents"]
    times = result.first_step
    waits = sum(e["dur"] for e in _slices(events, name="wait"))
    expected = (times.start - times.ready).sum() * 1e6
    assert expected > 0
    assert waits == pytest.approx(expected, rel=1e-3, abs=0.1)


def test_arrows_lead_from_the_last_to_those_who_waited(result: Result) -> None:
    events = result.timeline["traceEvents"]
    starts = [e for e in events if e["ph"] == "s"]
    waited = int((result.first_step.start > result.first_step.ready).sum())
    assert len(starts) == waited > 0


def test_steps_follow_one_another(result: Result) -> None:
    step = result.first_step
    twice = {n: np.concatenate([getattr(step, n)] * 2) for n in ("ready", "start", "end")}
    both = timeline(Played(items=step.items, **twice))["traceEvents"]
    assert check_timeline(both) == []
    second = [e["ts"] for e in both if e["ph"] == "X" and e["args"]["step"] == 1]
    assert min(second) == pytest.approx(step.step_times[0] * 1e6, abs=1e-3)


def _break(events: list[Event], fault: str) -> None:
    flow = next(e for e in events if e["ph"] == "f")
    wide = max(_slices(events, tid=1), key=lambda e: e["dur"])
    if fault == "ids":
        events[0]["pid"] = 0
    elif fault == "negative":
        wide["dur"] = -1.0
    elif fault == "overlap":
        wide["dur"] += 0.5
    elif fault == "unpaired":
        events.remove(flow)
    elif fault == "twice":
        events.append(dict(flow))
    elif fault == "outside":
        flow["ts"] = 1e9
    elif fault == "backwards":
        start = next(e for e in events if e["ph"] == "s" and e["id"] == flow["id"])
        start["ts"], flow["ts"] = flow["ts"], start["ts"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("ids", "below 1"),
        ("negative", "negative time"),
        ("overlap", "overlaps one that ends"),
        ("unpaired", "has only"),
        ("twice", "two ends"),
        ("outside", "not lie inside a slice"),
        ("backwards", "ends before it starts"),
    ],
)
def test_the_checker_sees_every_fault(result: Result, fault: str, message: str) -> None:
    events = copy.deepcopy(result.timeline["traceEvents"])
    assert check_timeline(events) == []
    _break(events, fault)
    assert any(message in problem for problem in check_timeline(events))


def test_one_rank_has_no_arrows_and_no_waits(
    make_model: Callable[..., ModelSpec],
    make_trace: Callable[..., RoutingTrace],
    contiguous: Callable[[ModelSpec, int], Placement],
    cluster_of: Callable[[int], Cluster],
) -> None:
    model = make_model()
    alone = simulate(
        model,
        make_trace(model),
        cluster_of(1),
        Deployment.of(contiguous(model, 1)),
        Workload(decode_batch=4),
        steps=1,
    )
    events = alone.timeline["traceEvents"]
    assert check_timeline(events) == []
    assert {e["ph"] for e in events} == {"M", "X"}
    assert not _slices(events, tid=2)
    assert np.isclose(sum(e["dur"] for e in _slices(events)), alone.step_times[0] * 1e6, atol=0.05)
