"""Tables for the terminal: what a person reads after a command.

They show the same figures as the JSON, rounded; nothing is computed here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from basis.units import format_quantity
from hwmodels import Cluster, Finding
from moeplan.compare_view import comparison_table
from moeplan.scenario import Scenario
from planner.plan import Plan
from simulator.result import Result


def show_plan(
    screen: Console, plan: Mapping[str, Any], out: Path, refused: Mapping[str, str]
) -> None:
    """Print the answer, the comparison and where the report lies."""
    show_facts(screen, plan)
    screen.print(_plan_table(plan))
    proof = plan["certificate"]
    screen.print(
        f"proof    busiest-rank load {proof['objective']:,.0f} tokens, no placement is below "
        f"{proof['bound']:,.0f}: gap {proof['gap']:.2%} ({proof['status']})"
    )
    show_end(screen, plan, out, refused)


def show_facts(screen: Console, plan: Mapping[str, Any]) -> None:
    """Print the answer and what it is about, for every kind of plan."""
    facts = plan["scenario"]
    screen.print(f"\n{plan['verdict']['answer']}\n", style="bold")
    screen.print(f"model    {facts['model']}: {facts['model_summary']}")
    screen.print(f"trace    {facts['trace']}: {facts['trace_summary']}")
    if facts["trace_note"]:
        screen.print(f"         {facts['trace_note']}")
    screen.print(f"cluster  {facts['cluster']}: {facts['cluster_summary']}")


def show_end(
    screen: Console, plan: Mapping[str, Any], out: Path, refused: Mapping[str, str]
) -> None:
    """Print the warnings, where the files lie, and which engines cannot run the plan."""
    for warning in plan["warnings"]:
        screen.print(f"warning  {warning}")
    for reason in refused.values():
        screen.print(f"export   {reason}")
    screen.print(f"report   {out / 'report.html'}")
    files = f", engine files in {out / 'export'}" if (out / "export").is_dir() else ""
    screen.print(f"plan     {out / 'plan.json'}{files}")


def _plan_table(plan: Mapping[str, Any]) -> Table:
    nodes = max(plan["node_of_rank"]) + 1
    title = f"held-out requests, split {plan['split']}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    table.add_column("placement", no_wrap=True)
    names = ["tokens/s", "step time", "p99", "straggler", "sends"]
    for name in names + ["cross-node"] * (nodes > 1) + ["memory/rank"]:
        table.add_column(name, justify="right")
    for name, row in {"plan": plan["predicted"], **plan["baselines"]}.items():
        cells = [
            f"{row['tokens_per_second']:,.0f}",
            format_quantity(row["step_time_s"], "s"),
            format_quantity(row["step_time_s_p99"], "s"),
            f"{row['straggler']:.3f}",
            f"{row['cross_rank_sends']:.2f}",
        ]
        across = [f"{row['cross_node_sends']:.3f}"] * (nodes > 1)
        memory = format_quantity(row["memory_bytes_fullest_rank"], "B")
        table.add_row(name, *cells, *across, memory)
    floor = plan["predicted"]["sampling_floor"]
    table.caption = (
        f"straggler: busiest over mean rank; even shares would give {floor:.3f}\n"
        "sends: other ranks that a token visits in a layer"
    )
    table.caption_justify = "left"
    return table


def show_result(
    screen: Console, scenario: Scenario, name: str, result: Result, out: Path | None
) -> None:
    """Print one simulation."""
    row = result.summary()
    table = Table(title=f"{name} on {scenario.cluster.name}", title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for key, value in row.items():
        table.add_row(key, f"{value:,.4g}" if isinstance(value, float) else str(value))
    for cause, seconds in result.seconds_by_cause.items():
        if seconds:
            table.add_row(f"  {cause}", format_quantity(seconds, "s"))
    screen.print(table)
    screen.print(result.composition)
    if out:
        screen.print(f"result   {out / 'result.json'}\ntimeline {out / 'timeline.json'}")


def comparison_row(cluster: Cluster, found: Plan) -> dict[str, Any]:
    """Return what `moeplan.compare_view` shows of one cluster."""
    results = found.predicted.results
    row = found.predicted.summary()
    causes = results[0].seconds_by_cause
    gain, noise = found.predicted.gain_over(found.baselines["contiguous"])
    return {
        "cluster": cluster.name,
        "gpus": cluster.num_ranks,
        "tokens_per_second": row["tokens_per_second"],
        "low": row["tokens_per_second_low"],
        "high": row["tokens_per_second_high"],
        "step_time_s": row["step_time_s"],
        "step_time_s_p99": row["step_time_s_p99"],
        "tpot_s": row["step_time_s"] if results[0].loads.decode else None,
        "straggler": row["straggler"],
        "memory_bytes_per_rank": row["memory_bytes_fullest_rank"],
        "memory_capacity_bytes": cluster.device.memory.capacity.value,
        "gain_over_contiguous": gain,
        "gain_over_contiguous_noise": noise,
        "seconds_by_cause": {
            c: sum(r.seconds_by_cause[c] for r in results) / len(results) for c in causes
        },
        "evidence": _shares_of_evidence(results[0]),
    }


def _shares_of_evidence(result: Result) -> str:
    """Say how much of the busy time rests on which class: ``fitted 91 %, assumed 9 %``."""
    shares: dict[str, float] = {}
    for item in result.evidence:
        if item.share:
            shares[item.evidence] = shares.get(item.evidence, 0.0) + item.share
    ordered = sorted(shares.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{name} {share:.0%}" for name, share in ordered)


def show_comparison(
    screen: Console, scenario: Scenario, rows: Sequence[Mapping[str, Any]], files: Sequence[Path]
) -> None:
    """Print the clusters side by side."""
    screen.print(f"{scenario.model.name}, {scenario.step.tokens} tokens per step")
    screen.print(comparison_table(list(rows)))
    for file in files:
        screen.print(f"wrote {file}")


def show_catalog(screen: Console, names: Mapping[str, Sequence[str]]) -> None:
    """Print the names in the catalog."""
    for kind, entries in names.items():
        screen.print(kind, style="bold")
        for name in entries:
            screen.print(f"  {name}")
    screen.print("A cluster with a network also takes a number of nodes: hgx-h100-8x4.")


_UNITS = {
    "capacity": "B",
    "bandwidth": "B/s",
    "flops": "FLOP/s",
    "clock": "Hz",
    "power": "W",
    "price": "USD/h",
    "cache": "B",
    "launch": "s",
    "startup": "s",
    "latency": "s",
    "ramp_bytes": "B",
    "pin_rate": "B/s",
    "stack_capacity": "B",
    "lane_rate": "B/s",
}
"""Unit of a figure by the last word of its path, or the one before."""


def show_hardware(screen: Console, entry: Mapping[str, Any]) -> None:
    """Print every figure of an entry with its unit and source, then the citations."""
    table = Table("figure", "value", "evidence", "source", title=entry["name"], box=box.SIMPLE)
    sources: dict[str, str] = {}
    _add_figures(table, entry, (), sources)
    screen.print(table)
    for key, text in sources.items():
        screen.print(Text(key, "bold"), text, sep=": ")


def _add_figures(
    table: Table, node: Any, path: tuple[str, ...], sources: dict[str, str], rests: Any = None
) -> None:
    if isinstance(node, Mapping):
        sources |= node.get("sources", {})
        rests = node if "evidence" in node else rests
        for key, inner in node.items():
            _add_figures(table, inner, path if key == "value" else (*path, key), sources, rests)
    elif isinstance(node, (int, float)) and not isinstance(node, bool):
        evidence = (str(rests.get(k, "")) for k in ("evidence", "source")) if rests else ("", "")
        table.add_row(".".join(path), _with_unit(path, node), *evidence)


def _with_unit(path: tuple[str, ...], value: float) -> str:
    unit = next((_UNITS[word] for word in path[:-3:-1] if word in _UNITS), None)
    return format_quantity(value, unit, digits=4) if unit else f"{value:.6g}"


def show_findings(screen: Console, title: str, found: Sequence[tuple[str, Finding]]) -> None:
    """Print what the guards found, each with its file, then how many."""
    for name, finding in found:
        screen.print(f"{finding.level}: {name}: {finding.where}: {finding.message}")
    count = f"{len(found)} finding{'' if len(found) == 1 else 's'}"
    screen.print(f"{title}: {count}" if title else count)
