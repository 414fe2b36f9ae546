"""What a recording leaves behind: the trace, how its model was trained, and what it looks like."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

from traces import RoutingTrace, read_trace, write_trace
from traces.stats import trace_statistics

TRACE_NAME = "example-moe-12x32.parquet"
NOT_A_PRODUCT = (
    "Routing of a small MoE language model trained by this project's script; "
    "not a production model."
)

_ROWS = {
    "num_tokens": "tokens",
    "num_requests": "requests",
    "decode_share": "share of decode tokens",
    "load_max_over_mean_mean": "busiest expert's load / mean load, mean over layers",
    "load_max_over_mean_worst": "the same, worst layer",
    "reuse_mean": "share of a token's experts that the previous token used too",
    "reuse_independent_mean": "the same, if tokens were independent draws from these loads",
    "predictability_mean": "best guess of a next-layer expert, given one of this layer, is right",
    "predictability_unconditional_mean": "the same, without knowing this layer",
}
"""Statistic -> its row in the table."""


def write(trace: RoutingTrace, work: Path, data: Path, reference: Path | None) -> None:
    """Write the trace and everything that documents it into `data`.

    Parameters
    ----------
    trace
        The recording.
    work
        Folder of the training run.
    data
        Folder to write to.
    reference
        Trace of a real model, whose statistics are put beside; or None.
    """
    data.mkdir(parents=True, exist_ok=True)
    write_trace(trace, data / TRACE_NAME)
    shutil.copyfile(work / "config.json", data / "example-moe-config.json")
    for name in ("manifest.json", "training_log.csv"):
        shutil.copyfile(work / name, data / name)
    columns = {trace.meta.model: trace_statistics(trace).to_dict()}
    if reference is not None:
        real = read_trace(reference)
        columns[real.meta.model] = trace_statistics(real).to_dict()
    training = training_facts(work)
    facts = {"note": NOT_A_PRODUCT, "training": training, "statistics": columns}
    (data / "trace_statistics.json").write_text(json.dumps(facts, indent=2) + "\n")
    (data / "trace_statistics.md").write_text(
        f"{NOT_A_PRODUCT}\n\n{statistics_table(columns)}\n{loss_table(training)}"
    )
    print((data / "trace_statistics.md").read_text())


def training_facts(work: Path) -> dict[str, Any]:
    """Read what the training run wrote about itself, with the losses of its last log line."""
    facts: dict[str, Any] = json.loads((work / "training.json").read_text())
    with (work / "training_log.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    prefix = "held_out_"
    facts["held_out_loss"] = {
        key.removeprefix(prefix): float(value)
        for key, value in last.items()
        if key.startswith(prefix) and key != "held_out_mean"
    }
    facts["unigram_loss"] = {k: round(v, 4) for k, v in facts["unigram_loss"].items()}
    facts["tokens_trained_on"] = int(last["tokens"])
    return facts


def statistics_table(columns: dict[str, dict[str, Any]]) -> str:
    """Markdown table of the statistics, one column per trace."""
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for key, label in _ROWS.items():
        values = (column[key] for column in columns.values())
        cells = (f"{v:,}" if isinstance(v, int) else f"{v:.3f}" for v in values)
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def loss_table(training: dict[str, Any]) -> str:
    """Markdown table of held-out loss against the unigram baseline, per domain."""
    lines = ["| domain | held-out loss, nats per token | unigram baseline |", "|---|---|---|"]
    for domain, loss in training["held_out_loss"].items():
        lines.append(f"| {domain} | {loss:.2f} | {training['unigram_loss'][domain]:.2f} |")
    return "\n".join(lines) + "\n"
