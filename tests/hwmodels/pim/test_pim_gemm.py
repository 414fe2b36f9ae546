"""Products on units in a memory: AttAcc's placements by hand, limits, and reading weights again."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.ops import Gemm
from hwmodels.pim import Pim, PimMemory, gemm_joules, gemm_seconds, load_pim, pim_names
from hwmodels.pim.streaming import host_bandwidth, peak_bandwidth, peak_flops, sustained_bandwidth

ALL = [(n, u) for n in pim_names() for u in load_pim(n).units]


def _gemm(m: object, n: object, k: object, dtype: str = "bf16") -> Gemm:
    return Gemm(
        m=np.asarray(m), n=np.asarray(n), k=np.asarray(k), weight_dtype=dtype,
        activation_dtype="bf16",
    )  # fmt: skip


# One matrix of a Mixtral expert on AttAcc: 14336 x 4096 in FP16 times one vector, five stacks


BYTES = 117_440_512  # 14336 x 4096 x 2
MACS = 58_720_256
OPERANDS = 4096 * 2 * 160 + 14336 * 2  # the vector to each of 5 x 32 channels, the result once
REFRESHED = 1 - 456 / 5070
BY_HAND = {
    # columns = ceil(bytes / (5 stacks x 32 channels x banks x 32 B)); rows = ceil(columns / 32).
    # Bank: 163,840 B a column, 717 columns, 23 rows. The limit of 26.22 W: 1024 banks x 4.5 nJ a
    # row (901 pJ + 8192 x 0.44 pJ) are 4.61 uJ, so 176 ns = 228.8 clocks; 31 x 5 + 8 + 19 + 19 =
    # 201 are too few, 31 x 6 + 46 = 232 enough: 6 clocks a column and 40 more a row.
    "bank": (717 * 6 + 23 * 40, 23 * 5 * 1024, 0.44),
    # Bank group: 40,960 B, 2,868 columns, 90 rows. 256 rows of 12.8 nJ (901 pJ + 8192 x 1.45 pJ)
    # are 3.27 uJ: 124.8 ns = 162.2 clocks; 32 x 5 = 160 are too few: 6 clocks, turns are hidden.
    "bank_group": (2868 * 6, 90 * 5 * 256, 0.44 + 1.01),
    # Buffer: 5,120 B, 22,938 columns, 717 rows; 17.5 W are within the limit: tCCD_S = 2 clocks.
    "buffer": (22_938 * 2, 717 * 5 * 32, 0.44 + 1.01 + 1.23 + 0.5),
}
"""Clocks of 1 / 1.3 GHz without refresh, rows opened, pJ per bit from the open row to the unit."""


@pytest.mark.parametrize("unit", list(BY_HAND))
def test_attaccs_placements_by_hand(unit: str) -> None:
    """Clocks / 1.3 GHz / (1 - tRFC / tREFI) + 1 us; energy of rows, bits, operands, products."""
    clocks, rows, per_bit = BY_HAND[unit]
    pim, op = Pim(load_pim("attacc"), unit, 5), _gemm(1, 14336, 4096)
    assert gemm_seconds(pim, op)[0] == pytest.approx(clocks / 1.3e9 / REFRESHED + 1e-6, rel=1e-9)
    picojoules = (
        rows * 901.12
        + BYTES * 8 * per_bit
        + OPERANDS * 8 * (0.44 + 1.01 + 1.23 + 0.5 + 0.3 - per_bit)
        + MACS * 0.32
    )
    assert gemm_joules(pim, op)[0] == pytest.approx(picojoules * 1e-12, rel=1e-9)


def test_attaccs_placements_in_round_figures() -> None:
    """5.4, 15.5 and 39.8 us; 0.57, 1.5 and 3.1 mJ: a bank's data go the shortest way."""
    op = _gemm(1, 14336, 4096)
    parts = [Pim(load_pim("attacc"), unit, 5) for unit in BY_HAND]
    microseconds = [float(gemm_seconds(p, op)[0]) * 1e6 for p in parts]
    millijoules = [float(gemm_joules(p, op)[0]) * 1e3 for p in parts]
    assert microseconds == pytest.approx([5.41, 15.55, 39.78], abs=0.01)
    assert millijoules == pytest.approx([0.571, 1.507, 3.113], abs=0.001)


def test_a_second_vector_reads_the_weights_again() -> None:
    """AttAcc's and Samsung's units hold one vector: twice the time and the energy of one."""
    for name, unit in (("attacc", "bank"), ("hbm-pim", "pim"), ("aim", "aim")):
        pim, op = Pim(load_pim(name), unit, 4), _gemm([1, 2, 3], 4096, 4096)
        moved = gemm_seconds(pim, op) - pim.units.launch.value
        np.testing.assert_allclose(moved / moved[0], [1, 2, 3], rtol=1e-12)
        joules = gemm_joules(pim, op)
        np.testing.assert_allclose(joules / joules[0], [1, 2, 3], rtol=1e-12)


