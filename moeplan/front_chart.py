"""The Pareto front of layouts as a picture: tokens/s of all ranks against TPOT, both logarithmic.

One inline SVG in the style of `moeplan.charts`; what is up and to the left is better.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from moeplan.charts import TOP, WIDTH, svg
from moeplan.figures import number, seconds

_LEFT, _HEIGHT = 62.0, 210.0
_MARGIN = 1.15  # factor beyond the outermost points
_ROUND = (1, 2, 5)


def front_chart(points: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any]) -> Markup:
    """Draw the points of a front by TPOT, joined, and the choice.

    Parameters
    ----------
    points : sequence of mapping
        ``tpot_s``, ``tokens_per_second``, ``running_requests`` and ``layout``, by ascending TPOT.
    chosen : mapping
        The same keys.
    """
    every = [*points, chosen]
    x = _Axis([p["tpot_s"] for p in every], _LEFT, WIDTH - 8)
    y = _Axis([p["tokens_per_second"] for p in every], TOP + _HEIGHT, TOP)
    marks = [_grid(x, y)]
    line = "L".join(f"{x.at(p['tpot_s']):.1f} {y.at(p['tokens_per_second']):.1f}" for p in points)
    marks.append(f'<path class="line" d="M{line}"/>')
    marks += [_dot(p, x, y, "dot", 3.0) for p in points]
    marks.append(_dot(chosen, x, y, "bound", 4.5))
    label = f"Pareto front of {len(points)} points: tokens/s against TPOT"
    return svg("".join(marks), _HEIGHT, label)


class _Axis:
    """A logarithmic axis between two places."""

    def __init__(self, values: Sequence[float], begin: float, end: float) -> None:
        self.low, self.high = min(values) / _MARGIN, max(values) * _MARGIN
        self.begin, self.end = begin, end

    def at(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.begin + share * (self.end - self.begin)

    @property
    def ticks(self) -> list[float]:
        """Round values inside; the ends where there are fewer than two."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        values = np.array([m * 10.0**p for p in powers for m in _ROUND])
        inside = values[(values >= self.low) & (values <= self.high)].tolist()
        return inside if len(inside) > 1 else [self.low * _MARGIN, self.high / _MARGIN]


def _grid(x: _Axis, y: _Axis) -> str:
    bottom = TOP + _HEIGHT
    parts = []
    for value in x.ticks:
        at = x.at(value)
        parts.append(
            f'<path class="grid" d="M{at:.1f} {TOP:.0f}V{bottom:.0f}"/>'
            f'<text x="{at:.1f}" y="{bottom + 12:.0f}" class="m">{seconds(value, 2)}</text>'
        )
    for value in y.ticks:
        at = y.at(value)
        parts.append(
            f'<path class="grid" d="M{_LEFT:.0f} {at:.1f}H{WIDTH - 8:.0f}"/>'
            f'<text x="{_LEFT - 4:.0f}" y="{at + 3:.1f}" class="e">{number(value, 2)}</text>'
        )
    parts.append(
        f'<text x="{(_LEFT + WIDTH) / 2:.0f}" y="{bottom + 25:.0f}" class="m">TPOT</text>'
        f'<text transform="translate(9 {TOP + _HEIGHT / 2:.0f})rotate(-90)" class="m">tokens/s'
        "</text>"
    )
    return "".join(parts)


def _dot(point: Mapping[str, Any], x: _Axis, y: _Axis, kind: str, radius: float) -> str:
    title = (
        f"{point['layout']}, {point['running_requests']:,} running requests: "
        f"{number(point['tokens_per_second'])} tokens/s, TPOT {seconds(point['tpot_s'])}"
    )
    return (
        f'<circle class="{kind}" cx="{x.at(point["tpot_s"]):.1f}" '
        f'cy="{y.at(point["tokens_per_second"]):.1f}" r="{radius}">'
        f"<title>{escape(title)}</title></circle>"
    )
