"""Many trace files as one data set, read in chunks however large it is.

A request lies in one file; requests are numbered 0, 1, ... over all files in the order of the files
(by name) and of first appearance in each. Chunks come request after request, positions ascending,
so that whatever looks at consecutive tokens has to remember a few rows only. Rows are tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from traces.meta import TraceMeta
from traces.parquet_columns import TraceFile
from traces.routing_trace import (
    RoutingTrace,
    TooLargeError,
    iter_trace,
    read_trace,
    request_order,
)

CHUNK_ROWS = 16384
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class FileSurvey:
    """What a first look at the ids of one file tells."""

    path: Path
    rows: int
    """Tokens that have a request."""
    dropped: int
    """Rows without a request (id -1), which are left out."""
    ids: Ints
    """``[R]`` request ids in the file, in order of first appearance."""
    lengths: Ints
    """``[R]`` tokens of each."""
    ordered: bool
    """Whether requests come one after the other, positions ascending, as chunks must."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TraceSet:
    """Files of one model's routing as one data set; see `open_traces`.

    Everything is picklable, so that parts of it can be read elsewhere.
    """

    meta: TraceMeta
    """Of the first file; all agree in geometry. Synthetic if any file is."""
    domains: tuple[str, ...]
    """Of all files, in order of first appearance."""
    files: tuple[FileSurvey, ...]

    @property
    def num_tokens(self) -> int:
        """Rows that have a request."""
        return sum(file.rows for file in self.files)

    @cached_property
    def lengths(self) -> Ints:
        """``[R]`` tokens of each request, by number."""
        return np.concatenate([file.lengths for file in self.files])

    @property
    def num_requests(self) -> int:
        """Requests of all files."""
        return len(self.lengths)

    @cached_property
    def first_request(self) -> Ints:
        """``[files]`` number of each file's first request."""
        counts = [len(file.ids) for file in self.files]
        return np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)

    def chunks(
        self,
        files: Sequence[int] | None = None,
        *,
        rows: int = CHUNK_ROWS,
        weights: bool = False,
        candidates: bool = False,
    ) -> Iterator[RoutingTrace]:
        """Read the rows, request after request, in chunks of at most ``rows`` tokens.

        A chunk's ``request_id`` is the request's number in the set, its ``domains`` those of the
        set. A file whose requests are mixed is sorted in memory.

        Parameters
        ----------
        files
            Indices of the files to read; all without.
        rows
            Tokens of a chunk, at most.
        weights, candidates
            Whether to read these where the files have them.

        Raises
        ------
        InputError
            If a file is bad, or its requests are mixed and it is too large to be sorted in memory.
        """
        for at in range(len(self.files)) if files is None else files:
            file, first = self.files[at], self.first_request[at]
            for chunk in _numbered(file, rows, weights=weights, candidates=candidates):
                domain = _renamed(chunk.domains, self.domains)[chunk.domain]
                yield replace(
                    chunk,
                    meta=replace(self.meta, num_candidates=chunk.meta.num_candidates),
                    request_id=(chunk.request_id + first).astype(np.int32),
                    domain=domain,
                    domains=self.domains,
                )


def chunks_of(trace: RoutingTrace, rows: int = CHUNK_ROWS) -> Iterator[RoutingTrace]:
    """Cut a trace in memory into chunks as `TraceSet.chunks` makes them of files."""
    request = request_order(trace)
    order = np.lexsort((trace.position, request))
    for start in range(0, len(order), rows):
        part = order[start : start + rows]
        yield replace(trace.select(part), request_id=request[part].astype(np.int32))


def _numbered(file: FileSurvey, rows: int, **columns: bool) -> Iterator[RoutingTrace]:
    """Read a file in order; ``request_id`` counts the requests of this file."""
    if file.ordered:
        place = np.argsort(file.ids)
        for chunk in iter_trace(file.path, rows, **columns):
            at = np.searchsorted(file.ids, chunk.request_id, sorter=place)
            yield replace(chunk, request_id=place[at].astype(np.int32))
        return
    try:
        whole = read_trace(file.path, **columns)
    except TooLargeError as error:
        raise InputError(
            f"{error}; its requests are mixed, so it has to be sorted in memory -- write it "
            "request after request, or in several files"
        ) from None
    yield from chunks_of(whole, rows)


