"""The routing trace: which experts each token of a model used in each layer, row by row.

One row is one token: its request, position, phase, engine step and domain, and ``[L, K]``
expert ids. On disk it is Parquet (``docs/reference/trace-schema.md``); it is read in chunks
and checked before any number is made of it.
"""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from basis.errors import InputError
from basis.files import replacing
from traces.checks import check_cells, check_positions
from traces.meta import TraceMeta
from traces.model_spec import ModelSpec
from traces.parquet_columns import Columns, TraceFile, arrow_schema, row_shapes, to_table

__all__ = [
    "RoutingTrace",
    "TooLargeError",
    "TraceMeta",
    "TraceWarning",
    "TraceWriter",
    "check_against_model",
    "iter_trace",
    "read_trace",
    "request_order",
    "write_trace",
]

_CHUNK_ROWS = 65536
_ROW_GROUP_ROWS = 16384
_ZSTD_LEVEL = 9
MAX_BYTES = 8 * 2**30


class TooLargeError(InputError):
    """A trace does not fit into the memory that it may take."""


class TraceWarning(UserWarning):
    """Something in a trace was left out or looks odd, but the rest can be used."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingTrace:
    """A trace in memory; T tokens, L recorded MoE layers, K experts per token and layer.

    Raises
    ------
    InputError
        If an array's shape or type is not the stated one.
    """

    meta: TraceMeta
    request_id: NDArray[np.int32]
    """``[T]``, 0 or larger; tokens of one request share it."""
    position: NDArray[np.int32]
    """``[T]``, index of the token in its request, prompt included."""
    decode: NDArray[np.bool_]
    """``[T]``, True = generated one at a time, False = prefill."""
    step: NDArray[np.int32]
    """``[T]``, engine step, or step within the request where the recorder knew no better."""
    domain: NDArray[np.int16]
    """``[T]``, index into ``domains``."""
    domains: tuple[str, ...]
    experts: NDArray[np.uint16]
    """``[T, L, K]`` logical expert ids, distinct along K."""
    weights: NDArray[np.float16] | None = None
    """``[T, L, K]`` router weights of these experts, or None."""
    candidates: NDArray[np.uint16] | None = None
    """``[T, L, M]`` the M best-scored experts, best first, or None; the K that were chosen need
    not be the first K (a router may limit groups or add a bias)."""
    candidate_scores: NDArray[np.float16] | None = None
    """``[T, L, M]`` the router's scores of these, descending, or None."""

    def __post_init__(self) -> None:
        tokens = self.request_id.size
        recorded = (self.candidates is not None, self.candidate_scores is not None)
        if recorded != (self.meta.num_candidates > 0,) * 2:
            raise InputError(
                f"trace: num_candidates {self.meta.num_candidates}, candidates and their scores "
                f"{'given' if any(recorded) else 'missing'} -- give all three, or none of them"
            )
        wanted = row_shapes(self.meta, weights=self.weights is not None, candidates=recorded[0])
        for name, (dtype, row) in wanted.items():
            array, shape = getattr(self, name), (tokens, *row)
            if array.dtype != dtype or array.shape != shape:
                raise InputError(
                    f"trace: {name} is {array.dtype}{list(array.shape)} -- must be "
                    f"{np.dtype(dtype)}{list(shape)}"
                )

    @property
    def num_tokens(self) -> int:
        """Rows."""
        return len(self.request_id)

    @property
    def num_layers(self) -> int:
        """Recorded MoE layers."""
        return self.meta.num_layers

    @property
    def num_requests(self) -> int:
        """Distinct requests."""
        return len(np.unique(self.request_id))

    @property
    def columns(self) -> Columns:
        """The arrays by name, ``weights`` and candidates only where there are some."""
        names = row_shapes(self.meta, weights=True, candidates=True)
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def select(self, rows: NDArray[Any]) -> "RoutingTrace":
        """Return the rows of an index or bool array, in the array's order."""
        return replace(self, **{name: column[rows] for name, column in self.columns.items()})


