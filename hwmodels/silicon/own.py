"""Tables of one's own measurements: Parquet files whose columns are an operation's fields.

One row is one measured operation: every field of its class in `hwmodels.ops` (tokens of each
expert as a list), ``seconds``, and for experts a label ``distribution`` of the kind of load. What
was measured, by whom and how it is swept lies in the file's metadata, as JSON under ``moeplan``.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from basis import InputError
from hwmodels.kernels.base import Limits
from hwmodels.ops import (
    AttentionDecode,
    AttentionPrefill,
    Elementwise,
    Floats,
    Gemm,
    GroupedGemm,
    Permute,
    Route,
)
from hwmodels.silicon.table import Dropped, Table, too_slow
from hwmodels.silicon.wheel import Source

SCHEMA = 1
_KEY = b"moeplan"
_CLASSES: dict[str, type[Any]] = {
    c.__name__: c
    for c in (Gemm, GroupedGemm, AttentionDecode, AttentionPrefill, Route, Permute, Elementwise)
}
_MEASURED = ("m", "n", "k", "tokens", "context", "pairs", "rows", "row_bytes", "bytes")
_LOADS = "tokens_per_expert"
_STATED = ("device", "engine", "version", "package", "op", "operation", "dtype", "kernel")


def write_table(table: Table, path: Path) -> None:
    """Write the rows of a table with where they come from.

    Parameters
    ----------
    table : Table
        ``source`` says which device, whose kernels (engine or library, and version) and who
        measured (``package``); labels beside the operations' fields are kept.
    path : Path
        A ``.parquet`` file.

    Raises
    ------
    InputError
        Operations that have no such table.
    """
    name = type(table.parts[0]).__name__
    if name not in _CLASSES:
        raise InputError(f"{path}: {name} rows -- tables hold {', '.join(_CLASSES)}")
    rows = pd.concat([_columns(part) for part in table.parts], ignore_index=True)
    labels = [c for c in table.frame.columns if c not in rows]
    rows[labels] = table.frame[labels].to_numpy()
    rows[labels] = rows[labels].astype(table.frame[labels].dtypes.to_dict())
    source = table.source
    about = {
        "schema": SCHEMA, "device": source.device, "engine": source.engine,
        "version": source.version, "package": source.package, "op": table.op, "operation": name,
        "dtype": table.dtype, "kernel": table.kernel, "shape": table.shape, "swept": table.swept,
    }  # fmt: skip
    data = pa.Table.from_pandas(rows, preserve_index=False)
    pq.write_table(data.replace_schema_metadata({_KEY: json.dumps(about).encode()}), path)


def read_table(path: Path, limits: Limits, *, slowest: float = 10.0) -> Table:
    """Read a table that `write_table` wrote, without rows that cannot be.

    Parameters
    ----------
    path : Path
        The file.
    limits : Limits
        Peaks of the device that was measured: faster rows are left out and counted.
    slowest : float
        Rows may take so many times the bound that the peaks set (and 10 us).

    Raises
    ------
    InputError
        No such file, one that was written by something else, or a column that is missing.
    """
    about, rows = _read(path)
    made, order = _parts(rows, _CLASSES[about["operation"]], path)
    rows = rows.iloc[order].reset_index(drop=True)
    seconds = rows["seconds"].to_numpy(dtype=np.float64)
    valid = np.isfinite(seconds) & (seconds > 0)
    compute = np.concatenate([flops_of(op) for op in made]) / limits.flops
    moved = np.concatenate([op.bytes_moved() for op in made])
    least = np.maximum(compute, (moved - limits.cache) / limits.bandwidth)
    bound = np.maximum(compute, moved / limits.bandwidth)
    fast = valid & (seconds < least)
    late = valid & too_slow(seconds, bound, slowest)
    kept = valid & ~fast & ~late
    if not kept.any():
        raise InputError(
            f"{path}: none of its {len(rows)} rows can be ({int(fast.sum())} beat the peaks, "
            f"{int(late.sum())} take over {slowest:g} times their bound) -- check the device"
        )
    rows = rows[kept].reset_index(drop=True)
    parts, order = _parts(rows, _CLASSES[about["operation"]], path)
    dropped = (
        Dropped(rule="no measurement", rows=int((~valid).sum())),
        Dropped(rule="beats the peaks", rows=int(fast.sum())),
        Dropped(rule=f"over {slowest:g} times its bound", rows=int(late.sum())),
    )
    return Table(
        source=Source(
            device=about["device"], engine=about["engine"], version=about["version"],
            path=str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            package=about["package"],
        ),
        op=about["op"],
        dtype=about["dtype"],
        kernel=about["kernel"],
        parts=parts,
        frame=rows.iloc[order].drop(columns=_LOADS, errors="ignore").reset_index(drop=True),
        shape=tuple(about["shape"]),
        swept=tuple(about["swept"]),
        dropped=tuple(d for d in dropped if d.rows),
    )  # fmt: skip


def _read(path: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    if not path.is_file():
        raise InputError(f"{path}: no such file -- give a table that write_table wrote")
    try:
        data = pq.read_table(path)
        about = json.loads((data.schema.metadata or {})[_KEY])
    except (pa.ArrowInvalid, KeyError, ValueError):
        raise InputError(
            f"{path}: no measured table of ours -- a Parquet file that write_table wrote"
        ) from None
    missing = [k for k in (*_STATED, "shape", "swept") if k not in about]
    if about.get("schema") != SCHEMA or missing or about["operation"] not in _CLASSES:
        raise InputError(
            f"{path}: schema {about.get('schema')!r}, operation {about.get('operation')!r}, "
            f"missing {missing} -- schema {SCHEMA} of {', '.join(_CLASSES)}"
        )
    rows = data.to_pandas(ignore_metadata=True)
    fields = dataclasses.fields(_CLASSES[about["operation"]])
    needed = [f.name for f in fields if f.default is not None]  # others may be left out
    absent = [c for c in (*about["shape"], *about["swept"], *needed, "seconds") if c not in rows]
    if absent:
        raise InputError(f"{path}: column {absent[0]!r} is missing -- one for each field")
    return about, rows


def _columns(op: Any) -> pd.DataFrame:
    """Return the fields of an operation column by column; loads as lists."""
    out = {}
    for field in dataclasses.fields(op):
        value = getattr(op, field.name)
        if value is None:
            continue
        out[field.name] = list(value) if field.name == _LOADS else np.broadcast_to(value, len(op))
    return pd.DataFrame(out)


def _parts(rows: pd.DataFrame, kind: type[Any], path: Path) -> tuple[list[Any], np.ndarray]:
    """Return the rows as operations, and the order in which they come."""
    fields = [f.name for f in dataclasses.fields(kind) if f.name in rows]
    columns = [n for n in (*_MEASURED, _LOADS) if n in fields]
    fixed = [n for n in fields if n not in columns]
    keys = rows[fixed].astype(str).agg("|".join, axis=1)
    if _LOADS in columns:
        keys = keys + "|" + rows[_LOADS].map(len).astype(str)
    parts, order = [], []
    for _, place in sorted(keys.groupby(keys).indices.items()):
        group = rows.iloc[place]
        values = {n: group[n].to_numpy() for n in columns if n != _LOADS}
        if _LOADS in columns:
            values[_LOADS] = np.stack(group[_LOADS].to_list())
        same = {n: _scalar(group[n].iloc[0]) for n in fixed}
        try:
            parts.append(kind(**values, **same))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        order.append(place)
    return parts, np.concatenate(order)


def flops_of(op: Any) -> Floats:
    """Return the FLOP of each row; none where nothing is multiplied."""
    return np.asarray(op.flops()) if hasattr(op, "flops") else np.zeros(len(op))


def _scalar(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
