"""What ranks on one machine cost each other: operations timed alone, and on all ranks at once.

Pinned processes have a core of their own but share the memory's bandwidth, the last level of the
caches and the power of the chip: rates that were measured on one of them are too high where all
read at once. Operands are cold, as `prepare` makes them. On the CPU. Seconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from hwmodels.ops import Op
from kernels_ref.exchange_sweep import LEAST_CACHE, check_sweep
from kernels_ref.machine import last_level_cache
from kernels_ref.measure import Run, Timing
from kernels_ref.operands import Operands
from kernels_ref.prepare import prepare
from kernels_ref.processes import run_processes


@dataclass(frozen=True, kw_only=True)
class SharedMemory:
    """What one operation takes on a rank alone, and while all ranks run it at once."""

    name: str
    alone: Timing
    """Mean over the ranks, one after the other."""
    together: Timing
    """Mean over the ranks, all at once."""

    @property
    def ratio(self) -> float:
        """Median over rounds of together / alone; 1: nothing is shared."""
        return float(np.median(self.together.samples / self.alone.samples))

    @property
    def floor(self) -> float:
        """Half the interquartile range of the rounds' ratios over their median."""
        low, high = np.quantile(self.together.samples / self.alone.samples, [0.25, 0.75])
        return float((high - low) / 2 / self.ratio)


def sweep_shared_memory(
    ops: Mapping[str, Op],
    *,
    ranks: int = 2,
    threads: int = 1,
    rounds: int = 11,
    sample: float = 5e-3,
    seed: int = 0,
    timeout: float = 300.0,
    crowded: bool = False,
) -> tuple[SharedMemory, ...]:
    """Time operations with cold operands on one rank at a time, and on all ranks at once.

    What slows down when all run is what the ranks share: memory, the last-level cache, power.

    Parameters
    ----------
    ops
        Operations by name; the first row of each is run. Collectives cannot be.
    ranks, threads, timeout, crowded
        As for `run_processes`.
    rounds
        Samples of each, at least 5; both ways follow each other in a round.
    sample
        Seconds that a sample takes about: calls in a row.
    seed
        Of the orders.

    Raises
    ------
    ValueError
        For too few rounds, fewer than two ranks, as `prepare` and as `run_processes`.
    """
    check_sweep(rounds, ranks)
    of_rank = run_processes(
        ranks,
        _share_rank,
        dict(ops),
        rounds,
        sample,
        seed,
        threads=threads,
        timeout=timeout,
        crowded=crowded,
    )
    mean = np.mean(np.stack(of_rank), axis=0)
    return tuple(
        SharedMemory(
            name=name,
            alone=Timing(samples=mean[at, 0], calls=1),
            together=Timing(samples=mean[at, 1], calls=1),
        )
        for at, name in enumerate(ops)
    )


def _share_rank(
    rank: int, ranks: int, ops: Mapping[str, Op], rounds: int, sample: float, seed: int
) -> NDArray[np.float64]:
    """Run on a rank; seconds of a call, [ops, alone and together, rounds]."""
    operands = Operands(cache_bytes=last_level_cache() or LEAST_CACHE)
    runs = [prepare(op, 0, operands).run for op in ops.values()]
    seconds = np.zeros((len(runs), 2, rounds))
    random = np.random.default_rng(seed)
    with torch.inference_mode():
        calls = [_agreed_calls(run, sample) for run in runs]
        for round_ in range(rounds):
            for at in random.permutation(len(runs)):
                for turn in range(ranks):
                    dist.barrier()
                    if turn == rank:
                        seconds[at, 0, round_] = _seconds(runs[at], calls[at])
                dist.barrier()
                seconds[at, 1, round_] = _seconds(runs[at], calls[at])
    return seconds


def _agreed_calls(run: Run, sample: float) -> int:
    """Return calls that fill a sample, as many on every rank."""
    run()
    calls = torch.tensor([max(1, round(sample / _seconds(run, 3)))])
    dist.all_reduce(calls, dist.ReduceOp.MAX)
    return int(calls)


def _seconds(run: Run, calls: int) -> float:
    """Return the mean seconds of a call, of several in a row."""
    begin = perf_counter_ns()
    for _ in range(calls):
        run()
    return (perf_counter_ns() - begin) * 1e-9 / calls
