"""The report of an offload plan: plan and baselines on both splits, the proof, what engines load.

Reads plan.json and nothing else; times in seconds per step, memory and copies in bytes.
"""

from typing import Any

from moeplan import figures
from moeplan.offload_view import SITES, grain
from moeplan.page import STATUS, badge, breakdown, render, split_tables
from moeplan.report_tables import NAMES, Metric

_PAIRS = "of token–expert pairs"
_METRICS = (
    Metric(key="step_time_s", label="Step time", hint="mean; in decode the TPOT",
           write=figures.seconds),
    Metric(key="step_time_s_p99", label="Step time", hint="99th percentile",
           write=figures.seconds),
    Metric(key="tokens_per_second", label="Throughput", hint="tokens/s", write=figures.number,
           higher_is_better=True),
    Metric(key="hit_rate", label="Hit rate", hint="of the experts that a layer uses",
           write=figures.percent, neutral=True),
    Metric(key="fetched_bytes_per_token", label="Fetched", hint="per token",
           write=figures.data_size, neutral=True),
    *(Metric(key=key, label=title.capitalize(), hint=_PAIRS, write=figures.percent, neutral=True)
      for key, title in SITES.items()),
    Metric(key="memory_bytes_fullest_rank", label="Fast memory", hint="taken in all",
           write=figures.data_size, neutral=True),
)  # fmt: skip


def render_offload(plan: dict[str, Any]) -> str:
    """Write the report of an offload plan as one self-contained HTML page.

    Parameters
    ----------
    plan : dict
        The content of plan.json, with the section ``offload``.
    """
    found = plan["offload"]
    return render(
        "offload.html.j2",
        plan,
        {
            "badge": badge(plan["verdict"]),
            "tiles": _tiles(plan),
            "found": found,
            "splits": split_tables(plan, _METRICS, noise=found["tie_within"]),
            "steps": breakdown(plan["details"], "critical_path_s"),
            "proofs": [
                (rule, proof, STATUS[proof["status"]])
                for rule, proof in found["certificates"].items()
            ],
            "ties": [NAMES[name] for name in found["ties"]],
            "grain": grain(found["engine"]),
        },
    )


def _tiles(plan: dict[str, Any]) -> list[dict[str, str]]:
    figure, verdict, found = plan["predicted"], plan["verdict"], plan["offload"]
    decode = plan["scenario"]["workload"]["phase"] == "decode"
    return [
        {
            "label": "Predicted TPOT" if decode else "Predicted step time",
            "figure": figures.seconds(figure["step_time_s"]),
            "below": f"{figures.number(figure['tokens_per_second'])} tokens/s",
        },
        {
            "label": "Over the best baseline",
            "figure": "tie"
            if verdict["tie"]
            else figures.percent(verdict["gain_over_default"], signed=True),
            "below": NAMES.get(verdict["default"], "none fits"),
        },
        {
            "label": "Experts kept fast",
            "figure": f"{found['slots']:,} of {found['num_experts']:,}",
            "below": f"{figures.data_size(found['fast_bytes'])} of the fast memory",
        },
        {
            "label": "Hit rate",
            "figure": figures.percent(figure["hit_rate"]),
            "below": f"{figures.data_size(figure['fetched_bytes_per_token'])} fetched per token",
        },
        {
            "label": "From the proved optimum",
            "figure": f"≤ {figures.percent(plan['certificate']['gap'])}",
            "below": f"{found['certificate_of']}, of the problem stated below",
        },
    ]
