"""One layer's placement while the second stage changes it, and the limits that it must keep.

Slot s lies on rank ``rank_of[s]`` and node ``node_of[s]`` and takes a share of its expert's
tokens. A change is allowed if no rank then holds an expert twice, every expert keeps a slot, and
no rank and no node is expected to get more than its limit; loads are shares of a layer's tokens.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulator.dispatch import Dispatch

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

_ROUNDING = 1e-9
_REPAIRS = 12


@dataclass(frozen=True, kw_only=True, eq=False)
class Topology:
    """Where slots are; P slots, G ranks, N nodes."""

    rank_of: Ints
    """Rank of each slot, [P]."""
    node_of: Ints
    """Node of each slot, 0 .. N - 1, [P]."""
    node_share: Floats
    """Share of the tokens whose home is on each node (homes uniform over ranks), [N]."""
    dispatch: Dispatch

    @classmethod
    def of(
        cls, num_slots: int, node_of_rank: NDArray[np.integer], dispatch: Dispatch
    ) -> "Topology":
        """Lay out slots over ranks in equal contiguous runs."""
        ranks = len(node_of_rank)
        node = np.unique(node_of_rank, return_inverse=True)[1]
        rank_of = np.arange(num_slots) // (num_slots // ranks)
        return cls(
            rank_of=rank_of,
            node_of=node[rank_of],
            node_share=np.bincount(node) / ranks,
            dispatch=dispatch,
        )

    @property
    def num_ranks(self) -> int:
        """Ranks."""
        return int(self.rank_of[-1]) + 1

    @property
    def num_nodes(self) -> int:
        """Nodes."""
        return len(self.node_share)

    @property
    def by_home(self) -> bool:
        """Whether the choice of a replica depends on the token's home node."""
        return self.dispatch == "nearest" and self.num_nodes > 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Limits:
    """What a layer's placement must keep."""

    loads: Floats
    """Expected share of each expert in the layer's tokens, [E]."""
    rank_limit: float
    """Largest expected share on one rank."""
    block_loads: Floats
    """The same shares in each block of requests, [blocks, E]."""
    node_limit: float
    """Largest share on one node: the busiest node of each block, averaged over blocks."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerSlots:
    """The experts in the slots of one layer, and each slot's share of its expert's tokens."""

    experts: Ints
    """Logical expert of each slot, [P]."""
    share: Floats
    """Shares of an expert's slots sum to 1, [P]."""

    def swapped(self, s: int, t: int, topology: Topology) -> "LayerSlots":
        """Exchange the contents of two slots; under ``nearest`` shares follow from the places."""
        experts, share = self.experts.copy(), self.share.copy()
        experts[[s, t]], share[[s, t]] = experts[[t, s]], share[[t, s]]
        return (
            LayerSlots(experts=experts, share=share)
            if not topology.by_home
            else spread(experts, topology)
        )

    def replaced(self, s: int, expert: int, topology: Topology) -> "LayerSlots":
        """Give slot s to another expert."""
        experts = self.experts.copy()
        experts[s] = expert
        return spread(experts, topology)


def spread(experts: Ints, topology: Topology) -> LayerSlots:
    """Split each expert's tokens over its slots as ``even`` or ``nearest`` does in expectation.

    Under ``nearest`` the tokens at home on a node that holds replicas divide among these, and
    those of the other nodes among all replicas.
    """
    size = int(experts.max()) + 1
    replicas = np.bincount(experts, minlength=size)
    if not topology.by_home:
        return LayerSlots(experts=experts, share=1 / replicas[experts])
    on_node = np.zeros((size, topology.num_nodes))
    np.add.at(on_node, (experts, topology.node_of), 1)
    homeless = (on_node == 0) @ topology.node_share
    local = topology.node_share[topology.node_of] / on_node[experts, topology.node_of]
    return LayerSlots(experts=experts, share=local + (homeless / replicas)[experts])


def rank_loads(layer: LayerSlots, topology: Topology, loads: NDArray[np.floating]) -> Floats:
    """Return the expected load of each rank, [..., G], from expert loads [..., E]."""
    return _gather(layer, topology.rank_of, topology.num_ranks, loads)


def node_loads(layer: LayerSlots, topology: Topology, loads: NDArray[np.floating]) -> Floats:
    """Return the expected load of each node, [..., N], from expert loads [..., E]."""
    return _gather(layer, topology.node_of, topology.num_nodes, loads)


def _gather(layer: LayerSlots, place: Ints, places: int, loads: NDArray[np.floating]) -> Floats:
    part = np.zeros((loads.shape[-1], places))
    np.add.at(part, (layer.experts, place), layer.share)
    return np.asarray(loads @ part)


def hosts(layer: LayerSlots, topology: Topology, num_experts: int) -> Mask:
    """Whether each rank holds each expert, [G, E]."""
    held = np.zeros((topology.num_ranks, num_experts), dtype=np.bool_)
    held[topology.rank_of, layer.experts] = True
    return held


def busiest_node(layer: LayerSlots, topology: Topology, limits: Limits) -> float:
    """Busiest node's share, averaged over the blocks."""
    return float(node_loads(layer, topology, limits.block_loads).max(axis=-1).mean())


def keeps_ranks(layer: LayerSlots, topology: Topology, limits: Limits) -> bool:
    """Whether every rank's expected load is within the limit."""
    load = rank_loads(layer, topology, limits.loads)
    return bool(load.max() <= limits.rank_limit * (1 + _ROUNDING))


def distinct_after_swap(layer: LayerSlots, topology: Topology, num_experts: int) -> Mask:
    """Which pairs of slots on two ranks may be exchanged without doubling an expert, [P, P]."""
    rank, expert = topology.rank_of, layer.experts
    # [s, t]: the expert of t already sits on the rank of s
    doubles = hosts(layer, topology, num_experts)[rank][:, expert]
    return np.asarray(~doubles & ~doubles.T & (rank[:, None] != rank[None, :]))


def peak_after_swap(layer: LayerSlots, topology: Topology, loads: Floats) -> Floats:
    """Return the larger expected load of the two ranks after exchanging two slots, [P, P].

    Shares are taken to move along with the slots, which is exact except for replicated experts
    under ``nearest`` dispatch; `keeps_ranks` decides there.
    """
    load = rank_loads(layer, topology, loads)[topology.rank_of]
    weight = loads[layer.experts] * layer.share
    after = load[:, None] - weight[:, None] + weight[None, :]
    return np.asarray(np.maximum(after, after.T))


def repaired(layer: LayerSlots, topology: Topology, limits: Limits) -> LayerSlots | None:
    """Bring all ranks under the limit by a few exchanges inside nodes, or return None.

    Each exchange relieves the busiest rank; what is on which node does not change.
    """
    for _ in range(_REPAIRS):
        if keeps_ranks(layer, topology, limits):
            return layer
        load = rank_loads(layer, topology, limits.loads)
        mine = topology.rank_of == load.argmax()
        peak = peak_after_swap(layer, topology, limits.loads)
        allowed = distinct_after_swap(layer, topology, len(limits.loads))
        allowed &= topology.node_of[:, None] == topology.node_of[None, :]
        peak = np.where(allowed & mine[:, None], peak, np.inf)
        s, t = np.unravel_index(peak.argmin(), peak.shape)
        if peak[s, t] >= load.max():
            return None
        layer = layer.swapped(int(s), int(t), topology)
    return layer if keeps_ranks(layer, topology, limits) else None
