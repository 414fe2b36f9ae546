"""From what an engine returned of its requests to rows of a trace, in chunks of bounded size.

A sequence is one request with one answer: its prompt and what was generated. The last sampled
token never went through the model, so that it has no row; further answers to the same prompt have
rows only from their first own token on. Rows are tokens.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from traces.importers.base import Asked, Tokens
from traces.importers.layers import Axis, Routing, asked_routing, token_cells
from traces.meta import TraceMeta
from traces.parquet_columns import Columns
from traces.routing_trace import RoutingTrace

CHUNK_ROWS = 16384
UNRECORDED = "rows without routing (padding, or never captured)"
REPEATED_PROMPT = "prompt rows of further answers to the same prompt (computed once)"


@dataclass(frozen=True, kw_only=True, eq=False)
class Sequence:
    """One request with one answer, as an engine returned it."""

    where: str
    """Where it was found, for messages."""
    ids: NDArray[Any]
    """``[T, layers, K]`` expert ids of consecutive positions."""
    start: int = 0
    """Position of the first row."""
    prompt: int | None = None
    """Tokens of the prompt, where the source tells."""
    output: int | None = None
    """Generated tokens, where the source tells."""
    again: bool = False
    """Whether an earlier sequence has the rows of the same prompt."""


def sequence_tokens(
    sequences: Iterable[Sequence],
    source: Path,
    asked: Asked,
    axis: Axis,
    recorder: str,
    notes: list[str] | None = None,
) -> Tokens:
    """Return sequences as a trace on its way.

    Parameters
    ----------
    axis
        Layers that the source records.
    recorder
        Name of the format, for the trace's description.
    notes
        Where whoever makes the sequences adds notes.

    Raises
    ------
    InputError
        If no model was given.
    """
    routing = asked_routing(asked, source)
    meta = routing.meta(source, recorder, asked)
    dropped: Counter[str] = Counter()
    notes = [] if notes is None else notes
    rows = _sequence_rows(sequences, routing, axis, dropped, notes)
    return Tokens(
        meta=meta,
        domains=(asked.domain,),
        weights=False,
        chunks=chunks(rows, meta, asked.domain),
        dropped=dropped,
        notes=notes,
    )


def _sequence_rows(
    sequences: Iterable[Sequence],
    routing: Routing,
    axis: Axis,
    dropped: Counter[str],
    notes: list[str],
) -> Iterator[Columns]:
    """Return the rows of sequences, numbered 0, 1, ..., a block at a time."""
    number, unknown = 0, 0
    for number, sequence in enumerate(sequences, start=1):
        _check_length(sequence)
        unknown += sequence.prompt is None
        for first in range(0, len(sequence.ids), CHUNK_ROWS):
            ids = sequence.ids[first : first + CHUNK_ROWS]
            yield _rows(sequence, number - 1, first, ids, routing, axis, dropped)
    if number:
        notes.append(f"the last sampled token of each of {number} requests has no row")
    if unknown:
        notes.append(
            f"{unknown} requests do not tell the length of their prompt: all their rows are marked "
            "prefill"
        )


def _check_length(sequence: Sequence) -> None:
    if sequence.prompt is None or sequence.output is None:
        return
    wanted = sequence.prompt + sequence.output - 1 - sequence.start
    if len(sequence.ids) != wanted:
        raise InputError(
            f"{sequence.where}: {len(sequence.ids)} rows from position {sequence.start} on for "
            f"{sequence.prompt} prompt and {sequence.output} generated tokens -- {wanted}, all but "
            "the last -- was it cut off, or returned from a later start that was not saved with it?"
        )


def _rows(
    sequence: Sequence,
    number: int,
    first: int,
    ids: NDArray[Any],
    routing: Routing,
    axis: Axis,
    dropped: Counter[str],
) -> Columns:
    position = sequence.start + first + np.arange(len(ids))
    prompt = sequence.prompt if sequence.prompt is not None else sequence.start + len(sequence.ids)
    if sequence.again and sequence.prompt is not None:
        own = position >= prompt
        count_dropped(dropped, REPEATED_PROMPT, own)
        ids, position = ids[own], position[own]
    cells, recorded = token_cells(ids, routing, axis, sequence.where)
    count_dropped(dropped, UNRECORDED, recorded)
    position = position[recorded]
    return {
        "request_id": np.full(len(position), number, np.int32),
        "position": position.astype(np.int32),
        "decode": position >= prompt,
        "step": np.maximum(position - prompt + 1, 0).astype(np.int32),
        "experts": cells,
    }


def count_dropped(dropped: Counter[str], reason: str, kept: NDArray[np.bool_]) -> None:
    """Add the rows that are not kept, if any, under their reason."""
    if not kept.all():
        dropped[reason] += len(kept) - int(kept.sum())


def lone_tokens(first: int, step: int, cells: NDArray[np.uint16]) -> Columns:
    """Return rows of tokens whose requests are not known: each is a request of its own.

    Parameters
    ----------
    first
        Request id of the first.
    """
    tokens = len(cells)
    return {
        "request_id": np.arange(first, first + tokens, dtype=np.int32),
        "position": np.zeros(tokens, np.int32),
        "decode": np.zeros(tokens, np.bool_),
        "step": np.full(tokens, step, np.int32),
        "experts": cells,
    }


LONE_TOKENS = (
    "requests, positions and phases are not recorded: each token is a request of its own, marked "
    "prefill, so that nothing can be said of reuse from token to token"
)


def chunks(pieces: Iterable[Columns], meta: TraceMeta, domain: str) -> Iterator[RoutingTrace]:
    """Join rows to chunks of at least 16,384 where there are as many, all of one domain."""
    held: list[Columns] = []
    rows = 0
    for piece in pieces:
        held.append(piece)
        rows += len(piece["request_id"])
        if rows >= CHUNK_ROWS:
            yield _joined(held, meta, domain)
            held, rows = [], 0
    if rows:
        yield _joined(held, meta, domain)


def _joined(held: list[Columns], meta: TraceMeta, domain: str) -> RoutingTrace:
    columns = {name: np.concatenate([piece[name] for piece in held]) for name in held[0]}
    kind = np.zeros(len(columns["request_id"]), np.int16)
    return RoutingTrace(meta=meta, domains=(domain,), domain=kind, **columns)
