"""What a statistic of a trace is: something that chunks are added to, and that can be merged.

A measure sees a data set (`traces.trace_set`) request after request, in chunks; its memory does not
grow with the number of tokens. Parts of a data set (whole files, so whole requests) may be measured
apart and merged: the result is the same. Figures are shares, ratios or tokens, as each one says.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import pairwise
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from traces.meta import TraceMeta
from traces.routing_trace import RoutingTrace, request_order
from traces.trace_set import CHUNK_ROWS, TraceSet, chunks_of

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class About:
    """What a measure may know of the whole data set beforehand."""

    meta: TraceMeta
    domains: tuple[str, ...]
    num_tokens: int
    lengths: Ints
    """``[R]`` tokens of each request, by number."""

    @classmethod
    def of(cls, traces: TraceSet | RoutingTrace) -> Self:
        """Return what is known of a data set, or of a trace in memory."""
        lengths = (
            traces.lengths
            if isinstance(traces, TraceSet)
            else np.bincount(request_order(traces)).astype(np.int64)
        )
        return cls(
            meta=traces.meta,
            domains=traces.domains,
            num_tokens=traces.num_tokens,
            lengths=lengths,
        )

    @property
    def num_requests(self) -> int:
        """Requests of the data set."""
        return len(self.lengths)


class Measure(Protocol):
    """A statistic; made from `About`, picklable."""

    def add(self, chunk: RoutingTrace) -> None:
        """Take in the next chunk of a part of the data set."""

    def merge(self, other: Self) -> None:
        """Take in what the same measure found on another part (other whole files)."""

    def result(self) -> Any:
        """Return the figures, a frozen dataclass with ``to_dict``."""


def measure(
    traces: TraceSet | RoutingTrace,
    measures: Iterable[Measure],
    files: Sequence[int] | None = None,
    *,
    rows: int = CHUNK_ROWS,
) -> None:
    """Feed the chunks of a data set to measures, in one pass.

    Parameters
    ----------
    traces
        A data set, or a trace in memory, whose requests may be mixed.
    measures
        Each takes in every chunk.
    files
        Indices of the files of the data set to read; all without.
    rows
        Tokens of a chunk, at most.
    """
    asked = list(measures)
    chunks = (
        traces.chunks(files, rows=rows) if isinstance(traces, TraceSet) else chunks_of(traces, rows)
    )
    for chunk in chunks:
        for each in asked:
            each.add(chunk)


def groups(labels: NDArray[Any]) -> Iterator[tuple[int, slice | Ints]]:
    """Yield each value of ``labels [T]``, ascending, and its rows: a slice where it can be."""
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    edges = [0, *(np.flatnonzero(np.diff(ordered)) + 1).tolist(), len(labels)]
    for start, stop in pairwise(edges):
        if start == stop:
            continue  # no rows at all
        rows = order[start:stop]
        together = rows[-1] - rows[0] == stop - start - 1
        yield int(ordered[start]), slice(int(rows[0]), int(rows[-1]) + 1) if together else rows


def plain(value: Any, omit: Sequence[str] = ()) -> Any:
    """Return figures as JSON values: NaN (not known) is null, a dataclass a mapping.

    ``omit`` names fields of a dataclass that are left out.
    """
    if is_dataclass(value) and not isinstance(value, type):
        named = {f.name: getattr(value, f.name) for f in fields(value) if f.name not in omit}
        return {name: _inner(each) for name, each in named.items()}
    if isinstance(value, dict):
        return {str(key): _inner(each) for key, each in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_inner(each) for each in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def _inner(value: Any) -> Any:
    return value.to_dict() if hasattr(value, "to_dict") else plain(value)


def spread(values: NDArray[Any], names: Sequence[Any]) -> dict[str, Any]:
    """Return one figure of all layers as JSON: mean, lowest and highest and where, and each.

    Parameters
    ----------
    values
        ``[n]`` figures, NaN where not known.
    names
        Of the layers, or pairs of layers.
    """
    answer: dict[str, Any] = dict.fromkeys(("mean", "lowest", "lowest_at", "highest", "highest_at"))
    if not np.isnan(values).all():
        low, high = int(np.nanargmin(values)), int(np.nanargmax(values))
        answer = {
            "mean": np.nanmean(values),
            "lowest": values[low],
            "lowest_at": names[low],
            "highest": values[high],
            "highest_at": names[high],
        }
    return plain(answer | {"each": values})
