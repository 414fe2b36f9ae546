"""Loads after expert-parallel load balancing, as the wide-EP tables' authors balanced them.

Spare slots go, one after the other, to the expert with the most tokens for each of its copies;
slots are then placed from the heaviest down on the rank with the least tokens that has a place
left. A copy gets an equal share of its expert's tokens; the rank with most tokens is timed. After
`collector/helper.py` of github.com/ai-dynamo/aiconfigurator; many draws at once.
"""

import numpy as np
from numpy.typing import NDArray

from basis import InputError
from hwmodels.ops import Floats

Counts = NDArray[np.int64]


def replicated(counts: Counts, slots: int) -> Floats:
    """Return tokens of each slot [n, slots] when hot experts take the spare ones.

    Parameters
    ----------
    counts : ndarray [n, experts]
        Tokens of each expert.
    slots : int
        At least as many as experts.

    Raises
    ------
    InputError
        Fewer slots than experts.
    """
    n, experts = counts.shape
    if slots < experts:
        raise InputError(f"slots: {slots} -- at least the number of experts ({experts})")
    copies = np.ones((n, experts))
    owner = np.empty((n, slots), dtype=np.int64)
    owner[:, :experts] = np.arange(experts)
    rows = np.arange(n)
    for slot in range(experts, slots):
        hottest = (counts / copies).argmax(axis=1)
        owner[:, slot] = hottest
        copies[rows, hottest] += 1
    return np.take_along_axis(counts / copies, owner, axis=1)


def placed(load: Floats, ranks: int) -> Floats:
    """Return tokens of the slots of each rank [n, ranks, slots / ranks] after greedy placement.

    Parameters
    ----------
    load : ndarray [n, slots]
        Tokens of each slot.
    ranks : int
        Divides the number of slots.

    Raises
    ------
    InputError
        Ranks that do not divide the slots.
    """
    n, slots = load.shape
    if slots % ranks:
        raise InputError(f"ranks: {ranks} -- a divisor of the number of slots ({slots})")
    each = slots // ranks
    heaviest = -np.sort(-load, axis=1)
    total = np.zeros((n, ranks))
    filled = np.zeros((n, ranks), dtype=np.int64)
    out = np.zeros((n, ranks, each))
    rows = np.arange(n)
    for slot in range(slots):
        rank = np.where(filled < each, total, np.inf).argmin(axis=1)
        out[rows, rank, filled[rows, rank]] = heaviest[:, slot]
        total[rows, rank] += heaviest[:, slot]
        filled[rows, rank] += 1
    return out


def balanced_ranks(counts: Counts, slots: int, ranks: int) -> Counts:
    """Return whole tokens of the slots of each rank [n, ranks, slots / ranks], the busiest first.

    Shares of copies are rounded down; what is left goes to the slots with the largest remainder.
    """
    load = placed(replicated(counts, slots), ranks)
    n = len(load)
    busiest = load.sum(axis=2).argmax(axis=1)
    order = np.argsort(np.arange(ranks) != busiest[:, None], axis=1, kind="stable")
    flat = np.take_along_axis(load, order[..., None], axis=1).reshape(n, slots)
    whole = np.floor(flat)
    left = (counts.sum(axis=1) - whole.sum(axis=1)).astype(np.int64)
    rank_of = np.argsort(np.argsort(whole - flat, axis=1, kind="stable"), axis=1, kind="stable")
    whole += rank_of < left[:, None]
    return whole.astype(np.int64).reshape(n, ranks, slots // ranks)
