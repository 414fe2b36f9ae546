"""`moeplan calibrate --device cpu|cuda`: measure this machine and fit the cost models to it.

A rank is one process with so many pinned threads (or one accelerator). Its reference kernels are
timed on random shapes, a quarter of which no fit sees; the folder that is written holds the device
and a cluster of such ranks as YAML, the measured tables, and what they were measured on.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from rich.table import Table as Grid

from basis import format_quantity, validate
from basis.errors import InputError
from hwmodels.cluster import load_cluster
from hwmodels.device import Device
from hwmodels.fitting.library import FORMATS, fit_library, held_out_of
from hwmodels.fitting.write import plain
from hwmodels.kernels.base import Limits, PhysicalCost
from hwmodels.silicon.own import write_table
from hwmodels.silicon.table import Table
from moeplan import console
from moeplan.calibrate_exchange import fit_exchange
from moeplan.calibrate_tier import calibrate_cache, calibrate_tier
from moeplan.reference import import_kernels
from moeplan.validate_verdict import NOISY

if TYPE_CHECKING:
    from kernels_ref.machine import Machine
    from kernels_ref.peaks import Peaks

HEAD = "# made by `moeplan calibrate --device {kind}` on {date}; do not edit\n"
NAME = "this-machine"
_ATTEMPTS = 5
_MOSTLY = 0.7  # of an operation's time that is fixed
_NOTHING: dict[str, Any] = {}
FLOOR = 0.02
"""Spread between rounds down to which a row counts in full; rows that repeat worse count less."""


def calibrate_machine(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, fit, write a folder, and print the errors on held-out shapes.

    Raises
    ------
    InputError
        Without torch, without the device, or on a machine that is too noisy to be measured.
    """
    _check(options)
    ref = import_kernels()
    screen, started = console.of(options), time.perf_counter()
    device, dtype = options.device[0], options.dtype
    options.out.mkdir(parents=True, exist_ok=True)
    with console.progress(screen) as tell, ref.pinned(options.threads):
        machine = ref.this_machine(device)
        noise = _noise(ref, device, tell)
        if not options.noisy:
            ref.refuse_noisy(noise)
        tell("peaks")
        peaks = ref.measure_peaks(device, machine.cache_bytes, ("fp32", "bf16"))
        operands = ref.Operands(device=device, cache_bytes=machine.cache_bytes)
        samples = ref.measure_cases(
            ref.draw_cases(dtype),
            operands,
            dtype=dtype,
            progress=lambda done, of: tell(f"measure {done} of {of}") if done % 500 == 0 else None,
        )
        tables = ref.tables_of(samples, machine, dtype)
        peaks = peaks.with_seen(dtype, tables)
        limits = limits_of(machine, peaks, dtype)
        tell("fit")
        fits = {table.op: fit_library(table, limits, weights=_weights(table)) for table in tables}
        made, tiers = device_of(machine, peaks, fits, dtype), _NOTHING
        tell("short operations again, near the cache")
        near = _near(ref, operands, samples, fits, limits, dtype)
        made["processors"][machine.kind]["near_fixed"] = near
        if machine.kind == "cpu":
            tell("fetches from memory and disk")
            tiers, made = _tiers(options.out, made)
    with console.progress(screen) as tell:  # processes pin themselves
        links = _links(ref, machine, tell)
    _write(options.out, machine, made, tables, links | tiers, dtype)
    load_cluster(options.out / "cluster.yaml")  # what was written loads
    seconds = time.perf_counter() - started
    screen.print(_grid(tables, fits, limits))
    count = sum(len(t.frame) for t in tables)
    screen.print(f"noise {noise.floor:.1%}; {count} operations in {seconds:.0f} s")
    screen.print(f"wrote {options.out / 'cluster.yaml'}")
    return {
        "machine": machine.describe(),
        "noise": noise.floor,
        "flops": peaks.flops,
        "bandwidth": peaks.bandwidth,
        "seconds": seconds,
        "kernels": {name: plain(cost.held_out) for name, cost in fits.items()},
    }


