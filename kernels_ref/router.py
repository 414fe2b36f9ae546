"""Routers in which each token chooses its experts: scores of all experts, then the best of them.

The scores are a linear layer and a softmax or a sigmoid; the choice is the top k, the top k within
the best groups of experts, or as many experts as a probability p asks for. The result says which
``K`` of ``E`` experts each token visits and with which weight (dimensionless).
Shape suffixes: T tokens, D model width, E experts, K experts per token, G groups of experts,
P = E / G experts of a group.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Routing(NamedTuple):
    """The router's decision for T tokens."""

    topk_ids_TK: Tensor
    """Chosen experts, int64, distinct in a row, by falling score; -1 where a token has fewer."""
    topk_weights_TK: Tensor
    """Combine weights of the chosen experts, dimensionless, in the dtype of the probabilities."""
    probs_TE: Tensor
    """Softmax over all experts (the load-balancing loss needs it), at least float32; the sigmoid
    scores, which do not sum to one, from `route_sigmoid`."""


class RaggedRouting(NamedTuple):
    """The decision of a router that gives each token as many experts as it needs."""

    topk_ids_TK: Tensor
    """Chosen experts, int64, by falling probability, then -1 up to the most that is allowed."""
    topk_weights_TK: Tensor
    """Combine weights, dimensionless, 0 where the id is -1."""
    counts_T: Tensor
    """Experts of each token, int64, at least 1."""
    probs_TE: Tensor
    """Softmax over all experts, at least float32."""


def route_topk(x_TD: Tensor, w_ED: Tensor, top_k: int, *, renormalise: bool) -> Routing:
    """Choose the ``top_k`` most probable experts of each token.

    ``p = softmax(x W^T)``; the weights are the chosen ``p``, divided by their sum if
    ``renormalise`` (Mixtral, Qwen3-MoE), else as they are (OLMoE, Qwen2-MoE).

    Parameters
    ----------
    x_TD
        Hidden states, ``[T, D]``.
    w_ED
        Router matrix, ``[E, D]``.
    top_k
        Experts per token, ``1 <= top_k <= E``.
    renormalise
        Whether a token's weights sum to one.

    Returns
    -------
    Routing
        Ids ``[T, K]``, weights ``[T, K]`` and probabilities ``[T, E]``.

    Raises
    ------
    ValueError
        When ``top_k`` is not within ``1..E``.

    Notes
    -----
    The softmax runs in float32 at least, as in Hugging Face transformers: in bfloat16, near ties
    would be decided by rounding.
    """
    _check_top_k(top_k, w_ED.shape[0])
    probs_TE = _softmax(functional.linear(x_TD, w_ED))
    weights_TK, ids_TK = torch.topk(probs_TE, top_k, dim=-1, sorted=True)
    if renormalise:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return Routing(ids_TK, weights_TK, probs_TE)


def route_recorded(
    x_TD: Tensor, w_ED: Tensor, recorded_TK: Tensor, *, renormalise: bool
) -> tuple[Tensor, Tensor]:
    """Route in earnest, then let a recording choose: its experts, with their real probabilities.

    Everything that `route_topk` computes is computed, so that it takes its time.

    Parameters
    ----------
    x_TD, w_ED
        As for `route_topk`.
    recorded_TK
        Experts that the recording chose, int64 ``[T, K]``.
    renormalise
        Whether a token's weights sum to one.

    Returns
    -------
    tuple of Tensor
        The recorded experts and their combine weights, ``[T, K]`` each.
    """
    routing = route_topk(x_TD, w_ED, recorded_TK.shape[1], renormalise=renormalise)
    weights_TK = routing.probs_TE.gather(1, recorded_TK)
    if renormalise:
        weights_TK /= weights_TK.sum(dim=-1, keepdim=True)
    return recorded_TK, weights_TK


