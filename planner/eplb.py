"""DeepSeek's EPLB: the replication-and-packing heuristic that serving engines ship today.

It gives the redundant slots one by one to the expert with the highest load per replica, then
packs replicas greedily, heaviest first, onto the lightest rank that still has room. Loads are
token counts (any scale); the result is a logical expert per physical slot. Our own numpy
implementation of the published algorithm (github.com/deepseek-ai/EPLB), all layers at once.
"""

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def eplb(
    loads: Floats, num_slots: int, num_groups: int, num_nodes: int, num_ranks: int
) -> NDArray[np.int32]:
    """Place experts as DeepSeek's ``rebalance_experts`` does.

    Hierarchical (expert groups stay inside a node) where `num_groups` is a multiple of
    `num_nodes`, otherwise flat. Unlike `planner.balance`, it may put two replicas of one
    expert on the same rank.

    Parameters
    ----------
    loads : float array [layers, experts]
        Load of each logical expert.
    num_slots, num_groups, num_nodes, num_ranks : int
        Physical slots per layer, expert groups of the router, nodes, EP ranks.

    Returns
    -------
    int32 array [layers, num_slots]
        Logical expert of each slot; slot s is on rank ``s // (num_slots // num_ranks)``.

    Raises
    ------
    InputError
        If slots do not divide over ranks, experts over groups, ranks over nodes, or there
        are fewer slots than experts.
    """
    weights = np.asarray(loads, dtype=np.float64)
    _check(weights, num_slots, num_groups, num_nodes, num_ranks)
    if num_groups % num_nodes != 0:
        num_groups, num_nodes = 1, 1
    layers, experts = weights.shape
    per_node = experts // num_nodes

    order = _experts_by_node(weights, num_groups, num_nodes)
    node_loads = np.take_along_axis(weights, order, axis=1).reshape(-1, per_node)
    local = _replicate_and_pack(node_loads, num_slots // num_nodes, num_ranks // num_nodes)
    first = np.tile(np.arange(num_nodes) * per_node, layers)[:, None]
    return np.take_along_axis(order, (local + first).reshape(layers, -1), axis=1).astype(np.int32)


def _check(
    weights: Floats, num_slots: int, num_groups: int, num_nodes: int, num_ranks: int
) -> None:
    if weights.ndim != 2:
        raise InputError(f"loads has {weights.ndim} dimensions -- EPLB takes [layers, experts]")
    experts = weights.shape[1]
    if num_slots < experts:
        raise InputError(f"{num_slots} slots for {experts} experts -- each needs at least one")
    for total, parts, what in (
        (num_slots, num_ranks, "slots over ranks"),
        (experts, num_groups, "experts over expert groups"),
        (num_ranks, num_nodes, "ranks over nodes"),
    ):
        if parts < 1 or total % parts:
            raise InputError(
                f"EPLB divides {what} evenly ({total} / {parts}) -- change one of them"
            )


def _experts_by_node(weights: Floats, num_groups: int, num_nodes: int) -> Ints:
    """Order the experts so that node n owns block n: whole groups, packed by group load."""
    layers, experts = weights.shape
    size = experts // num_groups
    node, place = _pack(weights.reshape(layers, num_groups, size).sum(2), num_nodes)
    position = node * (num_groups // num_nodes) + place
    of_expert = (position[:, :, None] * size + np.arange(size)).reshape(layers, experts)
    return _inverse(of_expert)


def _replicate_and_pack(weights: Floats, num_slots: int, num_ranks: int) -> Ints:
    """Replicate inside each row (a node of a layer) and pack the replicas onto its ranks."""
    expert, counts = _replicate(weights, num_slots)
    replica_load = np.take_along_axis(weights / counts, expert, axis=1)
    rank, place = _pack(replica_load, num_ranks)
    slot = rank * (num_slots // num_ranks) + place
    return np.take_along_axis(expert, _inverse(slot), axis=1)


def _replicate(weights: Floats, num_slots: int) -> tuple[Ints, Ints]:
    """Give each extra slot to the expert with the highest load per replica."""
    rows, experts = weights.shape
    row = np.arange(rows)
    expert = np.tile(np.arange(num_slots), (rows, 1))
    counts = np.ones((rows, experts), dtype=np.int64)
    for slot in range(experts, num_slots):
        chosen = (weights / counts).argmax(1)
        expert[:, slot] = chosen
        counts[row, chosen] += 1
    return expert, counts


def _pack(weights: Floats, num_packs: int) -> tuple[Ints, Ints]:
    """Pack n items into packs of exactly n / num_packs, heaviest first, into the lightest pack.

    Returns the pack of each item and its place in the pack. With one item per pack the order
    is kept, as the original does.
    """
    rows, items = weights.shape
    size = items // num_packs
    if size == 1:
        return np.tile(np.arange(items), (rows, 1)), np.zeros((rows, items), dtype=np.int64)
    row = np.arange(rows)
    pack = np.zeros((rows, items), dtype=np.int64)
    place = np.zeros((rows, items), dtype=np.int64)
    pack_load = np.zeros((rows, num_packs))
    filled = np.zeros((rows, num_packs), dtype=np.int64)
    for item in np.argsort(-weights, axis=1, kind="stable").T:
        target = np.where(filled < size, pack_load, np.inf).argmin(1)
        pack[row, item] = target
        place[row, item] = filled[row, target]
        pack_load[row, target] += weights[row, item]
        filled[row, target] += 1
    return pack, place


def _inverse(permutation: Ints) -> Ints:
    inverse = np.empty_like(permutation)
    np.put_along_axis(inverse, permutation, np.arange(permutation.shape[1])[None, :], axis=1)
    return inverse
