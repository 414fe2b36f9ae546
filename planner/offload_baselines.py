"""What engines do with experts that do not fit: what an offload plan must be compared with.

Each baseline fills the same number of slots of the fast memory and leaves the rest at home; misses
are computed there where a processor stands, else fetched. Counts of experts; no times.
"""

import numpy as np
from numpy.typing import NDArray

from simulator.offload import Cache, Offload, Site

Bools = NDArray[np.bool_]


def first_layers(num_layers: int, num_experts: int, slots: int) -> Bools:
    """Whole layers: the experts of the first ones stay at home, as many last ones as fit are kept.

    (llama.cpp ``--n-cpu-moe N``: experts of blocks 0 to N - 1 on the CPU.)

    Returns
    -------
    bool [L, E]
    """
    keep = np.zeros((num_layers, num_experts), dtype=np.bool_)
    keep[num_layers - min(slots // num_experts, num_layers) :] = True
    return keep


def uniform(num_layers: int, num_experts: int, slots: int) -> Bools:
    """Equal numbers in every layer, lowest ids; what does not divide goes to the first layers.

    (SGLang ``--kt-num-gpu-experts N``: experts 0 to N - 1 of every layer.)
    """
    each, more = divmod(min(slots, num_layers * num_experts), num_layers)
    counts = each + (np.arange(num_layers) < more)
    return np.arange(num_experts) < counts[:, None]


def most_frequent(counts: NDArray[np.integer], slots: int) -> Bools:
    """Most used experts over all layers together; of equal counts the lower layer and id.

    (ktransformers ``--kt-expert-placement-strategy frequency``.)

    Parameters
    ----------
    counts : integer array [L, E]
        Tokens of each expert.
    """
    keep = np.zeros(counts.size, dtype=np.bool_)
    keep[np.argsort(-counts.ravel(), kind="stable")[:slots]] = True
    return keep.reshape(counts.shape)


def rows_of(keep: Bools) -> tuple[tuple[int, ...], ...]:
    """Return the ids of each layer's kept experts."""
    return tuple(tuple(np.flatnonzero(row).tolist()) for row in keep)


def baseline_offloads(
    counts: NDArray[np.integer], slots: int, home: str, processor: str | None
) -> dict[str, Offload]:
    """Return the baselines by name.

    Parameters
    ----------
    counts : integer array [L, E]
        Tokens of each expert on the part planned on.
    slots : int
        Experts that fit into the fast memory.
    processor : str, optional
        Computes misses at home; None: they are fetched.
    """
    layers, experts = counts.shape
    aside = Site(name="fetch" if processor is None else "home", processor=processor)
    kept = {
        "first_layers": first_layers(layers, experts, slots),
        "uniform": uniform(layers, experts, slots),
        "most_frequent": most_frequent(counts, slots),
    }
    found = {
        name: Offload(home=home, resident=rows_of(keep), site=aside) for name, keep in kept.items()
    }
    if slots >= layers:
        cache = Cache(slots=slots // layers, score="lru")
        found["lru_on_demand"] = Offload(home=home, cache=cache, site=Site(name="fetch"))
    none = "all_aside" if processor is not None else "all_fetched"
    found[none] = Offload(home=home, site=aside)
    return found
