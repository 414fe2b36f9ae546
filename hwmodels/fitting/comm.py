"""Fit the cost models of collectives on measured tables, and score them by group size.

Which model a table takes follows from what was measured: rings for libraries' collectives, peers
for their all-to-all, an engine's own all-reduce, DeepEP's modes, kernels that exchange tokens. A
parameter that the rows cannot tell (per expert, where all have as many) stays at its default.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmodels.figures import HeldOut
from hwmodels.fitting.fit import Fit, fit, interval, score
from hwmodels.kernels.base import Features, Limits, Numbers, Parameter
from hwmodels.kernels.collective import CollectiveCost
from hwmodels.kernels.exchange import ChannelExchange, PeersCost, TokenExchange
from hwmodels.kernels.rings import DirectCost, RingCost
from hwmodels.ops import Floats
from hwmodels.silicon.comm import CommTable
from hwmodels.silicon.comm_moe import LOW_LATENCY

_LIMITS = [1.5 * 2.0**power for power in range(17, 28)]  # bytes, between the sizes measured


@dataclass(frozen=True, kw_only=True)
class CommFit:
    """A fitted cost model of one table, with its errors."""

    table: CommTable
    cost: CollectiveCost
    """With ``held_out`` and the interval of the held-out rows."""
    fitted: HeldOut
    """Errors on the rows fitted."""
    by_ranks: dict[int, HeldOut]
    """Errors on held-out rows by members of the link."""


def fit_comm(tables: Sequence[CommTable], units: float) -> list[CommFit]:
    """Fit one cost model per table.

    Parameters
    ----------
    tables : sequence of CommTable
        Those without enough rows on either side of the split (8 fitted, 3 held out) are left out.
    units : float
        Units (SMs) of the device.

    Returns
    -------
    list of CommFit
    """
    found = []
    for table in tables:
        held = table.held_out
        if (~held).sum() >= 8 and held.sum() >= 3:
            found.append(_fit_table(table, held, units))
    return found


@dataclass(frozen=True)
class Piece:
    """Rows of one table that take part in a fit."""

    table: CommTable
    units: float
    """Units (SMs) of the table's device."""
    chosen: NDArray[np.bool_]
    """[n] rows fitted."""


@dataclass(frozen=True)
class Found:
    """A cost model with the choices and numbers that fitted best."""

    kind: type[CollectiveCost]
    choices: dict[str, Any]
    numbers: dict[str, float]

    def predict(self, table: CommTable, units: float) -> Floats:
        """Return seconds [n] of all rows of a table."""
        features = _features(self.kind, self.choices, table, units)
        return self.kind.time(_all(self.kind, self.numbers), features)

    def made(self, **said: Any) -> CollectiveCost:
        """Return the cost model; as its values are in SI already, nothing is read from text."""
        values: dict[str, Any] = {**self.numbers, **self.choices, **said}
        return self.kind.model_construct(**values)


def search(pieces: Sequence[Piece]) -> Found:
    """Fit one cost model on rows of one or several tables of the same kernel."""
    best: tuple[Fit, Found] | None = None
    seconds = np.concatenate([p.table.seconds[p.chosen] for p in pieces])
    first = pieces[0].table
    for kind, choices in _candidates([piece.table for piece in pieces]):
        parts = [_rows(_features(kind, choices, p.table, p.units), p.chosen) for p in pieces]
        features = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        found = _fit(kind, first, features, seconds)
        if best is None or found.loss < best[0].loss:
            best = (found, Found(kind, choices, found.numbers))
    assert best is not None
    return best[1]


def _features(
    kind: type[CollectiveCost], choices: dict[str, Any], table: CommTable, units: float
) -> Features:
    limits = Limits(flops=0.0, bandwidth=table.rate, units=units)
    return table.features(kind.model_construct(**choices), limits)


def _fit_table(table: CommTable, held: NDArray[np.bool_], units: float) -> CommFit:
    found = search([Piece(table, units, ~held)])
    predicted = found.predict(table, units)
    low, high = interval(predicted[held], table.seconds[held])
    cost = found.made(
        kernel=table.kernel,
        low=low,
        high=high,
        evidence="fitted",
        source=f"{table.source.path} ({table.source.package})",
        held_out=score(predicted[held], table.seconds[held]),
    )
    return CommFit(
        table=table,
        cost=cost,
        fitted=score(predicted[~held], table.seconds[~held]),
        by_ranks=dict(_by_ranks(table, predicted, held)),
    )


def _candidates(
    tables: Sequence[CommTable],
) -> Iterator[tuple[type[CollectiveCost], dict[str, Any]]]:
    """Yield the models that fit what was measured, with the choices to try on the fitted rows."""
    table = tables[0]
    if table.op in ("dispatch", "combine"):
        if table.kernel.startswith("deepep_normal"):
            yield ChannelExchange, {"units": 20}
        else:
            own = table.kernel == "deepep_ll" and table.source.engine == "sglang"
            choices = {"spread": "experts" if own else "fixed"}
            per = "expert" if table.kernel in LOW_LATENCY else "rank"
            yield TokenExchange, choices | {"sent_per": per}
    elif table.op == "all_to_all":
        yield PeersCost, {}
    elif table.source.engine in ("nccl", "oneccl"):
        yield RingCost, {}
    else:
        most_measured = max(int(t.frame["ranks"].max()) for t in tables)
        for most in sorted({min(4, most_measured), most_measured}):
            for limit in _LIMITS:
                yield DirectCost, {"limit": limit, "most_ranks": most}


def _fit(kind: type[CollectiveCost], table: CommTable, features: Features, seconds: Floats) -> Fit:
    told = [p for p in kind.PARAMETERS if _told(p, kind, table, features)]

    def time(numbers: Numbers, rows: Features) -> Floats:
        return kind.time(_all(kind, numbers), rows)

    starts = 1 if kind is DirectCost else 3
    return fit(told, time, features, seconds, starts=starts, evaluations=200)


def _told(
    parameter: Parameter, kind: type[CollectiveCost], table: CommTable, features: Features
) -> bool:
    """Whether the rows can tell a parameter from the others."""
    match parameter.name:
        case "expert":
            return _vary(features["experts"])
        case "peer":
            return _vary(features["ranks"])
        case "host":  # NVLink's kernels and SGLang's rows were timed in a graph
            return "deepep" in table.kernel and table.source.engine != "sglang"
        case "row_rate":
            return _vary(features["row"])
        case "narrow":
            return table.link.startswith("pcie")
        case "multicast":  # switches add up since NVLink 4
            return table.op == "all_reduce" and table.link in ("nvlink4", "nvlink5")
        case _:
            return True


def _vary(column: Floats) -> bool:
    return bool(np.ptp(column) > 0)


def _all(kind: type[CollectiveCost], numbers: Numbers) -> dict[str, float]:
    """Add the defaults of parameters that were not fitted."""
    defaults = {p.name: kind.model_fields[p.name].default for p in kind.PARAMETERS}
    return defaults | dict(numbers)


def _by_ranks(
    table: CommTable, predicted: Floats, held: NDArray[np.bool_]
) -> Iterator[tuple[int, HeldOut]]:
    ranks = table.load.ranks
    for size in np.unique(ranks[held]):
        rows = held & (ranks == size)
        yield int(size), score(predicted[rows], table.seconds[rows])


def _rows(features: Features, chosen: NDArray[np.bool_]) -> Features:
    return {name: column[..., chosen] for name, column in features.items()}
