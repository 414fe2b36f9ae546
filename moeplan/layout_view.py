"""A plan of layouts on the terminal: the answer, the front, memory, and why the others lost."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from basis.units import format_quantity
from moeplan.views import show_end, show_facts

MEMORY = {
    "weights": "weights outside experts",
    "experts": "experts",
    "kv_cache": "KV cache",
    "activations": "activations",
    "communication": "communication buffers",
    "total": "total",
    "usable": "usable",
}
"""Terms of a rank's memory by their key in plan.json."""
_MOST = 4  # rejected layouts and alternatives that are named; the rest is counted


def show_layouts(
    screen: Console, plan: Mapping[str, Any], out: Path, refused: Mapping[str, str]
) -> None:
    """Print the answer, the Pareto front, the proof and where the report lies."""
    found = plan["layouts"]
    show_facts(screen, plan)
    counts = found["layouts"]
    screen.print(f"asked    {found['question']}")
    screen.print(
        f"layouts  {counts['enumerated']} divide the ranks and the model, {counts['fit']} fit into "
        f"memory, {counts['simulated']} of {counts['points']} points simulated"
    )
    screen.print(f"chosen   {plan['chosen']}")
    for remark in found["remarks"]:
        screen.print(f"         {remark}")
    screen.print(_front_table(found))
    screen.print(_memory_table(found))
    _show_runner_up(screen, found["runner_up"])
    screen.print(f"proof    {found['proof']['statement']}")
    screen.print(f"checked  other split, {found['confirmation']}")
    _show_some(screen, "no room ", found["rejected"])
    _show_some(screen, "lost    ", plan["alternatives"])
    show_end(screen, plan, out, refused)


def _front_table(found: Mapping[str, Any]) -> Table:
    title = "Pareto front of tokens/s and TPOT (* chosen)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    table.add_column("layout")
    for name in ("running", "tokens/s", "per GPU", "TPOT", "TPOT p99"):
        table.add_column(name, justify="right", no_wrap=True)
    for point in found["front"]:
        mark = " *" if is_chosen(point, found["chosen"]) else ""
        table.add_row(
            f"{point['layout']}{mark}",
            f"{point['running_requests']:,}",
            f"{point['tokens_per_second']:,.0f}",
            f"{point['tokens_per_second_per_gpu']:,.0f}",
            format_quantity(point["tpot_s"], "s"),
            format_quantity(point["tpot_s_p99"], "s"),
        )
    return table


def is_chosen(point: Mapping[str, Any], chosen: Mapping[str, Any]) -> bool:
    """Whether a point of the front is the choice."""
    return all(point[key] == chosen[key] for key in ("layout", "running_requests"))


def _memory_table(found: Mapping[str, Any]) -> Table:
    rows = [found["chosen"], found["runner_up"]] if found["runner_up"] else [found["chosen"]]
    table = Table(title="memory of the fullest rank", title_justify="left", box=box.SIMPLE)
    table.add_column("layout")
    for title in MEMORY.values():
        table.add_column(title, justify="right")
    for row in rows:
        sizes = [format_quantity(row["memory_bytes"][key], "B") for key in MEMORY]
        table.add_row(row["layout"], *sizes)
    return table


def _show_runner_up(screen: Console, runner: Mapping[str, Any] | None) -> None:
    if runner is None:
        screen.print("runner-up  none: no other layout fits and keeps the limits")
        return
    word = "a tie" if runner["tie"] else "runner-up"
    screen.print(f"next     {runner['layout']} ({word}): {runner['why_lost']}")


def _show_some(screen: Console, label: str, layouts: list[Mapping[str, Any]]) -> None:
    """Print the first few layouts with their reasons and count the rest."""
    for row in layouts[:_MOST]:
        screen.print(f"{label} {row['name']}: {row['why']}")
    if len(layouts) > _MOST:
        screen.print(f"         and {len(layouts) - _MOST} more in plan.json")
