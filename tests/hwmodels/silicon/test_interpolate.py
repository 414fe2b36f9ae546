"""Curves between measured points: closed forms, a published interpolant, no continuation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import PchipInterpolator

from hwmodels.silicon.interpolate import Curves, Kind, Surfaces

_knots = st.lists(
    st.tuples(st.integers(1, 5000), st.floats(1e-6, 1.0)), min_size=2, max_size=12,
    unique_by=lambda point: point[0],
)  # fmt: skip


def _one(x: list[float], y: list[float], kind: Kind = "linear") -> Curves:
    return Curves.through(np.zeros(len(x), np.int64), np.array(x), np.array(y), kind)


def _at(curves: Curves, x: list[float], number: int = 0) -> np.ndarray:
    return curves.at(np.full(len(x), number), np.array(x, dtype=float))


def test_line_between_points_and_nothing_outside():
    curves = _one([10, 20, 40], [1.0, 3.0, 3.0])
    assert _at(curves, [10, 15, 20, 30, 40]) == pytest.approx([1, 2, 3, 3, 3])
    assert np.isnan(_at(curves, [9.99, 40.01, 1e9])).all()
    assert np.isnan(_at(curves, [15], number=1)).all()
    assert np.isnan(_at(curves, [15], number=-1)).all()


def test_neighbouring_curves_do_not_touch():
    curves = Curves.through(
        np.array([0, 0, 1, 1]), np.array([1.0, 2, 3, 4]), np.array([1.0, 2, 30, 40])
    )
    inside = curves.at(np.array([0, 1, 0, 1]), np.array([2.0, 3.0, 3.0, 2.0]))
    assert inside[:2] == pytest.approx([2, 30])
    assert np.isnan(inside[2:]).all()


def test_points_measured_again_count_with_their_median():
    assert _at(_one([1, 1, 1, 2], [5.0, 1.0, 2.0, 9.0]), [1]) == pytest.approx([2])


def test_monotone_cubic_is_pchip_between_inner_points():
    x, y = np.array([1.0, 2, 5, 9, 20, 40, 80]), np.array([1.0, 1.5, 1.4, 4, 9, 30, 31])
    wanted = np.linspace(2, 40, 77)
    found = _one(list(x), list(y), "monotone").at(np.zeros(77, np.int64), wanted)
    assert found == pytest.approx(PchipInterpolator(x, y)(wanted), rel=1e-12)


@given(_knots, st.floats(0, 1), st.sampled_from(["linear", "monotone"]))
def test_value_lies_between_its_neighbours(points, share, kind):
    x, y = (np.array(sorted(points))[:, i] for i in (0, 1))
    i = min(int(share * (len(x) - 1)), len(x) - 2)
    between = x[i] + share * (x[i + 1] - x[i])
    value = float(_at(_one(list(x), list(y), kind), [between])[0])
    low, high = sorted([y[i], y[i + 1]])
    assert low * (1 - 1e-9) <= value <= high * (1 + 1e-9)


def test_left_out_points_are_what_their_neighbours_say():
    curves = _one([1, 2, 4, 8, 16, 32, 64], [1.0, 5, 3, 7, 11, 13, 2])
    expected = [np.nan, 1 + 2 / 3, 5 + 2 / 3, 3 + 8 / 3, 7 + 2.0, 11 - 3.0, np.nan]
    assert curves.left_out() == pytest.approx(expected, nan_ok=True)
    assert list(curves.inner()) == [False, True, True, True, True, True, False]


def test_surface_is_exact_for_a_bilinear_function():
    first, second = (g.ravel() for g in np.meshgrid([1.0, 2, 8, 32], [16.0, 64, 100, 400, 900]))
    truth = lambda a, b: 3 + 0.2 * a + 0.1 * b + 0.01 * a * b  # noqa: E731
    made = Surfaces.through(
        np.zeros(len(first), np.int64), first, second, truth(first, second), ("linear", "linear")
    )
    a, b = np.array([1.0, 5, 31, 32]), np.array([16.0, 99, 700, 900])
    assert made.at(np.zeros(4, np.int64), a, b) == pytest.approx(truth(a, b))
    outside = made.at(np.zeros(3, np.int64), np.array([0.5, 33, 4]), np.array([64.0, 64, 901]))
    assert np.isnan(outside).all()


def test_missing_cell_of_a_grid_is_filled_from_its_row_and_column():
    first, second = (g.ravel() for g in np.meshgrid([1.0, 2, 4], [10.0, 20, 40]))
    kept = ~((first == 2) & (second == 20))
    value = first * second
    made = Surfaces.through(
        np.zeros(int(kept.sum()), np.int64), first[kept], second[kept], value[kept],
        ("linear", "linear"),
    )  # fmt: skip
    assert made.at(np.zeros(1, np.int64), np.array([2.0]), np.array([20.0])) == pytest.approx([40])


def test_rows_that_end_early_are_not_continued():
    # a batch of 8 was measured up to 100, a batch of 1 up to 1000
    first, second = np.array([1.0, 1, 8, 8]), np.array([10.0, 1000, 10, 100])
    made = Surfaces.through(np.zeros(4, np.int64), first, second, np.ones(4), ("linear", "linear"))
    found = made.at(np.zeros(3, np.int64), np.array([1.0, 4, 4]), np.array([500.0, 50, 500]))
    assert list(np.isnan(found)) == [False, False, True]
