"""The statistics of a trace as text for a terminal."""

from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from moeplan.figures import percent
from moeplan.trace_answers import Answer
from moeplan.trace_statistics import Found
from traces.counts_trace import CountsTrace
from traces.measures.base import Floats
from traces.measures.load import Loads

_CURVES = 3  # of the caches with slots per layer


def show_statistics(screen: Console, found: Found, given: tuple[Answer, ...]) -> None:
    """Print what the trace is, the four answers, and the tables behind them."""
    meta, about = found.about.meta, found.about
    made = "SYNTHETIC: " if meta.synthetic else ""
    screen.print(
        f"{made}{meta.model}: {about.num_tokens:,} tokens of {about.num_requests:,} requests in "
        f"{len(found.files)} file(s); {meta.num_layers} MoE layers x {meta.num_experts} experts, "
        f"top-{meta.top_k}",
        highlight=False,
    )
    if meta.synthetic and meta.note:
        screen.print(meta.note)
    for answer in given:
        screen.print(f"\n{answer.question} {answer.word}: {answer.figure}", style="bold")
        screen.print(f"  {answer.because}.\n  So {answer.so}.")
    for table in (_load(found), _steps(found), _caches(found), _reuse(found), _support(found)):
        screen.print()
        screen.print(table)


def show_loads(screen: Console, counts: CountsTrace) -> None:
    """Print what counts without tokens tell."""
    loads = Loads(counts=counts.loads, moe_layer_ids=counts.moe_layer_ids)
    screen.print(
        f"{counts.model}: counts only, {len(counts.counts):,} step(s); {len(counts.moe_layer_ids)} "
        f"MoE layers x {counts.num_experts} experts",
        highlight=False,
    )
    table = _grid("Loads", "", "mean over layers", "highest", "at layer")
    _add_layers(table, loads, (("max / mean", loads.max_over_mean), ("Gini", loads.gini)))
    screen.print(table)
    screen.print(
        "Reuse, pairs, flow, caches and steps need tokens: record a trace of them for these."
    )


def _load(found: Found) -> Table:
    loads = found.load.loads
    table = _grid("Loads", "", "mean over layers", "highest", "at layer")
    rows = (
        ("max / mean", loads.max_over_mean),
        ("entropy / log2 E", loads.entropy_share),
        ("Gini", loads.gini),
        ("pairs unlike independent", found.coactivation.departure),
        ("early / late distance", found.drift.early_late),
        ("even / odd distance", found.drift.even_odd),
    )
    _add_layers(table, loads, rows)
    return table


def _add_layers(table: Table, loads: Loads, rows: Sequence[tuple[str, Floats]]) -> None:
    """Add mean and highest of figures ``[L]``; nothing where no layer has one."""
    for name, values in rows:
        if np.isnan(values).all():
            table.add_row(name, "not known", "", "")
            continue
        top = int(np.nanargmax(values))
        layer = str(loads.moe_layer_ids[top])
        table.add_row(name, f"{np.nanmean(values):.3f}", f"{values[top]:.3f}", layer)


def _steps(found: Found) -> Table:
    steps = found.balance.by_batch
    ranks = steps[-1].ranks[-1].groups if steps[-1].ranks else 0
    columns = [f"busiest of {ranks} ranks", "even loads"] if ranks else []
    table = _grid("Busiest over mean in a step", "batch", "expert", "shuffled", "even", *columns)
    for step in steps:
        parts = [step.experts, *step.ranks[-1:]]
        cells = [f"{parts[0].observed:.2f}", f"{parts[0].shuffled:.2f}", f"{parts[0].even:.2f}"]
        cells += [f"{value:.2f}" for p in parts[1:] for value in (p.observed, p.even)]
        table.add_row(str(step.batch), *cells)
    return table


def _caches(found: Found) -> Table:
    curves = found.caches[:_CURVES]
    table = _grid("Cache hits, slots per layer", "slots", *(c.policy.upper() for c in curves))
    for at, size in enumerate(curves[0].sizes):
        table.add_row(str(size), *(percent(float(c.hit_rate[at])) for c in curves))
    return table


def _reuse(found: Found) -> Table:
    table = _grid("Experts in common with a token before", "distance", "share", "independent")
    chance = percent(float(found.reuse.independent.mean()))
    for lag, seen in zip(found.reuse.lags, found.reuse.observed, strict=True):
        table.add_row(str(lag), percent(float(seen.mean())), chance)
    return table


def _support(found: Found) -> Table:
    table = Table("The trace supports", "", "number", "which is", title_justify="left")
    for each in found.support.findings:
        value = "not known" if np.isnan(each.value) else f"{each.value:.4g}"
        table.add_row(each.question, each.answer, value, each.why)
    return table


def _grid(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table