def route_topk_logits(
    x_TD: Tensor, w_ED: Tensor, top_k: int, *, bias_E: Tensor | None = None
) -> Routing:
    """Choose the ``top_k`` largest logits of each token; softmax over the chosen alone (gpt-oss).

    ``l = x W^T + b``; the weights are ``softmax`` of the chosen ``l``. In exact arithmetic this is
    `route_topk` with ``renormalise``; rounding differs, since here the logits are compared.

    Parameters
    ----------
    x_TD
        Hidden states, ``[T, D]``.
    w_ED
        Router matrix, ``[E, D]``.
    top_k
        Experts per token, ``1 <= top_k <= E``.
    bias_E
        Router bias, ``[E]``, added to the logits; None: none.

    Returns
    -------
    Routing
        Ids ``[T, K]``, weights ``[T, K]`` that sum to one and the probabilities ``[T, E]``.

    Raises
    ------
    ValueError
        When ``top_k`` is not within ``1..E``.
    """
    _check_top_k(top_k, w_ED.shape[0])
    logits_TE = functional.linear(x_TD, w_ED, bias_E)
    chosen_TK, ids_TK = torch.topk(logits_TE, top_k, dim=-1, sorted=True)
    return Routing(ids_TK, _softmax(chosen_TK), _softmax(logits_TE))


def route_sigmoid(
    x_TD: Tensor,
    w_ED: Tensor,
    top_k: int,
    *,
    correction_E: Tensor,
    num_groups: int,
    kept_groups: int,
    renormalise: bool,
    scaling: float,
) -> Routing:
    """Choose by sigmoid scores plus a correction, within the best groups (DeepSeek-V3).

    ``s = sigmoid(x W^T)`` and ``c = s + correction``. A group scores the sum of its two best ``c``;
    the ``top_k`` best ``c`` within the ``kept_groups`` best groups are chosen. The weights are the
    uncorrected ``s`` of the chosen, divided by their sum if ``renormalise``, times ``scaling``.

    Parameters
    ----------
    x_TD
        Hidden states, ``[T, D]``.
    w_ED
        Router matrix, ``[E, D]``.
    top_k
        Experts per token, at most the experts of the kept groups.
    correction_E
        Learnt correction that evens the load, ``[E]``; it moves the choice, not the weights.
    num_groups
        Groups of consecutive experts; divides E; 1: no group limit.
    kept_groups
        Groups that a token may visit, ``1..num_groups``.
    renormalise
        Whether a token's weights sum to ``scaling``.
    scaling
        Factor on all weights (``routed_scaling_factor``).

    Returns
    -------
    Routing
        Ids ``[T, K]`` by falling ``c``, weights ``[T, K]`` and the scores ``s``, ``[T, E]``.

    Raises
    ------
    ValueError
        When the groups do not fit the experts, or ``top_k`` the kept groups.

    Notes
    -----
    Source: DeepSeek-V3 (arXiv 2412.19437), section 2.1.2. All in float32 at least, the linear layer
    too, as in Hugging Face transformers.
    """
    _check_groups(top_k, w_ED.shape[0], num_groups, kept_groups, least=2)
    scores_TE = _wide_linear(x_TD, w_ED).sigmoid()
    choice_TE = scores_TE + correction_E
    if num_groups > 1:
        choice_TGP = torch.unflatten(choice_TE, 1, (num_groups, -1))
        best_two_TG = choice_TGP.topk(2, dim=-1).values.sum(dim=-1)
        choice_TE = _keep_groups(choice_TGP, best_two_TG, kept_groups)
    ids_TK = torch.topk(choice_TE, top_k, dim=-1, sorted=True).indices
    weights_TK = scores_TE.gather(1, ids_TK)
    if renormalise:
        # the small term is Hugging Face's: where all chosen sigmoids underflow, 0 instead of NaN
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
    return Routing(ids_TK, weights_TK * scaling, scores_TE)


def route_group_limited(
    x_TD: Tensor, w_ED: Tensor, top_k: int, *, num_groups: int, kept_groups: int, scaling: float
) -> Routing:
    """Choose the most probable experts within the best groups (DeepSeek-V2).

    ``p = softmax(x W^T)``. A group scores its largest ``p``; the ``top_k`` largest ``p`` within the
    ``kept_groups`` best groups are chosen, with the weights ``p * scaling``.

    Parameters
    ----------
    x_TD
        Hidden states, ``[T, D]``.
    w_ED
        Router matrix, ``[E, D]``.
    top_k
        Experts per token, at most the experts of the kept groups.
    num_groups
        Groups of consecutive experts; divides E; 1: no group limit ("greedy").
    kept_groups
        Groups that a token may visit, ``1..num_groups``.
    scaling
        Factor on all weights (``routed_scaling_factor``).

    Returns
    -------
    Routing
        Ids ``[T, K]``, weights ``[T, K]`` and probabilities ``[T, E]`` of all experts.

    Raises
    ------
    ValueError
        When the groups do not fit the experts, or ``top_k`` the kept groups.

    Notes
    -----
    Source: DeepSeek-V2 (arXiv 2405.04434), ``group_limited_greedy`` of Hugging Face transformers.
    That one sets the probabilities of other groups to 0, here they are ruled out: the two differ
    only for a token with a probability in a kept group that underflows to 0.
    """
    _check_groups(top_k, w_ED.shape[0], num_groups, kept_groups, least=1)
    probs_TE = _softmax(_wide_linear(x_TD, w_ED))
    probs_TGP = torch.unflatten(probs_TE, 1, (num_groups, -1))
    allowed_TE = _keep_groups(probs_TGP, probs_TGP.amax(dim=-1), kept_groups)
    weights_TK, ids_TK = torch.topk(allowed_TE, top_k, dim=-1, sorted=True)
    return Routing(ids_TK, weights_TK * scaling, probs_TE)


