"""How long ranks on one machine take to exchange tokens, swept over sizes.

An exchange is timed as a decoder runs it: the dispatch with the columns of the combine weights, and
the way back with its sum, both planned ahead. Before each sample every rank reads more than its
caches hold, as expert weights do in a step, and touches what it will send. Ranks come to the
exchange one after the other, as in a step: who waits for a message sleeps, and waking up is part of
what an exchange costs. A sample lasts from the last rank's begin to the last rank's end on the
machine's common clock. On the CPU over gloo. Bytes and seconds.
Shape suffixes: R ranks, T tokens of a rank, D width, K columns of weights, M rows received, N
elements that displace the caches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from hwmodels.ops import PHASES, AllToAll, Phase
from kernels_ref.collectives import Exchange, combine_ranks, dispatch, plan_known_exchange
from kernels_ref.machine import last_level_cache
from kernels_ref.measure import Timing
from kernels_ref.processes import run_processes

Pattern = Literal["balanced", "one-sided"]
"""Every token goes to every rank; or those of rank 0 do, and the others' stay at home."""
_ITEM = 4  # bytes of a float32
_WEIGHTS = 4  # columns of combine weights that travel with a token
LEAST_CACHE = 32 * 2**20
"""Bytes taken for the last-level cache where the system states none."""
_LEAST_ROUNDS = 5  # fewer have no quartiles
Marks = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class ExchangeCase:
    """Equal tokens on every rank, sent as the pattern says."""

    pattern: Pattern
    tokens: int
    """Tokens T of each rank."""
    width: int
    """Elements D of a token's row."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a token's row; the weights that travel with it are not counted."""
        return self.width * _ITEM

    def traffic(self, ranks: int) -> NDArray[np.float64]:
        """Bytes that a dispatch sends from rank to rank, [R, R]; the combine's is the transpose."""
        sends = np.ones((ranks, ranks)) if self.pattern == "balanced" else np.zeros((ranks, ranks))
        sends[0] = 1
        np.fill_diagonal(sends, 0)
        return sends * self.tokens * self.row_bytes


@dataclass(frozen=True, kw_only=True)
class ExchangeRow:
    """One half of an exchange, measured."""

    case: ExchangeCase
    phase: Phase
    ranks: int
    timing: Timing
    """From the last rank's begin to the last rank's end."""

    @property
    def traffic(self) -> NDArray[np.float64]:
        """Bytes from rank to rank, [R, R]."""
        sent = self.case.traffic(self.ranks)
        return sent if self.phase == "dispatch" else sent.T