def _near(
    ref: Any,
    operands: Any,
    samples: list[Any],
    fits: Mapping[str, PhysicalCost],
    limits: Limits,
    dtype: str,
) -> dict[str, Any]:
    """Measure the share of fixed times that is left where less passes through the cache.

    Operations that are mostly fixed time are measured once more; every second of them makes the
    share (the median of what remains), the others score it.
    """

    def priced(factor: float) -> Any:
        costs = {name: cost.with_fixed(factor) for name, cost in fits.items()}
        return np.array([costs[s.case.kernel].seconds(s.case.op, limits)[0] for s in samples])

    whole, free = priced(1.0), priced(0.0)
    short = np.flatnonzero(free < (1 - _MOSTLY) * whole)
    cases = [samples[at].case for at in short]
    again = ref.measure_cases(cases, operands, dtype=dtype, displaced=ref.sweep.NEAR, seed=1)
    seconds = np.array([s.seconds for s in again])
    share = (seconds - free[short]) / (whole - free)[short]
    value = float(np.clip(np.median(share[::2]), 0.01, 1.0))
    error = abs(free[short] + value * (whole - free)[short] - seconds)[1::2] / seconds[1::2]
    about = f"short operations again; median error on {len(error)} others {np.median(error):.1%}"
    return {"value": round(value, 4), "evidence": "fitted", "source": f"moeplan calibrate: {about}"}


def _noise(ref: Any, device: str, tell: Callable[[str], None]) -> Any:
    """Look how noisy the machine is, again while it is too much: neighbours come and go."""
    quietest = None
    for attempt in range(_ATTEMPTS):
        tell(f"how noisy is it{f', attempt {attempt + 1}' if attempt else ''}")
        noise = ref.noise(device, budget=2.0)
        if quietest is None or noise.floor < quietest.floor:
            quietest = noise
        if noise.floor <= NOISY:
            break
    return quietest


def _check(options: argparse.Namespace) -> None:
    """Refuse what only tables have, and devices that are not this machine."""
    if options.device not in (["cpu"], ["cuda"]):
        given = "nothing" if options.device is None else " ".join(options.device)
        raise InputError(
            f"calibrate --device: {given} -- cpu or cuda measures this machine -- catalog devices "
            "are fitted on tables: add --from silicon"
        )
    for name in ("engine", "rows"):
        if getattr(options, name):
            raise InputError(f"calibrate --{name}: belongs to --from silicon -- leave it out")
    cores = os.cpu_count() or 1
    if not 1 <= options.threads <= cores:
        raise InputError(
            f"calibrate --threads: {options.threads} -- 1 to the machine's {cores} cores -- change "
            "it"
        )


def limits_of(machine: "Machine", peaks: "Peaks", dtype: str) -> Limits:
    """Return the peaks that shares refer to."""
    return Limits(
        flops=peaks.flops[dtype],
        bandwidth=peaks.bandwidth,
        units=float(machine.threads if machine.kind == "cpu" else machine.cores),
        cache=float(machine.cache_bytes),
    )


def _weights(table: Table) -> Any:
    """Weigh rows by how well they repeat."""
    floor = table.frame["floor"].to_numpy(dtype=np.float64)
    return 1 / (1 + (floor / FLOOR) ** 2)


def _links(ref: Any, machine: "Machine", tell: Callable[[str], None]) -> dict[str, Any]:
    """Measure what lies between ranks; nothing on an accelerator or a machine of one rank."""
    if machine.kind == "cuda" or machine_ranks(machine) < 2:
        return {}
    tell("exchange between processes")
    rows = ref.sweep_exchange(ref.exchange_cases(), threads=machine.threads)
    source = f"moeplan calibrate, gloo, {machine.processor}, {machine.date}"
    return {"interconnect": fit_exchange(rows, source=source).to_dict()}


