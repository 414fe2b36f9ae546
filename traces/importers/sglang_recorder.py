"""Tokens of SGLang's expert recorder (``--expert-distribution-recorder-mode per_token``).

A source is one .pt file, of one rank: records of forward passes, with ids ``[all layers, T, 8]`` of
physical experts (slots; -1 where unused), which the map of slots in the file turns into logical
ones. The file's map is the last one: record without rebalancing. Requests are not recorded and are
pieced together from the positions (`traces.importers.sglang_requests`). Rows without ids (padding
of the pass) and passes of other kinds (speculative decoding) are dropped. At most 8 experts per
token fit into the layout.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from traces.importers.base import Asked, Format, Tokens
from traces.importers.layers import Routing, asked_routing, token_cells
from traces.importers.rows import UNRECORDED, chunks, count_dropped
from traces.importers.sglang_requests import Requests, segment_lengths
from traces.importers.torch_files import integers, load_torch, peek_pickle, whole_numbers
from traces.parquet_columns import Columns

_EXTEND, _DECODE, _MIXED, _IDLE = 1, 2, 3, 4
"""SGLang's ForwardMode; values above differ between versions."""
_SLOTS = 8  # of a token and layer, whatever the model's top-k
IDLE = "rows of idle passes"
OTHER = "rows of other passes (speculative decoding, split prefill)"


class SglangPerToken:
    """Ids of every token, by forward pass."""

    name = "sglang-per-token"
    title = "SGLang expert recorder, mode per_token: the .pt file of one rank"

    def matches(self, source: Path, head: bytes) -> bool:
        """Whether its records have ids of tokens."""
        names = peek_pickle(source, head)
        return b"records" in names and b"topk_ids_of_layer" in names

    def read(self, source: Path, asked: Asked) -> Tokens:
        """Read the records in their order."""
        routing = asked_routing(asked, source)
        if routing.top_k > _SLOTS:
            raise InputError(
                f"{source}: {routing.name} has top-{routing.top_k}, this recorder keeps {_SLOTS} "
                "experts per token -- record answers with routed_experts (sglang-r3) instead"
            )
        records, slots = load_records(source)
        meta = routing.meta(source, self.name, asked)
        dropped: Counter[str] = Counter()
        notes: list[str] = []
        pieces = _Passes(routing, slots, dropped, notes).pieces(records, source)
        return Tokens(
            meta=meta,
            domains=(asked.domain,),
            weights=False,
            chunks=chunks(pieces, meta, asked.domain),
            dropped=dropped,
            notes=notes,
        )


FORMATS_SGLANG_RECORDER: tuple[Format, ...] = (SglangPerToken(),)


def load_records(source: Path) -> tuple[list[dict[str, Any]], NDArray[Any]]:
    """Return the records of a file, and ``[layers, slots]`` the logical expert of each slot.

    Raises
    ------
    InputError
        If it holds something else, or no record.
    """
    data = load_torch(source)
    records = data.get("records") if isinstance(data, dict) else None
    if not isinstance(records, list) or not all(isinstance(each, dict) for each in records):
        raise InputError(f"{source}: no records -- a file of SGLang's recorder has a list of them")
    if not records:
        raise InputError(f"{source}: no forward pass was recorded -- start it, then send requests")
    where = f"{source}: last_physical_to_logical_map"
    return records, integers(data.get("last_physical_to_logical_map"), 2, where)


