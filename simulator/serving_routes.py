"""Routing of consecutive recorded tokens, counted fast: running sums of slots and visited ranks.

A decode token is looked up row by row; a chunk of a prompt is a stretch of places, so its counts
are the difference of two running sums, kept for every 64th place. For placements with one replica
per expert, where a token's slots do not depend on the step that it runs in. Counts of tokens.
"""

import numpy as np
from numpy.typing import NDArray

from simulator.dispatch import Dispatcher, touched_ranks
from traces.routing_trace import RoutingTrace

Ints = NDArray[np.int64]
_BLOCK = 64  # places between two running sums
_CHUNK = 64 * _BLOCK  # places counted at a time while the sums are made


class Routes:
    """Slot and visited ranks of every place, and their running sums. One replica per expert."""

    def __init__(self, trace: RoutingTrace, rows: Ints, dispatcher: Dispatcher) -> None:
        place, node_of = dispatcher.placement, dispatcher.node_of
        nodes, self.node_index = np.unique(node_of, return_inverse=True)
        self.layers, self.ranks = place.num_layers, place.num_ranks
        self.num_keys = place.num_layers * place.num_slots
        self.width = place.num_ranks + (len(nodes) if len(nodes) > 1 else 0)
        count, chosen = len(rows), place.num_layers * trace.meta.top_k
        fits = self.num_keys <= np.iinfo(np.uint16).max
        self.flat = np.empty((count, chosen), dtype=np.uint16 if fits else np.int32)
        self.marks = np.empty((count, -(-self.layers * self.width // 8)), dtype=np.uint8)
        blocks = count // _BLOCK
        slot_sums = np.zeros((blocks + 1, self.num_keys), dtype=np.int64)
        mark_sums = np.zeros((blocks + 1, self.layers * self.width), dtype=np.int64)
        base = (np.arange(self.layers) * place.num_slots)[:, None]
        for begin in range(0, count, _CHUNK):
            part = rows[begin : begin + _CHUNK]
            slot = dispatcher.assign(trace.experts[part], np.zeros(len(part), dtype=np.int64))
            flat = (slot + base).reshape(len(part), -1)
            marks = self._marks(touched_ranks(slot, place), node_of, nodes)
            self.flat[begin : begin + len(part)] = flat
            self.marks[begin : begin + len(part)] = np.packbits(marks, axis=1)
            whole = len(part) // _BLOCK
            at = begin // _BLOCK + 1
            block = np.repeat(np.arange(whole), _BLOCK)[:, None] * self.num_keys
            keys = (block + flat[: whole * _BLOCK]).ravel()
            slot_sums[at : at + whole] = np.bincount(keys, minlength=whole * self.num_keys).reshape(
                whole, -1
            )
            mark_sums[at : at + whole] = (
                marks[: whole * _BLOCK].reshape(whole, _BLOCK, -1).sum(axis=1)
            )
        self.slot_sums = np.cumsum(slot_sums, axis=0)
        self.mark_sums = np.cumsum(mark_sums, axis=0)

    def _marks(self, touched: NDArray[np.bool_], node_of: Ints, nodes: Ints) -> NDArray[np.bool_]:
        """Visited ranks, and with several nodes also visited nodes, [rows, L * width]."""
        if len(nodes) > 1:
            entered = np.stack([touched[..., node_of == n].any(-1) for n in nodes], axis=-1)
            touched = np.concatenate([touched, entered], axis=-1)
        return touched.reshape(len(touched), -1)

    def count(
        self, places: Ints, place_key: Ints, ends: Ints, weight: Ints, end_key: Ints, steps: int
    ) -> tuple[Ints, Ints]:
        """Count slots per step, and marks per step and home.

        Parameters
        ----------
        places, place_key : int64 arrays [D]
            Single tokens and their step * ranks + home.
        ends, weight, end_key : int64 arrays [M]
            Places up to which running sums are taken, each so many times.
        steps : int

        Returns
        -------
        slots : int64 array [S, L * P]
        marks : int64 array [S, G, L, G (+ N)]
        """
        block, rest = np.divmod(ends, _BLOCK)
        left = np.repeat(np.arange(len(ends)), rest)  # which end a leftover row belongs to
        within = np.arange(len(left)) - np.repeat(np.cumsum(rest) - rest, rest)
        rows = np.concatenate([places, block[left] * _BLOCK + within])
        key = np.concatenate([place_key, end_key[left]])
        sign = np.concatenate([np.ones(len(places), dtype=np.int64), weight[left]])
        slots = self._slots(rows, key // self.ranks, sign, steps)
        marks = np.zeros((steps * self.ranks, self.layers * self.width), dtype=np.int64)
        self._add_marks(marks, rows, key, sign)
        for b, k, w in zip(block.tolist(), end_key.tolist(), weight.tolist(), strict=True):
            slots[k // self.ranks] += w * self.slot_sums[b]
            marks[k] += w * self.mark_sums[b]
        return slots, marks.reshape(steps, self.ranks, self.layers, self.width)

    def _slots(self, rows: Ints, step: Ints, sign: Ints, steps: int) -> Ints:
        slots = np.zeros(steps * self.num_keys, dtype=np.int64)
        for value in np.unique(sign).tolist():
            mine = sign == value
            keys = self.flat[rows[mine]] + (step[mine] * self.num_keys)[:, None]
            slots += value * np.bincount(keys.ravel(), minlength=len(slots))
        return slots.reshape(steps, self.num_keys)

    def _add_marks(self, marks: Ints, rows: Ints, key: Ints, sign: Ints) -> None:
        if not len(rows):
            return
        order = np.lexsort((key, sign))
        rows, key, sign = rows[order], key[order], sign[order]
        new = np.flatnonzero(np.concatenate(([True], (np.diff(key) != 0) | (np.diff(sign) != 0))))
        bits = np.unpackbits(self.marks[rows], axis=1, count=self.layers * self.width)
        sums = np.add.reduceat(bits, new, axis=0, dtype=np.int32)
        for first, total in zip(new.tolist(), sums, strict=True):
            marks[key[first]] += sign[first] * total


def sent_between(visits: Ints, entered: Ints, node_of: Ints) -> NDArray[np.float64]:
    """Tokens that each rank sends to each other in the dispatch, as `simulator.dispatch.traffic`.

    Parameters
    ----------
    visits : int64 array [S, G, L, G]
        Tokens of each home that visit each rank.
    entered : int64 array [S, G, L, N]
        Tokens of each home that visit each node; N = 0 with a single node.
    node_of : int64 array [G]

    Returns
    -------
    float64 array [S, L, G, G]
    """
    between = visits.transpose(0, 2, 1, 3).astype(np.float64)
    ranks = np.arange(len(node_of))
    if entered.shape[-1]:
        sent = np.zeros_like(between)
        members = [np.flatnonzero(node_of == n) for n in np.unique(node_of)]
        for node, inside in enumerate(members):
            sent[..., inside[:, None], inside] += between[..., inside[:, None], inside]
            for senders in (m for other, m in enumerate(members) if other != node):
                for local, rank in enumerate(senders.tolist()):
                    entry = inside[local % len(inside)]
                    sent[..., rank, entry] += entered[:, rank, :, node]
                    sent[..., entry, inside] += between[..., rank, inside]
        between = sent
    between[..., ranks, ranks] = 0
    return between