def open_traces(paths: Path | Sequence[Path]) -> TraceSet:
    """Open a file, a folder of ``.parquet`` files, or several files as one data set.

    The ids of all rows are read once; nothing else is.

    Parameters
    ----------
    paths
        A Parquet file (own schema or transport file), a folder that holds some, or a list of files.

    Raises
    ------
    InputError
        If there is no file, one is bad or named twice, or they are of different models.
    """
    found = _files(paths)
    metas: list[TraceMeta] = []
    domains: dict[str, None] = {}
    surveys = []
    for path in found:
        with TraceFile(path, weights=False, candidates=False) as file:
            metas.append(file.meta)
            domains |= dict.fromkeys(file.domains)
            surveys.append(_survey(file))
    _check_same(found, metas)
    synthetic = any(meta.synthetic for meta in metas)
    return TraceSet(
        meta=replace(metas[0], synthetic=synthetic), domains=tuple(domains), files=tuple(surveys)
    )


def _files(paths: Path | Sequence[Path]) -> list[Path]:
    if not isinstance(paths, Path):
        found = [Path(path) for path in paths]
    elif paths.is_dir():
        found = sorted(paths.glob("*.parquet"))
    else:
        found = [paths]
    if not found:
        raise InputError(f"{paths}: no .parquet files -- name a folder that holds traces, or files")
    seen: dict[Path, Path] = {}
    for path in found:
        if path.is_dir():
            raise InputError(f"{path}: a folder beside files -- name a folder alone, or its files")
        real = path.resolve()
        if real in seen:
            raise InputError(f"{path}: named twice, before as {seen[real]} -- name each file once")
        seen[real] = path
    return found


def _survey(file: TraceFile) -> FileSurvey:
    """Read request ids and positions of a file, in batches."""
    lengths: dict[int, int] = {}
    request_before, position_before = -1, -1
    ordered = True
    for all_requests, all_positions in file.ids(CHUNK_ROWS * 16):
        known = all_requests >= 0
        request, position = all_requests[known], all_positions[known]
        if not len(request):
            continue
        begins = np.diff(request, prepend=request_before) != 0
        ordered &= bool((np.diff(position, prepend=position_before)[~begins] > 0).all())
        starts = request[begins].tolist()
        new = [id_ for id_ in dict.fromkeys(starts) if id_ not in lengths]
        ordered &= len(new) == len(starts)  # a request that begins again was interrupted
        lengths |= dict.fromkeys(new, 0)
        ids, counts = np.unique(request, return_counts=True)
        for id_, count in zip(ids.tolist(), counts.tolist(), strict=True):
            lengths[id_] += count
        request_before, position_before = request[-1], position[-1]
    rows = sum(lengths.values())
    if not rows:
        raise InputError(
            f"{file.path}: no row has a request ({file.num_rows} rows, all ids below 0) -- record "
            "request ids, from 0"
        )
    return FileSurvey(
        path=file.path,
        rows=rows,
        dropped=file.num_rows - rows,
        ids=np.array(list(lengths), np.int64),
        lengths=np.array(list(lengths.values()), np.int64),
        ordered=ordered,
    )


def _check_same(paths: Sequence[Path], metas: Sequence[TraceMeta]) -> None:
    def geometry(meta: TraceMeta) -> tuple[Any, ...]:
        return (meta.model, meta.num_experts, meta.top_k, meta.moe_layer_ids)

    def said(meta: TraceMeta) -> str:
        ids = meta.moe_layer_ids
        return (
            f"{meta.model}, {meta.num_experts} experts, top-{meta.top_k}, {len(ids)} layers from "
            f"{ids[0]} to {ids[-1]}"
        )

    for path, meta in zip(paths, metas, strict=True):
        if geometry(meta) != geometry(metas[0]):
            raise InputError(
                f"{path}: {said(meta)} -- {paths[0]} has {said(metas[0])}; the files of a data set "
                "are of one model -- leave one of them out"
            )


def _renamed(own: tuple[str, ...], common: tuple[str, ...]) -> NDArray[np.int16]:
    return np.array([common.index(name) for name in own], np.int16)
