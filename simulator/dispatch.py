"""How the tokens of a step choose among the replicas of their experts, and what that moves.

This is the one place where (token, layer, expert) becomes a slot. From the slots follow the
tokens per slot (work), the traffic between ranks (bytes) and the sends that leave a node.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from simulator.placement import Placement

Dispatch = Literal["even", "nearest", "shares"]
"""``even``: an expert's tokens go round its replicas in turn. ``nearest``: a replica on the token's
rank, else on its node, else any in turn. ``shares``: split by given shares per slot."""

_GOLDEN = 0.6180339887498949  # its multiples mod 1 fill [0, 1) evenly


def homes(tokens: int, num_ranks: int) -> NDArray[np.int64]:
    """Attention rank of each token of a step, [tokens]: equal contiguous blocks."""
    return np.arange(tokens) * num_ranks // max(tokens, 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Dispatcher:
    """Assigns tokens to slots under one placement and one dispatch rule."""

    placement: Placement
    dispatch: Dispatch
    node_of: NDArray[np.int64]
    """Node of each rank, [ranks]."""
    slot_share: NDArray[np.float64] | None = None
    """Share of its expert's tokens that each slot takes, [layers, slots]; only for ``shares``."""

    def __post_init__(self) -> None:
        if len(self.node_of) != self.placement.num_ranks:
            raise InputError(
                f"placement has {self.placement.num_ranks} ranks, the cluster {len(self.node_of)} "
                "-- plan again for this cluster"
            )
        if (self.dispatch == "shares") != (self.slot_share is not None):
            raise InputError(
                f"dispatch {self.dispatch!r} with{'' if self.slot_share is not None else 'out'} "
                "slot_share -- slot_share belongs to dispatch 'shares' and to it alone"
            )
        if self.slot_share is not None:
            _check_shares(self.slot_share, self.placement)

    def assign(
        self, experts: NDArray[np.integer], home: NDArray[np.int64], seed: int = 0
    ) -> NDArray[np.int32]:
        """Choose a slot for every (token, layer, choice) of one step.

        Parameters
        ----------
        experts : integer array [tokens, layers, top_k]
            Logical experts.
        home : integer array [tokens]
            Attention rank of each token.
        seed : int
            Where each expert's round of replicas starts, so that a remainder of tokens does not
            always fall on the first replica.

        Returns
        -------
        int32 array [tokens, layers, top_k]
        """
        place = self.placement
        layers = np.arange(place.num_layers)[None, :, None]
        if place.num_slots == place.num_experts:
            return place.replica_slots[layers, experts, 0]
        first, count = self._candidates(experts, home)
        group = layers * place.num_experts + experts.astype(np.int64)
        if self.dispatch == "nearest":
            group = group * place.num_ranks + home[:, None, None]
        nth = occurrence(group) + _start(group, seed)
        if self.slot_share is not None:
            at = self._share_ends[layers, experts]
            return first[
                (*np.indices(experts.shape), (at <= (nth * _GOLDEN % 1.0)[..., None]).sum(-1))
            ]
        return np.take_along_axis(first, (nth % count)[..., None], axis=-1)[..., 0]

    def expected_rank_load(self, loads: NDArray[np.float64]) -> NDArray[np.float64]:
        """Load of each rank in expectation, tokens' homes uniform over ranks.

        Parameters
        ----------
        loads : array [..., layers, experts]
            Tokens per logical expert.

        Returns
        -------
        float64 array [..., layers, ranks]
        """
        if self.dispatch != "nearest":
            return expected_rank_load(loads, self.placement, self.slot_share)
        place = self.placement
        slots, count = self._nearest
        chosen = np.arange(slots.shape[-1]) < count[..., None]
        layer, expert, home, nth = np.nonzero(chosen)
        part = np.zeros(place.hosts.shape)
        rank = place.rank_of_slot[slots[layer, expert, home, nth]]
        weight = 1 / (place.num_ranks * count[layer, expert, home])
        np.add.at(part, (layer, expert, rank), weight)
        return _times(loads, part)

    def _candidates(
        self, experts: NDArray[np.integer], home: NDArray[np.int64]
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return the slots to choose from, candidates first, and how many are candidates."""
        place = self.placement
        layers = np.arange(place.num_layers)[None, :, None]
        if self.dispatch != "nearest":
            return place.replica_slots[layers, experts], place.replicas[layers, experts]
        table, count = self._nearest
        home_ = home[:, None, None]
        return table[layers, experts, home_], count[layers, experts, home_]

    @cached_property
    def _nearest(self) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Slots of each expert by distance from each rank, [layers, experts, ranks, replicas]."""
        place = self.placement
        table = place.replica_slots[:, :, None, :]
        rank = place.rank_of_slot[table]
        here = np.arange(place.num_ranks)[:, None]
        far = np.where(rank == here, 0, np.where(self.node_of[rank] == self.node_of[here], 1, 2))
        far = np.where(table < 0, 3, far)
        order = np.argsort(far, axis=-1, kind="stable")
        slots = np.take_along_axis(np.broadcast_to(table, far.shape), order, axis=-1)
        return slots, (far == far.min(axis=-1, keepdims=True)).sum(axis=-1)

    @cached_property
    def _share_ends(self) -> NDArray[np.float64]:
        """Running sum of shares over the replicas of an expert; the last is 1 (or above)."""
        assert self.slot_share is not None
        table = self.placement.replica_slots
        layers = np.arange(self.placement.num_layers)[:, None, None]
        share = np.where(table < 0, 0.0, self.slot_share[layers, table])
        ends = np.cumsum(share, axis=-1)
        last = np.arange(table.shape[-1]) >= self.placement.replicas[..., None] - 1
        return np.where(last, np.inf, ends)


def _check_shares(share: NDArray[np.float64], placement: Placement) -> None:
    if share.shape != placement.slots.shape:
        raise InputError(
            f"slot_share has shape {share.shape} -- it must be {placement.slots.shape}"
        )
    layers = np.arange(placement.num_layers)[:, None]
    total = np.zeros((placement.num_layers, placement.num_experts))
    np.add.at(total, (layers, placement.slots), share)
    if share.min(initial=0.0) < 0 or np.abs(total - 1).max(initial=0.0) > 1e-6:
        raise InputError(
            "slot_share does not split every expert's tokens -- the shares of an expert's slots "
            "must be at least 0 and sum to 1 in each layer"
        )


def occurrence(group: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how many earlier entries (token order) are of the same group, same shape."""
    flat = group.ravel()
    small = flat.max(initial=0) < 2**16  # short keys are sorted by radix, several times faster
    order = np.argsort(flat.astype(np.uint16) if small else flat, kind="stable")
    ordered = flat[order]
    new = np.concatenate(([True], ordered[1:] != ordered[:-1]))
    starts = np.maximum.accumulate(np.where(new, np.arange(len(flat)), 0))
    nth = np.empty_like(flat)
    nth[order] = np.arange(len(flat)) - starts
    return nth.reshape(group.shape)


def _start(group: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Return a pseudo-random start of each group's round, the same for equal groups and seeds."""
    mixed = (group.astype(np.uint64) + np.uint64(1 + seed * 7919)) * np.uint64(0x9E3779B97F4A7C15)
    return (mixed >> np.uint64(40)).astype(np.int64)


def expected_rank_load(
    loads: NDArray[np.float64],
    placement: Placement,
    slot_share: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """Load of each rank when every expert's load is split over its replicas in fractions.

    Parameters
    ----------
    loads : array [..., layers, experts]
        Tokens per logical expert.
    placement : Placement
    slot_share : array [layers, slots], optional
        Share of each slot; without it the split is even.

    Returns
    -------
    float64 array [..., layers, ranks]
    """
    if slot_share is None:
        part = placement.hosts / placement.replicas[..., None]
    else:
        part = np.zeros(placement.hosts.shape)
        layers = np.arange(placement.num_layers)[:, None]
        np.add.at(part, (layers, placement.slots, placement.rank_of_slot[None, :]), slot_share)
    return _times(loads, part)


def _times(loads: NDArray[np.float64], part: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spread loads [..., layers, experts] by parts [layers, experts, ranks]."""
    return np.matmul(np.asarray(loads, dtype=np.float64)[..., None, :], part)[..., 0, :]


def tokens_per_slot(slot: NDArray[np.int32], num_slots: int) -> NDArray[np.int64]:
    """Count the tokens of each slot in one step, [layers, slots], from [tokens, layers, k]."""
    num_layers = slot.shape[1]
    key = np.arange(num_layers)[None, :, None] * num_slots + slot
    return np.bincount(key.ravel(), minlength=num_layers * num_slots).reshape(num_layers, num_slots)


def touched_ranks(slot: NDArray[np.int32], placement: Placement) -> NDArray[np.bool_]:
    """Return which ranks each token visits, [tokens, layers, ranks]."""
    tokens, layers, _ = slot.shape
    touched = np.zeros((tokens, layers, placement.num_ranks), dtype=np.bool_)
    token, layer = np.indices((tokens, layers), sparse=True)
    touched[token[..., None], layer[..., None], placement.rank_of_slot[slot]] = True
    return touched


def remote_sends(
    touched: NDArray[np.bool_], home: NDArray[np.int64], node_of: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count sends of one step that leave the token's node and the token's rank.

    Parameters
    ----------
    touched : bool array [tokens, layers, ranks]
    home : int array [tokens]
    node_of : int array [ranks]

    Returns
    -------
    cross_node, cross_rank : int64 arrays [layers]
        Sum over tokens of the distinct remote nodes, and of the distinct ranks other than home.
    """
    away = touched & (np.arange(touched.shape[2]) != home[:, None])[:, None, :]
    nodes = np.stack([touched[..., node_of == n].any(-1) for n in np.unique(node_of)], axis=-1)
    remote = nodes & (np.unique(node_of) != node_of[home][:, None])[:, None, :]
    return remote.sum((0, 2)), away.sum((0, 2))


def traffic(
    touched: NDArray[np.bool_],
    home: NDArray[np.int64],
    node_of: NDArray[np.int64],
    token_bytes: float,
) -> NDArray[np.float64]:
    """Bytes that each rank sends to each other in the dispatch of one step, [layers, ranks, ranks].

    A token goes once to each rank that it visits. To another node it travels once, to the rank
    there with the sender's local index, which forwards it inside that node (DeepEP's normal
    kernels, https://github.com/deepseek-ai/DeepEP). The combine is the transpose.
    """
    tokens, layers, ranks = touched.shape
    at_home = np.zeros((ranks, tokens), dtype=np.float32)
    at_home[home, np.arange(tokens)] = 1
    visits = _sum_by_home(at_home, touched)  # [home, layers, ranks]
    sent = np.zeros((layers, ranks, ranks))
    members = [np.flatnonzero(node_of == n) for n in np.unique(node_of)]
    for node, inside in enumerate(members):
        arrives = np.any(touched[..., inside], axis=-1, keepdims=True)
        arrivals = _sum_by_home(at_home, arrives)[..., 0]
        for other, senders in enumerate(members):
            for local, rank in enumerate(senders):
                if other == node:
                    sent[:, rank, inside] += visits[rank][:, inside]
                    continue
                entry = inside[local % len(inside)]
                sent[:, rank, entry] += arrivals[rank]
                sent[:, entry, inside] += visits[rank][:, inside]
    diagonal = np.arange(ranks)
    sent[:, diagonal, diagonal] = 0
    return sent * token_bytes


def _sum_by_home(at_home: NDArray[np.float32], marks: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Count marks [tokens, layers, x] by home rank, [ranks, layers, x]; exact below 2**24."""
    tokens, layers, width = marks.shape
    flat = marks.reshape(tokens, layers * width).astype(np.float32)
    return (at_home @ flat).reshape(len(at_home), layers, width).astype(np.float64)
