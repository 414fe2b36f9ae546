"""What a gate limited to groups of experts makes of logits that are nearly all equal.

The tables' logits single out k experts of each token and leave the others equal. DeepSeek's gate
scores a group of experts by its two best, keeps the best groups and takes the k best experts in
them; where a kept group offers too few singled-out experts, ties decide. TensorRT-LLM's fused
gate breaks ties towards the lower index, for groups and for experts.
"""

import numpy as np
from numpy.typing import NDArray

GROUPS = 8
"""Groups of experts in TensorRT-LLM's min-latency rows (DeepSeek-V3's number)."""
KEPT = 4
"""Groups that a token may use."""

Ints = NDArray[np.int64]


def group_limited(chosen: Ints, weight: Ints, experts: int) -> Ints:
    """Return tokens of each expert behind the gate.

    Parameters
    ----------
    chosen : ndarray [n, k]
        Experts that the logits of distinct tokens single out.
    weight : ndarray [n]
        Tokens of each kind.
    experts : int
        Experts of the layer, a multiple of the groups.

    Returns
    -------
    ndarray [experts]
        Sums to k times the tokens.
    """
    n, top_k = chosen.shape
    hot = np.zeros((n, experts), dtype=bool)
    hot[np.arange(n)[:, None], chosen] = True
    grouped = hot.reshape(n, GROUPS, experts // GROUPS)
    best = np.minimum(grouped.sum(axis=2), 2)  # a group's score counts its two best
    order = np.argsort(-best, axis=1, kind="stable")
    kept = np.zeros((n, GROUPS), dtype=bool)
    kept[np.arange(n)[:, None], order[:, :KEPT]] = True
    allowed = np.repeat(kept, experts // GROUPS, axis=1)
    taken = hot & allowed
    missing = top_k - taken.sum(axis=1, keepdims=True)
    cold = ~hot & allowed
    taken |= cold & (np.cumsum(cold, axis=1) <= missing)
    return np.asarray(weight @ taken.astype(np.int64))


def kinds(counts: Ints, tokens: int, top_k: int) -> tuple[Ints, Ints]:
    """Return the distinct tokens [n, k] of given loads [experts], and how many there are of each.

    Loads are laid out as upstream does: the experts, the most loaded first, each repeated by its
    load, fill the tokens' first choices, then their second ones, and so on.
    """
    order = np.argsort(-counts, kind="stable")
    ends = np.cumsum(counts[order])
    starts = np.unique(np.concatenate([[0], ends % tokens]))
    starts = starts[starts < tokens]
    places = starts[:, None] + np.arange(top_k) * tokens
    chosen = order[np.searchsorted(ends, places, side="right")]
    return chosen, np.diff(np.append(starts, tokens))
