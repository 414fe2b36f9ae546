"""What `moeplan trace import`, `stats` and `convert` do."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from basis.errors import InputError
from basis.files import check_file, check_target, refuse_same, replacing
from moeplan import console
from moeplan.plan_file import read_plan
from moeplan.trace_answers import answers
from moeplan.trace_report import render_statistics
from moeplan.trace_statistics import SCHEMA, find_statistics
from moeplan.trace_view import show_loads, show_statistics
from simulator.placement import Placement
from traces.arrivals.read import is_workload
from traces.arrivals.write import convert_workload
from traces.convert import convert, read_npz
from traces.counts_trace import CountsTrace, is_counts, read_counts
from traces.importers import FORMATS, import_file
from traces.importers.base import Asked
from traces.measures.load import Loads
from traces.model_spec import load_model
from traces.trace_set import open_traces


def stats(options: argparse.Namespace) -> dict[str, Any]:
    """Answer what a trace can tell, with tables, JSON and a page."""
    screen = console.of(options)
    if options.out:
        check_target(options.out)
        refuse_same([options.out], [*_files(options.trace), options.plan])
    if len(options.trace) == 1 and is_counts(options.trace[0]):
        asked = [name for name in ("out", "plan", "scheduler") if getattr(options, name)]
        if asked:
            raise InputError(
                f"{options.trace[0]}: loads without tokens -- no use for --{' and --'.join(asked)} "
                "-- leave that away, or record a trace of tokens"
            )
        counts = read_counts(options.trace[0])
        show_loads(screen, counts)
        return _loads_only(counts)
    with console.progress(screen) as tell:
        placed = _placed(options.plan, options.trace[0]) if options.plan else None
        found = find_statistics(
            options.trace, placed=placed, scheduler=options.scheduler, tell=tell
        )
    given = answers(found)
    show_statistics(screen, found, given)
    if options.out:
        with replacing(options.out) as file:
            file.write_text(render_statistics(found, given), encoding="utf-8")
        screen.print(f"wrote {options.out}")
    return {"answers": [answer.to_dict() for answer in given], **found.to_dict()}


def _files(traces: list[Path]) -> list[Path]:
    """Return the files that are read; a folder stands for its Parquet files."""
    return [
        file for path in traces for file in (path.glob("*.parquet") if path.is_dir() else [path])
    ]


def _placed(path: Path, trace: Path) -> tuple[str, Placement]:
    """Read the placement of a plan for the model of a trace."""
    check_file(path, "a plan.json")
    plan = read_plan(path)
    try:
        placement = Placement(
            slots=np.array(plan["physical_to_logical_map"], dtype=np.int32),
            num_experts=int(plan["num_experts"]),
            num_ranks=int(plan["parallelism"]["experts"]["ep"]),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"{path}: no placement in it ({error}) -- a plan.json with physical_to_logical_map and "
            "parallelism -- plan again"
        ) from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    meta = (read_npz(trace) if trace.suffix == ".npz" else open_traces(trace)).meta
    found, wanted = ((each.num_layers, each.num_experts) for each in (placement, meta))
    if found != wanted:
        raise InputError(
            f"{path}: a plan of another model: {found[0]} MoE layers of {found[1]} experts, the "
            f"trace of {meta.model} has {wanted[0]} of {wanted[1]} -- give the plan of that model"
        )
    return str(path), placement


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
            screen.print(f"{each.name:24} {each.title}")
        return {"formats": {each.name: each.title for each in FORMATS}}
    if options.source is None or options.target is None:
        raise InputError("trace import: SOURCE and TARGET are needed -- or --list for the formats")
    check_target(options.target)
    refuse_same([options.target], [options.source, options.model])
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
        screen.print(f"  dropped {count:,}: {why}")
    for note in done.notes:
        screen.print(f"  note: {note}")
    return {"target": str(options.target), **done.to_dict()}


def convert_(options: argparse.Namespace) -> dict[str, Any]:
    """Rewrite a trace, or the arrivals of a workload, in another format."""
    answer: dict[str, Any] = {"source": str(options.source), "target": str(options.target)}
    screen = console.of(options)
    if options.source.suffix == ".csv" or is_workload(options.source):
        done = convert_workload(options.source, options.target)
        answer |= done.to_dict()
        for line in done.notes:
            screen.print(line)
    else:
        convert(options.source, options.target)
    screen.print(f"wrote {options.target}")
    return answer