def _tiers(out: Path, device: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measure fetches from pageable memory and from the folder's disk, and uses after them.

    Returns memories and links of the node, and the device with the rate of its cache.
    """
    with tempfile.TemporaryDirectory(dir=out) as folder:
        tiers = calibrate_tier(Path(folder), "host")
    near = calibrate_cache(validate(device, Device, "device.yaml"))
    ((name, processor),) = device["processors"].items()
    changed = device | {"processors": {name: processor | {"cache_bandwidth": near}}}
    return tiers, changed


def _write(
    out: Path,
    machine: "Machine",
    device: dict[str, Any],
    tables: list[Table],
    node: dict[str, Any],
    dtype: str,
) -> None:
    """Write device, cluster, tables and provenance."""
    (out / "tables").mkdir(parents=True, exist_ok=True)
    for table in tables:
        write_table(table, out / table.source.path)
    about = machine.describe() | {"dtype": dtype}
    (out / "machine.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    head = HEAD.format(kind=machine.kind, date=machine.date)
    ranks = machine_ranks(machine) if "interconnect" in node else 1
    cluster = {
        "name": NAME,
        "title": f"{ranks} ranks of {machine.threads} threads each",
        "device": "device.yaml",
        "node": {"devices": ranks, **node},
    }
    for name, data in (("device", device), ("cluster", cluster)):
        text = yaml.safe_dump(data, sort_keys=False, width=110, default_flow_style=None)
        (out / f"{name}.yaml").write_text(head + text, encoding="utf-8")


def machine_ranks(machine: "Machine") -> int:
    """Return how many ranks of this many threads the machine has room for."""
    if machine.kind == "cuda":
        return 1
    return (os.cpu_count() or 1) // machine.threads


def device_of(
    machine: "Machine", peaks: "Peaks", fits: Mapping[str, PhysicalCost], dtype: str
) -> dict[str, Any]:
    """Return the device as its YAML has it."""
    kernels: dict[str, dict[str, Any]] = {}
    for name, cost in fits.items():
        entry = plain(cost)
        if name not in FORMATS or dtype == "bf16":
            kernels[name] = {"bf16": entry}
        else:  # every kernel needs an entry for bf16
            kernels[name] = {dtype: entry, "bf16": entry | {"evidence": "transfer"}}
    about = f"{machine.processor}, {machine.os}, {machine.date}"
    memory = "host" if machine.kind == "cpu" else "hbm"
    return {
        "name": NAME,
        "title": f"{machine.processor}, {machine.threads} of its threads",
        "sources": {
            "run": f"moeplan calibrate, torch {machine.torch}, {about}",
            "read": f"{peaks.how} over more than the caches hold, {about}",
            "system": f"what the operating system says, {about}",
        },
        "memories": {
            memory: {
                "kind": "memory of the host" if machine.kind == "cpu" else "device memory",
                "capacity": _figure(machine.memory_bytes, "B", "system"),
                "bandwidth": _figure(peaks.bandwidth, "B/s", "read"),
            }
        },
        "processors": {
            machine.kind: {
                "memory": memory,
                "compute_units": {
                    "value": machine.threads if machine.kind == "cpu" else machine.cores,
                    "evidence": "measured",
                    "source": "system",
                },
                "cache": _figure(machine.cache_bytes, "B", "system"),
                "flops": {n: _figure(rate, "FLOP/s", "run") for n, rate in peaks.flops.items()},
                "kernels": kernels,
            }
        },
    }


def _figure(value: float, unit: str, source: str) -> dict[str, Any]:
    return {"value": format_quantity(value, unit, 5), "evidence": "measured", "source": source}


def _grid(tables: list[Table], fits: Mapping[str, PhysicalCost], limits: Limits) -> Grid:
    grid = Grid(title="|predicted / measured - 1| on shapes that no fit saw")
    for column in ("kernel", "model", "median", "90 %", "rows", "spread of rounds"):
        grid.add_column(column, justify="right" if column not in ("kernel", "model") else "left")
    for table in tables:
        cost, held = fits[table.op], held_out_of(table)
        error = abs(table.predicted(cost, limits)[held] / table.seconds[held] - 1)
        grid.add_row(
            table.op,
            str(cost.model),  # type: ignore[attr-defined]
            f"{np.median(error):.1%}",
            f"{np.percentile(error, 90):.1%}",
            str(len(error)),
            f"{np.median(table.frame['floor']):.1%}",
        )
    return grid
