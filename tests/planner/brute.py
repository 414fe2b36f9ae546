"""Brute force over all placements of one tiny layer: the oracle of the planner's tests."""

from itertools import combinations, combinations_with_replacement

import numpy as np


def placements(num_experts, num_slots, num_ranks):
    """All placements up to the order of ranks: exact slots, distinct experts, all hosted."""
    patterns = list(combinations(range(num_experts), num_slots // num_ranks))
    for ranks in combinations_with_replacement(patterns, num_ranks):
        flat = [e for rank in ranks for e in rank]
        if len(set(flat)) == num_experts:
            yield np.array(flat)


def best_even(loads, num_slots, num_ranks):
    """Least busiest load under even dispatch."""
    best = np.inf
    for slots in placements(len(loads), num_slots, num_ranks):
        per_replica = loads / np.bincount(slots, minlength=len(loads))
        best = min(best, per_replica[slots].reshape(num_ranks, -1).sum(1).max())
    return best


def split_value(loads, slots, num_ranks):
    """Least busiest load over all splits: max over expert sets of load / hosting ranks.

    (Max-flow min-cut: the experts of a set can use only the ranks that host one of them.)
    """
    hosts = np.zeros((len(loads), num_ranks), bool)
    hosts[slots, np.arange(len(slots)) // (len(slots) // num_ranks)] = True
    best = 0.0
    for size in range(1, len(loads) + 1):
        for chosen in combinations(range(len(loads)), size):
            index = list(chosen)
            best = max(best, loads[index].sum() / hosts[index].any(0).sum())
    return best


def best_shares(loads, num_slots, num_ranks):
    """Least busiest load with free shares."""
    every = placements(len(loads), num_slots, num_ranks)
    return min(split_value(loads, slots, num_ranks) for slots in every)
