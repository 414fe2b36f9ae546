"""Placements compared, on the terminal: step times, then every pair."""

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moeplan.figures import percent
from moeplan.validate_parallel import DECIDED, Pair, ParallelFound
from moeplan.validate_verdict import NOISY
from moeplan.validate_view import conclusion, show_rows

_STYLES = {"ok": "green", "off": "red", "equal": "dim", "undecidable": "yellow"}


def show_parallel(screen: Console, found: ParallelFound) -> None:
    """Print what validating expert parallel steps found."""
    screen.print(f"\nExpert parallel over {found.ranks} processes", style="bold")
    show_rows(screen, found.rows, "step")
    table = Table(box=box.SIMPLE)
    table.add_column("pair", no_wrap=True)
    for column in ("predicted gap", "measured gap", "spread"):
        table.add_column(column, justify="right")
    table.add_column("answer: faster")
    table.add_column("verdict")
    for pair in found.pairs:
        table.add_row(*_cells(pair))
    screen.print(table)
    planned = ", ".join(f"{name} ({load})" for load, name in found.planned_as.items())
    for remark in (
        conclusion(found.summary, found.bound),
        order_conclusion(found),
        "Ranks wait for each other when the system holds one of them up: times may come out too "
        "low.",
        f"A gap says how much slower the second of a pair is; the spread is the larger floor of "
        f"the two over {found.rounds} interleaved rounds. Planned is the planner's candidate: "
        f"{planned}.",
    ):
        screen.print(remark, highlight=False, markup=False)


def order_conclusion(found: ParallelFound) -> str:
    """Say in a sentence whether the placements are in the right order."""
    right, wrong = found.count("ok"), found.count("off")
    begin = {"ok": "Passed", "off": "Failed", "undecidable": "Undecidable"}[found.order]
    return (
        f"{begin} order of placements: {right} of {right + wrong} decided pairs (predicted gap "
        f"above {DECIDED:g} times the spread) ordered rightly; {found.count('equal')} pairs are "
        f"equal, {found.count('undecidable')} undecidable (spread above {percent(NOISY)})."
    )


def _cells(pair: Pair) -> list[str | Text]:
    return [
        f"{pair.first.batch}, {pair.first.load}: {pair.first.placement} / {pair.second.placement}",
        percent(pair.predicted_gap, signed=True),
        percent(pair.measured_gap, signed=True),
        percent(pair.spread),
        pair.answer,
        Text(pair.verdict, _STYLES[pair.verdict]),
    ]