def exchange_cases(
    *, widths: Sequence[int] = (256, 1024), least: int = 2**10, most: int = 2**23
) -> tuple[ExchangeCase, ...]:
    """Return cases of both patterns: bytes per pair of ranks from ``least`` to ``most``.

    Sizes grow by a factor of two from one to the next, in whole tokens of each width.
    """
    cases = []
    for width in widths:
        tokens = -(-least // (width * _ITEM))
        while tokens * width * _ITEM <= most:
            for pattern in ("balanced", "one-sided"):
                cases.append(ExchangeCase(pattern=pattern, tokens=tokens, width=width))
            tokens *= 2
    return tuple(cases)


def exchange_ops(rows: Sequence[ExchangeRow]) -> AllToAll:
    """Return measured rows of one phase as a column of operations.

    Raises
    ------
    ValueError
        If they are of several phases, widths or numbers of ranks: a column has one of each.
    """
    kinds = {(row.phase, row.case.row_bytes, row.ranks) for row in rows}
    if len(kinds) != 1:
        raise ValueError(
            f"rows of {sorted(kinds)} (phase, row bytes, ranks) -- one of each -- make a column "
            "of each kind"
        )
    phase, row_bytes, _ = kinds.pop()
    return AllToAll(
        traffic=np.stack([row.traffic for row in rows]),
        phase=phase,
        tokens=np.array([row.case.tokens for row in rows]),
        row_bytes=row_bytes,
    )


def sweep_exchange(
    cases: Sequence[ExchangeCase],
    *,
    ranks: int = 2,
    threads: int = 1,
    rounds: int = 15,
    seed: int = 0,
    timeout: float = 300.0,
    crowded: bool = False,
) -> tuple[ExchangeRow, ...]:
    """Time the dispatch and the combine of each case, in rounds of another random order each.

    Parameters
    ----------
    cases
        What is sent.
    ranks, threads, timeout, crowded
        As for `run_processes`.
    rounds
        Samples of each, at least 5; one more comes first and is dropped.
    seed
        Of the orders.

    Returns
    -------
    tuple of ExchangeRow
        Both phases of each case in turn.

    Raises
    ------
    ValueError
        For too few rounds, fewer than two ranks, and as `run_processes`.
    """
    check_sweep(rounds, ranks)
    of_rank = run_processes(
        ranks,
        _sweep_rank,
        tuple(cases),
        rounds,
        seed,
        threads=threads,
        timeout=timeout,
        crowded=crowded,
    )
    seconds = _together(np.stack(of_rank))
    return tuple(
        ExchangeRow(
            case=case,
            phase=phase,
            ranks=ranks,
            timing=Timing(samples=seconds[at, half], calls=1),
        )
        for at, case in enumerate(cases)
        for half, phase in enumerate(PHASES)
    )


def _sweep_rank(
    rank: int, ranks: int, cases: Sequence[ExchangeCase], rounds: int, seed: int
) -> Marks:
    """Run on a rank; nanoseconds of begin and end, int64 [cases, phases, rounds, 2]."""
    plans = [_planned(case, rank, ranks) for case in cases]
    cache_N = torch.ones(max(last_level_cache(), LEAST_CACHE) // _ITEM)
    random, own = np.random.default_rng(seed), np.random.default_rng([seed, rank])
    marks = np.zeros((len(cases), len(PHASES), rounds + 1, 2), dtype=np.int64)
    with torch.inference_mode():
        for round_ in range(rounds + 1):
            for at in random.permutation(len(cases)):
                marks[at, :, round_] = _sample(cases[at], plans[at], cache_N, own)
    return marks[:, :, 1:]


def _planned(case: ExchangeCase, rank: int, ranks: int) -> Exchange:
    """Plan an exchange among ranks that have one slot each."""
    slot_ids_RTK = []
    for of in range(ranks):
        slots = torch.arange(ranks)
        if case.pattern == "one-sided" and of:
            slots = torch.where(slots == of, slots, -1)
        slot_ids_RTK.append(slots.repeat(case.tokens, 1))
    return plan_known_exchange(slot_ids_RTK, rank, 1)


def _sample(case: ExchangeCase, plan: Exchange, cache_N: Tensor, own: np.random.Generator) -> Marks:
    """Time both halves once, [phases, 2]."""
    x_TD, weights_TK = torch.ones(case.tokens, case.width), torch.ones(case.tokens, _WEIGHTS)
    _displace(cache_N, x_TD, own)
    begin = perf_counter_ns()
    rows_MX = dispatch(torch.cat([x_TD, weights_TK], dim=1), plan)
    there = [begin, perf_counter_ns()]
    y_MD = rows_MX[:, : case.width].contiguous()
    _displace(cache_N, y_MD, own)
    begin = perf_counter_ns()
    combine_ranks(y_MD, plan)
    return np.array([there, [begin, perf_counter_ns()]])


def _displace(cache_N: Tensor, x_TD: Tensor, own: np.random.Generator) -> None:
    """Read what fills the caches, more of it on one rank than on another; write what is sent."""
    dist.barrier()
    cache_N.sum()
    cache_N[: int(own.random() * len(cache_N))].sum()
    x_TD.mul_(0.5)


def _together(marks: Marks) -> NDArray[np.float64]:
    """Seconds from the last begin to the last end; the first axis of ``marks`` is the ranks."""
    last = marks.max(axis=0)
    return np.asarray((last[..., 1] - last[..., 0]) * 1e-9)


def check_sweep(rounds: int, ranks: int) -> None:
    """Refuse what has no quartiles, or nobody to share with."""
    if rounds < _LEAST_ROUNDS or ranks < 2:
        raise ValueError(
            f"{rounds} rounds on {ranks} ranks -- at least {_LEAST_ROUNDS} rounds, as fewer have "
            "no quartiles, and 2 ranks -- raise them"
        )
