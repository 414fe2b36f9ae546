"""The router: a linear layer, a softmax over the experts, and the top-k of it.

It decides which ``K`` of ``E`` experts each token visits and with which weight (dimensionless).
Shape suffixes: T tokens, D model width, E experts, K experts per token.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """The router's decision for T tokens."""

    topk_ids_TK: Tensor
    """Chosen experts, int64, distinct in a row, by falling probability."""
    topk_weights_TK: Tensor
    """Combine weights of the chosen experts, dimensionless, in the dtype of the probabilities."""
    probs_TE: Tensor
    """Softmax over all experts (the load-balancing loss needs it), at least float32."""


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
    num_experts = w_ED.shape[0]
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k} -- allowed is 1 to {num_experts} experts -- lower it")
    logits_TE = torch.nn.functional.linear(x_TD, w_ED)
    wide = torch.promote_types(logits_TE.dtype, torch.float32)
    probs_TE = torch.softmax(logits_TE, dim=-1, dtype=wide)
    weights_TK, ids_TK = torch.topk(probs_TE, top_k, dim=-1, sorted=True)
    if renormalise:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return Routing(ids_TK, weights_TK, probs_TE)
