"""What `moeplan trace import`, `stats` and `convert` do."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from basis.errors import InputError
from moeplan import console
from moeplan.plan_file import read_plan
from moeplan.trace_answers import answers
from moeplan.trace_report import render_statistics
from moeplan.trace_statistics import SCHEMA, find_statistics
from moeplan.trace_view import show_loads, show_statistics
from simulator.placement import Placement
from traces.arrivals.read import is_workload
from traces.arrivals.write import convert_workload
from traces.convert import convert
from traces.counts_trace import CountsTrace, is_counts, read_counts
from traces.importers import FORMATS, import_file
from traces.importers.base import Asked
from traces.measures.load import Loads
from traces.model_spec import load_model


def stats(options: argparse.Namespace) -> dict[str, Any]:
    """Answer what a trace can tell, with tables, JSON and a page."""
    screen = console.of(options)
    if len(options.trace) == 1 and is_counts(options.trace[0]):
        if options.out:
            raise InputError(
                f"{options.trace[0]}: loads without tokens -- there is no page of it -- leave "
                "--out away, or record a trace of tokens"
            )
        counts = read_counts(options.trace[0])
        show_loads(screen, counts)
        return _loads_only(counts)
    with console.progress(screen) as tell:
        placed = _placed(options.plan) if options.plan else None
        found = find_statistics(
            options.trace, placed=placed, scheduler=options.scheduler, tell=tell
        )
    given = answers(found)
    show_statistics(screen, found, given)
    if options.out:
        _folder(options.out)
        options.out.write_text(render_statistics(found, given), encoding="utf-8")
        screen.print(f"wrote {options.out}")
    return {"answers": [answer.to_dict() for answer in given], **found.to_dict()}


def _placed(path: Path) -> tuple[str, Placement]:
    plan = read_plan(path)
    try:
        slots = np.array(plan["physical_to_logical_map"], dtype=np.int32)
        ranks = int(plan["parallelism"]["experts"]["ep"])
        return str(path), Placement(
            slots=slots, num_experts=int(plan["num_experts"]), num_ranks=ranks
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: no placement in it ({error}) -- a plan.json with physical_to_logical_map and "
            "parallelism -- plan again"
        ) from None


def _loads_only(counts: CountsTrace) -> dict[str, Any]:
    loads = Loads(counts=counts.loads, moe_layer_ids=counts.moe_layer_ids)
    return {
        "schema": SCHEMA,
        "kind": "counts",
        "model": counts.model,
        "steps": len(counts.counts),
        "num_experts": counts.num_experts,
        "top_k": counts.top_k,
        "moe_layer_ids": list(counts.moe_layer_ids),
        "load": loads.to_dict(),
        "refused": "reuse, pairs, flow, caches and steps need tokens; this source has counts only",
    }


def import_(options: argparse.Namespace) -> dict[str, Any]:
    """Read what another tool recorded and write it as a trace, or as loads."""
    screen = console.of(options)
    if options.list:
        for each in FORMATS:
            screen.print(f"{each.name:24} {each.title}", highlight=False, markup=False)
        return {"formats": {each.name: each.title for each in FORMATS}}
    if options.source is None or options.target is None:
        raise InputError("trace import: SOURCE and TARGET are needed -- or --list for the formats")
    _folder(options.target)
    asked = Asked(
        model=load_model(options.model) if options.model else None,
        domain=options.domain,
        licence=options.licence,
    )
    with console.progress(screen) as tell:
        tell(f"read {options.source.name}")
        done = import_file(options.source, options.target, format=options.format, asked=asked)
    unit = "tokens" if done.kind == "tokens" else "steps of counts"
    screen.print(f"{done.format}: {done.rows:,} {unit}; wrote {options.target}")
    for why, count in done.dropped.items():
        screen.print(f"  dropped {count:,}: {why}", highlight=False, markup=False)
    for note in done.notes:
        screen.print(f"  note: {note}", highlight=False, markup=False)
    return {"target": str(options.target), **done.to_dict()}


def convert_(options: argparse.Namespace) -> dict[str, Any]:
    """Rewrite a trace, or the arrivals of a workload, in another format."""
    answer: dict[str, Any] = {"source": str(options.source), "target": str(options.target)}
    screen = console.of(options)
    if is_workload(options.source):
        done = convert_workload(options.source, options.target)
        answer |= done.to_dict()
        for line in done.notes:
            screen.print(line, highlight=False, markup=False)
    else:
        convert(options.source, options.target)
    screen.print(f"wrote {options.target}")
    return answer


def _folder(out: Path) -> None:
    if not out.parent.is_dir():
        raise InputError(f"{out.parent}: no such folder -- make it first")
