"""Pictures of a placement as small inline SVG: load per layer and rank, traffic, certificate.

Each function turns plain numbers into one `Markup` string. Colours are classes (``k0..k20`` for
deviations from the mean, ``t0..t10`` for amounts), so one style sheet serves light and dark.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from moeplan.figures import data_size, percent

Matrix = NDArray[np.float64]

STAGES = {
    "embed": ("#C7C7C7", "#000"),
    "attention": ("#56B4E9", "#000"),
    "router": ("#F0E442", "#000"),
    "dispatch": ("#E69F00", "#000"),
    "experts": ("#0072B2", "#fff"),
    "shared_experts": ("#6A51A3", "#fff"),
    "dense_ffn": ("#CC79A7", "#000"),
    "combine": ("#D55E00", "#fff"),
    "head": ("#009E73", "#fff"),
    "fetch": ("#B15928", "#fff"),
    "transfer": ("#B2DF8A", "#000"),
    "experts (aside)": ("#33A02C", "#fff"),
    "tensor_parallel": ("#A6761D", "#fff"),
    "other": ("#777777", "#fff"),
    "wait": ("#E8E8E8", "#000"),
}
"""Causes of time in the order of one step, each with its fill and text colour (after Okabe and
Ito, told apart by colour-blind readers too)."""

_DIVERGING = {"light": ("#2166ac", "#f4f4f2", "#b35806"), "dark": ("#5aa9e6", "#2b2f36", "#ffa84d")}
_AMOUNT = {"light": ("#f1f4f9", "#6b9fd0", "#08306b"), "dark": ("#232830", "#3f7fb5", "#d6ecff")}
WIDTH, _LEFT, _BOTTOM, TOP = 360.0, 34.0, 30.0, 6.0
_MAX_TITLED_CELLS = 8000  # hover titles double the size of the file


def stage_order(breakdowns: Iterable[Mapping[str, float]]) -> list[str]:
    """Return the causes that take any time, by their place in a step; unknown ones last."""
    present = dict.fromkeys(cause for b in breakdowns for cause, s in b.items() if s > 0)
    return [s for s in STAGES if s in present] + [s for s in present if s not in STAGES]


def stage_colour(cause: str) -> tuple[str, str]:
    """Return fill and text colour of a cause of time."""
    return STAGES.get(cause, STAGES["other"])


def scale_css(theme: str) -> Markup:
    """Return the colour classes of both scales for ``theme`` "light" or "dark"."""
    rules = [f".k{i}{{fill:{c};background:{c}}}" for i, c in enumerate(_mix(_DIVERGING[theme], 21))]
    rules += [f".t{i}{{fill:{c};background:{c}}}" for i, c in enumerate(_mix(_AMOUNT[theme], 11))]
    return Markup("".join(rules))


def load_span(panels: Sequence[Matrix]) -> float:
    """Return the largest deviation from the mean (1.0) over all panels, at least 0.05."""
    return max(0.05, *(float(np.abs(p - 1).max()) for p in panels))


def load_map(
    load: Matrix, span: float, *, name: str, layer_ids: Sequence[int], ranks_per_node: int | None,
    titles: bool = True,
) -> Markup:  # fmt: skip
    """Draw the load of each rank in each layer, 1.0 = the layer's mean.

    Parameters
    ----------
    load : float array [layers, ranks]
    span : float
        Deviation from 1.0 at both ends of the colour scale.
    """
    layers, ranks = load.shape
    height = min(14.0, max(6.0, 420 / layers))
    level = np.clip(np.rint(10 + 10 * (load - 1) / span), 0, 20).astype(int)
    label = f"{name}: load per layer and rank relative to the layer's mean, worst {load.max():.2f}"

    def title(row: int, column: int) -> str:
        return f"layer {layer_ids[row]}, rank {column}: {load[row, column]:.2f}×"

    cells = _cells(level, "k", height, title if titles else None)
    axes = _axes((layers, ranks), height, ("rank", "layer"), layer_ids)
    lines = _node_lines((layers, ranks), height, ranks_per_node, rows=False)
    return svg(cells + axes + lines, layers * height, label)


def amount_map(
    amount: Matrix, top: float, *, label: str, names: tuple[str, str], rows: Sequence[int],
    titles: Matrix | None = None,
) -> Markup:  # fmt: skip
    """Draw a matrix of amounts from 0 to ``top`` (darkest), with the names of both axes.

    Parameters
    ----------
    amount : float array [rows, columns]
    label : str
        What the picture shows, for readers who do not see it.
    names : tuple of str
        Of the columns' axis and of the rows' axis.
    rows : sequence of int
        Number of each row.
    titles : float array [rows, columns], optional
        Values to show on hover, instead of the amounts.
    """
    height = min(14.0, max(4.0, 420 / len(amount)))
    level = np.clip(np.rint(10 * amount / (top or 1.0)), 0, 10).astype(int)
    shown = amount if titles is None else titles

    def title(row: int, column: int) -> str:
        return f"{names[1]} {rows[row]}, {names[0]} {column}: {shown[row, column]:.3g}"

    cells = _cells(level, "t", height, title if with_titles([amount]) else None)
    return svg(cells + _axes(amount.shape, height, names, rows), len(amount) * height, label)


def traffic_map(
    traffic: Matrix, top: float, *, name: str, ranks_per_node: int | None, titles: bool = True
) -> Markup:
    """Draw the bytes per step from each rank (row) to each rank (column); ``top`` is darkest."""
    ranks = len(traffic)
    size = (WIDTH - _LEFT - 4) / ranks
    level = np.clip(np.rint(10 * traffic / (top or 1.0)), 0, 10).astype(int)
    label = f"{name}: traffic between ranks, {data_size(traffic.sum())} per step in all"

    def title(row: int, column: int) -> str:
        return f"rank {row} to {column}: {data_size(traffic[row, column])}"

    cells = _cells(level, "t", size, title if titles else None)
    axes = _axes((ranks, ranks), size, ("to rank", "from rank"), range(ranks))
    lines = _node_lines((ranks, ranks), size, ranks_per_node, rows=True)
    return svg(cells + axes + lines, ranks * size, label)


def certificate_chart(objective: Matrix, bound: Matrix, layer_ids: Sequence[int]) -> Markup:
    """Draw per layer the plan's busiest rank (dot) above its proved bound (dash), in layer means.

    Parameters
    ----------
    objective, bound : float arrays [layers]
        Both divided by the layer's mean rank load.
    """
    lines = round_values(min(1.0, float(bound.min())), float(max(objective.max(), bound.max())))
    low, high = lines[0] - 0.1 * (lines[1] - lines[0]), lines[-1]
    height, step = 130.0, (WIDTH - 46 - 4) / len(bound)

    def y(value: float) -> float:
        return TOP + height * (1 - (value - low) / (high - low))

    marks = []
    for i, (top, base) in enumerate(zip(objective, bound, strict=True)):
        x, gap = 46 + i * step, percent(float((top - base) / top))
        marks.append(
            f'<g><rect class="bound" x="{x + 0.1 * step:.1f}" y="{y(base):.1f}" '
            f'width="{0.8 * step:.1f}" height="2"/>'
            f'<circle class="dot" cx="{x + step / 2:.1f}" cy="{y(top):.1f}" '
            f'r="{min(3.0, 0.4 * step):.1f}"/><title>layer {layer_ids[i]}: plan {top:.4f}, '
            f"bound {base:.4f}, gap {gap}</title></g>"
        )
    for value in lines:
        marks.append(f'<text x="42" y="{y(value) + 3:.1f}" class="e">{value:.6g}</text>'
                     f'<path class="grid" d="M46 {y(value):.1f}H{WIDTH - 4:.0f}"/>')  # fmt: skip
    ticks = _ticks(len(bound), 12)
    marks += [f'<text x="{46 + (i + 0.5) * step:.1f}" y="{TOP + height + 12:.0f}" class="m">'
              f"{layer_ids[i]}</text>" for i in ticks]  # fmt: skip
    marks.append(f'<text x="{(46 + WIDTH) / 2:.0f}" y="{TOP + height + 25:.0f}" class="m">'
                 "layer</text>")  # fmt: skip
    worst = percent(float(((objective - bound) / objective).max()))
    return svg("".join(marks), height, f"Gap to the proved bound per layer, at most {worst}")


def with_titles(panels: Sequence[Matrix]) -> bool:
    """Say whether so many cells may each carry a hover title."""
    return sum(p.size for p in panels) <= _MAX_TITLED_CELLS


def _mix(anchors: tuple[str, str, str], steps: int) -> list[str]:
    """Interpolate ``steps`` colours over three anchors."""
    rgb = np.array([[int(a[i : i + 2], 16) for i in (1, 3, 5)] for a in anchors])
    at = np.linspace(0, 2, steps)
    mixed = np.stack([np.interp(at, [0, 1, 2], rgb[:, i]) for i in range(3)], axis=1)
    return [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in np.rint(mixed).astype(int)]


def _cells(level: NDArray[np.int_], kind: str, height: float, title: object) -> str:
    rows, columns = level.shape
    width = (WIDTH - _LEFT - 4) / columns
    parts = []
    for r in range(rows):
        y, h = f"{TOP + r * height:.1f}", f"{height - 0.4:.1f}"
        for c in range(columns):
            inner = f"><title>{title(r, c)}</title></rect>" if callable(title) else "/>"
            parts.append(f'<rect class="{kind}{level[r, c]}" x="{_LEFT + c * width:.1f}" y="{y}" '
                         f'width="{width - 0.4:.1f}" height="{h}"{inner}')  # fmt: skip
    return "".join(parts)


def _axes(
    shape: tuple[int, int], height: float, names: tuple[str, str], rows: Sequence[int]
) -> str:
    count, columns = shape
    width, bottom = (WIDTH - _LEFT - 4) / columns, TOP + count * height
    texts = [f'<text x="{_LEFT + (c + 0.5) * width:.1f}" y="{bottom + 12:.1f}" class="m">{c}</text>'
             for c in _ticks(columns, 16)]  # fmt: skip
    texts += [f'<text x="{_LEFT - 4:.0f}" y="{TOP + (r + 0.5) * height + 3:.1f}" class="e">'
              f"{rows[r]}</text>" for r in _ticks(count, int(count * height / 13))]  # fmt: skip
    middle = TOP + count * height / 2
    texts.append(f'<text x="{(_LEFT + WIDTH) / 2:.0f}" y="{bottom + 25:.1f}" class="m">'
                 f"{names[0]}</text>")  # fmt: skip
    texts.append(f'<text transform="translate(9 {middle:.0f})rotate(-90)" class="m">'
                 f"{names[1]}</text>")  # fmt: skip
    return "".join(texts)


def _ticks(count: int, most: int) -> range:
    """Return at most ``most`` tick positions at steps of 1, 2, 4, 8, ..."""
    step = 1
    while -(-count // step) > max(most, 1):
        step *= 2
    return range(0, count, step)


def round_values(low: float, high: float) -> list[float]:
    """Return three to seven round numbers, equally spaced, that enclose ``low`` to ``high``."""
    rough = max(high - low, 1e-4) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _node_lines(
    shape: tuple[int, int], height: float, ranks_per_node: int | None, *, rows: bool
) -> str:
    count, columns = shape
    if not ranks_per_node or ranks_per_node >= columns:
        return ""
    width, bottom = (WIDTH - _LEFT - 4) / columns, TOP + count * height
    lines = []
    for c in range(ranks_per_node, columns, ranks_per_node):
        lines.append(f"M{_LEFT + c * width - 0.2:.1f} {TOP - 4:.0f}V{bottom + 2:.1f}")
        if rows:
            lines.append(f"M{_LEFT - 2:.0f} {TOP + c * height - 0.2:.1f}H{WIDTH - 3:.0f}")
    return f'<path class="node" d="{"".join(lines)}"/>'


def svg(body: str, height: float, label: str) -> Markup:
    """Wrap a picture of the usual width, with room for its axes."""
    full = height + TOP + _BOTTOM
    return Markup(
        f'<svg viewBox="0 0 {WIDTH:.0f} {full:.0f}" role="img" aria-label="{escape(label)}">'
        f"{body}</svg>"
    )
