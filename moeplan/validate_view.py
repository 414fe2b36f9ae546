"""Predicted beside measured, on the terminal: a line for each row, then summaries."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moeplan.figures import percent, seconds
from moeplan.validate_blame import Suspect
from moeplan.validate_result import Blame, StepsFound
from moeplan.validate_verdict import NOISY, TAIL, Row, Summary

_STYLES = {"ok": "green", "off": "red", "undecidable": "yellow"}
_POINTS_AT = 3  # kernels named as the largest part of the error


def show_steps(screen: Console, found: StepsFound) -> None:
    """Print what validating steps on one process found."""
    screen.print("\nSteps of the real decoder on one process", style="bold")
    show_rows(screen, found.steps, "step")
    for title, rows in (
        ("batch", found.by_batch),
        ("load of decode", found.by_load),
        ("stage", found.by_stage),
        ("kernel", found.by_kernel),
        ("kernel: its limit", found.by_limit),
    ):
        show_summaries(screen, rows, title, found.bound)
    remarks = [
        conclusion(found.summary, found.bound),
        f"Points at kernels: {_blamed(found.kernels_to_blame)} (predicted less measured, all steps "
        "together).",
        suspicion(found.suspects) if any(row.verdict == "off" for row in found.steps) else "",
        f"Floor: half the interquartile range over {found.rounds} interleaved rounds (stages and "
        f"kernels: {found.lap_rounds} rounds with laps, which add {percent(found.lap_cost)} to a "
        "step).",
    ]
    for remark in filter(None, remarks):
        screen.print(remark, highlight=False, markup=False)


def show_rows(screen: Console, rows: Sequence[Row], what: str) -> None:
    """Print rows one by one."""
    table = _table(what, "predicted", "measured", "error", "floor", "verdict")
    for row in rows:
        table.add_row(
            row.label,
            seconds(row.predicted_s),
            seconds(row.measured_s),
            percent(row.error, signed=True),
            percent(row.floor),
            Text(row.verdict, _STYLES[row.verdict]),
        )
    screen.print(table)


def show_summaries(screen: Console, rows: Sequence[Summary], what: str, bound: float) -> None:
    """Print summaries; times are sums, errors are of the decidable rows."""
    if not rows:
        return
    columns = ("predicted", "measured", "median |error|", "signed", "worst", "floor", "decidable")
    table = _table(what, *columns, "verdict")
    for row in rows:
        verdict = row.verdict(bound)
        table.add_row(
            row.label,
            seconds(row.predicted_s),
            seconds(row.measured_s),
            percent(row.median),
            percent(row.signed, signed=True),
            percent(row.worst),
            percent(row.floor),
            f"{row.decidable} of {row.decidable + row.undecidable}",
            Text(verdict, _STYLES[verdict]),
        )
    screen.print(table)


def conclusion(summary: Summary, bound: float) -> str:
    """Say in a sentence what came out of some rows."""
    noisy = f"{summary.undecidable} undecidable (floor above {percent(NOISY)})"
    if not summary.decidable:
        return f"Undecidable {summary.label}: {noisy}, none decidable. Not passed."
    passed = "Passed" if summary.passed(bound) else "Failed"
    return (
        f"{passed} {summary.label}: median |error| {percent(summary.median)} of at most "
        f"{percent(bound)}, 90th percentile {percent(summary.p90)} of at most "
        f"{percent(TAIL * bound)}, worst {percent(summary.worst)}; "
        f"{summary.decidable} decidable, {noisy}."
    )


def _blamed(blames: Sequence[Blame]) -> str:
    return ", ".join(
        f"{each.name} {'+' if each.seconds > 0 else '−'}{seconds(abs(each.seconds))} "
        f"({percent(each.relative, signed=True)})"
        for each in blames[:_POINTS_AT]
    )


def suspicion(suspects: Sequence[Suspect]) -> str:
    """Say which figure of the machine would explain the error, if one does."""
    if not suspects:
        return ""
    first = suspects[0]
    now = f"of the measured time {percent(first.wrong)} is put wrongly"
    if not first.named:
        return f"Points at no single figure of the machine: {now}, no change of one explains it."
    what = {"bandwidth": "the memory bandwidth", "FLOP/s": "the peak FLOP/s"}
    return (
        f"Points at {what.get(first.limit, 'the fixed times (launches)')}: {now}, with "
        f"{first.factor:.2g} times the value in the file {percent(first.left)}."
    )


def _table(what: str, *numbers: str) -> Table:
    table = Table(box=box.SIMPLE)
    table.add_column(what, no_wrap=True)
    for column in numbers:
        table.add_column(column, justify="left" if column == "verdict" else "right")
    return table
