"""Placements that serving engines use without a planner: what a plan must be compared with.

A baseline maps expert loads (token counts of any scale, [layers, experts]) and a number of
slots and ranks to a `Placement`; `contiguous` and `round_robin` do not look at the loads.
"""

import numpy as np
from numpy.typing import NDArray

from planner.eplb import eplb
from simulator.placement import Placement

Floats = NDArray[np.float64]


def contiguous(num_layers: int, num_experts: int, num_slots: int, num_ranks: int) -> Placement:
    """Expert ids in order, the engines' default; redundant slots repeat ids 0, 1, 2, ..."""
    slots = np.arange(num_slots, dtype=np.int32) % num_experts
    return _same_in_all_layers(slots, num_layers, num_experts, num_ranks)


def round_robin(num_layers: int, num_experts: int, num_slots: int, num_ranks: int) -> Placement:
    """Experts dealt to the ranks in turn: expert e on rank e mod G; redundant slots go on dealing.

    (vLLM's ``expert_placement_strategy = round_robin``.)
    """
    dealt = np.arange(num_slots, dtype=np.int32) % num_experts
    slots = dealt.reshape(-1, num_ranks).T.ravel() if num_slots % num_ranks == 0 else dealt
    return _same_in_all_layers(slots, num_layers, num_experts, num_ranks)


def eplb_placement(
    loads: Floats, num_slots: int, num_ranks: int, *, num_nodes: int = 1, num_groups: int = 1
) -> Placement:
    """DeepSeek's EPLB (see `planner.eplb`): hierarchical if the groups divide over the nodes."""
    slots = eplb(loads, num_slots, num_groups, num_nodes, num_ranks)
    return Placement(slots=slots, num_experts=loads.shape[1], num_ranks=num_ranks)


def _same_in_all_layers(
    slots: NDArray[np.int32], num_layers: int, num_experts: int, num_ranks: int
) -> Placement:
    tiled = np.tile(slots, (num_layers, 1))
    return Placement(slots=tiled, num_experts=num_experts, num_ranks=num_ranks)
