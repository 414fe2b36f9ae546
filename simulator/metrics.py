"""Figures of merit of a placement: stragglers, their sampling floor, distinct nodes.

The straggler of a step and layer is the busiest rank's tokens over the mean rank's tokens (1 is
perfect). Even perfectly equal shares give more than 1 at a finite batch: the sampling floor.
"""

import numpy as np
from numpy.typing import NDArray


def straggler(rank_load: NDArray[np.floating] | NDArray[np.integer]) -> NDArray[np.float64]:
    """Busiest over mean rank load, [...] from loads [..., ranks]; 1 where nothing is loaded."""
    load = np.asarray(rank_load, dtype=np.float64)
    mean = load.mean(axis=-1)
    return np.divide(load.max(axis=-1), mean, out=np.ones_like(mean), where=mean > 0)


def sampling_floor(
    tokens: int, top_k: int, num_ranks: int, *, samples: int = 4000, seed: int = 0
) -> float:
    """Mean straggler of ``tokens * top_k`` choices thrown at ranks with exactly equal shares.

    Choices are independent here. Real tokens differ both ways: the experts of one token are
    distinct (less spread), and a request keeps its favourites (more), so a placement may come
    slightly below this floor or stay above it.
    """
    rng = np.random.default_rng(seed)
    load = rng.multinomial(tokens * top_k, np.full(num_ranks, 1 / num_ranks), size=samples)
    return float(straggler(load).mean())


def distinct_nodes(
    experts: NDArray[np.integer], node_of_expert: NDArray[np.integer]
) -> NDArray[np.int64]:
    """Count the nodes that hold a token's experts, [tokens, layers].

    Parameters
    ----------
    experts : integer array [tokens, layers, top_k]
    node_of_expert : integer array [layers, experts]
        For placements without replicas. With homes uniform over N nodes the expected number of
        remote nodes of a token is ``(N - 1) / N`` of this.
    """
    layers = np.arange(experts.shape[1])[None, :, None]
    nodes = np.sort(node_of_expert[layers, experts], axis=-1)
    return 1 + (np.diff(nodes, axis=-1) != 0).sum(axis=-1)
