"""Fit everything that the measured tables hold of one engine on one device.

Each kernel of an engine is fitted by itself on the fitted shapes and scored on the held-out ones.
Where an engine has several kernels for a format, its tables show what it takes: either the fastest
(it tunes on the machine) or always the one that ran most shapes, whichever explains the fitted
rows better.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from basis import InputError
from hwmodels.engines import EngineFits
from hwmodels.figures import HeldOut
from hwmodels.fitting.attention import fit_attention
from hwmodels.fitting.comm import CommFit
from hwmodels.fitting.comm_engines import engine_comm
from hwmodels.fitting.fit import score
from hwmodels.fitting.gemm import fit_gemm
from hwmodels.fitting.moe import fit_moe
from hwmodels.fitting.stream import fit_stream
from hwmodels.fitting.transfer import Drawn, draw
from hwmodels.kernels.attention import AttentionKernels
from hwmodels.kernels.base import Limits, PhysicalCost
from hwmodels.kernels.gemm import GemmCost
from hwmodels.kernels.included import Included
from hwmodels.kernels.models import Fastest
from hwmodels.kernels.route import RouteCost
from hwmodels.ops import Elementwise, Floats
from hwmodels.silicon.attention import attention_tables
from hwmodels.silicon.gemm import gemm_tables
from hwmodels.silicon.measured import held_out_seconds
from hwmodels.silicon.mla import mla_tables
from hwmodels.silicon.moe import moe_tables
from hwmodels.silicon.small import stream_tables
from hwmodels.silicon.table import Table, limits_of

Model = PhysicalCost | AttentionKernels
_Fitter = Callable[[Table, Limits], Model]
SOURCES: tuple[tuple[Callable[..., list[Table]], _Fitter], ...] = (
    (gemm_tables, fit_gemm),
    (moe_tables, fit_moe),
    (attention_tables, fit_attention),
    (mla_tables, fit_attention),
    (stream_tables, fit_stream),
)
"""Readers and what fits their tables."""
LEAST_ROWS = 60
"""Rows below which a kernel is left out."""
APART = ("nongated", "situ", "(fp8 products)")
"""In the names of kernels for experts of another structure, or for attention in fp8; where there
are others, these are scored, but not chosen."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FittedKernel:
    """One kernel with its table, its cost model, and its errors on the rows fitted."""

    table: Table
    cost: Model
    fitted: HeldOut

    @property
    def units(self) -> float:
        """Units of the device."""
        return limits_of(self.table).units


@dataclass(frozen=True, kw_only=True)
class KernelScore:
    """Errors of one kernel, as |predicted / measured - 1|."""

    device: str
    engine: str
    version: str
    op: str
    dtype: str
    kernel: str
    fitted: HeldOut
    """On the shapes fitted."""
    held_out: HeldOut
    """On shapes that the fit did not see."""
    dropped: dict[str, int]
    """Rows left out, by rule."""


@dataclass(frozen=True, kw_only=True)
class EngineResult:
    """What was fitted for one engine on one device."""

    fits: EngineFits
    sources: dict[str, str]
    scores: list[KernelScore]
    rows: pd.DataFrame
    """Every row: the table's columns, ``measured`` and ``predicted`` seconds, ``compute`` and
    ``memory`` (seconds at the peaks), ``held_out``, ``interpolated`` (the measured mode's answer
    for token counts that it does not see), and which kernel it belongs to."""
    drawn: dict[str, Drawn]
    """Rows for the transfer to other devices, by ``op|format``: of the usual kernel."""


def fit_engine(device: str, engine: str) -> EngineResult | None:
    """Fit everything that the tables hold of an engine on a device; None if they hold nothing.

    Raises
    ------
    InputError
        If the wheel is not installed, or has no tables of this device.
    """
    kernels = fit_kernels(device, engine)
    if not kernels:
        return None
    groups: dict[tuple[str, str], list[FittedKernel]] = {}
    for kernel in kernels:
        groups.setdefault((kernel.table.op, kernel.table.dtype), []).append(kernel)
    entries: dict[str, dict[str, Any]] = {}
    for (op, dtype), group in groups.items():
        entries.setdefault(op, {})[dtype] = choose(group)
    if "grouped_gemm" in entries:  # the measured expert layer holds permutations and top-k
        source = next(k.cost.source for k in kernels if k.table.op == "grouped_gemm")
        held = Included(within="grouped_gemm", evidence="fitted", source=source)
        entries["permute"] = {"bf16": held}
        entries["route"] = {"bf16": _router(entries["gemm"]["bf16"])}
    versions = sorted({k.table.source.version for k in kernels})
    between = engine_comm(device, engine, kernels[0].units)
    return EngineResult(
        fits=EngineFits(
            version=", ".join(versions),
            kernels=entries,
            interconnect=between.interconnect,
            network=between.network,
        ),
        sources={_key(k.table): _cited(k.table) for k in kernels},
        scores=[
            *(_scored(k) for k in kernels),
            *(_comm_score(f, device, engine) for f in between.fits),
        ],
        rows=pd.concat([_rows(k) for k in kernels], ignore_index=True),
        drawn={f"{op}|{dtype}": draw(usual(g).table) for (op, dtype), g in groups.items()},
    )


