"""Decode steps of a small decoder, expert parallel over processes, under several placements.

Every rank keeps all experts once and copies those of a placement into its slots before the steps
that run under it, so that placements take turns within one start of the processes. Ranks begin a
step together; it lasts from the last rank's begin to the last rank's end on the machine's common
clock. On the CPU in float32, over gloo. Seconds.
Shape suffixes: L MoE layers, S slots of all ranks, T tokens of a rank, K choices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from kernels_ref.decoder import Decoder
from kernels_ref.decoder_experts import ParallelExperts
from kernels_ref.decoder_weights import Ids, SlotWeights, Weights, expert_slots
from kernels_ref.processes import run_processes
from kernels_ref.stage_clock import StageClock
from traces.model_spec import ModelSpec

_LEAST_ROUNDS = 5  # fewer have no quartiles
_DTYPE = torch.float32
Step = tuple[Ids, ...]
"""A decode step: for each rank the slots of its tokens' choices, ``[L, T, K]``. Its tokens belong
to its first T requests."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacedSteps:
    """Steps that run under one placement."""

    slot_map_LS: Ids
    """Logical expert of each slot; rank r has the r-th equal run of them."""
    steps: tuple[Step, ...]


class MovableExperts(ParallelExperts):
    """Routed experts of a rank whose placement can be changed; parameters as `ParallelExperts`.

    Parameters
    ----------
    model
    slot_map_LS
        The first placement; others have as many slots.
    dtype, seed
        Of the weights, see `expert_slots`.
    """

    def __init__(
        self, model: ModelSpec, slot_map_LS: Ids, *, dtype: torch.dtype = _DTYPE, seed: int = 0
    ) -> None:
        everyone = np.tile(np.arange(model.num_experts), (model.num_moe_layers, 1))
        self._all = expert_slots(model, everyone, dtype=dtype, seed=seed)
        local = slot_map_LS.shape[1] // dist.get_world_size()
        slots = [SlotWeights.empty(model, local, dtype) for _ in self._all]
        super().__init__(model, np.array(slot_map_LS, dtype=np.int64), slots)
        self.place(slot_map_LS)

    def place(self, slot_map_LS: Ids) -> None:
        """Copy this rank's experts of a placement into its slots.

        Raises
        ------
        ValueError
            If it has another number of slots.
        """
        if slot_map_LS.shape != self.slot_map_LS.shape:
            raise ValueError(
                f"placement of shape {list(slot_map_LS.shape)} -- {list(self.slot_map_LS.shape)}, "
                "as the first one -- give all placements as many slots"
            )
        self.slot_map_LS[:] = slot_map_LS
        run = slice(self._rank * self._local, (self._rank + 1) * self._local)
        mine_LP = torch.from_numpy(self.slot_map_LS[:, run])
        for mine_P, source, target in zip(mine_LP, self._all, self._slots, strict=True):
            torch.index_select(source.records_PN, 0, mine_P, out=target.records_PN)


def time_parallel_steps(
    model: ModelSpec,
    placed: Sequence[PlacedSteps],
    lengths: Sequence[Sequence[int]],
    *,
    threads: int = 1,
    rounds: int = 7,
    seed: int = 0,
    timeout: float = 600.0,
    crowded: bool = False,
) -> tuple[NDArray[np.float64], ...]:
    """Time decode steps under placements that take turns.

    Each round goes through the placements, and through the steps of each, in another random order;
    the first step after a change of placement is run once more beforehand, not timed.

    Parameters
    ----------
    model
        Geometry that the decoder runs, see `check_runs`.
    placed
        Steps by placement; all placements have as many slots.
    lengths
        For each rank the tokens that each of its requests holds before every step.
    threads, timeout, crowded
        As for `run_processes`; as many processes as ``lengths`` has entries.
    rounds
        Samples of each step, at least 5; one more round comes first and is dropped.
    seed
        Of the weights, the tokens and the orders.

    Returns
    -------
    tuple of ndarray
        Seconds [rounds, steps] of each entry of ``placed``.

    Raises
    ------
    ValueError
        For too few rounds, and as `run_processes` and the decoder.
    """
    if rounds < _LEAST_ROUNDS:
        raise ValueError(
            f"rounds is {rounds} -- allowed is {_LEAST_ROUNDS} or more, fewer have no quartiles -- "
            "raise it"
        )
    task = (model, tuple(placed), tuple(map(tuple, lengths)), rounds, seed)
    marks = run_processes(
        len(lengths), _run_rank, *task, threads=threads, timeout=timeout, crowded=crowded
    )
    last = [np.stack(of_rank).max(axis=0) for of_rank in zip(*marks, strict=True)]
    return tuple((each[1:, :, 1] - each[1:, :, 0]) * 1e-9 for each in last)


def _run_rank(
    rank: int,
    _ranks: int,
    model: ModelSpec,
    placed: Sequence[PlacedSteps],
    lengths: Sequence[Sequence[int]],
    rounds: int,
    seed: int,
) -> list[NDArray[np.int64]]:
    """Run on a rank; nanoseconds of begin and end, int64 [rounds + 1, steps, 2] of each entry."""
    own = list(lengths[rank])
    experts = MovableExperts(model, placed[0].slot_map_LS, seed=seed)
    weights = Weights.random(model, dtype=_DTYPE, seed=seed)
    requests, context = max(1, len(own)), max(own, default=0) + 1
    decoder = Decoder(model, weights, experts, requests=requests, context=context)
    clock = TogetherClock(laps=False)
    decoder.clock = clock
    decoder.warm_cache(own, seed=seed)
    tokens, order = np.random.default_rng([seed, rank]), np.random.default_rng(seed)
    marks = [np.zeros((rounds + 1, len(each.steps), 2), dtype=np.int64) for each in placed]

    def run(step: Step) -> tuple[int, int]:
        count = step[rank].shape[1]
        ids = tokens.integers(model.vocab_size, size=(count,))
        decoder.decode(ids, range(count), step)
        decoder.rewind(own)
        return clock.began, clock.ended

    for round_ in range(rounds + 1):
        for at in order.permutation(len(placed)):
            experts.place(placed[at].slot_map_LS)
            turns = order.permutation(len(placed[at].steps))
            run(placed[at].steps[turns[0]])
            for turn in turns:
                marks[at][round_, turn] = run(placed[at].steps[turn])
    return marks


class TogetherClock(StageClock):
    """Begins when all ranks are ready, and says when on the machine's clock; nanoseconds."""

    began: int = 0
    ended: int = 0

    def start(self) -> None:
        """Begin a step once all ranks are here."""
        dist.barrier()
        super().start()
        self.began = perf_counter_ns()

    def stop(self) -> None:
        """End the step."""
        super().stop()
        self.ended = perf_counter_ns()
