"""Streaming from banks: published rates, a command-by-command oracle, power, what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import hwmodels
from basis import InputError
from hwmodels.pim import (
    Pim,
    PimMemory,
    command_interval,
    host_bandwidth,
    interleaved_read_power,
    load_pim,
    peak_bandwidth,
    peak_flops,
    pim_names,
    streaming_power,
    sustained_bandwidth,
    uncited,
)
from hwmodels.pim.streaming import available, row_cycle, timed_interval

ATTACC = load_pim("attacc")


def _changed(memory: PimMemory, block: str, **figures: Any) -> PimMemory:
    return memory.model_copy(update={block: getattr(memory, block).model_copy(update=figures)})


def _unlimited(memory: PimMemory) -> PimMemory:
    return memory.model_copy(update={"power_limit": None})


def test_every_memory_of_the_catalog_loads_and_cites() -> None:
    assert pim_names() == ["aim", "attacc", "cxl-pnm", "duplex", "hbm-pim", "monde"]
    for name in pim_names():
        memory = load_pim(name)
        assert memory.name == name
        assert uncited(memory) == {}
        for unit in memory.units:
            pim = Pim(memory, unit)
            assert 0 < sustained_bandwidth(pim) < peak_bandwidth(pim)


# Published figures


def test_hbm_pim_as_published() -> None:
    """ISCA 2021: 1.23 TB/s and 1.2 TFLOP/s inside a stack, four times the 307.2 GB/s outside."""
    pim = Pim(load_pim("hbm-pim"), "pim")
    assert host_bandwidth(pim) == pytest.approx(307.2e9)
    assert peak_bandwidth(pim) == pytest.approx(1.2288e12)
    assert peak_flops(pim) == pytest.approx(1.2288e12)


def test_aim_as_published() -> None:
    """ISSCC 2022: 1 TFLOP/s a chip; 16 times the bandwidth of 32 pins at 16 Gbit/s."""
    pim = Pim(load_pim("aim"), "aim")
    assert host_bandwidth(pim) == pytest.approx(64e9)
    assert peak_bandwidth(pim) == pytest.approx(16 * 64e9)
    assert peak_flops(pim) == pytest.approx(1.024e12)


def test_duplex_as_published() -> None:
    """MICRO 2024: 21.3 TFLOP/s a stack, 4 times its bandwidth, 8 FLOP per byte; with five stacks
    beside 3.35 TB/s to the xPU both take the same for F / W = 31.8 tokens of an expert.
    """
    stack, device = (Pim(load_pim("duplex"), "pim", n) for n in (1, 5))
    assert peak_flops(stack) == pytest.approx(21.3e12, rel=1e-4)
    assert host_bandwidth(device) == pytest.approx(3.35e12, rel=1e-6)
    assert peak_bandwidth(device) == pytest.approx(4 * host_bandwidth(device))
    assert peak_flops(device) / peak_bandwidth(device) == pytest.approx(8, rel=0.01)
    tie = peak_flops(device) / host_bandwidth(device)
    assert tie == pytest.approx(31.8, abs=0.05)


def test_figures_of_assumed_near_memories_are_the_catalogs() -> None:
    """512 GB/s (assumed) and 1.1 TB/s (HPCA 2024), 8 FLOP per byte each."""
    for name, bandwidth in (("monde", 512e9), ("cxl-pnm", 1.1e12)):
        pim = Pim(load_pim(name), "ndp")
        assert peak_bandwidth(pim) == host_bandwidth(pim)
        assert peak_bandwidth(pim) == pytest.approx(bandwidth, rel=0.01)
        assert peak_flops(pim) / peak_bandwidth(pim) == pytest.approx(8, rel=1e-6)


# AttAcc: multiples of the interface, and the authors' cycle-level results


def test_attaccs_multiples_of_the_interface() -> None:
    """Without a limit 16, 4 and 1 times: 32, 8 and 1 columns per 4, 4 and 2 clocks.

    The simulator's config.py has 16, 8 and 1, but its HBM3-PIM.cpp reads a bank group's columns
    every 4 clocks (nCCDSB), which is 4 times; the commands are what is modelled.
    """
    for unit, times in (("bank", 16), ("bank_group", 4), ("buffer", 1)):
        pim = Pim(_unlimited(ATTACC), unit)
        assert peak_bandwidth(pim) / host_bandwidth(pim) == pytest.approx(times)
        assert command_interval(pim) == timed_interval(pim)


def test_the_power_of_interleaved_reads_gives_attaccs_intervals() -> None:
    """The simulator's limit makes nCCDAB and nCCDSB 6 at 5.2 Gbit/s; it quotes 9 and 3 times.

    With the rows' turns six clocks are 8.8 and 2.7 times the interface.
    """
    assert ATTACC.power_limit is not None
    for unit, published in (("bank", 9), ("bank_group", 3)):
        pim = Pim(ATTACC, unit)
        limit = ATTACC.power_limit.value
        assert limit == pytest.approx(interleaved_read_power(pim), rel=1e-3)
        assert command_interval(pim) == 6
        before_refresh = sustained_bandwidth(pim) / available(pim) / host_bandwidth(pim)
        assert before_refresh == pytest.approx(published, rel=0.12)
    assert command_interval(Pim(ATTACC, "buffer")) == 2


def test_interleaved_reads_by_hand() -> None:
    """32 channels x 2 ranks x 4 rows of 901 pJ in 30 ns, and 665.6 GB/s at 3.48 pJ a bit."""
    by_hand = 32 * 2 * 4 * 901.12e-12 / 30e-9 + 665.6e9 * 8 * 3.48e-12
    assert interleaved_read_power(Pim(ATTACC, "bank")) == pytest.approx(by_hand)


CYCLES = [  # unit, limited, heads of a stack, clocks, products of all channels; ramulator.out
    ("bank", True, 2050, 65_518, 131_216),  # 256 tokens x 128, FP16
    ("bank", True, 562, 73_904, 145_680),  # 2,048 x 128, INT8
    ("bank", True, 292, 78_632, 149_520),  # 2,045 x 160, INT8
    ("bank_group", True, 188, 325_445, 778_256),  # 4,086 x 128, FP16
    ("bank_group", True, 188, 172_967, 413_456),  # 2,166 x 128, FP16
    ("bank_group", False, 130, 163_071, 517_936),  # 3,983 x 128, FP16
    ("buffer", False, 188, 871_721, 6_225_936),  # 4,096 x 128, FP16
    ("buffer", False, 188, 435_461, 3_112_976),  # 2,048 x 128, FP16
    ("buffer", True, 157, 450_681, 3_217_566),  # 4,059 x 160, INT8
]
"""Results that AttAcc's authors ship with their cycle-level simulator (at c1540de)."""


