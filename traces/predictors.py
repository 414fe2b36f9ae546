"""Predictors: which experts are expected to be used, known some layers before they are.

A predictor is a function of the access sequence ``active [S, L, E]`` (`traces.caches`) and
answers in the same shape. How accurate gate reuse is cannot be learnt from a trace of chosen
experts: it is an input, and a result that rests on it should say so.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError

Bools = NDArray[np.bool_]
_CHUNK_CELLS = 2**20  # (step, layer, expert) cells sorted at a time
_STREAM = 8  # its own random stream: a synthetic trace of the same seed must not guide the errors


@dataclass(frozen=True, kw_only=True)
class _Options:
    depth: int
    accuracy: float
    count: int
    seed: int


def predict(
    name: str,
    active: Bools,
    *,
    depth: int = 1,
    accuracy: float = 1.0,
    count: int | None = None,
    seed: int = 0,
) -> Bools:
    """Predict the experts of every access.

    ``none``; ``exact``: what will be used, ``depth`` MoE layers ahead (Pre-gated MoE);
    ``gate_reuse``: the gate of a later layer on an earlier hidden state, as a noise model: each
    used expert is predicted with probability ``accuracy``, independently, and for each that is
    not, a wrong one is predicted instead, drawn by how often the layer uses it; ``frequent``: the
    ``count`` experts that the layer used most in earlier steps, of those it has used at all;
    ``all``: every expert of the layer (SE-MoE).

    A prediction for layer l is known when layer ``l - depth`` has been routed. For the first
    ``depth`` layers that would be in the step before, whose token decides the next one only at
    its end: there ``exact`` and ``gate_reuse`` predict nothing. ``frequent`` and ``all`` need no
    routing of the step; for them ``depth`` only says how early the copy may begin.

    Parameters
    ----------
    name : str
        One of `PREDICTORS`.
    active : bool array ``[S, L, E]``
    depth : int
        MoE layers ahead, at least 1.
    accuracy : float
        Of ``gate_reuse``, per used expert: an input, between 0 and 1.
    count : int, optional
        Of ``frequent``: experts per layer. What limits the copies of any predictor is
        `most_used` (and ``most_ahead`` of `traces.caches.replay`).
    seed : int
        Of ``gate_reuse``.

    Returns
    -------
    bool array ``[S, L, E]``

    Raises
    ------
    InputError
        If the name is unknown or a number impossible.
    """
    if name not in PREDICTORS:
        raise InputError(f"unknown predictor {name!r} -- one of {', '.join(PREDICTORS)}")
    if active.ndim != 3 or active.dtype != np.bool_:
        raise InputError(
            f"active is {active.dtype}{list(active.shape)} -- must be bool [steps, layers, "
            "experts] -- build it with active_experts"
        )
    if depth < 1:
        raise InputError(f"predictor depth {depth} -- must be at least 1 MoE layer ahead")
    if not 0 <= accuracy <= 1:
        raise InputError(f"predictor accuracy {accuracy} -- a probability, 0 to 1")
    experts = active.shape[2]
    if name == "frequent" and (count is None or not 1 <= count <= experts):
        raise InputError(
            f"predictor frequent: count {count} -- give the experts to predict per layer, 1 to "
            f"{experts}"
        )
    options = _Options(depth=depth, accuracy=accuracy, count=count or 0, seed=seed)
    return PREDICTORS[name](active, options)


def _none(active: Bools, options: _Options) -> Bools:
    return np.zeros_like(active)


def _all(active: Bools, options: _Options) -> Bools:
    return np.ones_like(active)


def _exact(active: Bools, options: _Options) -> Bools:
    predicted = active.copy()
    predicted[:, : options.depth] = False
    return predicted


def _gate_reuse(active: Bools, options: _Options) -> Bools:
    rng = np.random.default_rng([options.seed, _STREAM])
    predicted = np.zeros_like(active)
    used = np.count_nonzero(active, axis=0) + 1.0  # [L, E]; one more, so that any can be drawn
    for part in _chunks(active):
        right = active[part] & (rng.random(active[part].shape) < options.accuracy)
        missed = np.count_nonzero(active[part] & ~right, axis=2)
        # Smallest exponential clocks first = drawn without replacement, by frequency.
        clocks = rng.standard_exponential(right.shape) / used
        wrong = _first(np.where(active[part], np.inf, clocks), missed) & ~active[part]
        predicted[part] = right | wrong
    predicted[:, : options.depth] = False
    return predicted


def _frequent(active: Bools, options: _Options) -> Bools:
    predicted = np.zeros_like(active)
    for part, before in _uses_before(active):
        predicted[part] = _most(before, before > 0, options.count)
    return predicted


def most_used(chosen: Bools, active: Bools, count: int) -> Bools:
    """Keep at most ``count`` of the chosen experts of each access.

    Those stay that their layer used most in earlier steps, of equals the smaller ids.

    Parameters
    ----------
    chosen, active : bool array ``[S, L, E]``

    Returns
    -------
    bool array ``[S, L, E]``

    Raises
    ------
    InputError
        If the count is below 1.
    """
    if count < 1:
        raise InputError(f"predictor count {count} -- must be at least 1, or none for no limit")
    kept = np.zeros_like(chosen)
    for part, before in _uses_before(active):
        kept[part] = _most(before, chosen[part], count)
    return kept


def _uses_before(active: Bools) -> Iterator[tuple[slice, NDArray[np.int64]]]:
    """Yield runs of steps, and how often each expert was used before each of them ``[s, L, E]``."""
    past = np.zeros(active.shape[1:], np.int64)
    for part in _chunks(active):
        counts = past + np.cumsum(active[part], axis=0)
        yield part, np.concatenate([past[None], counts[:-1]])
        past = counts[-1]


def _most(uses: NDArray[np.int64], among: Bools, count: int) -> Bools:
    """Mark the ``count`` largest uses of each access ``[s, L, E]`` among the given."""
    most = _first(np.where(among, -uses, np.inf), np.full(uses.shape[:2], count))
    return most & among


def _first(key: NDArray[np.number], count: NDArray[np.integer]) -> Bools:
    """Mark the ``count [s, L]`` smallest keys of ``[s, L, E]``, of equal ones the smaller ids."""
    order = np.argsort(key, axis=2, kind="stable")
    marked = np.zeros(key.shape, np.bool_)
    np.put_along_axis(marked, order, np.arange(key.shape[2]) < count[..., None], axis=2)
    return marked


def _chunks(active: Bools) -> list[slice]:
    """Cut the steps into runs of about `_CHUNK_CELLS` cells."""
    rows = max(_CHUNK_CELLS // max(active[:1].size, 1), 1)
    return [slice(first, first + rows) for first in range(0, len(active), rows)]


PREDICTORS: dict[str, Callable[[Bools, _Options], Bools]] = {
    "none": _none,
    "exact": _exact,
    "gate_reuse": _gate_reuse,
    "frequent": _frequent,
    "all": _all,
}
"""Predictors by name."""
