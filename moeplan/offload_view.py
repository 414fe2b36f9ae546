"""An offload plan on the terminal: the answer, plan and baselines on both splits, the proof."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from basis.units import format_quantity
from moeplan.report_tables import NAMES
from moeplan.views import show_end, show_facts

SITES = {
    "pairs_resident": "resident",
    "pairs_copied_ahead": "copied ahead",
    "pairs_fetched": "fetched",
    "pairs_aside": "aside",
}
"""Shares of (token, expert) pairs by where they are computed, by their key in plan.json."""


def show_offload(
    screen: Console, plan: Mapping[str, Any], out: Path, refused: Mapping[str, str]
) -> None:
    """Print the answer, the comparison on both splits, the proof and what engines can load."""
    found = plan["offload"]
    show_facts(screen, plan)
    aside = f", computed there by {found['processor']}" if found["processor"] else ""
    screen.print(
        f"memory   {format_quantity(found['fast_bytes'], 'B')} of the fast memory hold "
        f"{found['slots']} of {found['num_experts']} experts; the others live in "
        f"{found['home']}{aside}"
    )
    screen.print(f"chosen   {plan['chosen']}")
    for part in (plan, plan["other_split"]):
        screen.print(_table(part, plan["scenario"]["workload"]["phase"]))
    for rule, proof in found["certificates"].items():
        of_plan = proof["problem"] == plan["certificate"]["problem"]
        own = f" (of {found['certificate_of']})" if of_plan else ""
        screen.print(
            f"proof    {rule}{own}: {format_quantity(proof['objective'], 's')}, nothing is below "
            f"{format_quantity(proof['bound'], 's')}: gap {proof['gap']:.2%} ({proof['status']})"
        )
        screen.print(f"         of the {proof['problem']}")
    ties = ", ".join(NAMES[name] for name in found["ties"]) or "none"
    screen.print(f"ties     within {found['tie_within']:.1%}: {ties}")
    for sentence in grain(found["engine"]):
        screen.print(f"engines  {sentence}")
    show_end(screen, plan, out, refused)


def grain(engine: Mapping[str, Any]) -> list[str]:
    """Say what the placements that engines can load would take; nothing where there is none."""
    if not engine:
        return []
    times = engine["step_time_s"]
    exact, coarse, last = (times[k] for k in ("gpu_experts", "gpu_layers", "last_gpu_layers"))
    return [
        f"single experts that stay (sglang-kt): {format_quantity(exact, 's')} per step",
        f"whole layers (llama.cpp -ot): {format_quantity(coarse, 's')}; its coarser grain costs "
        f"{coarse / exact - 1:+.1%}",
        f"the last layers (llama.cpp --n-cpu-moe): {format_quantity(last, 's')}, "
        f"{last / exact - 1:+.1%}",
    ]


def _table(part: Mapping[str, Any], phase: str) -> Table:
    title = f"held-out requests, split {part['split']}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    table.add_column("experts", no_wrap=True)
    rows = {"plan": part["predicted"], **part["baselines"]}
    sites = [key for key in SITES if any(row[key] for row in rows.values())]
    time = "TPOT" if phase == "decode" else "step time"
    names = [time, "tokens/s", "hit rate", "fetched/token", *(SITES[key] for key in sites)]
    for name in [*names, "fast memory"]:
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in rows.items():
        table.add_row(
            part["chosen"] if name == "plan" else NAMES[name],
            format_quantity(row["step_time_s"], "s"),
            f"{row['tokens_per_second']:,.1f}",
            f"{row['hit_rate']:.1%}",
            format_quantity(row["fetched_bytes_per_token"], "B"),
            *(f"{row[key]:.1%}" for key in sites),
            format_quantity(row["memory_bytes_fullest_rank"], "B"),
        )
    return table