@pytest.mark.parametrize(("unit", "limited", "heads", "clocks", "products"), CYCLES)
def test_attaccs_own_simulation(
    unit: str, limited: bool, heads: int, clocks: int, products: int
) -> None:
    """Whole attention layers, softmax and moves included: within 4 % of columns x row cycle.

    Heads lie one per channel, so of 16 channels the busiest has ceil(heads / 16).
    """
    pim = Pim(ATTACC if limited else _unlimited(ATTACC), unit)
    busiest = products / heads * -(-heads // 16)
    columns = ATTACC.organisation.columns
    per_column = row_cycle(pim, command_interval(pim)) / columns / available(pim)
    assert busiest * per_column == pytest.approx(clocks, rel=0.04)


def test_softmax_in_sight_is_not_in_the_row_cycle() -> None:
    """130 heads on 16 channels are nine in a row; the odd one's softmax is waited for: 10 %."""
    pim = Pim(_unlimited(ATTACC), "buffer")
    per_column = row_cycle(pim, 2) / ATTACC.organisation.columns / available(pim)
    ours = 4_160_016 / 130 * 9 * per_column
    assert ours / 706_165 == pytest.approx(0.896, abs=0.005)


# The row cycle against commands one by one


def _played(pim: Pim, interval: int, rows: int) -> float:
    """Clocks per row, from issuing every command at its earliest legal clock, sets in turn."""
    t, o, u = pim.memory.timings, pim.memory.organisation, pim.units
    sets = o.banks // u.streams if u.overlapped else 1
    per_rank = -(-u.streams // o.ranks)
    waves = 1 if u.activations_per_window is None else -(-per_rank // u.activations_per_window)
    window = 0.0
    if u.activations_per_window is not None:
        window = per_rank * t.faw / u.activations_per_window
    opened = [-1e9] * sets
    closed = [-1e9] * sets
    last_opening = last_column = -1e9
    starts = []
    for row in range(rows):
        s = row % sets
        opening = max(closed[s] + t.rp, opened[s] + t.ras + t.rp, last_opening + window, 0)
        ready = opening + (waves - 1) * t.faw + t.rcd
        first = max(ready, last_column + interval)
        last_column = first + (o.columns - 1) * interval
        closed[s] = max(last_column + t.rtp, opening + t.ras)
        opened[s], last_opening = opening, opening
        starts.append(first)
    half = rows // 2 // sets * sets  # a whole number of rounds, after the first ones
    return (starts[-1] - starts[-1 - half]) / half


_CLOCKS = st.integers(1, 60)


@settings(max_examples=300, deadline=None)
@given(
    ccd=st.integers(1, 8), rcd=_CLOCKS, rp=_CLOCKS, ras=_CLOCKS, rtp=st.integers(1, 20),
    faw=st.integers(1, 80), streams=st.sampled_from([1, 2, 4, 8, 16, 32]),
    columns=st.sampled_from([1, 2, 8, 32]), overlapped=st.booleans(),
    allowed=st.sampled_from([None, 1, 4, 16]),
)  # fmt: skip
def test_row_cycle_is_that_of_commands_issued_at_once(
    ccd: int, rcd: int, rp: int, ras: int, rtp: int, faw: int, streams: int, columns: int,
    overlapped: bool, allowed: int | None,
) -> None:  # fmt: skip
    memory = _changed(ATTACC, "organisation", row_bytes=32.0 * columns)
    memory = _changed(memory, "timings", rcd=rcd, rp=rp, ras=ras, rtp=rtp, faw=faw)
    units = memory.units["bank"].model_copy(
        update={
            "streams": streams, "overlapped": overlapped, "activations_per_window": allowed
        }
    )  # fmt: skip
    pim = Pim(memory.model_copy(update={"units": {"bank": units}}), "bank")
    assert row_cycle(pim, ccd) == pytest.approx(_played(pim, ccd, 400), rel=1e-6)


def test_rows_turn_in_sight_or_behind() -> None:
    """Bank: 31 x 6 + 8 + 19 + 19 clocks a row; bank group: 32 x 6, four banks take turns."""
    assert row_cycle(Pim(ATTACC, "bank"), 6) == 232
    assert row_cycle(Pim(ATTACC, "bank_group"), 6) == 192


def test_jedecs_window_would_hold_up_an_all_bank_activation() -> None:
    """16 rows of a rank, four each 39 clocks: the last opens 117 clocks after the first."""
    units = ATTACC.units["bank"].model_copy(update={"activations_per_window": 4})
    pim = Pim(ATTACC.model_copy(update={"units": {"bank": units}}), "bank")
    assert row_cycle(pim, 6) == 232 + 117


# Invariants


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["bank", "bank_group", "buffer"]), st.floats(0.5, 60))
def test_the_interval_is_the_least_within_the_limit(unit: str, watts: float) -> None:
    limit = ATTACC.power_limit
    assert limit is not None
    memory = ATTACC.model_copy(update={"power_limit": limit.model_copy(update={"value": watts})})
    pim = Pim(memory, unit)
    interval = command_interval(pim)
    assert streaming_power(pim, interval) <= watts or interval == timed_interval(pim)
    assert interval == timed_interval(pim) or streaming_power(pim, interval - 1) > watts
    assert sustained_bandwidth(pim) <= sustained_bandwidth(Pim(_unlimited(ATTACC), unit))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["rcd", "rp", "ras", "rtp", "faw", "rfc"]),
    st.integers(1, 400),
    st.sampled_from([(n, u) for n in pim_names() for u in load_pim(n).units]),
)
def test_longer_timings_are_never_faster(name: str, more: int, part: tuple[str, str]) -> None:
    memory = load_pim(part[0])
    slower = _changed(memory, "timings", **{name: getattr(memory.timings, name) + more})
    fast, slow = Pim(_unlimited(memory), part[1]), Pim(_unlimited(slower), part[1])
    assert sustained_bandwidth(slow) <= sustained_bandwidth(fast) * (1 + 1e-12)


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["units"]["pim"].update(streams=64), "streams: 64 -- a channel has 16 banks"),
        (lambda d: d["units"]["pim"].update(placement="controller"), "reads one bank of a"),
        (lambda d: d["timings"].update(ccd_short=9), r"ccd_short: 9 -- at most ccd_long \(4\)"),
        (lambda d: d["timings"].update(rfc=9999), r"rfc: 9999 -- at most refi \(4680\)"),
        (lambda d: d["organisation"].update(row_bytes="1000 B"), "a multiple of column_bytes"),
        (lambda d: d["energies"].update(cell="0.44"), "write a quantity in joules"),
        (lambda d: d["units"]["pim"].update(lane=16), "did you mean 'lanes'"),
    ],
)
def test_wrong_files_are_refused(
    change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    path = Path(hwmodels.__file__).parent / "catalog" / "pim" / "hbm-pim.yaml"
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    change(data)
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump(data), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load_pim(wrong)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match="unknown memory 'hbm-pin' -- known are aim, attacc"):
        load_pim("hbm-pin")
    with pytest.raises(InputError, match="no units 'banks' -- known are bank, bank_group, buffer"):
        Pim(ATTACC, "banks")
    with pytest.raises(InputError, match="0 stacks -- at least 1"):
        Pim(ATTACC, "bank", 0)


def test_a_source_that_the_file_does_not_explain_is_named() -> None:
    stray = _changed(ATTACC, "timings", source="jedec")
    assert uncited(stray) == {"timings": "jedec"}
