"""The exchange sweep: what is sent is what is stated.

No time is asserted: only shapes, counts, and arithmetic on given marks.
"""

import numpy as np
import pytest

from kernels_ref.exchange_sweep import (
    ExchangeCase,
    ExchangeRow,
    _planned,
    _together,
    exchange_cases,
    exchange_ops,
    sweep_exchange,
)
from kernels_ref.measure import Timing

CASES = (
    ExchangeCase(pattern="balanced", tokens=3, width=8),
    ExchangeCase(pattern="one-sided", tokens=5, width=4),
)


def row(case, phase, ranks=2, seconds=1e-4):
    return ExchangeRow(
        case=case, phase=phase, ranks=ranks, timing=Timing(samples=np.full(5, seconds), calls=1)
    )


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_the_plan_sends_what_the_traffic_says(case, ranks):
    stated = case.traffic(ranks)
    for rank in range(ranks):
        plan = _planned(case, rank, ranks)
        for other in range(ranks):
            sends = case.pattern == "balanced" or rank == 0
            rows = case.tokens if sends or other == rank else 0
            assert plan.send_counts[other] == rows
            if other != rank:
                assert stated[rank, other] == rows * case.width * 4
                assert plan.receive_counts[other] * case.row_bytes == stated[other, rank]
    assert np.diag(stated).sum() == 0


def test_the_way_back_is_the_transpose():
    there, back = row(CASES[1], "dispatch"), row(CASES[1], "combine")
    assert there.traffic.tolist() == [[0, 5 * 16], [0, 0]]
    assert np.array_equal(back.traffic, there.traffic.T)


def test_cases_cover_the_sizes_by_factors_of_two():
    cases = exchange_cases(widths=(256,), least=2**10, most=2**13)
    sizes = [case.tokens * case.row_bytes for case in cases]
    assert sizes == [2**10, 2**10, 2**11, 2**11, 2**12, 2**12, 2**13, 2**13]
    assert {case.pattern for case in cases} == {"balanced", "one-sided"}
    assert all(2**10 <= case.tokens * case.row_bytes <= 2**23 for case in exchange_cases())


def test_rows_of_one_kind_make_a_column():
    small, large = (ExchangeCase(pattern="balanced", tokens=n, width=8) for n in (2, 7))
    op = exchange_ops([row(small, "combine"), row(large, "combine")])
    assert op.phase == "combine"
    assert op.tokens.tolist() == [2, 7]
    assert op.row_bytes == 32
    assert op.traffic[:, 0, 1].tolist() == [64, 224]
    with pytest.raises(ValueError, match=r"dispatch.*one of each -- make a column of each kind"):
        exchange_ops([row(small, "combine"), row(small, "dispatch")])


def test_a_sample_lasts_from_the_last_begin_to_the_last_end():
    marks = np.array([[[100, 900]], [[400, 700]]])  # [ranks, samples, 2]
    assert _together(marks) == pytest.approx([500e-9])


def test_sweep_times_both_halves_of_each_case():
    rows = sweep_exchange(CASES, rounds=5, crowded=True)
    assert [(each.case, each.phase) for each in rows] == [
        (case, phase) for case in CASES for phase in ("dispatch", "combine")
    ]
    assert all(each.timing.repeats == 5 and each.ranks == 2 for each in rows)
    assert all((each.timing.samples > 0).all() for each in rows)


@pytest.mark.parametrize(("rounds", "ranks"), [(4, 2), (5, 1)])
def test_what_has_no_quartiles_or_no_peer_is_refused(rounds, ranks):
    with pytest.raises(ValueError, match=f"{rounds} rounds on {ranks} ranks -- at least 5"):
        sweep_exchange(CASES, rounds=rounds, ranks=ranks)
