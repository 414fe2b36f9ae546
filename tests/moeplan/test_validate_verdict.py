"""Rows, floors and verdicts: oracles worked out by hand or with plain loops."""

import json
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.validate_verdict import Row, Summary, measured, summaries


def row(error: float, floor: float = 0.01, label: str = "a", bound: float = 0.1) -> Row:
    return Row(label=label, predicted_s=2 + 2 * error, measured_s=2.0, floor=floor, bound=bound)


@pytest.mark.parametrize(
    ("error", "floor", "verdict"),
    [
        (0.09, 0.05, "ok"),
        (-0.09, 0.0, "ok"),
        (0.11, 0.05, "off"),
        (-0.11, 0.01, "off"),
        (0.0, 0.051, "undecidable"),
        (0.5, 0.051, "undecidable"),
    ],
)
def test_a_row_is_judged_only_above_the_noise(error: float, floor: float, verdict: str) -> None:
    assert row(error, floor).verdict == verdict


def test_a_summary_takes_errors_of_decidable_rows_and_times_of_all() -> None:
    rows = [row(0.1), row(-0.3), row(0.2), row(9.0, floor=0.2)]
    found = Summary.of("some", rows)
    assert (found.decidable, found.undecidable) == (3, 1)
    assert found.median == pytest.approx(0.2)
    assert found.signed == pytest.approx(0.1)
    assert found.worst == pytest.approx(0.3)
    assert found.p90 == pytest.approx(0.28)  # numpy's linear rule between 0.2 and 0.3
    assert found.measured_s == 8.0
    assert found.predicted_s == pytest.approx(2.2 + 1.4 + 2.4 + 20.0)
    assert found.verdict(0.1) == "off"
    assert found.verdict(0.2 + 1e-9) == "ok"


def test_nothing_decidable_never_passes() -> None:
    found = Summary.of("noisy", [row(0.0, floor=0.06)])
    assert found.verdict(10.0) == "undecidable"
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["median"] is None
    assert data["undecidable"] == 1


def test_rows_are_grouped_by_label_in_order() -> None:
    rows = [row(0.1, label="b"), row(0.2, label="a"), row(0.3, label="b")]
    found = summaries(rows, lambda each: each.label)
    assert [each.label for each in found] == ["b", "a"]
    assert [each.decidable for each in found] == [2, 1]


@settings(deadline=None, max_examples=30)
@given(st.integers(5, 9), st.integers(1, 4), st.integers(0, 1000))
def test_time_and_floor_of_samples(rounds: int, windows: int, seed: int) -> None:
    samples = np.random.default_rng(seed).uniform(1, 2, (rounds, windows))
    medians = [statistics.median(samples[:, w].tolist()) for w in range(windows)]
    time = sum(medians) / windows
    means = sorted(statistics.fmean(samples[r].tolist()) for r in range(rounds))
    low, _, high = statistics.quantiles(means, n=4, method="inclusive")
    assert measured(samples) == pytest.approx((time, (high - low) / 2 / time))


def test_windows_that_differ_are_no_noise() -> None:
    assert measured(np.tile([1.0, 5.0], (5, 1))) == (3.0, 0.0)