def route_top_p(
    x_TD: Tensor, w_ED: Tensor, p: float, *, max_experts: int, renormalise: bool
) -> RaggedRouting:
    """Choose the fewest experts of each token whose probabilities reach ``p`` together.

    The experts are taken by falling ``softmax(x W^T)`` until their sum is at least ``p`` or
    ``max_experts`` are taken: an expert is in when those before it sum to less than ``p``.

    Parameters
    ----------
    x_TD
        Hidden states, ``[T, D]``.
    w_ED
        Router matrix, ``[E, D]``.
    p
        Probability to reach, ``0 < p <= 1``.
    max_experts
        Most experts of a token, ``K``, ``1..E``.
    renormalise
        Whether a token's weights sum to one; else they are the probabilities.

    Returns
    -------
    RaggedRouting
        Ids and weights ``[T, K]`` (padded with -1 and 0), counts ``[T]``, probabilities ``[T, E]``.

    Raises
    ------
    ValueError
        When ``p`` is not within (0, 1] or ``max_experts`` not within ``1..E``.

    Notes
    -----
    Source: "Harder Tasks Need More Experts", arXiv 2403.07652.
    """
    _check_top_k(max_experts, w_ED.shape[0], "max_experts")
    if not 0 < p <= 1:
        raise ValueError(f"p is {p} -- allowed is above 0, up to 1 -- give a probability")
    probs_TE = _softmax(functional.linear(x_TD, w_ED))
    best_TK, ids_TK = torch.topk(probs_TE, max_experts, dim=-1, sorted=True)
    reached_TK = best_TK.cumsum(dim=-1) >= p
    left_out_TK = functional.pad(reached_TK[:, :-1], (1, 0), value=False)
    weights_TK = best_TK.masked_fill(left_out_TK, 0.0)
    if renormalise:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    counts_T = (~left_out_TK).sum(dim=-1)
    return RaggedRouting(ids_TK.masked_fill(left_out_TK, -1), weights_TK, counts_T, probs_TE)


def _softmax(logits: Tensor) -> Tensor:
    """Softmax of the last axis, in float32 at least."""
    return torch.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _wide_linear(x_TD: Tensor, w_ED: Tensor) -> Tensor:
    """``x W^T`` in float32 at least, as DeepSeek's routers do; ``[T, E]``."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    return functional.linear(x_TD.to(wide), w_ED.to(wide))


def _keep_groups(scores_TGP: Tensor, group_scores_TG: Tensor, kept: int) -> Tensor:
    """Scores ``[T, E]`` with those of all but the ``kept`` best groups at minus infinity."""
    best_TG = torch.topk(group_scores_TG, kept, dim=-1).indices
    dropped_TG = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter(1, best_TG, False)
    return scores_TGP.masked_fill(dropped_TG.unsqueeze(-1), float("-inf")).flatten(1)


def _check_top_k(top_k: int, num_experts: int, name: str = "top_k") -> None:
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"{name} is {top_k} -- allowed is 1 to {num_experts} experts -- lower it")


def _check_groups(top_k: int, num_experts: int, groups: int, kept: int, *, least: int) -> None:
    """Refuse groups of unequal size or of fewer than ``least`` experts, and too few kept ones."""
    if groups < 1 or num_experts % groups or (groups > 1 and num_experts // groups < least):
        raise ValueError(
            f"num_groups is {groups} for {num_experts} experts -- allowed are equal groups of at "
            f"least {least} experts, or 1 group -- change num_groups"
        )
    if not 1 <= kept <= groups:
        raise ValueError(f"kept_groups is {kept} -- allowed is 1 to {groups} groups -- change it")
    _check_top_k(top_k, kept * num_experts // groups)
