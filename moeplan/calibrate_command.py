"""`moeplan calibrate --from silicon`: fit the catalog's engines on measured kernel tables.

One file per device, with the errors on held-out shapes in it; engines that are not asked for keep
what the file already holds. With a folder for rows, everything that was predicted is kept there,
and what all devices together say of one that nobody measured goes into ``transfer.yaml``.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table as Grid

from basis.errors import InputError
from hwmodels.cluster import load_device
from hwmodels.engines import TRANSFER, EngineFits, FittedFile, load_fitted
from hwmodels.fitting.comm_transfer import transfer_comm
from hwmodels.fitting.silicon import EngineResult, KernelScore, fit_engine
from hwmodels.fitting.transfer import load, save, transfer
from hwmodels.fitting.write import plain, write_yaml
from hwmodels.kernels.included import Included
from hwmodels.link import Standard
from hwmodels.silicon.comm import PORTS
from hwmodels.silicon.wheel import ENGINES, GPUS
from moeplan import console
from planner.parallel import run_parallel

HEAD = "made by `moeplan calibrate --from silicon`; do not edit"
WORKERS = 2
"""Fits at the same time."""


def calibrate(options: argparse.Namespace) -> dict[str, Any]:
    """Fit devices and engines, write a file per device, and print the errors."""
    devices, engines = options.device or list(GPUS), options.engine or list(ENGINES)
    _check("device", devices, list(GPUS))
    _check("engine", engines, list(ENGINES))
    options.out.mkdir(parents=True, exist_ok=True)
    screen = console.of(options)
    tasks = [(device, engine) for device in devices for engine in engines]
    scores: list[KernelScore] = []
    with console.progress(screen) as tell:
        for first in range(0, len(tasks), WORKERS):
            batch = tasks[first : first + WORKERS]
            tell("fit " + ", ".join(f"{device} {engine}" for device, engine in batch))
            for (device, engine), result in zip(
                batch, run_parallel(fit_engine, batch), strict=True
            ):
                if result is not None:
                    _write(options.out / f"{device}.yaml", device, engine, result)
                    scores += result.scores
                    if options.rows:
                        _keep(options.rows / f"{device}-{engine}", result)
        if options.rows:
            tell("transfer to devices without tables")
            _transfer(options.rows, options.out)
    screen.print(_grid(scores))
    screen.print(f"wrote {len({s.device for s in scores})} files into {options.out}")
    return {"kernels": [_row(s) for s in scores]}


def _keep(stem: Path, result: EngineResult) -> None:
    """Write every row of an engine on a device, and what the transfer needs of it."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    result.rows.to_parquet(stem.with_suffix(".parquet"))
    save(stem.with_suffix(".npz"), result.drawn)


def _transfer(rows: Path, out: Path) -> None:
    """Fit all devices of a folder of rows together, engine by engine."""
    engines, scores = {}, []
    for engine in ENGINES:
        files = {p.stem.removesuffix(f"-{engine}"): p for p in rows.glob(f"*-{engine}.npz")}
        drawn = {device: load(path) for device, path in sorted(files.items())}
        kernels: dict[str, dict[str, Any]] = {}
        for key in sorted({k for d in drawn.values() for k in d}):
            op, dtype = key.split("|")
            found = transfer(op, {n: d[key] for n, d in drawn.items() if key in d}, "tables")
            if found is None:
                continue
            kernels.setdefault(op, {})[dtype] = found.cost
            scores += [
                {
                    "engine": engine, "op": op, "dtype": dtype, "device": one.device,
                    **plain(one.errors), "coverage": found.coverage[one.device],
                }
                for one in found.left_out
            ]  # fmt: skip
        if "grouped_gemm" in kernels:
            held = Included(within="grouped_gemm", evidence="transfer", source="tables")
            kernels["permute"] = {"bf16": held}
        if kernels:
            units = {d: load_device(d).limits("bf16").units for d in drawn}
            links = {s: transfer_comm(engine, units, s) for s in _standards(drawn)}
            engines[engine] = EngineFits(version="as fitted", kernels=kernels, by_link=links)
    if engines:
        sources = {"tables": "measured tables of all other devices, see their fitted files"}
        made = FittedFile(device=TRANSFER, sources=sources, engines=engines)
        write_yaml(made, out / f"{TRANSFER}.yaml", HEAD)
        (rows / "transfer.json").write_text(json.dumps(scores, indent=1), encoding="utf-8")


def _standards(devices: Iterable[str]) -> list[Standard]:
    """Links of the devices' nodes that at least two of them have."""
    found = Counter(PORTS[device][0] for device in devices)
    return sorted(standard for standard, count in found.items() if count > 1)


def _check(what: str, given: list[str], known: list[str]) -> None:
    if unknown := [name for name in given if name not in known]:
        raise InputError(
            f"calibrate: no measured tables of {what} {unknown[0]!r} -- there are some for "
            f"{', '.join(known)}"
        )


def _write(path: Path, device: str, engine: str, result: EngineResult) -> None:
    """Put an engine's fits into a device's file, beside those of other engines."""
    old = load_fitted(path) if path.is_file() else FittedFile(device=device, engines={})
    kept = {k: v for k, v in old.sources.items() if not k.startswith(f"{engine}-")}
    if engine == "vllm" and "sglang" in old.engines:  # its rows hold the host's time
        mine, other = result.fits.kernels.setdefault("gemm", {}), old.engines["sglang"].kernels
        for dtype in ({"fp8_block"} & set(other.get("gemm", {}))) - set(mine):
            mine[dtype] = other["gemm"][dtype].model_copy(update={"evidence": "transfer"})
    made = FittedFile(
        device=device,
        sources=dict(sorted((kept | result.sources).items())),
        engines=dict(sorted((old.engines | {engine: result.fits}).items())),
    )
    write_yaml(made, path, HEAD)
    load_fitted.cache_clear()


def _grid(scores: list[KernelScore]) -> Grid:
    grid = Grid(title="|predicted / measured - 1|, median / mean")
    for column in ("device", "engine", "op", "format", "kernel", "fitted shapes", "unseen shapes"):
        grid.add_column(column)
    for s in scores:
        errors = [f"{e.median:.1%} / {e.mean:.1%} ({e.rows})" for e in (s.fitted, s.held_out)]
        grid.add_row(s.device, s.engine, s.op, s.dtype, s.kernel, *errors)
    return grid


def _row(score: KernelScore) -> dict[str, Any]:
    errors = {"fitted": plain(score.fitted), "held_out": plain(score.held_out)}
    return vars(score) | errors
