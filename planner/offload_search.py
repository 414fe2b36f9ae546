"""Residencies of single layers, how they are found without a solver, and the choice among them.

A pool holds residencies of one layer; a dynamic programme picks one of each pool within a number
of slots, and local search adds better ones. Seconds; slots are experts.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from basis.errors import InfeasibleError
from planner.offload_layer import Bools, Layer, Rule
from planner.offload_program import Column

_BISECTIONS = 40
_RELATIVE = 1e-9  # an improvement below this is rounding


def start(layer: Layer, rule: Rule) -> list[Column]:
    """Residencies of every size, without and (where the rule allows it) with fetched experts."""
    plain = _chain(layer, "home")
    return plain if rule == "home" else plain + _chain(layer, rule)


@dataclass(frozen=True, kw_only=True, eq=False)
class Search:
    """Residencies of every layer found so far, and the choice among them."""

    layers: tuple[Layer, ...]
    pools: list[list[Column]]
    rule: Rule

    def at(self, slots: int, deadline: float = 0.0) -> list[Column]:
        """Choose a residency of each layer; with what lands beside them they fit into ``slots``.

        Until the deadline (`time.monotonic`) local search improves them.

        Raises
        ------
        InfeasibleError
            If what a step has to fetch does not fit.
        """
        while True:
            chosen, better = self._choose(slots), 0
            most = max(c.landing for c in chosen)
            for layer, pool, column in zip(self.layers, self.pools, chosen, strict=True):
                found = _descend(layer, column, self.rule, most, deadline)
                least = {n: min((c.mean for c in pool if c.slots == n), default=np.inf)
                         for n in {c.slots for c in found}}  # fmt: skip
                new = [c for c in found if c.mean < least[c.slots] * (1 - _RELATIVE)]
                pool += new
                better += len(new)
            if not better or time.monotonic() > deadline:
                return self._choose(slots)

    def _choose(self, slots: int) -> list[Column]:
        """Pick for every number of landing buffers, and take the best."""
        best: list[Column] = []
        for landing in sorted({c.landing for pool in self.pools for c in pool}):
            pools = [[c for c in pool if c.landing <= landing] for pool in self.pools]
            room = slots - landing
            if room < 0 or sum(min((c.slots for c in p), default=slots + 1) for p in pools) > room:
                continue
            chosen = pick(pools, room)
            if sum(c.slots for c in chosen) > room:
                continue
            if not best or sum(c.mean for c in chosen) < sum(c.mean for c in best):
                best = chosen
        if not best:
            least = min(c.landing + c.slots for pool in self.pools for c in pool)
            raise InfeasibleError(
                f"{slots} experts fit into the fast memory for experts -- a step fetches "
                f"{least} or more of one layer",
                levers=("more fast_memory", "a smaller decode_batch", "a processor at the home"),
            )
        return best


def pick(pools: Sequence[Sequence[Column]], slots: int) -> list[Column]:
    """Choose one column of each layer, at most ``slots`` in all, with the least sum of means."""
    best, picked = np.zeros(slots + 1), []
    for pool in pools:
        totals = np.full((len(pool), slots + 1), np.inf)
        for row, column in zip(totals, pool, strict=True):
            if column.slots <= slots:
                row[column.slots :] = best[: slots + 1 - column.slots] + column.mean
        picked.append(totals.argmin(axis=0))
        best = totals.min(axis=0)
    left, chosen = slots, []
    for pool, choice in zip(reversed(pools), reversed(picked), strict=True):
        column = pool[int(choice[left])]
        chosen.append(column)
        left -= column.slots
    return chosen[::-1]


def pool_price(pools: Sequence[Sequence[Column]], slots: int) -> float:
    """Price per slot at which the pools' cheapest columns fill the budget, s per slot."""

    def used(price: float) -> int:
        return sum(min(p, key=lambda c: (c.mean + price * c.slots, c.slots)).slots for p in pools)

    low, high = 0.0, max(c.mean for pool in pools for c in pool)
    if used(low) <= slots:
        return 0.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if used(middle) <= slots else (middle, high)
    return high


def _chain(layer: Layer, rule: Rule) -> list[Column]:
    """One residency of each size, each the last one and the expert that helps most.

    Under ``planned`` each may also change one expert between fetched and aside.
    """
    experts = layer.num_experts
    one = np.eye(experts, dtype=np.bool_)
    fetch_all = layer.times.side is None
    toggles = rule == "planned" and not fetch_all
    keep = np.zeros(experts, dtype=np.bool_)
    fetch = np.full(experts, fetch_all)
    columns: list[Column] = []
    while True:
        column = Column.of(layer, keep[None], fetch[None])
        assert column is not None
        begun = bool(columns)
        columns.append(column)
        while toggles and not keep.all():
            other = Column.of(layer, *_toggled(column, one))
            if other is None or other.mean >= column.mean:
                break
            column = other
            columns.append(column)
            if begun:
                break
        if keep.all():
            return columns
        more = column.keep | one[~column.keep]
        best = Column.of(layer, more, column.fetch & ~more)
        assert best is not None
        keep, fetch = best.keep, best.fetch


def _toggled(column: Column, one: Bools) -> tuple[Bools, Bools]:
    """Residencies that change one expert between fetched and aside, bool [C, E] each."""
    changed = one[~column.keep]
    return np.repeat(column.keep[None], len(changed), axis=0), column.fetch ^ changed


def _descend(layer: Layer, column: Column, rule: Rule, most: int, deadline: float) -> list[Column]:
    """Swap a kept expert for another, or fetch one instead of computing it aside, while it helps.

    No step fetches more than ``most`` experts.

    Returns
    -------
    list of Column
        The local optimum, and the best ones with one expert more and with one less.
    """
    while time.monotonic() < deadline:
        moves = _neighbours(column, layer, rule)
        if not len(moves[0]):
            break
        best = Column.of(layer, *moves, most=most)
        if best is None or best.mean >= column.mean * (1 - _RELATIVE):
            break
        column = best
    return [column, *_sized(layer, column, most)]


def _sized(layer: Layer, column: Column, most: int) -> list[Column]:
    """Return the best columns with one expert more and one less."""
    one = np.eye(layer.num_experts, dtype=np.bool_)
    found = []
    for flips in (~column.keep, column.keep):
        keep = column.keep ^ one[flips]
        if len(keep):
            fetch = (column.fetch | (layer.times.side is None)) & ~keep
            found.append(Column.of(layer, keep, fetch, most=most))
    return [column for column in found if column is not None]


def _neighbours(column: Column, layer: Layer, rule: Rule) -> tuple[Bools, Bools]:
    """Residencies one swap, or one change between fetched and aside, away; bool [C, E] each."""
    one = np.eye(layer.num_experts, dtype=np.bool_)
    out, into = np.nonzero(column.keep[:, None] & ~column.keep[None, :])
    keep = column.keep ^ one[out] ^ one[into]
    always = layer.times.side is None
    fetch = (column.fetch & ~one[into]) | (one[out] & always)
    if rule == "home" or always:
        return keep, fetch
    swapped = column.fetch[into][:, None] & one[out]  # the one that leaves is fetched in turn
    same, toggled = _toggled(column, one)
    return np.concatenate([keep, keep, same]), np.concatenate([fetch, fetch | swapped, toggled])
