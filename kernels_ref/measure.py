"""Times of calls: how long one takes, how far repeats spread, and whether the machine is quiet.

A sample is the mean of so many calls in a row that the clock's resolution does not count; the
result is the median over samples, which a few interrupted ones do not move. On CUDA the calls of
a sample are queued behind each other between two events: the launch of one hides behind the work
of the one before it where that is longer, as in a decoder's own stream. All times in seconds.
"""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from basis.errors import InputError
from kernels_ref.machine import this_machine

_LEAST_SAMPLES = 5
_BLOCKS = 12  # of the repeats of `noise`
_MOST_CALLS = 1 << 20  # of one sample: an end for a clock that stands still
_LEAST_STREAM = 64 * 2**20  # bytes of the stream that `noise` times, if the caches are small
_GEMM = 512  # rows and columns of the product that `noise` times

Run = Callable[[], object]
Clock = Callable[[], int]
_Watch = Callable[[Run, int], float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Timing:
    """How long one call takes, and how far that is known."""

    samples: NDArray[np.float64]
    """[repeats] seconds of one call, in the order measured."""
    calls: int
    """Calls in a row that each sample is the mean of."""

    @property
    def seconds(self) -> float:
        """Median over the samples."""
        return float(np.median(self.samples))

    @property
    def low(self) -> float:
        """Lower quartile, s."""
        return float(np.quantile(self.samples, 0.25))

    @property
    def high(self) -> float:
        """Upper quartile, s."""
        return float(np.quantile(self.samples, 0.75))

    @property
    def floor(self) -> float:
        """Half the interquartile range over the median: no error below it means anything."""
        return (self.high - self.low) / 2 / self.seconds

    @property
    def repeats(self) -> int:
        """Samples taken."""
        return len(self.samples)


@dataclass(frozen=True, kw_only=True, eq=False)
class Noise:
    """How far repeats of fixed work spread on a machine."""

    product: Timing
    """A float32 product of fixed size: the cores."""
    stream: Timing
    """Numbers copied from memory to memory, more than the caches hold."""

    @property
    def floors(self) -> tuple[float, float]:
        """Relative spread of the medians of blocks of repeats: of the product, of the stream.

        Medians over several repeats are what results are made of; neighbours that share the memory
        of a virtual machine move single repeats much further.
        """
        product, stream = (_of_blocks(each.samples) for each in (self.product, self.stream))
        return product, stream

    @property
    def floor(self) -> float:
        """Larger of the two."""
        return max(self.floors)


def _of_blocks(samples: NDArray[np.float64]) -> float:
    """Half the interquartile range of the blocks' medians, over their median."""
    blocks = np.array_split(samples, min(_BLOCKS, len(samples)))
    low, middle, high = np.quantile([np.median(block) for block in blocks], [0.25, 0.5, 0.75])
    return float((high - low) / 2 / middle)


def time_calls(
    run: Run,
    *,
    device: str = "cpu",
    warmup: int = 3,
    repeats: int = 100,
    budget: float = 0.5,
    shortest: float = 50e-6,
    clock: Clock = time.perf_counter_ns,
) -> Timing:
    """Time one piece of work by itself.

    Parameters
    ----------
    run
        The work; what it returns is dropped.
    device
        Where it runs: ``"cpu"``, or a CUDA device, which is timed by its own events.
    warmup
        Calls beforehand, not timed.
    repeats
        Samples at most, at least 5.
    budget
        Timed seconds after which no further sample starts; five are always taken.
    shortest
        Seconds that a sample takes at least: shorter calls are repeated within it.
    clock
        Nanoseconds; not used on CUDA.

    Returns
    -------
    Timing

    Raises
    ------
    ValueError
        When ``repeats`` is below 5.
    """
    _enough("repeats", repeats)
    with _quiet(device):
        watch = _watch(device, clock)
        calls = _calls(run, watch, warmup, shortest)
        samples: list[float] = []
        while len(samples) < _LEAST_SAMPLES or (
            len(samples) < repeats and sum(samples) * calls < budget
        ):
            samples.append(watch(run, calls) / calls)
    return Timing(samples=np.array(samples), calls=calls)


def time_after(
    run: Run,
    before: Run,
    *,
    device: str = "cpu",
    repeats: int = 5,
    clock: Clock = time.perf_counter_ns,
) -> Timing:
    """Time single calls, each after something that is not timed.

    Parameters
    ----------
    run
        The work; what it returns is dropped.
    before
        Runs before each call: what a step does in between, such as passing other data through the
        caches.
    device, clock
        As `time_calls`.
    repeats
        Samples.

    Returns
    -------
    Timing
        Of one call per sample; the first is thrown away.

    Raises
    ------
    ValueError
        When ``repeats`` is below 5.
    """
    _enough("repeats", repeats)
    samples = []
    with _quiet(device):
        watch = _watch(device, clock)
        for _ in range(repeats + 1):
            before()
            samples.append(watch(run, 1))
    return Timing(samples=np.array(samples[1:]), calls=1)


def measure_interleaved(
    runs: Sequence[Run],
    *,
    rounds: int,
    device: str = "cpu",
    warmup: int = 1,
    shortest: float = 50e-6,
    before: Run | None = None,
    seed: int = 0,
    clock: Clock = time.perf_counter_ns,
) -> tuple[Timing, ...]:
    """Time several pieces of work in rounds, in another random order each round.

    What drifts slowly (clock rate, neighbours) thus meets all of them alike, and their times can
    be compared more closely than any is known by itself.

    Parameters
    ----------
    runs
        The pieces; all of them are held in memory at the same time.
    rounds
        Samples of each, at least 5.
    device, shortest, clock
        As for `time_calls`.
    warmup
        Calls before each sample, not timed: the piece before left its own data in the caches.
    before
        Runs before each sample instead, which is then one call: what a step does in between.
    seed
        Of the orders.

    Returns
    -------
    tuple of Timing
        In the order of ``runs``; sample ``r`` of each is of round ``r``.

    Raises
    ------
    ValueError
        When ``rounds`` is below 5.
    """
    _enough("rounds", rounds)
    random, samples = np.random.default_rng(seed), np.empty((len(runs), rounds))
    with _quiet(device):
        watch = _watch(device, clock)
        calls = [1 if before else _calls(run, watch, warmup, shortest) for run in runs]
        for round_ in range(rounds):
            for piece in random.permutation(len(runs)):
                for prepare in [before] if before else [runs[piece]] * warmup:
                    prepare()
                samples[piece, round_] = watch(runs[piece], calls[piece]) / calls[piece]
    pairs = zip(samples, calls, strict=True)
    return tuple(Timing(samples=row, calls=count) for row, count in pairs)


def noise(device: str = "cpu", *, budget: float = 1.0) -> Noise:
    """Time a fixed product and a fixed stream again and again, as the caller pinned them.

    Parameters
    ----------
    device
        As for `this_machine`, whose last-level cache the stream exceeds.
    budget
        Seconds for both together.
    """
    cache_bytes = this_machine(device).cache_bytes
    a, b = (torch.randn(_GEMM, _GEMM, device=device) for _ in range(2))
    source = torch.ones(max(2 * cache_bytes, _LEAST_STREAM) // 4, device=device)
    target = torch.empty_like(source)

    def spread(run: Run) -> Timing:
        return time_calls(run, device=device, budget=budget / 2, repeats=1000)

    return Noise(product=spread(lambda: a @ b), stream=spread(lambda: target.copy_(source)))


def refuse_noisy(measured: Noise, limit: float = 0.05) -> None:
    """Refuse a machine whose repeats spread too far; a caller that goes on raises the limit.

    Raises
    ------
    InputError
        When `Noise.floor` is above ``limit`` (relative).
    """
    if measured.floor <= limit:
        return
    product, stream = measured.floors
    raise InputError(
        "this machine is too noisy to measure: repeats of a fixed product spread by "
        f"{product:.1%}, of a memory stream by {stream:.1%} (medians of blocks: half the "
        f"interquartile range over the median) -- allowed is {limit:.1%} -- close other "
        "programs, pin fewer threads than there are cores, wait and try again; or allow more, "
        "and read every result with this spread"
    )


def _enough(name: str, number: int) -> None:
    if number < _LEAST_SAMPLES:
        raise ValueError(
            f"{name} is {number} -- allowed is {_LEAST_SAMPLES} or more, fewer have no quartiles "
            "-- raise it"
        )


@contextlib.contextmanager
def _quiet(device: str) -> Iterator[None]:
    """Keep Python's garbage collector and autograd out of the measurement; choose the device."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        with torch.inference_mode():
            if device == "cpu":
                yield
            else:
                with torch.cuda.device(device):
                    yield
    finally:
        if collecting:
            gc.enable()


def _watch(device: str, clock: Clock) -> _Watch:
    """Return what measures the seconds of several calls in a row on a device."""
    if device == "cpu":
        return lambda run, calls: _host_seconds(run, calls, clock)
    return _cuda_seconds


def _host_seconds(run: Run, calls: int, clock: Clock) -> float:
    start = clock()
    for _ in range(calls):
        run()
    return (clock() - start) / 1e9


def _cuda_seconds(run: Run, calls: int) -> float:
    event: Callable[..., torch.cuda.Event] = torch.cuda.Event  # untyped in torch's stubs
    start, end = event(enable_timing=True), event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3  # it counts in milliseconds


def _calls(run: Run, watch: _Watch, warmup: int, shortest: float) -> int:
    """Warm up, then find how many calls in a row take ``shortest`` seconds."""
    for _ in range(warmup):
        run()
    calls = 1
    while (taken := watch(run, calls)) < shortest and calls < _MOST_CALLS:
        # at most tenfold: a first guess from few calls is rough
        growth = min(10.0, max(2.0, shortest / taken if taken else 10.0))
        calls = min(int(np.ceil(calls * growth)), _MOST_CALLS)
    return calls
