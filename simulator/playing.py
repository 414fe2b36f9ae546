"""Steps in time on a layout: parts of a step in turn, side by side, or down a pipeline.

The parts of a step (microbatches x halves) are priced alone. Two halves alternate on the compute
and communication streams of a rank. Pipeline stages are played one by one and then, one level up,
as streams that work off one microbatch after another, round after round, until the time of a round
is steady. Seconds.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hwmodels.ops import Stage
from simulator.deployment import Overlap
from simulator.layout import Layout
from simulator.program import Item, Played, Stream, evaluate, play

ROUNDS = 4
"""Rounds of a pipeline after which a round's time is taken as steady, over as many again."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class PlayedSteps:
    """S steps in time."""

    step_times: Floats
    """Seconds from one token of a request to its next (decode), or between steps, [S]."""
    stages: tuple[Played, ...]
    """The microbatches of all steps on each pipeline stage, [S * microbatches, items, R]."""
    first: Played
    """The first step on all ranks: of a pipeline its microbatches once down the stages; S = 1."""


def parts_of(layout: Layout, overlap: Overlap) -> int:
    """Parts into which a step's tokens are cut."""
    return layout.pp * (1 if overlap == "none" else 2)


def play_steps(
    items: Sequence[Item],
    seconds: Floats,
    layout: Layout,
    num_layers: int,
    *,
    overlap: Overlap = "none",
    decode: bool = True,
) -> PlayedSteps:
    """Play steps whose parts were priced alone.

    Parameters
    ----------
    items : sequence of Item
        Program of one part, all layers.
    seconds : float64 array [S * parts, I, R]
        Of each part on the ranks of a stage, a step's parts one after another; see `parts_of`.
    layout : Layout
    num_layers : int
        Of the model.
    overlap : str
        ``two_batch``: neighbouring parts are halves that alternate.
    decode : bool
        Whether a microbatch's next token needs this one (it goes round), or steps just follow.
    """
    stages = []
    for own, at in _by_stage(items, layout, num_layers):
        program, took = own, seconds[:, at]
        if overlap == "two_batch":
            program, took = two_batch(program, took)
        stages.append(play(program, took))
    if layout.pp == 1:
        whole = stages[0]
        return PlayedSteps(step_times=whole.step_times, stages=(whole,), first=whole.step(0))
    busy = np.stack([body(p).step_times for p in stages], axis=-1)
    sends = np.stack([_sends(p) for p in stages], axis=-1)
    shape = (-1, layout.pp, layout.pp)  # step, microbatch, stage
    steady, starts = pipeline(busy.reshape(shape), sends.reshape(shape), decode=decode)
    first = _first_round(stages, starts[0], layout)
    return PlayedSteps(step_times=steady, stages=tuple(stages), first=first)


def two_batch(items: Sequence[Item], seconds: Floats) -> tuple[tuple[Item, ...], Floats]:
    """Write two halves as one program: between collectives they take turns on the processor.

    Parameters
    ----------
    items : sequence of Item
        Program of a half.
    seconds : float64 array [2 n, I, R]
        Halves one after another.

    Returns
    -------
    items, seconds
        The program [2 I] and its times [n, 2 I, R].
    """
    streams = np.array([item.stream for item in items])
    segment = np.concatenate(([0], np.cumsum(streams[1:] != streams[:-1])))
    half, index = np.divmod(np.arange(2 * len(items)), len(items))
    order = np.lexsort((index, half, segment[index]))
    place = np.empty(2 * len(items), dtype=np.int64)
    place[order] = np.arange(2 * len(items))
    program = []
    for number in order:
        item, base = items[index[number]], half[number] * len(items)
        after = _explicit(item, int(index[number]))
        there = tuple(int(place[base + earlier]) for earlier in after)
        program.append(replace(item, after=there))
    pairs = seconds.reshape(-1, 2, *seconds.shape[1:])
    return tuple(program), pairs[:, half[order], index[order]]


