"""Measured runs beside their predictions, on the terminal: a line for each metric, then remarks."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from basis.units import format_quantity
from moeplan.runs import MeasuredRun
from moeplan.runs_compare import Compared, Comparison


def show_runs(screen: Console, found: Sequence[Comparison]) -> None:
    """Print what `moeplan.runs_compare.compare` found, run by run."""
    for comparison in found:
        run = comparison.run
        screen.print(f"\n{run.source}: {run.tool}, {_asked(run)}", highlight=False, markup=False)
        if comparison.rows:
            screen.print(_table(comparison.rows))
        for remark in comparison.remarks:
            screen.print(f"note     {remark}", highlight=False, markup=False)


def _table(rows: Sequence[Compared]) -> Table:
    table = Table(box=box.SIMPLE)
    table.add_column("metric", no_wrap=True)
    for column in ("measured", "predicted", "error", "spread"):
        table.add_column(column, justify="right")
    for row in rows:
        spread = "-" if row.spread is None else f"{row.spread:.1%}"
        shown = [_shown(value, row.unit) for value in (row.measured, row.predicted)]
        table.add_row(row.metric, *shown, f"{row.error:+.1%}", spread)
    return table


def _shown(value: float, unit: str) -> str:
    return format_quantity(value, "s") if unit == "s" else f"{value:,.0f} {unit}"


def _asked(run: MeasuredRun) -> str:
    """Say in a few words what the run was asked."""
    lengths = (
        "unknown lengths"
        if run.input_tokens is None or run.output_tokens is None
        else f"{run.input_tokens:.0f} input and {run.output_tokens:.0f} output tokens"
    )
    if run.batch_size is not None:
        return f"decode steps of {run.batch_size} requests, {lengths}"
    if run.request_rate is not None:
        return f"{run.request_rate:g} requests/s, {lengths}"
    cached = f" after {run.cached_tokens} cached" if run.cached_tokens else ""
    return f"concurrency {run.concurrency or 'unknown'}, {lengths}{cached}"
