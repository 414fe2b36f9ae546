"""Statistics of timings, with a clock and work that follow a script; no real time is looked at."""

import gc
import itertools
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from basis.errors import InputError
from kernels_ref.measure import Noise, Timing, measure_interleaved, noise, refuse_noisy, time_calls

MS = 1_000_000  # nanoseconds


class Script:
    """A clock in nanoseconds, and work that moves it forward."""

    def __init__(self):
        self.now, self.log = 0, []

    def __call__(self):
        return self.now

    def work(self, *durations, name=None):
        """Work that takes these durations in turn, again and again."""
        turn = itertools.cycle(durations)

        def run():
            self.log.append(name)
            self.now += next(turn)

        return run


def test_median_and_quartiles():
    clock = Script()
    # two calls to warm up, one to see how long a call takes, then the samples
    run = clock.work(90 * MS, 90 * MS, 70 * MS, *(n * MS for n in (5, 1, 4, 2, 3)))
    timing = time_calls(run, warmup=2, repeats=5, clock=clock)
    assert timing.samples.tolist() == [5e-3, 1e-3, 4e-3, 2e-3, 3e-3]
    assert (timing.low, timing.seconds, timing.high) == (2e-3, 3e-3, 4e-3)
    assert timing.floor == pytest.approx(1 / 3)
    assert (timing.repeats, timing.calls, len(clock.log)) == (5, 1, 8)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(1e-6, 1e3), min_size=5, max_size=40))
def test_statistics_equal_the_standard_library(samples):
    timing = Timing(samples=np.array(samples), calls=1)
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    assert (timing.low, timing.seconds, timing.high) == pytest.approx((low, middle, high))
    assert timing.floor == pytest.approx((high - low) / 2 / middle, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("duration", [1, 7, 900, 49_999])
def test_short_calls_are_repeated_within_a_sample(duration):
    clock = Script()
    timing = time_calls(clock.work(duration), repeats=6, shortest=50e-6, clock=clock)
    assert timing.calls * duration >= 50_000 > duration
    assert timing.calls * duration <= 50_000 * 10  # and not far more often than needed
    assert timing.samples == pytest.approx(np.full(6, duration * 1e-9))


def test_long_calls_are_not():
    clock = Script()
    assert time_calls(clock.work(50_000), repeats=5, clock=clock).calls == 1


@pytest.mark.parametrize(("budget", "repeats"), [(0.0, 5), (0.095, 10), (9.0, 30)])
def test_samples_end_with_the_budget(budget, repeats):
    clock = Script()
    assert (
        time_calls(clock.work(10 * MS), repeats=30, budget=budget, clock=clock).repeats == repeats
    )


def test_a_clock_that_stands_still_ends():
    assert time_calls(lambda: None, warmup=0, repeats=5, clock=lambda: 7).seconds == 0


def test_nothing_is_collected_or_recorded_while_timing():
    states = []

    def run():
        states.append((gc.isenabled(), torch.is_inference_mode_enabled()))
        if len(states) == 8:
            raise KeyError

    assert gc.isenabled()
    with pytest.raises(KeyError):
        time_calls(run)
    assert set(states) == {(False, True)}
    assert gc.isenabled()
    assert not torch.is_inference_mode_enabled()


def test_collection_that_was_off_stays_off():
    gc.disable()
    try:
        clock = Script()
        time_calls(clock.work(MS), repeats=5, clock=clock)
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("few", [0, 4])
def test_quartiles_need_samples(few):
    with pytest.raises(ValueError, match=f"repeats is {few} -- allowed is 5 or more"):
        time_calls(lambda: None, repeats=few)
    with pytest.raises(ValueError, match=f"rounds is {few} -- allowed is 5 or more"):
        measure_interleaved([lambda: None], rounds=few)


def test_rounds_hold_every_piece_once_in_another_order():
    clock = Script()
    runs = [clock.work((n + 1) * MS, name=n) for n in range(4)]
    timings = measure_interleaved(runs, rounds=6, warmup=1, clock=clock)
    assert [t.seconds for t in timings] == pytest.approx([1e-3, 2e-3, 3e-3, 4e-3])
    assert [t.samples.shape for t in timings] == [(6,)] * 4
    found = clock.log[: 2 * 4]  # a call to warm up and one to see how long it takes
    assert found == [0, 0, 1, 1, 2, 2, 3, 3]
    turns = np.reshape(clock.log[2 * 4 :], (6, 4, 2))
    assert (turns[..., 0] == turns[..., 1]).all()  # not timed, then timed
    orders = {tuple(order) for order in turns[..., 0].tolist()}
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert len(orders) > 1


def test_rounds_let_a_drift_meet_all_alike():
    """Everything gets slower and slower while measured: ratios stay, one after the other not."""

    def drifting(clock, base):
        def run():
            clock.now += int(base * (1 + clock.now / (400 * MS)))

        return run

    clock = Script()
    short, long = measure_interleaved(
        [drifting(clock, MS), drifting(clock, 2 * MS)], rounds=100, clock=clock
    )
    assert short.high / short.low > 1.5
    assert long.seconds / short.seconds == pytest.approx(2, rel=0.05)
    clock = Script()
    short = time_calls(drifting(clock, MS), budget=9.0, clock=clock)
    long = time_calls(drifting(clock, 2 * MS), budget=9.0, clock=clock)
    assert long.seconds / short.seconds > 2.2


def test_short_pieces_have_their_own_number_of_calls():
    clock = Script()
    fast, slow = measure_interleaved([clock.work(100), clock.work(MS)], rounds=5, clock=clock)
    assert (fast.calls * 100 >= 50_000, slow.calls) == (True, 1)
    assert fast.samples == pytest.approx(np.full(5, 1e-7))


def quiet_or_not(product, stream):
    """Noise of which each part has this spread."""

    def timing(spread):
        return Timing(
            samples=np.array([1 - spread, 1 - spread, 1, 1 + spread, 1 + spread]), calls=1
        )

    return Noise(product=timing(product), stream=timing(stream))


def test_a_noisy_machine_is_refused():
    measured = quiet_or_not(0.01, 0.083)
    assert measured.floor == pytest.approx(0.083)
    with pytest.raises(InputError) as caught:
        refuse_noisy(measured)
    assert str(caught.value) == (
        "this machine is too noisy to measure: repeats of a fixed product spread by 1.0%, of a "
        "memory stream by 8.3% (medians of blocks: half the interquartile range over the median) "
        "-- allowed is 5.0% -- close other programs, pin fewer threads than there are cores, wait "
        "and try again; or "
        "allow more, and read every result with this spread"
    )


def test_a_quiet_machine_or_a_higher_limit_passes():
    refuse_noisy(quiet_or_not(0.049, 0.02))
    refuse_noisy(quiet_or_not(0.3, 0.2), limit=0.4)


def test_noise_of_this_machine_is_a_spread():
    measured = noise(budget=0.02)
    assert measured.product.repeats >= 5
    assert measured.stream.repeats >= 5
    assert measured.floor == max(measured.product.floor, measured.stream.floor) >= 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda_is_timed_by_its_events():
    x = torch.randn(512, 512, device="cuda")
    for timing in (time_calls(lambda: x @ x, device="cuda"), noise("cuda", budget=0.1).stream):
        assert timing.seconds > 0
