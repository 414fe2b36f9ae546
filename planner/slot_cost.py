"""What the tokens of one slot cost its rank: the work by which stragglers are compared.

Tokens alone mislead: an expert's rows are padded to whole tiles and its weights are read once
however few tokens come, so two ranks with equal tokens can differ in time. The cost is the
priced expert kernel of one slot without its launch (every rank launches once), the moves of its
rows, and their share of dispatch and combine; seconds per layer and step. Kernel models err by
10 to 30 % and tokens are the robust measure, so half of the weight stays on tokens (assumed).
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from basis.dtypes import bytes_of
from hwmodels import AllToAll, Cluster, GroupedGemm, Permute, price
from hwmodels.ops import PHASES, Phase
from simulator.layout import Layout
from traces.model_spec import ModelSpec

Singles = NDArray[np.float32]
SlotCost = Callable[[Singles], Singles]
"""Tokens of slots, any shape, to their cost in the same shape."""

_MOST_TOKENS = 2**15  # entries of the table; beyond it the cost goes on linearly


def tokens_as_cost(tokens: Singles) -> Singles:
    """Take the tokens themselves as the cost."""
    return tokens


def slot_seconds(
    model: ModelSpec, cluster: Cluster, tokens: int, slots: int, layout: Layout | None = None
) -> SlotCost:
    """Return what a slot costs its rank, by its tokens: seconds, plus as much again by tokens.

    The second part is linear and equals the first at the mean load of a slot.

    Sums of slots overstate a rank a little where some slots are bound by memory and others by
    compute: the roofline is then of the sums.

    Parameters
    ----------
    model : ModelSpec
    cluster : Cluster
    tokens : int
        Tokens of a step that share the slots, the most that a slot can have.
    slots : int
        Slots of a layer, each counted once.
    layout : Layout, optional
        Its expert tensor parallelism narrows the experts; without an all-to-all nothing is sent
        for a slot. None: whole experts and an all-to-all of all ranks.
    """
    count = np.arange(min(tokens, _MOST_TOKENS) + 1)
    token_bytes = bytes_of(model.activation_dtype, model.comm_size)
    experts = GroupedGemm(
        tokens_per_expert=count[:, None],
        hidden=model.comm_size,
        width=model.expert_width if layout is None else layout.slice_width(model),
        gated=model.gated,
        weight_dtype=model.expert_dtype,
        activation_dtype=model.activation_dtype,
        tokens=count / model.top_k,  # a token's cost is shared by its experts
    )
    moves = Permute(rows=count, row_bytes=np.full(len(count), token_bytes))
    no_launch = cluster.scaled(fixed=0.0)
    table = price(experts, no_launch).seconds + 2 * price(moves, no_launch).seconds
    if layout is None or layout.exchanged > 1:
        table += count * sum(_port_seconds(no_launch, token_bytes, phase) for phase in PHASES)

    mean = min(tokens * model.top_k / slots, len(count) - 1.0)
    table += count * float(np.interp(mean, count, table)) / mean

    def cost(slot_tokens: Singles) -> Singles:
        whole = np.ceil(slot_tokens - 1e-3).astype(np.int64)
        over = np.maximum(whole / (len(table) - 1), 1.0)
        return (table[np.minimum(whole, len(table) - 1)] * over).astype(np.float32)

    return cost


def _port_seconds(cluster: Cluster, size: float, phase: Phase) -> float:
    """Seconds for which ``size`` bytes occupy a rank's port into its node, startup left out."""
    ranks = cluster.num_ranks
    if ranks == 1 or cluster.node.interconnect is None:
        return 0.0
    many = 2**20
    traffic = np.zeros((1, ranks, ranks))
    traffic[0, 1, 0] = size * many
    return float(price(AllToAll(traffic=traffic, phase=phase), cluster).seconds[0]) / many
