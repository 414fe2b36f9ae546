"""The statistics of a trace as one HTML page: four answers, and the pictures behind them.

One file, pictures inline as SVG, no script, no network. Everything is a share, a ratio or a number
of tokens; beside each figure stands what chance alone would give.
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from markupsafe import Markup

from moeplan import charts
from moeplan.figures import fixed, percent
from moeplan.line_chart import legend, line_chart
from moeplan.page import page
from moeplan.trace_answers import Answer
from moeplan.trace_statistics import SCHEMA, Found
from traces.measures.base import Floats
from traces.measures.segment_cache import COMPARED

_BADGES = {"yes": "yes", "somewhat": "tie", "no": "no", "unknown": "tie"}
_MOST_CELLS = 96  # experts of a layer whose pairs are drawn one by one


def render_statistics(found: Found, given: Sequence[Answer]) -> str:
    """Write the page."""
    return page(
        "trace.html.j2",
        {
            "found": found,
            "meta": found.about.meta,
            "about": found.about,
            "given": [(answer, _BADGES[answer.word]) for answer in given],
            "warnings": [],
            "tiles": [],
            "schema": SCHEMA,
            "version": _version(),
            "findings": [(f, _number(f.value)) for f in found.support.findings],
            "load": _load(found),
            "steps": _steps(found),
            "capped": _capped(found),
            "locality": _locality(found),
            "flow": _flow(found),
            "pairs": _pairs(found),
            "drift": _drift(found),
        },
    )


def _version() -> str:
    try:
        return version("moeplan")
    except PackageNotFoundError:
        return ""


def _highest(values: Floats) -> float:
    """Return the largest known figure, 0 where none is."""
    return float(np.nan_to_num(values).max())


def _number(value: float) -> str:
    if np.isnan(value):
        return "not known"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.3g}"


def _lines(
    series: Mapping[str, Sequence[float | None]], at: Sequence[float], **options: Any
) -> Markup:
    """Draw lines with their key; nothing without any value."""
    series = {name: _known(values) for name, values in series.items()}
    if not any(value is not None for values in series.values() for value in values):
        return Markup("")
    return line_chart(series, at, **options) + legend(list(series))


def _known(values: Sequence[float | None]) -> list[float | None]:
    return [None if v is None or np.isnan(v) else float(v) for v in values]


def _load(found: Found) -> dict[str, Any]:
    loads = found.load.loads
    over = loads.counts / np.maximum(loads.counts.mean(axis=1, keepdims=True), 1e-9)
    ordered, ids = -np.sort(-over, axis=1), loads.moe_layer_ids
    return {
        "map": charts.amount_map(
            ordered, float(ordered.max()), names=("expert, busiest first", "layer"), rows=ids,
            label=f"Load of each layer's experts over the mean, at most {ordered.max():.2f}",
        ),
        "top": fixed(float(ordered.max()), 2),
        "levels": range(11),
        "layers": _lines(
            {"busiest over mean": loads.max_over_mean.tolist()}, ids,
            names=("layer", "load / mean"), least=1.0,
            label="Busiest expert over the mean by layer",
        ),
        "rows": [
            (title, fixed(float(np.nanmean(v)), 3), fixed(float(np.nanmax(v)), 3),
             ids[int(np.nanargmax(v))])
            for title, v in (
                ("Busiest expert over mean", loads.max_over_mean),
                ("Gini coefficient (0 is even)", loads.gini),
                ("Entropy over log2 E (1 is even)", loads.entropy_share),
                ("Experts that no token used", loads.unused.astype(float)),
            )
        ],
    }  # fmt: skip


def _steps(found: Found) -> list[tuple[str, Markup]]:
    steps = found.balance.by_batch
    at = [step.batch for step in steps]
    kinds: list[tuple[str, list[Any]]] = [("expert", [step.experts for step in steps])]
    if steps[0].ranks:
        kinds.append((f"of {steps[0].ranks[-1].groups} ranks", [s.ranks[-1] for s in steps]))
    return [
        (
            name,
            _lines(
                {
                    "observed": [p.observed for p in parts],
                    "tokens shuffled": [p.shuffled for p in parts],
                    "even loads": [p.even for p in parts],
                },
                at, names=("tokens in the step", "busiest / mean"), log=True, least=1.0,
                label=f"Busiest {name} over the mean by batch size",
            ),
        )
        for name, parts in kinds
    ]  # fmt: skip


def _capped(found: Found) -> dict[str, Any]:
    steps = [step for step in found.balance.by_batch if step.batch > 1]
    return {
        "factors": [each.factor for each in steps[0].capped] if steps else [],
        "rows": [(s.batch, [(c.dropped, c.straggler) for c in s.capped]) for s in steps],
    }


def _locality(found: Found) -> dict[str, Any]:
    reuse, curves = found.reuse, [c for c in found.caches if c.scope == "layer"]
    shared = [c for c in found.caches if c.scope == "global"]
    sparsity, segments = found.locality.sparsity, found.segment_cache
    slots = segments.slots(COMPARED)
    chance = float(reuse.independent.mean())
    return {
        "reuse": _lines(
            {
                "observed": [float(row.mean()) for row in reuse.observed],
                "independent tokens": [chance] * len(reuse.lags),
            },
            reuse.lags, names=("distance, tokens", "experts in common"), log=True, percent=True,
            least=0.0, label="Experts in common with the token some tokens before",
        ),
        "caches": _lines(
            {c.policy.upper() if c.policy != "belady" else "Belady": c.hit_rate.tolist()
             for c in curves},
            curves[0].sizes, names=("slots per layer", "hit rate"), percent=True, least=0.0,
            label="Hit rate of an expert cache by its slots per layer",
        ),
        "shared": _lines(
            {c.policy.upper() if c.policy != "belady" else "Belady": c.hit_rate.tolist()
             for c in shared},
            shared[0].sizes, names=("slots of all layers", "hit rate"), percent=True, least=0.0,
            label="Hit rate of one cache for all layers by its slots",
        ),
        "phase": curves[0].phase,
        "curve_share": curves[0].tokens / curves[0].tokens_of_phase,
        "segment_tokens": segments.tokens,
        "shared_share": shared[0].tokens / shared[0].tokens_of_phase,
        "sparsity": _lines(
            {
                "observed": [float(s.observed.mean()) for s in sparsity],
                "independent tokens": [float(s.independent.mean()) for s in sparsity],
            },
            [s.length for s in sparsity], names=("consecutive tokens", "experts left unused"),
            log=True, percent=True, least=0.0,
            label="Share of a layer's experts that consecutive tokens leave unused",
        ),
        "slots": slots,
        "segments": [
            (r.length, r.segments, r.of_model, float(np.mean(r.size_ratio)),
             float(segments.hit_rate[i, :, slots].mean()))
            for i, r in enumerate(found.locality.routing) if r.segments
        ],
        "lru": float(segments.lru[:, slots].mean()),
        "lfu": float(segments.lfu[:, slots].mean()),
    }  # fmt: skip


def _flow(found: Found) -> Markup:
    flow = found.flow
    if not flow.layers:
        return Markup("")
    return _lines(
        {
            "given an expert of the layer before": flow.predictability.tolist(),
            "without": flow.unconditional.tolist(),
        },
        [second for _, second in flow.layers], names=("layer", "best guess is right"),
        percent=True, least=0.0, label="How often the best guess of an expert is right, by layer",
    )  # fmt: skip


def _pairs(found: Found) -> dict[str, Any]:
    pairs = found.coactivation
    if pairs.skipped:
        return {}
    ids, apart, chance = pairs.moe_layer_ids, pairs.departure, pairs.departure_by_chance
    at = int(apart.argmax())
    picture: Markup | None = None
    experts = pairs.pairs.shape[1]
    if pairs.clusters and experts <= _MOST_CELLS:
        order = [e for members in pairs.clusters[at].members for e in members]
        lift = np.nan_to_num(pairs.lift[at][np.ix_(order, order)], nan=0.0)
        picture = charts.amount_map(
            np.minimum(lift, 4.0), 4.0, rows=order,
            names=("the same, in this order", "expert, by cluster"),
            titles=lift, label=f"Layer {ids[at]}: pairs of experts over what independence gives",
        )  # fmt: skip
    return {
        "layers": _lines(
            {"observed": apart.tolist(), "by chance": chance.tolist()}, ids,
            names=("layer", "unlike independent"), percent=True, least=0.0,
            label="Share of the pairs of experts that independent choices would not make, by layer",
        ),
        "layer": ids[at],
        "map": picture,
        "strongest": pairs.strongest[at],
        "clusters": pairs.clusters[at] if pairs.clusters else None,
    }  # fmt: skip


def _drift(found: Found) -> dict[str, Any]:
    drift = found.drift
    ids = drift.moe_layer_ids
    top = max(_highest(drift.windows), 1e-9)
    return {
        "layers": _lines(
            {
                "first half to second half": drift.early_late.tolist(),
                "even to odd requests": drift.even_odd.tolist(),
                "independent tokens": drift.independent.tolist(),
            },
            ids, names=("layer", "distance"), percent=True, least=0.0,
            label="Distance of the loads of two halves of the requests, by layer",
        ),
        "map": charts.amount_map(
            np.nan_to_num(drift.windows), top, names=("part of the trace", "part"),
            rows=range(len(drift.windows)),
            label=f"Distance of the loads of parts of the trace, at most {percent(top)}",
        ),
        "top": percent(top),
        "floor": percent(_highest(drift.windows_floor)),
        "levels": range(11),
        "farthest": drift.to_dict()["domains_farthest"],
    }  # fmt: skip
