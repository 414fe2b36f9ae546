"""Lines over a common axis as one inline SVG: hit rates over cache sizes, reuse over distances.

Drawn in the style of `moeplan.charts`; each point carries its values as a hover title, and lines
differ by dash as well as by colour.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from markupsafe import Markup, escape

from moeplan.charts import TOP, WIDTH, round_values, svg

_LEFT, _RIGHT, _HEIGHT = 44.0, 8.0, 150.0
DASHES = ("", "6 3", "2 2", "8 3 2 3", "1 3", "10 4")
"""Of the lines, in their order; the style sheet has as many colours (``s0`` to ``s5``)."""


def line_chart(
    series: Mapping[str, Sequence[float | None]],
    at: Sequence[float],
    *,
    names: tuple[str, str],
    label: str,
    log: bool = False,
    percent: bool = False,
    least: float | None = None,
) -> Markup:
    """Draw lines.

    Parameters
    ----------
    series
        Values by name, one for each place; None where there is none. At most as many as `DASHES`.
    at
        Places on the horizontal axis, ascending; above 0 with ``log``.
    names
        Of the horizontal and of the vertical axis.
    label
        What the picture shows, for readers who do not see it.
    log
        Whether the horizontal axis is logarithmic.
    percent
        Whether values are shares, written in per cent.
    least
        Lower end of the vertical axis; the lowest value, rounded, without.
    """
    known = [v for values in series.values() for v in values if v is not None]
    lines = round_values(min(known) if least is None else least, max(known))
    low, high = lines[0], lines[-1]
    places = np.log(at) if log else np.asarray(at, dtype=np.float64)
    span = float(places[-1] - places[0]) or 1.0
    xs = _LEFT + (WIDTH - _LEFT - _RIGHT) * ((places - places[0]) / span * 0.96 + 0.02)

    def y(value: float) -> float:
        return TOP + _HEIGHT * (1 - (value - low) / (high - low))

    marks = [_axes(lines, y, xs, at, names, percent)]
    for place, (name, values) in enumerate(series.items()):
        points = [(x, y(v)) for x, v in zip(xs, values, strict=True) if v is not None]
        path = "L".join(f"{x:.1f} {v:.1f}" for x, v in points)
        dash = f' stroke-dasharray="{DASHES[place]}"' if DASHES[place] else ""
        marks.append(f'<path class="line s{place}"{dash} d="M{path}"/>')
        for x, where, value in zip(xs, at, values, strict=True):
            if value is not None:
                title = f"{name}, {names[0]} {where:g}: {_text(value, percent)}"
                marks.append(
                    f'<circle class="s{place}" cx="{x:.1f}" cy="{y(value):.1f}" r="2.2">'
                    f"<title>{escape(title)}</title></circle>"
                )
    return svg("".join(marks), _HEIGHT, label)


def legend(names: Sequence[str]) -> Markup:
    """Return the key of a picture's lines, in their order."""
    keys = []
    for place, name in enumerate(names):
        dash = f' stroke-dasharray="{DASHES[place]}"' if DASHES[place] else ""
        keys.append(
            f'<span><svg class="key" viewBox="0 0 26 8"><path class="line s{place}"{dash} '
            f'd="M1 4H25"/></svg>{escape(name)}</span>'
        )
    return Markup(f'<p class="legend">{" ".join(keys)}</p>')


def _axes(
    lines: Sequence[float], y: Callable[[float], float], xs: Sequence[float], at: Sequence[float],
    names: tuple[str, str], percent: bool,
) -> str:  # fmt: skip
    parts = []
    for value in lines:
        parts.append(
            f'<path class="grid" d="M{_LEFT:.0f} {y(value):.1f}H{WIDTH - _RIGHT:.0f}"/>'
            f'<text x="{_LEFT - 4:.0f}" y="{y(value) + 3:.1f}" class="e">'
            f"{_text(value, percent)}</text>"
        )
    bottom, last = TOP + _HEIGHT, -math.inf
    for x, where in zip(xs, at, strict=True):
        if x - last > 24:  # labels must not touch
            parts.append(f'<text x="{x:.1f}" y="{bottom + 12:.0f}" class="m">{where:g}</text>')
            last = x
    parts.append(
        f'<text x="{(_LEFT + WIDTH) / 2:.0f}" y="{bottom + 25:.0f}" class="m">{names[0]}</text>'
        f'<text transform="translate(9 {TOP + _HEIGHT / 2:.0f})rotate(-90)" class="m">{names[1]}'
        "</text>"
    )
    return "".join(parts)


def _text(value: float, percent: bool) -> str:
    return f"{100 * value:.3g} %" if percent else f"{value:.4g}"
