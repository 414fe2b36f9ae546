"""The figures of the report: headline tiles and the comparison with the baselines.

A baseline's figure comes with how much better or worse it is than the plan's; where the two
differ by no more than the noise, the word is "tie".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moeplan import figures

NAMES = {
    "plan": "Plan",
    "contiguous": "Contiguous (default)",
    "round_robin": "Round-robin",
    "eplb": "EPLB",
    "dp_ep": "DP = EP, experts in order",
    "tensor_parallel": "tensor parallelism",
    "first_layers": "First layers at home (--n-cpu-moe)",
    "uniform": "Uniform (--kt-num-gpu-experts)",
    "most_frequent": "Most frequent (ktransformers)",
    "lru_on_demand": "LRU cache, misses fetched",
    "all_aside": "All at home",
    "all_fetched": "All fetched",
}
"""Plan and baselines by their key in plan.json, in the order of the tables' columns."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One row of the comparison."""

    key: str
    label: str
    hint: str
    write: Callable[[float | None], str]
    higher_is_better: bool = False
    neutral: bool = False
    """Neither more nor less is better: no comparison."""


METRICS = (
    Metric(key="tokens_per_second", label="Throughput", hint="tokens/s, all ranks",
           write=figures.number, higher_is_better=True),
    Metric(key="step_time_s", label="Step time", hint="mean", write=figures.seconds),
    Metric(key="step_time_s_p99", label="Step time", hint="99th percentile",
           write=figures.seconds),
    Metric(key="straggler", label="Straggler", hint="busiest ÷ mean rank, per step and layer",
           write=figures.fixed),
    Metric(key="cross_node_sends", label="Cross-node sends", hint="per token and layer",
           write=figures.fixed),
    Metric(key="cross_rank_sends", label="Cross-rank sends", hint="per token and layer",
           write=figures.fixed),
    Metric(key="memory_bytes_fullest_rank", label="Memory", hint="fullest rank",
           write=figures.data_size),
)  # fmt: skip


def comparison(
    predicted: dict[str, Any],
    baselines: dict[str, dict[str, Any]],
    noise: float,
    metrics: Sequence[Metric] = METRICS,
) -> dict[str, Any]:
    """Return columns and rows of the comparison table, as text.

    Parameters
    ----------
    predicted, baselines : dict
        Figures by key; of the plan, and of each baseline.
    noise : float
        Relative difference up to which two figures are a tie.
    metrics : sequence of Metric
        Rows, of which those without any figure are left out.
    """
    columns = {"plan": predicted} | {n: baselines[n] for n in NAMES if n in baselines}
    rows = []
    for metric in metrics:
        if not any(figure.get(metric.key) for figure in columns.values()):
            continue  # not given, or no nodes to cross
        cells = [_cell(metric, name, figure, predicted, noise) for name, figure in columns.items()]
        rows.append({"label": metric.label, "hint": metric.hint, "cells": cells})
    return {"columns": [NAMES[name] for name in columns], "rows": rows}


def _cell(
    metric: Metric, name: str, figure: dict[str, Any], plan: dict[str, Any], noise: float
) -> dict[str, str]:
    value = figure.get(metric.key)
    below = ""
    if metric.key == "tokens_per_second":
        ends = figure.get("tokens_per_second_low"), figure.get("tokens_per_second_high")
        below = figures.interval(*ends)
    elif metric.key == "straggler" and figure.get("sampling_floor") is not None:
        below = f"floor {figures.fixed(figure['sampling_floor'])}"
    mark, kind = ("", "") if name == "plan" else _against(metric, value, plan, noise)
    return {"value": metric.write(value), "below": below, "mark": mark, "kind": kind}


def _against(
    metric: Metric, value: float | None, plan: dict[str, Any], noise: float
) -> tuple[str, str]:
    """Say how a baseline's figure compares with the plan's: the words, and their style."""
    own = plan.get(metric.key)
    if value is None or own is None or metric.neutral:
        return "", ""
    if value == own:
        return "same", "tie"
    if not own:
        return "", ""
    difference = value / own - 1
    if abs(difference) <= noise:
        return "tie", "tie"
    word = "better" if (difference > 0) == metric.higher_is_better else "worse"
    if metric.higher_is_better:  # the gain as the headline states it, in parts of the baseline
        return f"plan {figures.percent(own / value - 1, signed=True)}", word
    if metric.key == "memory_bytes_fullest_rank":
        word = "more" if difference > 0 else "less"
    return f"{figures.percent(abs(difference))} {word}", word


def headline(plan: dict[str, Any]) -> list[dict[str, str]]:
    """Return the tiles under the answer: label, figure, and one line below it."""
    figure, verdict, proof = plan["predicted"], plan["verdict"], plan["certificate"]
    noise = float(verdict.get("noise") or 0.0)
    ends = figure.get("tokens_per_second_low"), figure.get("tokens_per_second_high")
    inside = figures.interval(*ends)
    tiles = [
        {"label": "Predicted throughput",
         "figure": f"{figures.number(figure['tokens_per_second'])} tokens/s",
         "below": f"likely {inside}" if inside else ""}
    ]  # fmt: skip
    for key, other in (("gain_over_default", "engine default"), ("gain_over_eplb", "EPLB")):
        gain = verdict.get(key)
        if gain is not None:
            tie = abs(gain) <= noise
            tiles.append(
                {"label": f"Gain over {other}",
                 "figure": "tie" if tie else figures.percent(gain, signed=True),
                 "below": f"{figures.percent(gain, signed=True) + ', ' if tie else ''}"
                          f"noise ±{figures.percent(noise)}"}
            )  # fmt: skip
    if figure.get("straggler") is not None:
        floor = figure.get("sampling_floor")
        tiles.append(
            {"label": "Straggler per step", "figure": f"{figures.fixed(figure['straggler'], 2)}×",
             "below": "" if floor is None else f"floor at this batch {figures.fixed(floor, 2)}×"}
        )  # fmt: skip
    tiles.append(
        {"label": "From the proved optimum", "figure": f"≤ {figures.percent(proof['gap'])}",
         "below": "of balance on average load"}
    )  # fmt: skip
    return tiles
