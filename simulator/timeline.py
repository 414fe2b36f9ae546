"""Timelines in the Chrome JSON format that Perfetto opens.

One process per rank, one thread per stream, a slice per kernel and per wait, and an arrow from the
rank that a collective waited for to each rank that it held up.

Times are microseconds from the start of the first step, rounded to nanoseconds. Process and
thread ids start at 1; slices of a thread never overlap in part.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from simulator.program import Played, Stream

Event = dict[str, Any]
_MICRO = 1e6


def timeline(played: Played) -> dict[str, Any]:
    """Draw all steps, back to back.

    Returns
    -------
    dict
        JSON object with ``traceEvents``; write it to a file and open it in ui.perfetto.dev.
    """
    events = list(_names(played))
    ids = itertools.count(1)
    begin = 0.0
    for number, length in enumerate(played.step_times.tolist()):
        step = played.step(number)
        events += _slices(step, begin, number)
        events += _arrows(step, begin, ids)
        begin += length
    return {"displayTimeUnit": "ms", "traceEvents": events}


def check_timeline(events: Sequence[Event]) -> list[str]:
    """Say what a viewer would drop or refuse; an empty list means that all is well.

    Checks that ids start at 1, durations are not negative, the slices of a thread nest, and each
    flow starts inside a slice, ends inside another and not before it starts.
    """
    problems = []
    slices: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    flows: dict[tuple[str, str, int], dict[str, Event]] = defaultdict(dict)
    for event in events:
        if event["pid"] < 1 or event.get("tid", 1) < 1:
            problems.append(f"pid or tid below 1: {event}")
        if event["ph"] == "X":
            start, length = _nano(event["ts"]), _nano(event["dur"])
            if length < 0 or start < 0:
                problems.append(f"negative time: {event}")
            slices[event["pid"], event["tid"]].append((start, start + length))
        if event["ph"] in "sf":
            key = (event["cat"], event["name"], event["id"])
            if event["ph"] in flows[key]:
                problems.append(f"flow {key} has two ends of kind {event['ph']}")
            flows[key][event["ph"]] = event
    for thread, spans in slices.items():
        problems += _overlaps(thread, spans)
    for key, ends in flows.items():
        problems += _unpaired(key, ends, slices)
    return problems


def _names(played: Played) -> Iterator[Event]:
    streams = sorted({item.stream for item in played.items})
    for rank in range(played.num_ranks):
        yield {
            "ph": "M",
            "pid": rank + 1,
            "tid": 1,
            "name": "process_name",
            "args": {"name": f"rank {rank}"},
        }
        for stream in streams:
            yield {
                "ph": "M",
                "pid": rank + 1,
                "tid": stream + 1,
                "name": "thread_name",
                "args": {"name": Stream(stream).name.lower()},
            }


def _slices(step: Played, begin: float, number: int) -> Iterator[Event]:
    """One slice per kernel and rank, and one per wait at a collective or a shared resource."""
    for i, item in enumerate(step.items):
        for rank in range(step.num_ranks):
            ready, start, end = (begin + t[0, i, rank] for t in (step.ready, step.start, step.end))
            yield from _slice(rank, item.stream, "wait", "wait", ready, start, number)
            name = f"{item.name} L{item.layer}"
            yield from _slice(rank, item.stream, item.stage.value, name, start, end, number)


def _slice(
    rank: int, stream: int, stage: str, name: str, since: float, until: float, number: int
) -> Iterator[Event]:
    start, end = _micro(since), _micro(until)
    if end > start:
        yield {
            "ph": "X",
            "pid": rank + 1,
            "tid": stream + 1,
            "ts": start,
            "dur": round(end - start, 3),
            "name": name,
            "cat": stage,
            "args": {"step": number},
        }


def _arrows(step: Played, begin: float, ids: Iterator[int]) -> Iterator[Event]:
    """From the rank that came last to a collective to each rank that waited for it."""
    for i, item in enumerate(step.items):
        if item.groups is None:
            continue
        for group in sorted(set(item.groups)):
            members = [rank for rank, its in enumerate(item.groups) if its == group]
            yield from _held_up(step, i, members, begin, ids)


def _held_up(
    step: Played, i: int, members: list[int], begin: float, ids: Iterator[int]
) -> Iterator[Event]:
    item, ready = step.items[i], step.ready[0, i]
    start, end = begin + step.start[0, i, members[0]], begin + step.end[0, i, members[0]]
    holder = max(members, key=lambda rank: float(ready[rank]))
    quarter, middle = _micro(start + (end - start) / 4), _micro((start + end) / 2)
    if middle <= _micro(start):
        return  # free communication has no slice to point at
    name = f"held up at {item.name}"
    for rank in members:
        if ready[rank] < ready[holder]:
            shared = {"tid": item.stream + 1, "cat": "wait", "name": name, "id": next(ids)}
            yield {"ph": "s", "pid": holder + 1, "ts": quarter, **shared}
            yield {"ph": "f", "bp": "e", "pid": rank + 1, "ts": middle, **shared}


def _micro(seconds: float) -> float:
    return round(float(seconds) * _MICRO, 3)


def _nano(micro: float) -> int:
    return round(micro * 1000)


def _overlaps(thread: tuple[int, int], spans: list[tuple[int, int]]) -> Iterator[str]:
    open_ends: list[int] = []
    for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
        while open_ends and open_ends[-1] <= start:
            open_ends.pop()
        if open_ends and end > open_ends[-1]:
            yield f"thread {thread}: slice {start}..{end} ns overlaps one that ends {open_ends[-1]}"
        open_ends.append(end)


def _unpaired(
    key: tuple[str, str, int],
    ends: dict[str, Event],
    slices: dict[tuple[int, int], list[tuple[int, int]]],
) -> Iterator[str]:
    if set(ends) != {"s", "f"}:
        yield f"flow {key} has only {sorted(ends)}"
        return
    for event in ends.values():
        at = _nano(event["ts"])
        spans = slices.get((event["pid"], event["tid"]), [])
        if not any(start <= at < end for start, end in spans):
            yield f"flow {key} does not lie inside a slice at {at} ns"
    if _nano(ends["f"]["ts"]) < _nano(ends["s"]["ts"]):
        yield f"flow {key} ends before it starts"
