"""The timed path of the bound: which ranks it passes, and the tokens that they work on.

In each part of attention the path is on a rank of the dp group with the most tokens (of those the
one with the most context), among the experts in that rank's block. The composition of batches
decides the tokens of both, so they are exact counts of the steps that will be simulated.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from simulator.batches import Composition, StepBatch
from simulator.dispatch import homes, occurrence
from simulator.layout import Layout
from simulator.micro_batches import split
from traces.routing_trace import RoutingTrace

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Path:
    """The tokens of one batch size on the timed path, of all its steps."""

    tokens: int
    """Tokens of the rank's dp group in one microbatch."""
    lane_tokens: Ints
    """Tokens that each rank of its block routes, [block]."""
    context: Floats
    """Keys that they attend to, summed, by kind of layer; mean over steps of the group with the
    most, [kinds]."""
    counts: NDArray[np.integer]
    """Tokens of each expert in the block, [steps * MoE layers, E]."""

    @property
    def block_tokens(self) -> int:
        """Tokens of the block."""
        return int(self.lane_tokens.sum())


class PathFinder:
    """Paths of layouts at several batch sizes; what layouts share is counted once.

    Parameters
    ----------
    trace : RoutingTrace
    compositions : sequence of sequences of Composition
        For each batch size one for each seed.
    windows : tuple of (int or None)
        Attention window of each kind of layer.
    """

    def __init__(
        self,
        trace: RoutingTrace,
        compositions: Sequence[Sequence[Composition]],
        windows: tuple[int | None, ...],
    ) -> None:
        self.trace, self.windows = trace, windows
        self.compositions = tuple(tuple(made) for made in compositions)
        self._steps = [[b for made in size for b in made.batches] for size in self.compositions]
        self._paths: dict[tuple[int, ...], Path] = {}
        self._parts: dict[tuple[int, ...], tuple[list[StepBatch], Ints]] = {}
        self._before: dict[tuple[int, int], NDArray[np.int32]] = {}

    def path(self, layout: Layout, size: int) -> Path:
        """Find the path of a layout at one of the batch sizes; it is the same in every step."""
        key = (size, *path_key(layout))
        if key not in self._paths:
            self._paths[key] = self._walk(layout, size)
        return self._paths[key]

    def _walk(self, layout: Layout, size: int) -> Path:
        batches, places = self._microbatches(layout, size)
        home = batches[0].home
        tokens = np.bincount(home, minlength=layout.dp)
        index = np.arange(layout.tp)
        slices = -(-(index + 1) * tokens[:, None] // layout.tp)
        slices = slices - -(-index * tokens[:, None] // layout.tp)
        fullest = (tokens[:, None] == tokens.max()) & (slices == slices.max())
        lanes = slices.reshape(layout.edp, -1)
        passed = fullest.reshape(lanes.shape).any(axis=1)
        block = int(np.where(passed, lanes.sum(axis=1), -1).argmax())
        inside = np.arange(layout.lanes).reshape(layout.dp, layout.tp) // layout.block == block
        groups = np.flatnonzero((fullest & inside).any(axis=1))
        lane = home * layout.tp + occurrence(home) * layout.tp // np.maximum(tokens[home], 1)
        mine = np.flatnonzero(lane // layout.block == block)
        return Path(
            tokens=int(tokens.max()),
            lane_tokens=lanes[block],
            context=np.mean([_most_context(b, groups, self.windows) for b in batches], axis=0),
            counts=self._counts(size, places[mine], layout.num_ranks),
        )

    def _microbatches(self, layout: Layout, size: int) -> tuple[list[StepBatch], Ints]:
        """Return the fullest microbatch of every step, and its tokens' places in the step.

        Requests are dealt to the dp groups.
        """
        key = (size, layout.dp, layout.pp)
        if key not in self._parts:
            steps = self._steps[size]
            home = homes(len(steps[0].rows), layout.dp)
            part = _fullest_part(home, layout)
            numbered = replace(steps[0], rows=np.arange(len(home)), home=home)
            dealt = tuple(replace(step, home=home) for step in steps)
            made = replace(self.compositions[size][0], batches=(*dealt, numbered))
            *batches, last = split(made, layout.pp).batches[part :: layout.pp]
            self._parts[key] = batches, last.rows
        return self._parts[key]

    def _counts(self, size: int, places: Ints, ranks: int) -> NDArray[np.integer]:
        """Tokens of each expert among some places of every step, [steps * MoE layers, E].

        Where the batch divides over the ranks, every rank's tokens are chunks that all layouts
        share, and counts of chunks are added up.
        """
        steps = self._steps[size]
        tokens = len(steps[0].rows)
        if tokens % ranks:
            return np.concatenate([self._count(step.rows[places], 1)[0] for step in steps])
        chunks = np.unique(places * ranks // tokens)
        begins = chunks[np.diff(chunks, prepend=-2) > 1]
        ends = chunks[np.diff(chunks, append=ranks + 2) > 1] + 1
        sums = (self._running(size, step, ranks) for step in range(len(steps)))
        return np.concatenate([(run[ends] - run[begins]).sum(axis=0) for run in sums])

    def _running(self, size: int, step: int, ranks: int) -> NDArray[np.int32]:
        """Tokens of each expert on all ranks before each one, [ranks + 1, MoE layers, E]."""
        if (size, step) not in self._before:
            counts = self._count(self._steps[size][step].rows, ranks)
            before = np.zeros((len(counts) + 1, *counts.shape[1:]), dtype=np.int32)
            np.cumsum(counts, axis=0, out=before[1:])
            self._before[size, step] = before
        return self._before[size, step]

    def _count(self, rows: Ints, chunks: int) -> Ints:
        """Tokens of each expert in equal chunks of rows, [chunks, MoE layers, E]."""
        layers, experts = self.trace.num_layers, self.trace.meta.num_experts
        chunk = np.arange(len(rows)) * chunks // len(rows)
        base = (chunk[:, None] * layers + np.arange(layers)) * experts
        keys = (base[..., None] + self.trace.experts[rows]).ravel()
        counts = np.bincount(keys, minlength=chunks * layers * experts)
        return counts.reshape(chunks, layers, experts)


def path_key(layout: Layout) -> tuple[int, ...]:
    """Return the part of a layout that a path depends on."""
    return layout.dp, layout.tp, layout.pp, layout.edp


def _fullest_part(home: Ints, layout: Layout) -> int:
    """Microbatch in which the fullest dp groups have most tokens."""
    most = int(np.bincount(home).max())
    edges = -(-np.arange(layout.pp + 1) * most // layout.pp)
    return int(np.diff(edges).argmax())


def _most_context(batch: StepBatch, groups: Ints, windows: tuple[int | None, ...]) -> Floats:
    """Context of the dp group that has the most of it, by kind of layer."""
    every = np.bincount(batch.home, weights=batch.context, minlength=int(groups.max()) + 1)
    mine = batch.context[batch.home == groups[every[groups].argmax()]]
    return np.array([np.minimum(mine, w or np.inf).sum() for w in windows])
