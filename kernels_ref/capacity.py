"""Experts of limited capacity: an expert takes at most C tokens, and something must give.

Expert choice turns the question round (each expert picks its C best tokens); drop takes the choice
away from tokens that come too late; reroute sends them to their next best expert with room.
Shape suffixes: T tokens, D model width, E experts, C capacity, K experts per token, J >= K
candidates of a token.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class ExpertChoice(NamedTuple):
    """The tokens that each expert picked."""

    token_ids_EC: Tensor
    """Picked tokens, int64, distinct in a row, by falling probability."""
    weights_EC: Tensor
    """Combine weights, the probabilities of the picked pairs, dimensionless."""
    probs_TE: Tensor
    """Softmax over all experts, at least float32."""


class CapacityRouting(NamedTuple):
    """A routing in which no expert has more than C tokens."""

    topk_ids_TK: Tensor
    """Experts of each token, int64; -1 where a choice found no room."""
    topk_weights_TK: Tensor
    """Combine weights, dimensionless, 0 where the id is -1."""
    dropped_mass_T: Tensor
    """Weight that each token lost: that of its K best choices minus that of what it got."""


def route_expert_choice(x_TD: Tensor, w_ED: Tensor, capacity: int) -> ExpertChoice:
    """Let every expert pick the ``capacity`` tokens that it is most probable for.

    ``p = softmax(x W^T)`` over the experts; expert ``e`` picks the tokens of the C largest
    ``p[:, e]``. All experts are equally loaded; a token may be picked by any number, even none.

    Parameters
    ----------
    x_TD
        Hidden states, ``[T, D]``.
    w_ED
        Router matrix, ``[E, D]``.
    capacity
        Tokens of each expert, ``1 <= capacity <= T``.

    Returns
    -------
    ExpertChoice
        Token ids ``[E, C]``, weights ``[E, C]`` and probabilities ``[T, E]``.

    Raises
    ------
    ValueError
        When ``capacity`` is not within ``1..T``.

    Notes
    -----
    Source: Zhou et al., "Mixture-of-Experts with Expert Choice Routing", arXiv 2202.09368.
    """
    if not 1 <= capacity <= x_TD.shape[0]:
        raise ValueError(
            f"capacity is {capacity} -- allowed is 1 to {x_TD.shape[0]} tokens -- change it"
        )
    logits_TE = functional.linear(x_TD, w_ED)
    wide = torch.promote_types(logits_TE.dtype, torch.float32)
    probs_TE = torch.softmax(logits_TE, dim=-1, dtype=wide)
    weights_CE, tokens_CE = torch.topk(probs_TE, capacity, dim=0, sorted=True)
    return ExpertChoice(tokens_CE.T, weights_CE.T, probs_TE)


def drop_over_capacity(
    topk_ids_TK: Tensor, topk_weights_TK: Tensor, num_experts: int, capacity: int
) -> CapacityRouting:
    """Take a choice away where its expert is full: first token, first served.

    Token ``t`` keeps its choice of expert ``e`` if fewer than C of the tokens before ``t`` chose
    ``e``. A lost choice stays in its column, as id -1 and weight 0; other weights are unchanged.

    Parameters
    ----------
    topk_ids_TK
        Expert of each choice, int64, ``[T, K]``, distinct in a row; -1 is no choice.
    topk_weights_TK
        Their weights, ``[T, K]``.
    num_experts
        Experts ``E`` of the layer.
    capacity
        Most tokens of one expert, at least 1.

    Returns
    -------
    CapacityRouting
        Ids ``[T, K]``, weights ``[T, K]`` and the dropped mass ``[T]``.

    Raises
    ------
    ValueError
        When ``capacity`` is below 1, or an id not within ``-1..E - 1``.

    Notes
    -----
    Source: Switch Transformers (arXiv 2101.03961) for K = 1. With K > 1 all choices of a token
    stand before those of the next; in GShard (arXiv 2006.16668) all first choices come before any
    second choice.
    """
    _check(topk_ids_TK, num_experts, capacity)
    chosen_TK = topk_ids_TK >= 0
    kept_TK = chosen_TK & ~_too_late(topk_ids_TK, chosen_TK, num_experts, capacity)
    weights_TK = topk_weights_TK.masked_fill(~kept_TK, 0)
    lost_TK = topk_weights_TK.masked_fill(kept_TK | ~chosen_TK, 0)
    return CapacityRouting(topk_ids_TK.masked_fill(~kept_TK, -1), weights_TK, lost_TK.sum(dim=-1))


def reroute_over_capacity(
    candidate_ids_TJ: Tensor,
    candidate_weights_TJ: Tensor,
    top_k: int,
    num_experts: int,
    capacity: int,
) -> CapacityRouting:
    """Give each token its ``top_k`` best candidates that still have room, token after token.

    Token 0 takes its first K candidates; token ``t`` goes through its candidates in order and takes
    each whose expert has fewer than C tokens from the tokens before ``t``, until it has K. What it
    got stands first in the row, in the candidates' order; -1 and 0 where the candidates ran out.

    Parameters
    ----------
    candidate_ids_TJ
        Experts that a token would take, best first, int64, ``[T, J]``, distinct in a row; -1 is no
        candidate (`route_topk` with ``top_k = J`` and no renormalisation makes such a list).
    candidate_weights_TJ
        Their weights, ``[T, J]``; a token keeps the weight of the expert that it ends at.
    top_k
        Experts per token, ``1 <= top_k <= J``.
    num_experts
        Experts ``E`` of the layer.
    capacity
        Most tokens of one expert, at least 1.

    Returns
    -------
    CapacityRouting
        Ids ``[T, K]``, weights ``[T, K]`` and the dropped mass ``[T]``.

    Raises
    ------
    ValueError
        When ``top_k`` is not within ``1..J``, ``capacity`` below 1, or an id not within
        ``-1..E - 1``.

    Notes
    -----
    All tokens at once: each proposes to its first K candidates, every expert strikes out all but
    its C earliest tokens, and those propose further down until nothing is struck. A struck pair
    stays full for good, since proposals give way to earlier tokens only, so the end is that of the
    token-by-token walk.
    """
    _check(candidate_ids_TJ, num_experts, capacity)
    if not 1 <= top_k <= candidate_ids_TJ.shape[1]:
        raise ValueError(
            f"top_k is {top_k} -- allowed is 1 to {candidate_ids_TJ.shape[1]} candidates -- give "
            "a longer candidate list or lower it"
        )
    open_TJ = candidate_ids_TJ >= 0
    wanted_TJ = _first(open_TJ, top_k)
    taken_TJ = wanted_TJ
    while (late_TJ := _too_late(candidate_ids_TJ, taken_TJ, num_experts, capacity)).any():
        open_TJ = open_TJ & ~late_TJ
        taken_TJ = _first(open_TJ, top_k)
    wanted_T = candidate_weights_TJ.masked_fill(~wanted_TJ, 0).sum(dim=-1)
    front_TK = torch.argsort(~taken_TJ, dim=-1, stable=True)[:, :top_k]
    weights_TK = candidate_weights_TJ.masked_fill(~taken_TJ, 0).gather(1, front_TK)
    ids_TK = candidate_ids_TJ.masked_fill(~taken_TJ, -1).gather(1, front_TK)
    return CapacityRouting(ids_TK, weights_TK, wanted_T - weights_TK.sum(dim=-1))


def _first(open_TJ: Tensor, top_k: int) -> Tensor:
    """Mark the first ``top_k`` open candidates of each row."""
    return open_TJ & (open_TJ.cumsum(dim=-1) <= top_k)


def _too_late(ids_TJ: Tensor, asking_TJ: Tensor, num_experts: int, capacity: int) -> Tensor:
    """Mark the asking pairs whose expert C earlier tokens ask for; ``[T, J]``."""
    # one column more than experts: what does not ask is counted there, and never marked
    columns_TJ = ids_TJ.masked_fill(~asking_TJ, num_experts)
    asks_TX = ids_TJ.new_zeros(len(ids_TJ), num_experts + 1).scatter(1, columns_TJ, 1)
    place_TJ = asks_TX.cumsum(dim=0).gather(1, columns_TJ)
    return asking_TJ & (place_TJ > capacity)


def _check(ids: Tensor, num_experts: int, capacity: int) -> None:
    if capacity < 1:
        raise ValueError(f"capacity is {capacity} -- allowed is 1 token or more -- raise it")
    wrong = ids[(ids < -1) | (ids >= num_experts)]
    if wrong.numel():
        raise ValueError(
            f"expert id {int(wrong[0])} for {num_experts} experts -- allowed is -1 (none) to "
            f"{num_experts - 1} -- check the ids or num_experts"
        )
