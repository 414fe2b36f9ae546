"""Expected cross-node sends of a token in one layer, and how exchanging replicas changes them.

A token sends one copy to each remote node that serves any of its experts. With q[h, e, n] the
probability that node n serves expert e for a token at home on node h (choices of different
experts independent), the expected sends are the sum over homes h and nodes n other than h of
``p[h] * E_token[1 - prod_e (1 - q[h, e, n])]``. This is linear in each expert's q, so first and
second derivatives give the exact change when two experts move: all exchanges are valued at
once. Unit: copies per token and layer.
"""

from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from planner.layer import LayerSlots, Topology
from planner.observed import TokenSets

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_NONE = 1e-9  # a share below this is rounding: no replica


@dataclass(frozen=True, kw_only=True, eq=False)
class Derivatives:
    """Expected sends at a placement, with derivatives by each expert's absence from a column."""

    value: float
    first: Floats
    """[E, columns]."""
    second: Floats
    """[columns, E, E]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SendCost:
    """The expected sends of one layer's tokens as a function of its placement.

    A column is a destination node, seen from one home node where the choice of a replica depends
    on the home (``nearest``), else from all homes together. An expert is absent from a column with
    probability ``1 - q``.
    """

    sets: TokenSets
    topology: Topology
    num_experts: int

    @cached_property
    def columns(self) -> tuple[Ints, Ints, Floats]:
        """Home node (0 where it does not matter), destination node and weight of each column."""
        share = self.topology.node_share
        if not self.topology.by_home:
            return np.zeros(len(share), np.int64), np.arange(len(share)), 1 - share
        home, node = np.nonzero(~np.eye(len(share), dtype=np.bool_))
        return home, node, share[home]

    def absent(self, part: Floats) -> Floats:
        """Probability that no column's token goes there for an expert, [..., C].

        Parameters
        ----------
        part : float array [..., N]
            Share of the expert's replicas (or of its tokens, where homes do not matter) by node.
        """
        home, node, _ = self.columns
        if not self.topology.by_home:
            return np.asarray(1 - part[..., node])
        return np.asarray(np.where(part[..., home] > _NONE, 1.0, 1 - part[..., node]))

    def parts(self, layer: LayerSlots) -> tuple[Floats, Floats]:
        """Return the share of each expert by node [E, N], and what each slot adds to it [P]."""
        weight = layer.share
        if self.topology.by_home:
            weight = 1 / np.bincount(layer.experts, minlength=self.num_experts)[layer.experts]
        part = np.zeros((self.num_experts, self.topology.num_nodes))
        np.add.at(part, (layer.experts, self.topology.node_of), weight)
        return part, weight

    def value(self, layer: LayerSlots) -> float:
        """Return the expected copies per token."""
        nobody = _product(self._absent_by_choice(layer), ())
        return float(self.columns[2] @ (1 - nobody) @ self.sets.weight)

    def derivatives(self, layer: LayerSlots) -> Derivatives:
        """Value and derivatives at a placement."""
        members, experts = self.sets.members, self.num_experts
        weight = self.columns[2]
        absent = self._absent_by_choice(layer)
        chosen = range(len(absent))
        value = self.value(layer)
        others = np.stack([_product(absent, (k,)) for k in chosen])
        first = -self._sums(members.T, others, experts) * weight[:, None]
        second = np.zeros((len(weight), experts, experts))
        pairs = list(combinations(chosen, 2))
        if pairs:
            keys = np.stack([members[:, a] * experts + members[:, b] for a, b in pairs])
            rest = np.stack([_product(absent, pair) for pair in pairs])
            half = -self._sums(keys, rest, experts**2).reshape(second.shape)
            second = (half + half.transpose(0, 2, 1)) * weight[:, None, None]
        return Derivatives(value=value, first=first.T, second=second)

    def _absent_by_choice(self, layer: LayerSlots) -> Floats:
        """Absence of the k-th expert of each set, [K, C, sets]."""
        absent = self.absent(self.parts(layer)[0])
        return np.ascontiguousarray(absent.T[:, self.sets.members.T].transpose(1, 0, 2))

    def _sums(self, keys: Ints, values: Floats, size: int) -> Floats:
        """Sum values [n, C, sets], weighted by their set's share, by key [n, sets]: [C, size]."""
        weighted = (values * self.sets.weight).transpose(1, 0, 2).reshape(values.shape[1], -1)
        return np.stack([np.bincount(keys.ravel(), row, minlength=size) for row in weighted])

    def swap_changes(self, layer: LayerSlots, at: Derivatives) -> Floats:
        """Change of the expected sends by exchanging each pair of slots, [P, P]."""
        topology, expert = self.topology, layer.experts
        part, weight = self.parts(layer)
        # Absence of each slot's expert after the slot has moved to node b, less that before.
        moved = np.repeat(part[expert][:, None], topology.num_nodes, axis=1)  # [P, b, N]
        slot = np.arange(len(expert))
        moved[slot, :, topology.node_of] -= weight[:, None]
        nodes = np.arange(topology.num_nodes)
        moved[:, nodes, nodes] += weight[:, None]
        step = self.absent(moved) - self.absent(part)[expert][:, None]  # [P, b, C]
        linear = np.einsum("sc,sbc->sb", at.first[expert], step)[:, topology.node_of]
        change = linear + linear.T
        there = step[:, topology.node_of]  # [s, t, C]: slot s moves to the node of t
        for column, second in enumerate(at.second):
            d = there[:, :, column]
            change += second[expert[:, None], expert[None, :]] * d * d.T
        return np.asarray(change)

    def replacement_changes(self, layer: LayerSlots, at: Derivatives, slots: Ints) -> Floats:
        """Change by giving each of ``slots`` [n] to each expert instead, [n, E].

        Replicas of an expert share alike here (``even``, ``nearest``); the expert of each slot
        must have another replica.
        """
        topology, expert = self.topology, layer.experts[slots]
        part, _ = self.parts(layer)
        replicas = np.bincount(layer.experts, minlength=self.num_experts)
        nodes = np.eye(topology.num_nodes)
        now = self.absent(part)
        held = part * replicas[:, None]  # replicas by node
        lost = (held[expert] - nodes[topology.node_of[slots]]) / (replicas[expert] - 1)[:, None]
        gained = (held[:, None] + nodes[None]) / (replicas + 1)[:, None, None]  # [E, a, N]
        down = self.absent(lost) - now[expert]  # [n, C]
        up = (self.absent(gained) - now[:, None])[:, topology.node_of[slots]]  # [E, n, C]
        change = np.einsum("nc,nc->n", at.first[expert], down)[:, None]
        change = change + np.einsum("ec,enc->ne", at.first, up)
        for column, second in enumerate(at.second):
            change += second[expert] * down[:, column, None] * up[:, :, column].T
        return np.asarray(change)


def _product(factors: Floats, without: tuple[int, ...]) -> Floats:
    """Multiply the arrays of factors [K, ...] but those left out."""
    kept = [factor for k, factor in enumerate(factors) if k not in without]
    return reduce(np.multiply, kept, np.ones(factors.shape[1:]))