class _Passes:
    def __init__(
        self, routing: Routing, slots: NDArray[Any], dropped: Counter[str], notes: list[str]
    ) -> None:
        self._routing, self._slots = routing, slots
        self._dropped, self._notes = dropped, notes
        self._requests = Requests()

    def pieces(self, records: list[dict[str, Any]], source: Path) -> Iterator[Columns]:
        self._check_slots(source)
        for step, record in enumerate(records):
            where = f"{source}: pass {step}"
            position = whole_numbers(record.get("positions"), f"{where}: positions")
            mode = record.get("forward_mode")
            if mode in (_EXTEND, _DECODE, _MIXED):
                if len(position):
                    yield self._piece(record, step, position, int(mode), where)
            elif len(position):
                self._dropped[IDLE if mode == _IDLE else OTHER] += len(position)
        self._explain()

    def _check_slots(self, source: Path) -> None:
        low, high = int(self._slots.min(initial=0)), int(self._slots.max(initial=0))
        if low < 0 or high >= self._routing.num_experts:
            raise InputError(
                f"{source}: slots of experts {low} to {high} -- 0 to "
                f"{self._routing.num_experts - 1} in {self._routing.name} -- give the config.json "
                "of the model that was recorded"
            )

    def _piece(
        self, record: dict[str, Any], step: int, position: NDArray[np.int64], mode: int, where: str
    ) -> Columns:
        cells, recorded = self._cells(record, len(position), where)
        count_dropped(self._dropped, UNRECORDED, recorded)
        decode = np.ones(len(position), bool)
        request = np.zeros(len(position), np.int64)
        if mode == _DECODE:
            request[recorded] = self._requests.decode(position[recorded])
        else:
            stated = record.get("extend_seq_lens")
            if stated is not None:
                stated = whole_numbers(stated, f"{where}: extend_seq_lens")
            rows = _real_rows(stated, recorded, where)
            lengths = segment_lengths(position[:rows], stated, where)
            found = self._requests.extend(position[:rows], lengths, mixed=mode == _MIXED)
            request[:rows], decode[:rows] = found
        return {
            "request_id": request[recorded].astype(np.int32),
            "position": position[recorded].astype(np.int32),
            "decode": decode[recorded],
            "step": np.full(len(cells), step, np.int32),
            "experts": cells,
        }

    def _cells(
        self, record: dict[str, Any], tokens: int, where: str
    ) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
        """Return logical ids ``[R, L, K]`` of rows that have any, and ``[T]`` which these are."""
        slots, top_k = self._slots, self._routing.top_k
        ids = integers(record.get("topk_ids_of_layer"), 3, f"{where}: topk_ids_of_layer")
        if ids.shape[:2] != (len(slots), tokens):
            raise InputError(
                f"{where}: ids of {ids.shape[0]} layers and {ids.shape[1]} tokens, {len(slots)} "
                f"layers in the map of slots, {tokens} positions -- as many of each; record again"
            )
        used = int((ids != -1).any(axis=(0, 1)).sum())
        if used not in (0, top_k):
            raise InputError(
                f"{where}: {used} experts per token and layer, {self._routing.name} has "
                f"top-{top_k} -- give the config.json of the model that was recorded"
            )
        physical = ids[:, :, :top_k]
        if physical.min(initial=-1) < -1 or physical.max(initial=-1) >= slots.shape[1]:
            raise InputError(
                f"{where}: slots {physical.min()} to {physical.max()} out of range -- 0 to "
                f"{slots.shape[1] - 1}, -1 where unused -- damaged; record it again"
            )
        logical = slots[np.arange(len(slots))[:, None, None], physical]
        logical[physical < 0] = -1
        return token_cells(logical.transpose(1, 0, 2), self._routing, "all", where, blank=-1)

    def _explain(self) -> None:
        found = self._requests
        self._notes.append(
            f"{found.total} requests were pieced together from positions; {found.guessed} decode "
            "rows could have belonged to another request of the same length"
        )
        if found.late:
            self._notes.append(
                f"{found.late} requests begin after position 0: cached, or begun before recording"
            )


def _real_rows(stated: NDArray[np.int64] | None, recorded: NDArray[np.bool_], where: str) -> int:
    """Return how many rows of a prefill pass are of requests; padding comes after them."""
    last = int(np.flatnonzero(recorded)[-1]) + 1 if recorded.any() else 0
    rows = last if stated is None else int(stated.sum())
    if not last <= rows <= len(recorded):
        raise InputError(
            f"{where}: extend_seq_lens add up to {rows}, {last} of {len(recorded)} rows have "
            "experts -- damaged; record it again"
        )
    return rows
