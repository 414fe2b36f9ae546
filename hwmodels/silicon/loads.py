"""The loads that the measured expert layers were given: tokens of each expert on the timed rank.

`balanced` gives each token experts a fixed stride apart. A power law draws a weight for every
expert, scales the weights to tokens x k, clamps at the number of tokens and evens the remainder
out rank by rank; the rank with most tokens is timed. Tables average five unseeded draws, so a
reader draws five with seeds of its own. After `collector/helper.py` of
github.com/ai-dynamo/aiconfigurator.
"""

from functools import lru_cache
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from basis import InputError
from hwmodels.silicon.gates import group_limited, kinds

DRAWS = 5
Counts = NDArray[np.int32]


@lru_cache(maxsize=200_000)
def rank_loads(
    tokens: int, top_k: int, experts: int, ranks: int, distribution: str, grouped: bool = False
) -> Counts:
    """Return tokens of each local expert on the timed rank, for each draw.

    Parameters
    ----------
    tokens, top_k, experts, ranks : int
        Tokens of all ranks together, experts of each, experts of the layer, ranks that share them.
    distribution : str
        ``balanced`` or ``power_law_<exponent>``.
    grouped : bool
        Whether the gate is limited to groups of experts, see `hwmodels.silicon.gates`.

    Returns
    -------
    ndarray [draws, experts // ranks]
        One draw for ``balanced``, else five.

    Raises
    ------
    InputError
        An unknown distribution.
    """
    local = experts // ranks
    if distribution == "balanced":
        if not grouped:
            return balanced(tokens, top_k, experts)[None, :local]
        chosen, weight = np.unique(_strided(tokens, top_k, experts), axis=0, return_counts=True)
        return group_limited(chosen, weight, experts)[None, :local].astype(np.int32)
    name, _, exponent = distribution.rpartition("_")
    if name != "power_law":
        raise InputError(
            f"loads: distribution {distribution!r} -- balanced or power_law_<exponent>"
        )
    seed = crc32(f"{tokens} {top_k} {experts} {ranks} {distribution}".encode())
    rng = np.random.default_rng(seed)
    counts = power_law(tokens, top_k, experts, ranks, float(exponent), rng)
    busiest = counts.sum(axis=2).argmax(axis=1)
    if not grouped:
        return counts[np.arange(DRAWS), busiest].astype(np.int32)
    behind = []
    for draw, rank in zip(counts, busiest, strict=True):
        draw[[0, rank]] = draw[[rank, 0]]  # the busiest rank is timed, as the first
        behind.append(group_limited(*kinds(draw.ravel(), tokens, top_k), experts)[:local])
    return np.stack(behind).astype(np.int32)


@lru_cache(maxsize=20_000)
def balanced(tokens: int, top_k: int, experts: int) -> Counts:
    """Return tokens of each expert [experts] when choices lie a fixed stride apart."""
    chosen = _strided(tokens, top_k, experts)
    return np.bincount(chosen.ravel(), minlength=experts).astype(np.int32)


def _strided(tokens: int, top_k: int, experts: int) -> NDArray[np.int64]:
    """Return the experts [tokens, k] of each token, a fixed stride apart."""
    stride = -(-experts // top_k)
    start = np.arange(tokens, dtype=np.float64)[:, None]
    if tokens < stride:
        start = start * stride / tokens
    return np.asarray((start + np.arange(top_k) * stride) % experts).astype(np.int64)


def power_law(
    tokens: int,
    top_k: int,
    experts: int,
    ranks: int,
    exponent: float,
    rng: np.random.Generator,
    draws: int = DRAWS,
) -> NDArray[np.int64]:
    """Return tokens of each expert [draws, ranks, experts // ranks], drawn as the module says."""
    counts = rounded(tokens, top_k, experts, exponent, rng, draws)
    counts = counts.reshape(draws, ranks, experts // ranks)
    missing = tokens * top_k - counts.sum(axis=(1, 2))
    counts = _raised(counts, np.maximum(missing, 0), tokens)
    return -_raised(-counts, np.maximum(-missing, 0), 0)


def rounded(
    tokens: int,
    top_k: int,
    experts: int,
    exponent: float,
    rng: np.random.Generator,
    draws: int,
) -> NDArray[np.int64]:
    """Return drawn tokens of each expert [draws, experts], before the remainder is evened out."""
    low, high = (0.01, 2.0) if tokens * top_k <= experts else (1.0, 0.8 * tokens)
    e = 1 - exponent
    u = rng.random((draws, experts))
    weight = (low**e + u * (high**e - low**e)) ** (1 / e)
    share = weight / weight.sum(axis=1, keepdims=True)
    return np.minimum(np.rint(share * tokens * top_k).astype(np.int64), tokens)


def _raised(
    counts: NDArray[np.int64], amount: NDArray[np.int64], ceiling: int
) -> NDArray[np.int64]:
    """Add ``amount`` [draws] to counts [draws, ranks, local]: ranks in turn, lowest first."""
    counts, left = counts.copy(), amount.copy()
    while left.any():
        room = (ceiling - counts).sum(axis=2)
        open_ranks = np.maximum((room > 0).sum(axis=1), 1)
        turn = np.cumsum(room > 0, axis=1) - 1
        share = left // open_ranks
        extra = turn < (left - share * open_ranks)[:, None]
        given = np.minimum(np.where(room > 0, share[:, None] + extra, 0), room)
        if not given.any():
            break  # every expert has every token
        counts = _filled(counts, given)
        left = left - given.sum(axis=1)
    return counts


def _filled(counts: NDArray[np.int64], given: NDArray[np.int64]) -> NDArray[np.int64]:
    """Raise the lowest of each rank's counts by ``given`` [draws, ranks] in all, like water."""
    order = np.argsort(counts, axis=2, kind="stable")
    ranked = np.take_along_axis(counts, order, axis=2)
    number = np.arange(1, counts.shape[2] + 1)
    # water needed until the surface reaches the next expert's count
    needed = number * ranked - np.cumsum(ranked, axis=2)
    wet = (needed <= given[..., None]).sum(axis=2, keepdims=True)
    below = np.take_along_axis(np.cumsum(ranked, axis=2), wet - 1, axis=2)
    surface, extra = np.divmod(given[..., None] + below, wet)
    level = np.where(number <= wet, surface + (number <= extra), ranked)
    out = np.empty_like(counts)
    np.put_along_axis(out, order, level, axis=2)
    return out
