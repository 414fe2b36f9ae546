"""A trace file that grows while a model runs, in bounded memory.

Rows wait until a batch is over and are then written request after request, positions ascending.
A batch that grows over the bound is written in parts, each sorted: the positions of a request still
ascend in the file, but requests are mixed. Sizes in bytes.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from basis.errors import InputError
from traces.meta import TraceMeta
from traces.parquet_columns import Columns, row_shapes
from traces.routing_trace import RoutingTrace, TraceWriter

_WRITE_ROWS = 16384  # a row group
MAX_BYTES = 128 * 2**20


class TraceSink:
    """Collects recorded rows and writes them; see `open_sink`."""

    def __init__(self, open_file: Callable[[int], TraceWriter], max_bytes: int) -> None:
        self._open_file, self._max_bytes = open_file, max_bytes
        self._writer: TraceWriter | None = None
        self._waiting: list[Columns] = []
        self._waiting_rows = self._waiting_bytes = 0
        self.rows = 0
        """Rows so far."""

    def add(self, columns: Columns) -> None:
        """Take the rows of a forward pass, by field of a trace."""
        rows = len(columns["request_id"])
        self._waiting.append(columns)
        self.rows += rows
        self._waiting_rows += rows
        self._waiting_bytes += sum(column.nbytes for column in columns.values())
        if self._waiting_bytes > self._max_bytes:
            self.write()

    def batch_over(self) -> None:
        """Write what waits if it is worth it: the next rows are of other requests."""
        if self._waiting_rows >= _WRITE_ROWS:
            self.write()

    def write(self) -> None:
        """Write what waits.

        Raises
        ------
        InputError
            If a row is bad.
        """
        if not self._waiting_rows:
            return
        if self._writer is None:
            self._writer = self._open_file(self._waiting[0]["experts"].shape[2])
        meta = self._writer.meta
        shapes = row_shapes(meta, weights=True, candidates=meta.num_candidates > 0)
        whole = {name: np.concatenate([part[name] for part in self._waiting]) for name in shapes}
        self._waiting.clear()
        self._waiting_rows = self._waiting_bytes = 0
        order = np.lexsort((whole["position"], whole["request_id"]))
        rows: Columns = {
            name: whole.pop(name)[order].astype(dtype, copy=False)
            for name, (dtype, _) in shapes.items()
        }
        self._writer.write(RoutingTrace(meta=meta, domains=self._writer.domains, **rows))


@contextmanager
def open_sink(
    path: Path,
    meta: Callable[[int], TraceMeta],
    domains: tuple[str, ...],
    *,
    max_bytes: int = MAX_BYTES,
) -> Iterator[TraceSink]:
    """Open a file for recorded rows; it appears when the block ends without an error.

    Parameters
    ----------
    path
        File to write.
    meta
        Gives the file's description for a top-k; asked when the first rows are written.
    domains
        Names that the rows' ``domain`` indexes.
    max_bytes
        Rows that wait are written when they take more.

    Raises
    ------
    InputError
        If the folder does not exist, or nothing was recorded.
    """
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such folder -- make it first")
    with ExitStack() as files:

        def open_file(top_k: int) -> TraceWriter:
            return files.enter_context(TraceWriter(path, meta(top_k), domains, weights=True))

        sink = TraceSink(open_file, max_bytes)
        yield sink
        sink.write()
        if not sink.rows:
            raise InputError(
                "no forward pass was recorded (0 tokens) -- at least one is needed -- call the "
                "model inside the recorder's with block"
            )