def request_order(trace: RoutingTrace) -> NDArray[np.int64]:
    """Return ``[T]`` each row's request, numbered 0.. in order of first appearance."""
    _, first, inverse = np.unique(trace.request_id, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


def check_against_model(trace: RoutingTrace, model: ModelSpec) -> None:
    """Check that a trace can be planned for a model.

    Raises
    ------
    InputError
        If experts, top-k or layers disagree (all at once), or layers are missing.
    """
    meta = trace.meta
    problems = [
        f"{name}: trace {ours}, config {theirs}"
        for name, ours, theirs in (
            ("num_experts", meta.num_experts, model.num_experts + model.zero_experts),
            ("top_k", meta.top_k, model.top_k),
        )
        if ours != theirs
    ]
    extra = sorted(set(meta.moe_layer_ids) - set(model.moe_layer_ids))
    absent = sorted(set(model.moe_layer_ids) - set(meta.moe_layer_ids))
    if extra:
        problems.append(f"layers {_some(extra)} of the trace are no MoE layers of the config")
    if problems:
        raise InputError(
            f"trace of {meta.model} and config of {model.name} disagree: {'; '.join(problems)} "
            "-- give the config.json of the model that was recorded"
        )
    if absent:
        raise InputError(
            f"trace of {meta.model} records {meta.num_layers} of {model.num_moe_layers} MoE layers "
            f"(missing: {_some(absent)}) -- a plan needs all of them; statistics work on such a "
            "trace, for a plan record every layer"
        )


def _some(values: list[int]) -> str:
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")


class TraceWriter:
    """Writes a trace chunk by chunk in bounded memory; a context manager.

    Parameters
    ----------
    path : Path
        File to write; it appears only when the writer closes without an error.
    meta : TraceMeta
        Description that every chunk must share.
    domains : tuple of str
        Names that the chunks' ``domain`` indexes.
    weights : bool
        Whether the chunks carry router weights; ``meta`` says whether they carry candidates.

    Raises
    ------
    InputError
        If the file cannot be written there.
    """

    def __init__(
        self, path: Path, meta: TraceMeta, domains: tuple[str, ...], *, weights: bool
    ) -> None:
        self.path, self.meta, self.domains = Path(path), meta, domains
        self._schema = arrow_schema(meta, domains, weights=weights)
        self._rows, self._weights = 0, weights
        with ExitStack() as files:
            self._writer = files.enter_context(
                pq.ParquetWriter(
                    files.enter_context(replacing(self.path)),
                    self._schema,
                    compression="zstd",
                    compression_level=_ZSTD_LEVEL,
                    write_page_checksum=True,  # a flipped bit is an error, not another expert
                )
            )
            self._files = files.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._files.__exit__(kind, error, trace)

    def write(self, chunk: RoutingTrace) -> None:
        """Append rows.

        Raises
        ------
        InputError
            If the chunk's description, domains or presence of weights differ, or a row is bad.
        """
        if (chunk.meta, chunk.domains) != (self.meta, self.domains):
            raise InputError(f"{self.path}: a chunk's metadata or domains differ from the file's")
        if (chunk.weights is not None) != self._weights:
            raise InputError(f"{self.path}: weights must be in all chunks of a file or in none")
        check_cells(chunk.columns, self.meta, len(self.domains), str(self.path), self._rows)
        self._rows += chunk.num_tokens
        table = to_table(chunk.columns, self._schema)
        self._writer.write_table(table, row_group_size=_ROW_GROUP_ROWS)


def write_trace(trace: RoutingTrace, path: Path) -> None:
    """Write a trace in the own schema (Parquet, zstd).

    Raises
    ------
    InputError
        If a row is bad, or repeats a position of its request.
    """
    check_positions(trace.request_id, trace.position, str(path))
    with TraceWriter(path, trace.meta, trace.domains, weights=trace.weights is not None) as out:
        out.write(trace)


def iter_trace(
    path: Path, rows: int = _CHUNK_ROWS, *, weights: bool = True, candidates: bool = True
) -> Iterator[RoutingTrace]:
    """Read a trace in chunks of at most ``rows`` tokens, in bounded memory.

    Rows without a request (id -1, which recorders write where a token could not be attributed)
    are left out; a `TraceWarning` at the end says how many.

    Parameters
    ----------
    path : Path
        A file in the own schema or a transport file.
    rows : int
        Tokens per chunk.
    weights, candidates : bool
        Whether to read the router weights, and the best candidates, where the file has them.

    Raises
    ------
    InputError
        If the file is missing, not Parquet, truncated, of another schema, or has bad rows.
    """
    with TraceFile(Path(path), weights=weights, candidates=candidates) as file:
        first_row = dropped = 0
        for columns in file.batches(rows):
            check_cells(columns, file.meta, len(file.domains), str(path), first_row)
            kept = _with_request(columns)
            first_row += len(columns["request_id"])
            dropped += len(columns["request_id"]) - len(kept["request_id"])
            if len(kept["request_id"]):
                yield RoutingTrace(meta=file.meta, domains=file.domains, **kept)
        _report_dropped(path, dropped, first_row)


def read_trace(
    path: Path, *, weights: bool = True, candidates: bool = True, max_bytes: int = MAX_BYTES
) -> RoutingTrace:
    """Read a whole trace.

    Parameters
    ----------
    path : Path
        A file in the own schema or a transport file.
    weights, candidates : bool
        Whether to read the router weights, and the best candidates, where the file has them.
    max_bytes : int
        Refuse a file whose rows would take more memory than this (bytes).

    Returns
    -------
    RoutingTrace
        Without the rows that have no request; see `iter_trace`.

    Raises
    ------
    InputError
        As `iter_trace`; also where it is too large, or repeats a position of a request.
    """
    with TraceFile(Path(path), weights=weights, candidates=candidates) as file:
        if file.bytes_in_memory > max_bytes:
            raise TooLargeError(
                f"{path}: {file.num_rows} rows take {file.bytes_in_memory / 2**30:.1f} GiB in "
                f"memory -- at most {max_bytes / 2**30:.1f} GiB; read it in chunks with iter_trace"
            )
        whole: Columns = {
            name: np.empty((file.num_rows, *shape), dtype)
            for name, (dtype, shape) in file.shapes.items()
        }
        first_row = 0
        for columns in file.batches(_CHUNK_ROWS):
            rows = slice(first_row, first_row + len(columns["request_id"]))
            for name, column in columns.items():
                whole[name][rows] = column
            first_row = rows.stop
    check_cells(whole, file.meta, len(file.domains), str(path))
    kept = rows_with_request(whole, path)
    check_positions(kept["request_id"], kept["position"], str(path))
    return RoutingTrace(meta=file.meta, domains=file.domains, **kept)


def rows_with_request(columns: Columns, path: Path) -> Columns:
    """Return the rows that have a request; a `TraceWarning` says how many have none.

    Raises
    ------
    InputError
        If none has one.
    """
    kept = _with_request(columns)
    rows = len(columns["request_id"])
    _report_dropped(path, rows - len(kept["request_id"]), rows)
    return kept


def _with_request(columns: Columns) -> Columns:
    known = columns["request_id"] >= 0
    return columns if known.all() else {name: c[known] for name, c in columns.items()}


def _report_dropped(path: Path, dropped: int, rows: int) -> None:
    if dropped == rows:
        raise InputError(
            f"{path}: no row has a request ({rows} rows) -- record request ids, from 0"
        )
    if dropped:
        warnings.warn(
            f"{path}: {dropped} of {rows} rows have no request (id -1) and are left out",
            TraceWarning,
            stacklevel=4,
        )
