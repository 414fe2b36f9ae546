"""Lines: values stand at their height, and nothing is drawn where there is no value."""

import re

import pytest

from moeplan.line_chart import DASHES, legend, line_chart


def circles(svg):
    return [tuple(map(float, m)) for m in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)]


def test_points_lie_where_their_values_are():
    svg = line_chart({"a": [0.0, 0.5, 1.0]}, [1, 2, 3], names=("x", "y"), label="l", least=0.0)
    (x0, y0), (x1, y1), (x2, y2) = circles(svg)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.11)
    assert y0 > y2  # up is more


def test_a_logarithmic_axis_has_equal_steps_for_equal_ratios():
    svg = line_chart({"a": [1, 1, 2]}, [1, 10, 100], names=("x", "y"), label="l", log=True)
    (x0, _), (x1, _), (x2, _) = circles(svg)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)


def test_missing_values_are_left_out():
    svg = line_chart({"a": [None, 2.0], "b": [1.0, None]}, [1, 2], names=("x", "y"), label="l")
    assert len(circles(svg)) == 2


def test_texts_are_escaped():
    svg = line_chart({"<a>": [1.0, 2.0]}, [1, 2], names=("x", "y"), label='"<l>')
    assert "<a>" not in svg
    assert "&lt;a&gt;" in svg
    assert "<b>" not in legend(["<b>"])


def test_every_line_has_a_dash_and_a_colour():
    names = [f"n{i}" for i in range(len(DASHES))]
    svg = line_chart({n: [1.0, 2.0] for n in names}, [1, 2], names=("x", "y"), label="l")
    assert all(f'class="line s{i}"' in svg for i in range(len(DASHES)))
    assert svg.count("stroke-dasharray") == len(DASHES) - 1
