"""The integer programme of one layer at a price per slot: mean time + price x experts kept.

Each expert is kept, computed aside, or (under ``planned``) fetched at every use; a step's time is
at least each of its timelines, and at least the convex envelope of its least time by the number
of its experts that are not kept. Under ``any`` only the envelope is left.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import numpy as np
import pulp

from planner.offload_costs import Floats
from planner.offload_layer import Bools, Layer, Rule
from planner.solver import Backend, SolverResult, solve

_SCALE = 1e6  # the programme counts microseconds


@dataclass(frozen=True, kw_only=True, eq=False)
class Column:
    """A residency of one layer."""

    keep: Bools
    """[E]."""
    fetch: Bools
    """[E]."""
    mean: float
    """Mean time over the steps, s."""
    landing: int
    """Most experts that a step fetches."""

    @classmethod
    def of(cls, layer: Layer, keep: Bools, fetch: Bools, most: int | None = None) -> Self | None:
        """Return the best of C residencies, bool [C, E] each, that fetch at most ``most``."""
        means = layer.mean(keep, fetch)
        for i in np.argsort(means, kind="stable"):
            landing = layer.landing(fetch[i])
            if most is None or landing <= most:
                return cls(keep=keep[i], fetch=fetch[i], mean=float(means[i]), landing=landing)
        return None

    @property
    def slots(self) -> int:
        """Experts kept."""
        return int(self.keep.sum())


class LayerProgram:
    """The programme of one layer; solved again for every price."""

    def __init__(self, layer: Layer, rule: Rule) -> None:
        self.layer, self.rule = layer, rule
        self._problem = pulp.LpProblem("layer", pulp.LpMinimize)
        experts, patterns = range(layer.num_experts), range(len(layer.tokens))
        self.keep = [self._problem.add_variable(f"keep_{e}", cat="Binary") for e in experts]
        self.fetch = [self._problem.add_variable(f"fetch_{e}", cat="Binary") for e in experts]
        self.times = [self._problem.add_variable(f"t_{p}", lowBound=0) for p in patterns]
        least = [float(least_times(layer, p, rule).min()) for p in patterns]
        self._floor = float(np.dot(layer.weight, least))
        for e in experts:
            total = self.keep[e] + self.fetch[e]
            if layer.times.side is None and rule != "any":
                self._problem += total == 1, f"kept_or_fetched[{e}]"
            elif rule == "planned":
                self._problem += total <= 1, f"one_site[{e}]"
            else:
                self._problem += self.fetch[e] == 0, f"never_fetched[{e}]"
        for p in patterns:
            for row in (*(() if rule == "any" else self._timelines(p)), *self._envelope(p)):
                self._problem += row

    def solve(
        self, price: float, *, backend: Backend, time_limit: float, gap: float
    ) -> tuple[Column | None, float, bool]:
        """Minimise; time limit in seconds, gap relative.

        Returns
        -------
        (the residency if one was found, the proved bound in seconds, stopped by the clock)
        """
        mean = [w * t for w, t in zip(self.layer.weight, self.times, strict=True)]
        self._problem.setObjective(pulp.lpSum(mean) + price * _SCALE * pulp.lpSum(self.keep))
        result = solve(self._problem, backend, time_limit, gap)
        bound = max(result.bound / _SCALE, self._floor)
        return self._column(result), bound, result.status == "time_limit"

    def _column(self, result: SolverResult) -> Column | None:
        if not result.values:
            return None
        keep = np.array([result.values.get(v.name, 0.0) > 0.5 for v in self.keep])
        fetch = np.array([result.values.get(v.name, 0.0) > 0.5 for v in self.fetch])
        if self.layer.times.side is None:
            fetch = ~keep
        return Column.of(self.layer, keep[None], fetch[None])

    def _timelines(self, p: int) -> Iterator[Any]:
        """Yield the epigraph rows of one step: its time is at least each timeline."""
        layer, t = self.layer, self.times[p]
        active = np.flatnonzero(layer.tokens[p])
        keep, fetch = ([v[e] for e in active] for v in (self.keep, self.fetch))
        call, own = layer.call[p, active], 0
        if layer.times.side is None or self.rule == "planned":
            own = _dot(call, fetch)
            last = self._once(f"copied_{p}", fetch, float(call.min()) + layer.times.lead)
            yield from last[1]
            yield t >= last[0] + layer.times.fetch * _SCALE * pulp.lpSum(fetch)
        start = self._once(f"kept_{p}", keep, layer.times.fast.launch)
        yield from start[1]
        for part in _undominated(layer.fast[:, p, active]):
            yield t >= start[0] + _dot(part, keep) + own
        if layer.times.side is not None:
            beside = [1 - k - f for k, f in zip(keep, fetch, strict=True)]
            start = self._once(f"side_{p}", beside, layer.side_start)
            yield from start[1]
            for part in _undominated(layer.side[:, p, active] + sent_at_least(layer, p)[active]):
                yield t >= start[0] + _dot(part, beside)

    def _once(self, name: str, terms: list[Any], cost: float) -> tuple[Any, list[Any]]:
        """Cost paid once where any term is 1, with the rows that say so."""
        if cost <= 0:  # a discount: given always, so that the row stays below the time
            return cost * _SCALE, []
        paid = self._problem.add_variable(name, lowBound=0, upBound=1)
        return cost * _SCALE * paid, [paid >= term for term in terms]

    def _envelope(self, p: int) -> Iterator[Any]:
        """Yield rows of the convex envelope of the least time by experts that are not kept.

        They are implied at whole numbers but not between them, where most of the relaxation's
        error is when few experts are active.
        """
        active = np.flatnonzero(self.layer.tokens[p])
        least = least_times(self.layer, p, self.rule)
        away = len(active) - pulp.lpSum(self.keep[e] for e in active)
        corners = _lower_hull(least)
        yield self.times[p] >= least.min() * _SCALE
        for a, b in pairwise(corners):
            slope = (least[b] - least[a]) / (b - a) * _SCALE
            yield self.times[p] >= least[a] * _SCALE + slope * (away - a)


def least_times(layer: Layer, p: int, rule: Rule) -> Floats:
    """Lower bound of a step's time by the number of its experts that are not kept, [k + 1].

    Every timeline takes its cheapest experts; exact where all experts cost the same.
    """
    active = np.flatnonzero(layer.tokens[p])
    count = len(active)
    away, fetched, aside = np.indices((count + 1, count + 1, count + 1))
    kept = np.maximum(count - fetched - aside, 0)
    possible = (fetched + aside <= count) & (fetched <= away) & (kept <= count - away)
    if rule != "any":
        possible &= kept == count - away
    if layer.times.side is None:
        possible &= aside == 0
    elif rule == "home":
        possible &= fetched == 0
    call = layer.call[p, active]
    group = np.max([_smallest_sums(part[active])[kept] for part in layer.fast[:, p]], axis=0)
    total = group + layer.times.fast.launch * (kept > 0) + _smallest_sums(call)[fetched]
    last = np.where(fetched > 0, call.min(initial=np.inf) + layer.times.lead, 0.0)
    total = np.maximum(total, layer.times.fetch * fetched + last)
    if layer.times.side is not None:
        parts = layer.side[:, p] + sent_at_least(layer, p)
        sums = [_smallest_sums(part[active])[aside] for part in parts]
        total = np.maximum(total, np.max(sums, axis=0) + layer.side_start * (aside > 0))
    return np.asarray(np.where(possible, total, np.inf).min(axis=(1, 2)))


def _undominated(parts: Floats) -> Floats:
    """Leave out the compute or the memory row where the other is at least it for every expert."""
    compute, memory = parts
    if (compute >= memory).all():
        return parts[:1]
    return parts[1:] if (memory >= compute).all() else parts


def sent_at_least(layer: Layer, p: int) -> Floats:
    """Bound what each expert adds to the activations' copies, s, [E].

    ``min(rows, tokens of the step) >= rows / top_k``, because a token has top_k rows in all.
    """
    return np.asarray(layer.times.per_token * layer.tokens[p] / layer.times.top_k)


def _dot(costs: Floats, variables: list[Any]) -> Any:
    return pulp.lpSum(c * _SCALE * v for c, v in zip(costs, variables, strict=True) if c > 0)


def _smallest_sums(values: Floats) -> Floats:
    return np.concatenate([[0.0], np.cumsum(np.sort(values))])


def _lower_hull(values: Floats) -> list[int]:
    """Return the corners of the lower convex hull of the points (i, values[i])."""
    hull: list[int] = []
    for i, value in enumerate(values):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (values[b] - values[a]) * (i - a) < (value - values[a]) * (b - a):
                break
            hull.pop()
        hull.append(i)
    return hull
