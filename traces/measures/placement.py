"""How many choices stay on the token's own rank under a placement (local activation rate).

Speculative MoE, arXiv 2503.04398: a token lives on the rank of its request; a choice is local where
that rank holds a replica of the expert, and needs no communication. Which rank a request gets makes
the difference. Rates are shares of all (token, layer, choice).
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from traces.measures.base import About, Ints, plain
from traces.routing_trace import RoutingTrace

_CHUNK_CELLS = 2**22


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalActivation:
    """Local choices of R requests on G ranks."""

    ranks: int
    local: Ints
    """``[R, G]`` choices of a request that would be local on each rank."""
    choices: Ints
    """``[R]`` all its choices."""

    @property
    def any_rank(self) -> float:
        """Rate if ranks were given out at random: the mean over ranks."""
        return float(self.local.sum() / (self.ranks * self._total))

    @property
    def round_robin(self) -> float:
        """Rate with request r on rank r modulo G, by number."""
        requests = np.arange(len(self.local))
        return float(self.local[requests, requests % self.ranks].sum() / self._total)

    @property
    def in_rounds(self) -> float:
        """Rate with one request on each rank in every round of G requests, best free rank first.

        The published rule, in the order of requests. It takes the routing of the whole request as
        known beforehand, so it is an upper estimate.
        """
        local = 0
        for first in range(0, len(self.local), self.ranks):
            free = np.ones(self.ranks, np.bool_)
            for request in self.local[first : first + self.ranks]:
                rank = int(np.argmax(np.where(free, request, -1)))
                free[rank] = False
                local += int(request[rank])
        return local / self._total

    @property
    def best_rank(self) -> float:
        """Rate with every request on its best rank, however many that gives one rank."""
        return float(self.local.max(axis=1).sum() / self._total)

    @property
    def best_rank_busiest(self) -> float:
        """Tokens of the rank that ``best_rank`` gives most, over the mean: 1 is even."""
        tokens = np.bincount(self.local.argmax(axis=1), self.choices, minlength=self.ranks)
        return float(tokens.max() / tokens.mean())

    @property
    def _total(self) -> int:
        return max(int(self.choices.sum()), 1)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "ranks": self.ranks,
            "any_rank": self.any_rank,
            "round_robin": self.round_robin,
            "in_rounds": self.in_rounds,
            "best_rank": self.best_rank,
            "best_rank_busiest": plain(self.best_rank_busiest),
        }


class LocalActivations:
    """Counts local choices by request and rank; a `Measure` whose result is a `LocalActivation`.

    Parameters
    ----------
    about : About
    slots : int array ``[L, S]``
        Logical expert of each physical slot of each layer; slot s is on rank ``s // (S / G)``.
    ranks : int
        G.

    Raises
    ------
    InputError
        If the slots are no such array, do not divide among the ranks, or leave an expert out.
    """

    def __init__(self, about: About, slots: NDArray[Any], ranks: int) -> None:
        meta = about.meta
        slots = np.asarray(slots)
        _check(slots, ranks, meta.num_layers, meta.num_experts)
        per_rank = slots.shape[1] // ranks
        self._held = np.zeros((meta.num_layers, meta.num_experts, ranks), np.bool_)
        layer = np.arange(meta.num_layers)[:, None]
        self._held[layer, slots, np.arange(slots.shape[1]) // per_rank] = True
        self._local = np.zeros((about.num_requests, ranks), np.int64)
        self._choices = np.zeros(about.num_requests, np.int64)

    def add(self, chunk: RoutingTrace) -> None:
        """Count the local choices of each request."""
        layers, _, ranks = self._held.shape
        layer = np.arange(layers)[:, None]
        rows = max(_CHUNK_CELLS // (layers * chunk.meta.top_k * ranks), 1)
        for start in range(0, chunk.num_tokens, rows):
            part = slice(start, start + rows)
            local = self._held[layer, chunk.experts[part]].sum(axis=(1, 2), dtype=np.int64)
            request = chunk.request_id[part]
            starts = np.flatnonzero(np.diff(request, prepend=-1))
            np.add.at(self._local, request[starts], np.add.reduceat(local, starts, axis=0))
        choices = layers * chunk.meta.top_k
        self._choices += choices * np.bincount(chunk.request_id, minlength=len(self._choices))

    def merge(self, other: Self) -> None:
        """Take in the counts of another part."""
        self._local += other._local
        self._choices += other._choices

    def result(self) -> LocalActivation:
        """Return the rates."""
        return LocalActivation(
            ranks=self._held.shape[2], local=self._local, choices=self._choices
        )  # fmt: skip


def contiguous_slots(layers: int, experts: int) -> Ints:
    """Return the slots ``[L, E]`` of an engine's default placement: neighbours on one rank."""
    return np.tile(np.arange(experts), (layers, 1))


def _check(slots: NDArray[Any], ranks: int, layers: int, experts: int) -> None:
    wanted = f"[{layers} layers, slots] of expert ids below {experts}, slots a multiple of ranks"
    if slots.dtype.kind not in "iu" or slots.ndim != 2 or slots.shape[0] != layers:
        raise InputError(f"slots: {slots.dtype}{list(slots.shape)} -- must be {wanted}")
    if ranks < 1 or slots.shape[1] % ranks or not slots.size:
        raise InputError(f"slots: {slots.shape[1]} a layer on {ranks} ranks -- must be {wanted}")
    if slots.min() < 0 or slots.max() >= experts:
        raise InputError(f"slots: ids {slots.min()} to {slots.max()} -- must be {wanted}")
    held = np.zeros((layers, experts), np.bool_)
    held[np.arange(layers)[:, None], slots] = True
    if not held.all():
        layer, expert = np.argwhere(~held)[0]
        raise InputError(
            f"slots: expert {expert} of layer index {layer} has none ({np.sum(~held)} such) -- "
            "every expert needs at least one slot"
        )
