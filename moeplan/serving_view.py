"""Requests served over time, on the terminal: latencies by percentile, throughput, steps."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from basis.units import format_quantity

_LATENCIES = {
    "ttft": "TTFT",
    "tpot": "TPOT",
    "itl": "between tokens",
    "latency": "request latency",
    "queue_wait": "wait in queue",
}


def show_serving(screen: Console, cluster: str, name: str, answer: Mapping[str, Any]) -> None:
    """Print the summary of a `simulator.serving_metrics.ServingResult`."""
    found = answer["summary"]
    table = Table(title=f"{name} on {cluster}", title_justify="left", box=box.SIMPLE)
    table.add_column("seconds", no_wrap=True)
    ends = [key.rsplit("_", 1)[1] for key in found if key.startswith("ttft_s_p")]
    for column in ["mean", *[end for end in ends if end.startswith("p")]]:
        table.add_column(column, justify="right")
    for key, title in _LATENCIES.items():
        keys = [f"{key}_s", *(f"{key}_s_{end}" for end in ends if end.startswith("p"))]
        table.add_row(title, *[_seconds(found.get(k)) for k in keys])
    screen.print(table)
    screen.print(
        f"output   {found['output_tokens_per_second']:,.0f} tokens/s "
        f"({found['total_tokens_per_second']:,.0f} with prompts), "
        f"{found['requests_per_second']:.2f} requests/s over {found['makespan_s']:.1f} s"
    )
    screen.print(
        f"steps    {found['steps']:,} of {format_quantity(found['step_time_s'], 's')}, "
        f"{found['decodes_per_step']:.0f} decodes and "
        f"{found['tokens_per_step'] - found['decodes_per_step']:.0f} prompt tokens each; "
        f"{found['running']:.0f} requests running, {found['waiting']:.1f} waiting, "
        f"{found['preemptions']} preempted"
    )
    peak, room = found["kv_peak_bytes_fullest_rank"], found["kv_capacity_bytes_per_rank"]
    screen.print(
        f"cache    at most {format_quantity(peak, 'B')} of {format_quantity(room, 'B')} per rank"
    )
    if "goodput_requests_per_second" in found:
        screen.print(
            f"goodput  {found['goodput_requests_per_second']:.2f} requests/s keep the limits "
            f"({found['slo_share']:.1%})"
        )
    for statement in answer["statements"]:
        screen.print(f"note     {statement}")


def _seconds(value: float | None) -> str:
    return "-" if value is None else format_quantity(value, "s")
