"""Eviction scores: how much an expert in a cache is worth keeping; the smallest goes first.

Every score here follows from the sequence of accesses alone, never from what the cache holds,
so it is computed once for a whole sequence: a *key* per touched expert that stays valid until
the expert is touched again. Keys of one score can be compared across layers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from traces.routing_trace import RoutingTrace

Bools = NDArray[np.bool_]
Floats = NDArray[np.floating]


@dataclass(frozen=True, kw_only=True, eq=False)
class Keys:
    """What each expert is worth while a sequence of S steps x L layers is replayed.

    A cell is ``layer * E + expert``, an access ``step * L + layer``.
    """

    initial: NDArray[np.float64]
    """``[L * E]`` keys before the first access."""
    cells: NDArray[np.int64]
    """``[n]`` cells whose key changes, access after access."""
    values: NDArray[np.float64]
    """``[n]`` their new keys."""
    bounds: NDArray[np.int64]
    """``[S * L + 1]`` access a changes ``cells[bounds[a]:bounds[a + 1]]``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Touched:
    """The touched cells in order of access; n in all."""

    access: NDArray[np.int64]
    """``[n]``, ascending."""
    cells: NDArray[np.int64]
    order: NDArray[np.int64]
    """``[n]`` permutation that puts the touches of each cell side by side, in order of access."""
    first: Bools
    """``[n]`` in that order: whether it is the cell's first touch."""
    weight: NDArray[np.float64]
    """``[n]`` summed router score of each touch; 1 where a score needs none."""
    layers: int
    accesses: int
    decay: float


def score_keys(
    name: str, active: Bools, *, scores: Floats | None = None, decay: float = 0.5
) -> Keys:
    """Compute the keys of a score for a sequence.

    ``lru`` time of the last use. ``lfu`` number of accesses that used the expert, counted over
    all that has been played, also while it was not in the cache; of equals the one used longer
    ago goes. ``belady`` minus the time of the next use: it knows the future, no real cache does.
    ``weight_ema`` and ``mrs``: exponential moving average ``V <- decay V + (1 - decay) x`` at
    each access of the layer, where x is the summed router weight of the chosen experts, or the
    score of the token's 2k best candidates (HybriMoE's Minus Recent Score, ``S <- a TopP(s) +
    (1 - a) S`` with p = 2k and a = 1 - decay), else 0. It is kept as ``log(V) - t log(decay)``
    with t the time in steps, which decays by itself.

    Parameters
    ----------
    name : str
        One of `SCORES`.
    active : bool array ``[S, L, E]``
    scores : float array ``[S, L, E]``, optional
        For ``weight_ema`` and ``mrs``: `expert_scores`.
    decay : float
        Of the averages, per step; between 0 and 1, both excluded.

    Raises
    ------
    InputError
        If the name is unknown, a score's input is missing, of another shape or negative, or the
        decay is impossible.
    """
    check_score(name)
    if name not in NEEDS:
        return _keys(name, active, None, decay)
    if scores is None or scores.shape != active.shape:
        has = "none" if scores is None else f"{list(scores.shape)}"
        raise InputError(
            f"score {name!r} needs router scores {list(active.shape)}, got {has} -- give those of "
            "expert_scores, or use lru"
        )
    if not 0 < decay < 1:
        raise InputError(f"decay {decay} of score {name!r} -- must be between 0 and 1")
    if not (np.isfinite(scores) & (scores >= 0)).all():
        raise InputError(f"scores of {name!r} -- must be finite and not negative")
    return _keys(name, scores > 0, scores, decay)


def check_score(name: str) -> None:
    """Check that a score of this name exists.

    Raises
    ------
    InputError
        If it does not.
    """
    if name not in SCORES:
        raise InputError(f"unknown eviction score {name!r} -- one of {', '.join(SCORES)}")


