"""Traces from one file format to another, by suffix, without losing a bit of a token.

Parquet (own schema or a transport file), npz and JSONL are read; Parquet (own schema), npz and
JSONL are written. Layouts: ``docs/reference/trace-schema.md``.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from basis.errors import InputError
from basis.files import check_file, check_target, refuse_same, replacing
from traces.checks import check_cells, check_positions
from traces.importers.files import npz_names
from traces.importers.files import read_npz as read_arrays
from traces.json_lines import rows_of_lists, tables
from traces.meta import TraceMeta, decode, encode
from traces.parquet_columns import Columns, row_shapes
from traces.routing_trace import (
    MAX_BYTES,
    RoutingTrace,
    read_trace,
    rows_with_request,
    write_trace,
)

_COLUMNS = ("request_id", "position", "decode", "step", "domain", "experts")
_OPTIONAL = ("weights", "candidates", "candidate_scores")
_MOST_HEAD = 2**26
_IDS, _NUMBERS = (pa.list_(pa.list_(kind)) for kind in (pa.int32(), pa.float32()))
_JSONL_SCHEMA = pa.schema(
    {
        "request_id": pa.int32(),
        "position": pa.int32(),
        "phase": pa.string(),
        "step": pa.int32(),
        "domain": pa.string(),
        "experts": _IDS,
        "weights": _NUMBERS,
        "candidates": _IDS,
        "candidate_scores": _NUMBERS,
    }
)


def convert(source: Path, target: Path) -> RoutingTrace:
    """Read ``source`` and write ``target``; the suffixes say the formats.

    Parameters
    ----------
    source : Path
        ``.parquet``, ``.npz`` or ``.jsonl``.
    target : Path
        ``.parquet``, ``.npz`` or ``.jsonl``.

    Returns
    -------
    RoutingTrace
        What was written.

    Raises
    ------
    InputError
        If a suffix is not one of these, both are the same file, the source is bad, or the target
        cannot be written.
    """
    source, target = Path(source), Path(target)
    readers = {".parquet": read_trace, ".npz": read_npz, ".jsonl": read_jsonl}
    writers = {".parquet": write_trace, ".npz": write_npz, ".jsonl": write_jsonl}
    for path, known, verb in ((source, readers, "read"), (target, writers, "write")):
        if path.suffix not in known:
            raise InputError(
                f"{path}: cannot {verb} {path.suffix!r} -- one of {', '.join(known)}; a workload "
                "is read from .csv or .jsonl"
            )
    check_target(target)
    refuse_same([target], [source])
    trace = readers[source.suffix](source)
    writers[target.suffix](trace, target)
    return trace


def write_npz(trace: RoutingTrace, path: Path) -> None:
    """Write the columns and the metadata document as an npz, not compressed."""
    arrays: dict[str, Any] = {"meta": np.array(encode(trace.meta, trace.domains)), **trace.columns}
    with replacing(Path(path)) as file, file.open("wb") as out:
        np.savez(out, **arrays)


def read_npz(path: Path) -> RoutingTrace:
    """Read a trace from an npz that `write_npz` wrote; nothing in it is unpickled.

    Raises
    ------
    InputError
        If the file is not such an npz, is damaged or too large, or has bad or no rows.
    """
    path = Path(path)
    check_file(path, "an npz trace")
    names = npz_names(path)
    arrays: dict[str, Any] = read_arrays(path, names, MAX_BYTES)
    missing, unknown = {"meta", *_COLUMNS} - names, names - {"meta", *_OPTIONAL, *_COLUMNS}
    if missing or unknown:
        raise InputError(
            f"{path}: missing {sorted(missing)}, unknown {sorted(unknown)} -- an npz trace has "
            f"{', '.join(_COLUMNS)}, maybe {', '.join(_OPTIONAL)}, and the text meta"
        )
    meta = arrays.pop("meta")
    if meta.dtype.kind != "U" or meta.ndim:
        raise InputError(
            f"{path}: meta is {meta.dtype}{list(meta.shape)} -- one text; save np.array(str), not "
            "bytes"
        )
    try:
        about, domains = decode(meta.tobytes().decode("utf-32-le").rstrip("\0"))
        trace = RoutingTrace(meta=about, domains=domains, **arrays)
    except (InputError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}") from None
    return _checked(trace.columns, about, domains, path)


def _checked(
    columns: Columns, meta: TraceMeta, domains: tuple[str, ...], path: Path
) -> RoutingTrace:
    """Return the trace of columns that were read, checked as `read_trace` checks them."""
    check_cells(columns, meta, len(domains), str(path))
    kept = rows_with_request(columns, path)
    check_positions(kept["request_id"], kept["position"], str(path))
    return RoutingTrace(meta=meta, domains=domains, **kept)


def write_jsonl(trace: RoutingTrace, path: Path) -> None:
    """Write a line of metadata, then one line per token; every number is exact."""
    texts = [json.dumps(name) for name in trace.domains]
    phases = ['"prefill"', '"decode"']
    with replacing(Path(path)) as file, file.open("w", encoding="utf-8") as out:
        out.write(encode(trace.meta, trace.domains) + "\n")
        for start in range(0, trace.num_tokens, 4096):
            columns = {name: c[start : start + 4096].tolist() for name, c in trace.columns.items()}
            more = [name for name in _OPTIONAL if name in columns]
            for place, (request, position, decoded, step, domain, experts) in enumerate(
                zip(*(columns[name] for name in _COLUMNS), strict=True)
            ):
                tail = "".join(f', "{name}": {json.dumps(columns[name][place])}' for name in more)
                out.write(
                    f'{{"request_id": {request}, "position": {position}, '
                    f'"phase": {phases[decoded]}, "step": {step}, "domain": {texts[domain]}, '
                    f'"experts": {json.dumps(experts)}{tail}}}\n'
                )


def read_jsonl(path: Path) -> RoutingTrace:
    """Read a trace from JSON lines that `write_jsonl` wrote, block by block.

    Raises
    ------
    InputError
        If the first line is no description of a trace, a line is damaged, the rows take too much
        memory, or a row is bad.
    """
    path = Path(path)
    check_file(path, "a JSONL trace")
    with path.open("rb") as file:
        first = file.readline(_MOST_HEAD)
    try:
        meta, domains = decode(first)
    except InputError as error:
        raise InputError(f"{path}: line 1: {error}") from None
    parts: list[Columns] = []
    total = 0
    for record, table in tables(path, _JSONL_SCHEMA):
        rows = table.slice(1) if record == 1 else table  # the first line is the description
        if rows.num_rows:
            parts.append(_columns(rows, meta, domains, f"{path}: rows from line {record}"))
            total += sum(column.nbytes for column in parts[-1].values())
        if total > MAX_BYTES:
            raise InputError(f"{path}: more than {MAX_BYTES} bytes in memory -- use Parquet")
    if not parts:
        raise InputError(f"{path}: no rows after the first line -- was it cut off?")
    if any(part.keys() != parts[0].keys() for part in parts):
        raise InputError(f"{path}: weights in some rows only -- in all rows, or in none")
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return _checked(whole, meta, domains, path)


def _columns(table: Any, meta: TraceMeta, domains: tuple[str, ...], where: str) -> Columns:
    absent = [n for n in ("phase", *_COLUMNS) if n != "decode" and table[n].null_count]
    if absent:
        raise InputError(f"{where}: a row has no {', '.join(absent)} -- every token needs them")
    if set(pc.unique(table["phase"]).to_pylist()) - {"prefill", "decode"}:
        raise InputError(f"{where}: phase must be prefill or decode")
    domain = pc.index_in(table["domain"], value_set=pa.array(domains, pa.string()))
    if domain.null_count:
        raise InputError(f"{where}: a domain is none of the first line's -- {', '.join(domains)}")
    found: Columns = {n: np.asarray(table[n]) for n in ("request_id", "position", "step")}
    found["decode"] = np.asarray(pc.equal(table["phase"], "decode"))
    found["domain"] = np.asarray(domain).astype(np.int16)
    weighted = table["weights"].null_count < table.num_rows
    shapes = row_shapes(meta, weights=weighted, candidates=meta.num_candidates > 0)
    for name, (dtype, shape) in shapes.items():
        if shape:
            found[name] = _nested(table[name], dtype, shape, f"{where}: {name}")
    return found


def _nested(column: Any, dtype: type, shape: tuple[int, ...], where: str) -> NDArray[Any]:
    """Return ``[N, L, K]`` from N lists of L lists of K numbers."""
    outer = column.combine_chunks()
    if outer.null_count or pc.any(pc.not_equal(pc.list_value_length(outer), shape[0])).as_py():
        raise InputError(f"{where} of a row is not {shape[0]} lists, one per layer")
    inner = pa.chunked_array([outer.flatten()])
    values = rows_of_lists(inner, shape[1], f"{where} of a row and layer")
    if dtype is np.uint16 and not ((values >= 0) & (values < 2**16)).all():
        raise InputError(f"{where}: ids from {values.min()} to {values.max()} -- 0 to 65535")
    with np.errstate(over="ignore"):  # what becomes infinite is refused as a bad weight
        return values.astype(dtype).reshape(-1, *shape)
