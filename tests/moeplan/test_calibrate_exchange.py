"""The fit of the link between ranks: a known start-up and rate come back, and set the price."""

from dataclasses import replace

import numpy as np
import pytest
import yaml

from basis import parse_quantity
from basis.errors import InputError
from hwmodels.cluster import load_cluster
from hwmodels.cost_comm import price_comm
from hwmodels.link import Link
from hwmodels.ops import AllToAll
from kernels_ref.exchange_sweep import ExchangeRow, exchange_cases
from kernels_ref.measure import Timing
from moeplan.calibrate_exchange import FITTED_BYTES, fit_exchange

STARTUP, RATE = {"dispatch": 9e-5, "combine": 6e-5}, {"dispatch": 1.5e9, "combine": 2.5e9}


def rows(noise=0.0, slow_beyond=1.0, quiet=lambda number: True, spread=0.01, stall=0.0):
    """Exchanges that take start-up + bytes / rate, give or take some noise."""
    rng = np.random.default_rng(0)
    found = []
    for number, case in enumerate(exchange_cases()):
        port = case.tokens * case.row_bytes
        for phase in ("dispatch", "combine"):
            seconds = (STARTUP[phase] + port / RATE[phase]) * np.exp(noise * rng.standard_normal())
            seconds *= slow_beyond if port > FITTED_BYTES else 1.0
            late = 1 + (spread if quiet(number) else 3.0)
            samples = seconds * np.concatenate([np.ones(5), np.full(4, late)])
            samples[-1] += stall
            timing = Timing(samples=samples, calls=1)
            found.append(ExchangeRow(case=case, phase=phase, ranks=2, timing=timing))
    return found


def test_known_parameters_come_back():
    found = fit_exchange(rows())
    for half in found.halves:
        assert half.startup_s == pytest.approx(STARTUP[half.phase], rel=1e-3)
        assert half.rate == pytest.approx(RATE[half.phase], rel=1e-3)
        assert half.held_out.median < 1e-3
        assert half.left_out == 0
    assert [half.phase for half in found.halves] == ["dispatch", "combine"]


def test_held_out_sizes_tell_the_noise_and_no_row_is_in_both_parts():
    every = rows(noise=0.1)
    for half in fit_exchange(every).halves:
        assert 0.02 < half.held_out.median < 0.3
        assert half.low < 1 < half.high
        within = [r for r in every if r.phase == half.phase and r.traffic.max() <= FITTED_BYTES]
        assert half.fitted.rows + half.held_out.rows == len(within)
        assert half.held_out.rows >= len(within) / 6


def test_larger_sizes_are_scored_and_not_fitted():
    for half in fit_exchange(rows(slow_beyond=2.0)).halves:
        assert half.startup_s == pytest.approx(STARTUP[half.phase], rel=1e-3)
        assert half.beyond is not None
        assert half.beyond.median == pytest.approx(0.5, abs=1e-3)


def test_stalls_are_priced_by_their_mean_and_do_not_move_the_fit():
    stall = 3e-3  # one sample in nine
    found = fit_exchange(rows(spread=0.0, stall=stall))
    for half, cost in zip(found.halves, found.to_dict()["costs"].values(), strict=True):
        assert half.startup_s == pytest.approx(STARTUP[half.phase], rel=1e-3)
        assert half.stall_s == pytest.approx(stall / 9, rel=1e-9)
        assert parse_quantity(cost["startup"], "seconds") == pytest.approx(
            half.startup_s + half.stall_s, rel=1e-3
        )


def test_no_stall_is_below_zero():
    early = [
        replace(r, timing=Timing(samples=2 * r.timing.seconds - r.timing.samples, calls=1))
        for r in rows()
    ]
    assert all(half.stall_s == 0 for half in fit_exchange(early).halves)


def test_noisy_rows_are_left_out_and_counted():
    half = fit_exchange(rows(quiet=lambda number: number % 5)).halves[0]
    noisy = sum(number % 5 == 0 for number in range(len(exchange_cases())))
    assert half.left_out == noisy
    assert half.rate == pytest.approx(RATE["dispatch"], rel=1e-3)


def test_a_noisy_machine_is_refused():
    with pytest.raises(InputError, match=r"dispatch: 0 of \d+ measured exchanges are quiet.*close"):
        fit_exchange(rows(quiet=lambda number: False))


def test_the_link_prices_what_was_fitted():
    small_cluster = load_cluster("hgx-h100-8", gpus=2)
    link = yaml.safe_load(
        yaml.safe_dump(fit_exchange(rows(spread=0.0), source="here, today").to_dict())
    )
    node = small_cluster.node.model_copy(update={"interconnect": Link.model_validate(link)})
    cluster = small_cluster.model_copy(update={"node": node})
    sent, back = 300_000, 200_000
    op = AllToAll(traffic=np.array([[[0, sent], [back, 0]]]), phase="combine")
    price = price_comm(op, cluster)
    assert price.seconds == pytest.approx([STARTUP["combine"] + sent / RATE["combine"]], rel=2e-3)
    assert price.evidence == "fitted"
    assert "here, today" in link["costs"]["combine"]["source"]


def test_the_bandwidth_is_the_best_rate_measured_or_fitted():
    fitted = fit_exchange(rows()).bandwidth  # with a start-up no sample reaches the rate
    assert fitted.evidence == "fitted"
    assert fitted.value == pytest.approx(RATE["combine"], rel=1e-3)
    every = rows(slow_beyond=0.25)
    measured = fit_exchange(every).bandwidth
    one_way = [r.traffic.max() / r.timing.seconds for r in every if r.case.pattern == "one-sided"]
    assert measured.evidence == "measured"
    assert measured.value == pytest.approx(max(one_way))
    assert "one-sided" in measured.source
