"""A published system on the terminal: its variants per workload, the claims beside our figures."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from basis.units import format_quantity
from moeplan.composition_file import Composition

_CONFIDENCE = {
    "P": "paper's text",
    "C": "authors' code",
    "N": "third-party notes",
    "A": "abstract",
    "R": "recollection",
    "own": "the paper's formula, recomputed",
}
_DIRECTION = {True: ", same direction", False: ", the other direction", None: ""}


def show_composition(screen: Console, composition: Composition, answer: Mapping[str, Any]) -> None:
    """Print the table of every workload, then the claims."""
    screen.print(Text(f"\n{composition.system}", "bold"), composition.paper, sep="  ")
    screen.print(f"cluster  {composition.cluster}   model  {answer['model']}")
    screen.print(f"routing  {answer['routing']}")
    for name, variant in composition.variants.items():
        screen.print(f"  {name}: {variant.title}")
    workloads = [run["workload"] for run in answer["runs"]]
    for workload in [w for i, w in enumerate(workloads) if w not in workloads[:i]]:
        screen.print(_table(workload, composition.baseline, answer))
    for reason in dict.fromkeys(r["refused"] for r in answer["runs"] if r["refused"]):
        screen.print(f"cannot run: {reason}")
    for claim in answer["claims"]:
        screen.print(f"claim    {claim['claim']} ({_CONFIDENCE[claim['confidence']]})")
        if not answer["own_facts"]:
            continue
        figure = "not answered by a simulation" if claim["ours"] is None else _figures(claim)
        remark = f" -- {claim['remark']}" if claim["remark"] else ""
        screen.print(f"         {figure}{remark}")
    if not answer["own_facts"]:
        screen.print("note     the claims are of the paper's model, the figures above of another")
    for note in composition.notes:
        screen.print(f"note     {note}")


def _figures(claim: Mapping[str, Any]) -> str:
    claimed = "" if claim["claimed"] is None else f"claimed {claim['claimed']:,.4g}, "
    return f"{claimed}ours {claim['ours']:,.4g}{_DIRECTION[claim['same_direction']]}"


def _table(workload: Mapping[str, Any], baseline: str, answer: Mapping[str, Any]) -> Table:
    (kind, tokens), *_ = workload.items()
    table = Table(title=f"{kind} {tokens}", title_justify="left", box=box.SIMPLE)
    table.add_column("variant", no_wrap=True)
    for name in ("tokens/s", "step time", f"x {baseline}", "hit rate", "fetched/token", "memory"):
        table.add_column(name, justify="right")
    rows = [run for run in answer["runs"] if run["workload"] == workload]
    below = next((r["summary"] for r in rows if r["variant"] == baseline), None)
    for run in rows:
        found = run["summary"]
        if found is None:
            table.add_row(run["variant"], "cannot run", *[""] * 5)
            continue
        ratio = found["tokens_per_second"] / below["tokens_per_second"] if below else None
        fetched = found.get("fetched_bytes_per_token")
        table.add_row(
            run["variant"],
            f"{found['tokens_per_second']:,.0f}",
            format_quantity(found["step_time_s"], "s"),
            "" if ratio is None else f"{ratio:.2f}",
            f"{found['hit_rate']:.1%}" if "hit_rate" in found else "",
            "" if fetched is None else format_quantity(fetched, "B"),
            format_quantity(found["memory_bytes_fullest_rank"], "B"),
        )
    return table