def pipeline(busy: Floats, sends: Floats, *, decode: bool) -> tuple[Floats, Floats]:
    """Seconds of a steady round of microbatches down a pipeline, and when each begins.

    In decode a microbatch enters the first stage again when its sampled tokens are back. With m
    equal microbatches a steady round takes ``max(m max_s busy_s, sum_s (busy_s + send_s))``; the
    second term falls away in prefill.

    Parameters
    ----------
    busy : float64 array [S, microbatches, stages]
        Time that a microbatch holds a stage.
    sends : float64 array [S, microbatches, stages]
        From each stage to the next; from the last one back to the first.
    decode : bool

    Returns
    -------
    steady : float64 array [S]
    starts : float64 array [S, microbatches, stages]
        In the first round.
    """
    steps, count, depth = busy.shape
    blank = Item(name="microbatch", stage=Stage.OTHER, layer=0)
    items: list[Item] = []
    for job in range(2 * ROUNDS * count):
        for stage in range(depth):
            before = (len(items) - 1,) if stage else ()
            if decode and not stage and job >= count:
                before = (len(items) - 2 * depth * (count - 1) - 1,)
            here = len(items)
            items.append(replace(blank, stream=stage, after=before))
            items.append(replace(blank, stream=depth + stage, after=(here,)))
    both = np.stack([busy, sends], axis=-1).reshape(steps, -1)
    played = evaluate(items, np.tile(both, 2 * ROUNDS)[..., None])
    ends = played.end.reshape(steps, 2, -1).max(axis=-1)
    starts = played.start.reshape(steps, -1, count, depth, 2)[:, 0, :, :, 0]
    return (ends[:, 1] - ends[:, 0]) / ROUNDS, starts


def body(played: Played) -> Played:
    """Leave out what a stage only sends on, beside which it goes on working."""
    keep = [i for i, item in enumerate(played.items) if not _is_send(item)]
    return Played(
        items=tuple(played.items[i] for i in keep),
        ready=played.ready[:, keep],
        start=played.start[:, keep],
        end=played.end[:, keep],
    )


def _is_send(item: Item) -> bool:
    return item.stage is Stage.TRANSFER and item.stream == Stream.ACTIVATIONS


def _sends(played: Played) -> Floats:
    """Seconds in which a microbatch goes on to the next stage, the slowest rank's, [n]."""
    at = [i for i, item in enumerate(played.items) if _is_send(item)]
    return np.asarray(played.busy[:, at].max(axis=2).sum(axis=1))


def _by_stage(
    items: Sequence[Item], layout: Layout, num_layers: int
) -> Iterator[tuple[tuple[Item, ...], slice]]:
    """Cut a program where pipeline stages do; what an earlier stage did has ended."""
    last = np.array([layers[-1] for layers in layout.stage_layers(num_layers)])
    last[-1] = num_layers
    stage = np.searchsorted(last, [item.layer for item in items])
    ends = np.searchsorted(stage, np.arange(layout.pp + 1))
    for begin, end in itertools.pairwise(ends.tolist()):
        own = tuple(
            replace(item, after=tuple(a - begin for a in item.after if a >= begin))
            if item.after is not None
            else item
            for item in items[begin:end]
        )
        yield own, slice(begin, end)


def _explicit(item: Item, index: int) -> tuple[int, ...]:
    """Items that it is after, the one before it included where none are named."""
    if item.after is not None:
        return item.after
    return (index - 1,) if index else ()


def _first_round(stages: Sequence[Played], starts: Floats, layout: Layout) -> Played:
    """Put the first step's microbatches [M] on all ranks, each stage at its ``starts`` [M, s]."""
    items: list[Item] = []
    tables: list[Floats] = []
    for number, begins in np.ndenumerate(starts):
        stage = stages[number[1]]
        lanes = slice(number[1] * layout.lanes, (number[1] + 1) * layout.lanes)
        times = np.zeros((3, len(stage.items), layout.num_ranks))
        for row, table in enumerate((stage.ready, stage.start, stage.end)):
            times[row, :, lanes] = begins + table[number[0]]
        tables.append(times)
        for item in stage.items:
            groups = None
            if item.groups is not None:
                alone = [-1 - rank for rank in range(layout.num_ranks)]
                alone[lanes] = item.groups
                groups = tuple(alone)
            items.append(replace(item, groups=groups))
    ready, start, end = np.concatenate(tables, axis=1)[:, None]
    return Played(items=tuple(items), ready=ready, start=start, end=end)