def test_registers_share_a_read_until_the_arithmetic_is_slower() -> None:
    """Twice the lanes and two vectors held: a pair costs what one did, a third a second pass."""
    memory = load_pim("hbm-pim")
    units = memory.units["pim"].model_copy(update={"lanes": 32, "vectors": 2})
    pim = Pim(memory.model_copy(update={"units": {"pim": units}}), "pim")
    moved = gemm_seconds(pim, _gemm([1, 2, 3, 4], 4096, 4096)) - units.launch.value
    np.testing.assert_allclose(moved / moved[0], [1, 1, 2, 2], rtol=1e-12)
    slow = units.model_copy(update={"lanes": 16})  # 4 clocks for each vector's column
    pim = Pim(memory.model_copy(update={"units": {"pim": slow}}), "pim")
    moved = gemm_seconds(pim, _gemm([1, 2], 4096, 4096)) - slow.launch.value
    one, two = 31 * 4 + 17 + 17 + 8, 31 * 8 + 17 + 17 + 8  # clocks of a row
    assert moved[1] / moved[0] == pytest.approx(two / one)


def test_duplex_is_bound_by_bandwidth_up_to_eight_tokens() -> None:
    """The more of bytes / W and FLOP / F: 8 FLOP per byte are 8 tokens of bf16."""
    pim = Pim(load_pim("duplex"), "pim", 5)
    times = gemm_seconds(pim, _gemm([1, 4, 7, 16, 32, 64], 14336, 4096))
    np.testing.assert_allclose(times[:3], times[0], rtol=1e-12)
    flops = 2.0 * np.array([16, 32, 64]) * 14336 * 4096
    np.testing.assert_allclose(times[3:], flops / peak_flops(pim), rtol=2e-3)
    host = BYTES / host_bandwidth(pim)
    assert times[4] / host == pytest.approx(32 / 31.79, rel=2e-3)


def test_operands_stop_aims_stream() -> None:
    """GDDR6-AiM, one chip: columns, row turns, refresh; then inputs and results through 64 GB/s.

    4096 x 4096 in bf16: 33.6 MB over 32 banks x 32 B are 32,768 columns of 2 clocks and 512 rows
    of 12 + 32 + 56 - 2 = 98 clocks more; the 8 KB vector goes to two channels, and is held 2 KB at
    a time, so that 4096 sums are read four times.
    """
    pim = Pim(load_pim("aim"), "aim")
    stream = (32_768 * 2 + 512 * 98) / 2e9 / (1 - 210 / 3333)
    moved = (2 * 8192 + 4 * 8192) / 64e9
    time = gemm_seconds(pim, _gemm(1, 4096, 4096))[0]
    assert time == pytest.approx(1e-6 + stream + moved, rel=1e-9)


def test_small_products_cost_a_whole_column_of_all_units() -> None:
    """64 x 64 weights (8 KB) and 128 x 256 (64 KB) fit into AttAcc's 163,840 B column."""
    pim = Pim(load_pim("attacc"), "bank", 5)
    times = gemm_seconds(pim, _gemm(1, [64, 128], [64, 256]))
    assert times[0] == times[1]


def test_nothing_costs_nothing() -> None:
    pim = Pim(load_pim("attacc"), "bank")
    assert gemm_seconds(pim, _gemm([0, 1], 64, 64)).tolist()[0] == 0
    assert gemm_joules(pim, _gemm([0, 1], 64, 64)).tolist()[0] == 0


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(ALL), st.integers(1, 40), st.integers(1, 9000), st.integers(1, 9000))
def test_never_below_the_bound_and_never_less_for_more(
    part: tuple[str, str], m: int, n: int, k: int
) -> None:
    """At least the bytes and the FLOP at their peaks; monotone in m."""
    pim = Pim(load_pim(part[0]), part[1], 2)
    op = _gemm([m, m + 1], n, k)
    seconds, joules = gemm_seconds(pim, op), gemm_joules(pim, op)
    assert seconds[0] >= float(op.flops()[0]) / peak_flops(pim) * (1 - 1e-9)
    assert seconds[0] >= 2.0 * n * k / peak_bandwidth(pim)
    assert seconds[1] >= seconds[0]
    assert joules[1] > joules[0]


@pytest.mark.parametrize("part", ALL)
def test_large_products_reach_the_sustained_rate(part: tuple[str, str]) -> None:
    pim = Pim(load_pim(part[0]), part[1])
    op = _gemm(1, 65536, 65536)
    time = gemm_seconds(pim, op)[0] - pim.units.launch.value
    assert time == pytest.approx(65536**2 * 2 / sustained_bandwidth(pim), rel=0.02)


def test_narrow_weights_need_fewer_columns_and_more_products_of_each() -> None:
    """8-bit weights: half the columns; on 16 lanes each column takes twice as long."""
    narrow = _changed_lanes(load_pim("attacc"), 16)
    wide = _changed_lanes(load_pim("attacc"), 32)
    whole, half = (_gemm(1, 16384, 16384, d) for d in ("bf16", "fp8"))
    time = float(gemm_seconds(narrow, whole)[0] - 1e-6)
    assert gemm_seconds(wide, half)[0] - 1e-6 == pytest.approx(time / 2, rel=0.01)
    per_row = 32 * 8 + 40 - 2  # 8 clocks of arithmetic a column instead of 6 of power
    assert gemm_seconds(narrow, half)[0] - 1e-6 == pytest.approx(time / 2 * per_row / 232, rel=0.01)


def _changed_lanes(memory: PimMemory, lanes: int) -> Pim:
    units = memory.units["bank"].model_copy(update={"lanes": lanes})
    return Pim(memory.model_copy(update={"units": {"bank": units}}), "bank")