def fit_kernels(device: str, engine: str) -> list[FittedKernel]:
    """Fit each kernel by itself; those with few rows or shapes are left out."""
    found = []
    for read, fitter in SOURCES:
        for table in read(device, (engine,)):
            held = table.held_out
            if len(held) < LEAST_ROWS or held.all() or not held.any():
                continue
            limits = limits_of(table)
            try:
                cost = fitter(table, limits)
            except InputError:  # too few shapes for this model
                continue
            cost = cost.model_copy(update={"kernel": table.kernel, "source": _key(table)})
            predicted = table.predicted(cost, limits)
            errors = score(predicted[~held], table.seconds[~held])
            found.append(FittedKernel(table=table, cost=cost, fitted=errors))
    return found


def _router(scores: GemmCost) -> RouteCost:
    """Return a router's cost: a dense product, its selection being timed with the experts."""
    update = {"low": scores.low, "high": scores.high, "source": scores.source}
    made = RouteCost(scores=scores, selection=0, evidence="transfer")
    return made.model_copy(update=update)


def _scored(kernel: FittedKernel) -> KernelScore:
    table, cost = kernel.table, kernel.cost
    assert cost.held_out is not None
    return KernelScore(
        device=table.source.device,
        engine=table.source.engine,
        version=table.source.version,
        op=table.op,
        dtype=table.dtype,
        kernel=table.kernel,
        fitted=kernel.fitted,
        held_out=cost.held_out,
        dropped={d.rule: d.rows for d in table.dropped},
    )


def _comm_score(found: CommFit, device: str, engine: str) -> KernelScore:
    table = found.table
    assert found.cost.held_out is not None
    return KernelScore(
        device=device,
        engine=engine,
        version=table.source.version,
        op=table.op,
        dtype=table.dtype,
        kernel=f"{table.source.engine} {table.kernel}, {table.level}",
        fitted=found.fitted,
        held_out=found.cost.held_out,
        dropped={d.rule: d.rows for d in table.dropped},
    )


def _rows(kernel: FittedKernel) -> pd.DataFrame:
    table, limits = kernel.table, limits_of(kernel.table)
    interpolated = np.full(len(table.frame), np.nan)
    if table.op != "stream":  # casts have no interpolation
        answered, asked = held_out_seconds(table, limits)
        interpolated[asked] = answered
    moved = np.concatenate([part.bytes_moved() for part in table.parts])  # type: ignore[union-attr]
    return table.frame.drop(columns="seconds").assign(
        device=table.source.device,
        engine=table.source.engine,
        op=table.op,
        dtype=table.dtype,
        kernel=table.kernel,
        held_out=table.held_out,
        measured=table.seconds,
        predicted=table.predicted(kernel.cost, limits),
        compute=np.concatenate([_flops(part) for part in table.parts]) / limits.flops,
        memory=moved / limits.bandwidth,
        interpolated=interpolated,
    )


def _flops(part: Any) -> Floats:
    return np.zeros(len(part)) if isinstance(part, Elementwise) else np.asarray(part.flops())


def usual(group: Sequence[FittedKernel]) -> FittedKernel:
    """Return the kernel that ran most rows, of those for ordinary experts if there are any."""
    ordinary = [k for k in group if not any(a in k.table.kernel for a in APART)]
    return max(ordinary or group, key=lambda k: len(k.table.frame))


def choose(group: Sequence[FittedKernel]) -> Model | Fastest:
    """Return what stands for several kernels of one format: the usual one, or the fastest."""
    always = usual(group).cost
    group = [k for k in group if not any(a in k.table.kernel for a in APART)] or list(group)
    if len(group) == 1:
        return always
    losses = np.zeros(2)
    for kernel in group:
        limits, fitted = limits_of(kernel.table), ~kernel.table.held_out
        times = {k.table.kernel: kernel.table.predicted(k.cost, limits) for k in group}
        tuned = np.min(list(times.values()), axis=0)
        for number, time in enumerate((times[usual(group).table.kernel], tuned)):
            losses[number] += np.abs(np.log(time / kernel.table.seconds))[fitted].sum()
    if losses[0] <= losses[1]:
        return always
    return Fastest(of=[k.cost for k in group], evidence="fitted", source=always.source)


def _key(table: Table) -> str:
    folder, name = table.source.path.split("/")[-4], table.source.path.split("/")[-1]
    return f"{table.source.engine}-{folder}-{name.removesuffix('.parquet').removesuffix('_perf')}"


def _cited(table: Table) -> str:
    s = table.source
    return f"{s.package} (Apache-2.0), {s.path}, sha256 {s.sha256[:12]}"
