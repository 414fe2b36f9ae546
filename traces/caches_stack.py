"""Every size of a cache at once: an order of the experts whose first C are what C slots hold.

A rule that ranks experts the same way whatever the number of slots keeps in C slots a part of what
it keeps in C + 1 (a stack algorithm: Mattson et al., "Evaluation techniques for storage
hierarchies", 1970). LRU, LFU, Belady and "fewest uses soon" are such rules. The rule of access is
that of `traces.caches_play`: what is wanted comes in and does not push itself out; of the rest the
smallest worth goes. Unit: experts.
"""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
_HOLE = np.iinfo(np.int64).min


class Stacks:
    """G caches side by side, each of up to E experts, that start empty.

    A *worth* is an int64 made by `worth`; whoever was never used has one below all others.
    """

    def __init__(self, groups: int, experts: int) -> None:
        self._mask = (1 << _bits(experts)) - 1
        self._first = np.arange(groups)[:, None] * experts
        self._column = np.arange(experts)
        self._order = self._first + self._column  # [G, E] cells, best first
        self._place = np.tile(np.arange(experts), groups)  # [G * E] of each cell in the order
        self._used = np.zeros(groups * experts, np.bool_)

    def access(self, cells: Ints, worth: Ints) -> Ints:
        """Use experts of the first n caches.

        Parameters
        ----------
        cells : int64 array ``[n, K]``
            The distinct experts that each cache is asked for, as ``group * E + expert``.
        worth : int64 array ``[n, E]``
            Of all experts after this use, by expert.

        Returns
        -------
        int64 array ``[n, K]``
            The place of each before: a hit in every cache of more slots. E where it was never
            used before, which no cache has.
        """
        count, many = cells.shape
        order, first, flat = self._order[:count], self._first[:count], worth.reshape(-1)
        place = self._place[cells]
        ranked = flat[order]
        ranked.reshape(-1)[first + place] = _HOLE
        holes = np.sort(place, axis=1)
        for taken in range(many):
            _push_down(ranked[:, taken:], self._column[taken:], holes[:, taken, None])
        ranked[:, :many] = np.sort(flat[cells], axis=1)[:, ::-1]
        np.bitwise_and(ranked, self._mask, out=ranked)
        np.add(ranked, first, out=order)
        self._place[order] = self._column
        known = self._used[cells]
        self._used[cells] = True
        return np.where(known, place, len(self._column))


def _push_down(ranked: Ints, column: Ints, hole: Ints) -> None:
    """Free the first place: each size up to the hole passes its least worth on to the next."""
    least = np.minimum.accumulate(ranked[:, :-1], axis=1)
    moved = np.maximum(least, ranked[:, 1:])
    np.copyto(ranked[:, 1:], moved, where=column[1:] <= hole)


def worth(key: Ints, expert: Ints, experts: int) -> Ints:
    """Join keys (-1 = never used, else at least 0) and ids: of equal keys the smaller id goes."""
    joined: Ints = (key << _bits(experts)) | expert
    return joined


def largest_key(experts: int) -> int:
    """Return the largest key that `worth` can hold."""
    return (1 << (63 - _bits(experts))) - 1


def _bits(experts: int) -> int:
    return max(experts - 1, 1).bit_length()