def needs(name: str, trace: RoutingTrace) -> None:
    """Check that a trace has what an eviction score needs.

    Raises
    ------
    InputError
        If the name is unknown, or the trace lacks router weights or the 2k best candidates.
    """
    check_score(name)
    meta = trace.meta
    if NEEDS.get(name) == "weights" and trace.weights is None:
        raise InputError(
            f"score {name!r} needs the router weights of the chosen experts, this trace of "
            f"{meta.model} has none -- record weights or use lru"
        )
    wanted = mrs_candidates(trace)
    has = 0 if trace.candidates is None else meta.num_candidates
    if NEEDS.get(name) == "candidates" and has < wanted:
        only = f"{has}" if has else f"the chosen {meta.top_k}"
        other = "lru" if trace.weights is None else "weight_ema"
        raise InputError(
            f"score {name!r} needs the 2k = {wanted} best candidates of each token, this trace has "
            f"only {only} -- record candidates or use {other}"
        )


def mrs_candidates(trace: RoutingTrace) -> int:
    """Return p = 2k, the candidates of a token that MRS looks at (at most all experts)."""
    return min(2 * trace.meta.top_k, trace.meta.num_experts)


def _keys(name: str, touched: Bools, weight: Floats | None, decay: float) -> Keys:
    """Compute the keys of the cells where ``touched [S, L, E]``."""
    steps, layers, experts = touched.shape
    access, expert = np.nonzero(touched.reshape(steps * layers, experts))
    cells = access % layers * experts + expert
    order = np.argsort(cells, kind="stable")
    first = np.ones(len(cells), np.bool_)
    first[1:] = np.diff(cells[order]) > 0
    value = np.ones(len(cells)) if weight is None else weight[touched].astype(np.float64)
    initial, values = SCORES[name](
        _Touched(
            access=access, cells=cells, order=order, first=first, weight=value,
            layers=layers, accesses=steps * layers, decay=decay,
        )
    )  # fmt: skip
    before = np.full(layers * experts, -np.inf)
    before[cells[order[first]]] = initial[order[first]]
    bounds = np.concatenate([[0], np.cumsum(np.bincount(access, minlength=steps * layers))])
    return Keys(initial=before, cells=cells, values=values, bounds=bounds)


Pair = tuple[NDArray[np.float64], NDArray[np.float64]]
"""``[n]`` each: the key that a touched cell has before (used at its first touch), and after."""


def _worthless(touched: _Touched) -> NDArray[np.float64]:
    return np.full(len(touched.cells), -np.inf)


def _lru(touched: _Touched) -> Pair:
    return _worthless(touched), touched.access.astype(np.float64)


def _lfu(touched: _Touched) -> Pair:
    place = np.arange(len(touched.order))
    group_start = np.maximum.accumulate(np.where(touched.first, place, 0))
    count = np.empty(len(place))
    count[touched.order] = place - group_start + 1
    return _worthless(touched), count + touched.access / touched.accesses  # a fraction below 1


def _belady(touched: _Touched) -> Pair:
    now = -touched.access.astype(np.float64)
    following = np.full(len(now), -np.inf)
    following[:-1] = np.where(touched.first[1:], -np.inf, now[touched.order][1:])
    after = np.empty_like(now)
    after[touched.order] = following
    return now, after


def _average(touched: _Touched) -> Pair:
    time = touched.access / touched.layers
    terms = np.log((1 - touched.decay) * touched.weight) - time * np.log(touched.decay)
    terms = terms[touched.order]
    starts = np.flatnonzero(touched.first)
    for start, stop in zip(starts, np.append(starts, len(terms))[1:], strict=True):
        np.logaddexp.accumulate(terms[start:stop], out=terms[start:stop])
    after = np.empty_like(terms)
    after[touched.order] = terms
    return _worthless(touched), after


SCORES: dict[str, Callable[[_Touched], Pair]] = {
    "lru": _lru,
    "lfu": _lfu,
    "belady": _belady,
    "weight_ema": _average,
    "mrs": _average,
}
"""Eviction scores by name."""
NEEDS = {"weight_ema": "weights", "mrs": "candidates"}
"""What a score takes from the trace besides the chosen experts."""
