"""Parquet on one side, checked numpy columns on the other.

The only module that knows how a trace lies on disk: the own schema ``moeplan.trace/1`` and the
transport files with ``moe.*`` keys. Sizes are compared with what the metadata promises before
anything is allocated; rows are read in batches.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from basis.errors import InputError
from traces.counts_trace import COUNTS_KEY
from traces.meta import META_KEY, TraceMeta, decode, decode_transport, encode

Columns = dict[str, NDArray[Any]]
"""``request_id position decode step domain`` ``[T]``, ``experts`` and maybe ``weights``
``[T, L, K]``, maybe ``candidates`` and ``candidate_scores`` ``[T, L, M]``."""
Shapes = dict[str, tuple[type, tuple[int, ...]]]
"""Type and shape of one row of each column."""
_READ_BYTES = 2**20  # of a column, at a time
_DAMAGED = (pa.ArrowException, OSError, UnicodeDecodeError)


def row_shapes(meta: TraceMeta, *, weights: bool, candidates: bool) -> Shapes:
    """Return type and shape of one row of each column of a trace."""
    cells = (meta.num_layers, meta.top_k)
    shapes: Shapes = {
        "request_id": (np.int32, ()),
        "position": (np.int32, ()),
        "decode": (np.bool_, ()),
        "step": (np.int32, ()),
        "domain": (np.int16, ()),
        "experts": (np.uint16, cells),
    }
    if weights:
        shapes["weights"] = (np.float16, cells)
    if candidates:
        best = (meta.num_layers, meta.num_candidates)
        shapes |= {"candidates": (np.uint16, best), "candidate_scores": (np.float16, best)}
    return shapes


def arrow_schema(meta: TraceMeta, domains: tuple[str, ...], *, weights: bool) -> Any:
    """Return the Arrow schema of the own format, metadata included."""
    fields = []
    for name, (dtype, shape) in row_shapes(
        meta, weights=weights, candidates=meta.num_candidates > 0
    ).items():
        kind = _arrow(dtype)
        if shape:
            kind = pa.list_(pa.field("element", kind, nullable=False), int(np.prod(shape)))
        fields.append(pa.field(name, kind, nullable=False))
    return pa.schema(fields, metadata={META_KEY: encode(meta, domains).encode()})


def to_table(columns: Mapping[str, NDArray[Any]], schema: Any) -> Any:
    """Return an Arrow table of ``schema`` from columns."""
    arrays = []
    for field in schema:
        values = columns[field.name]
        if pa.types.is_fixed_size_list(field.type):
            flat = pa.array(values.reshape(-1))
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, type=field.type))
        else:
            arrays.append(pa.array(values, type=field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


class TraceFile:
    """An open trace file; a context manager.

    Raises
    ------
    InputError
        If the file is missing, not Parquet, truncated, or its schema is neither the own one
        nor that of a transport file.
    """

    def __init__(self, path: Path, *, weights: bool, candidates: bool) -> None:
        self.path = path
        if not path.is_file():
            raise InputError(f"{path}: no such file -- give the path of a routing trace (Parquet)")
        try:
            self._file = pq.ParquetFile(
                path,
                page_checksum_verification=True,
                pre_buffer=False,  # else all that was read stays in memory until the file closes
                buffer_size=_READ_BYTES,  # else a row group's column is read in one piece
            )
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"{path}: not a readable Parquet file ({_first_line(error)}) -- is it truncated, a "
                "Git LFS pointer, or another format? fetch or record it again"
            ) from error
        try:
            self._open(weights, candidates)
        except BaseException:
            self._file.close()
            raise

    def _open(self, weights: bool, candidates: bool) -> None:
        schema = self._file.schema_arrow
        stored = schema.metadata or {}
        self.num_rows: int = self._file.metadata.num_rows
        """Rows, as the footer declares."""
        if COUNTS_KEY in stored:
            raise InputError(
                f"{self.path}: loads without tokens -- requests, steps and caches need tokens -- "
                "record a trace of them; `moeplan trace stats` shows the loads"
            )
        self._own = META_KEY in stored
        try:
            if self._own:
                self.meta, self.domains = decode(stored[META_KEY])
            else:
                self.meta, self.domains = decode_transport(stored), ()
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from None
        if not candidates:
            self.meta = replace(self.meta, num_candidates=0)
        self.shapes = row_shapes(
            self.meta,
            weights=weights and "weights" in schema.names,
            candidates=self.meta.num_candidates > 0,
        )
        """Type and shape of one row of each column that will be read."""
        problems = list(self._column_problems(schema))
        if problems:
            raise InputError(
                f"{self.path}: {'; '.join(problems)} -- see docs/reference/trace-schema.md"
            )
        if not self.num_rows:
            raise InputError(f"{self.path}: no rows -- a trace needs at least one token")
        if not self._own:
            self.domains = self._scan_domains()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def bytes_in_memory(self) -> int:
        """Bytes that all rows take as numpy columns."""
        return self.num_rows * sum(
            np.dtype(dtype).itemsize * int(np.prod(shape)) for dtype, shape in self.shapes.values()
        )

    def batches(self, rows: int) -> Iterator[Columns]:
        """Read at most ``rows`` rows at a time.

        Raises
        ------
        InputError
            If the data pages are damaged, or hold nulls or another number of rows.
        """
        names = [self._stored_name(name) for name in self.shapes]
        seen = 0
        try:
            for batch in self._file.iter_batches(batch_size=rows, columns=names):
                yield {name: self._column(batch, name, seen) for name in self.shapes}
                seen += batch.num_rows
        except _DAMAGED as error:
            raise InputError(
                f"{self.path}: damaged after row {seen} ({_first_line(error)}) -- fetch or record "
                "it again"
            ) from error
        if seen != self.num_rows:
            raise InputError(f"{self.path}: {seen} rows, the footer declares {self.num_rows}")

    def ids(self, rows: int) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        """Read request ids and positions only, at most ``rows`` at a time.

        Raises
        ------
        InputError
            As `batches`.
        """
        seen = 0
        try:
            for batch in self._file.iter_batches(rows, columns=["request_id", "position"]):
                yield self._column(batch, "request_id", seen), self._column(batch, "position", seen)
                seen += batch.num_rows
        except _DAMAGED as error:
            raise InputError(
                f"{self.path}: damaged after row {seen} ({_first_line(error)}) -- fetch or record "
                "it again"
            ) from error

    def _stored_name(self, name: str) -> str:
        return "phase" if name == "decode" and not self._own else name

    def _column_problems(self, schema: Any) -> Iterator[str]:
        for name, (dtype, shape) in self.shapes.items():
            stored = self._stored_name(name)
            if stored not in schema.names:
                yield f"column {stored} is missing"
                continue
            if schema.names.count(stored) > 1:
                yield f"column {stored} is there twice"
                continue
            kind = schema.field(stored).type
            if shape:
                right = pa.types.is_fixed_size_list(kind) and kind.value_type == _arrow(dtype)
                if not right:
                    yield f"column {stored} is {kind}, must be fixed_size_list<{_arrow(dtype)}>"
                elif kind.list_size != np.prod(shape):
                    yield (
                        f"column {stored} lists {kind.list_size} values a row, the metadata says "
                        f"{shape[0]} layers x top-{shape[1]} = {np.prod(shape)}"
                    )
            elif not self._own and name in ("decode", "domain"):
                value = kind.value_type if pa.types.is_dictionary(kind) else kind
                if not pa.types.is_string(value):
                    yield f"column {stored} is {kind}, must be text"
            elif kind != _arrow(dtype):
                yield f"column {stored} is {kind}, must be {_arrow(dtype)}"

    def _column(self, batch: Any, name: str, first_row: int) -> NDArray[Any]:
        """Return one column of a batch as numpy, in the own types."""
        array = batch.column(self._stored_name(name))
        dtype, shape = self.shapes[name]
        nulls = array.null_count + (array.flatten().null_count if shape else 0)
        if nulls:
            raise InputError(
                f"{self.path}: {nulls} nulls in column {self._stored_name(name)} (rows from "
                f"{first_row}) -- every token needs a value"
            )
        if shape:
            return np.asarray(array.flatten()).reshape(-1, *shape)
        if not self._own and name == "decode":
            return self._phases(array)
        if not self._own and name == "domain":
            array = pc.index_in(_plain(array), value_set=pa.array(self.domains, pa.string()))
        return np.asarray(array.to_numpy(zero_copy_only=False), dtype=dtype)

    def _phases(self, array: Any) -> NDArray[np.bool_]:
        texts = _plain(array)
        unknown = set(pc.unique(texts).to_pylist()) - {"prefill", "decode"}
        if unknown:
            raise InputError(
                f"{self.path}: phase {', '.join(sorted(unknown))!r} -- prefill or decode"
            )
        return np.asarray(pc.equal(texts, "decode").to_numpy(zero_copy_only=False))

    def _scan_domains(self) -> tuple[str, ...]:
        """Return a transport file's domain names in order of first appearance."""
        seen: dict[str, None] = {}
        try:
            for batch in self._file.iter_batches(columns=["domain"]):
                seen |= dict.fromkeys(pc.unique(_plain(batch.column(0)).drop_null()).to_pylist())
        except _DAMAGED as error:
            raise InputError(
                f"{self.path}: damaged column domain ({_first_line(error)}) -- fetch it again"
            ) from error
        if len(seen) > np.iinfo(np.int16).max:
            raise InputError(f"{self.path}: {len(seen)} domains -- at most 32767")
        return tuple(seen)


def _plain(array: Any) -> Any:
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def _arrow(dtype: type) -> Any:
    return pa.from_numpy_dtype(np.dtype(dtype))


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
