"""Permute and combine: tokens laid out by expert, and their results added up again.

Every token appears once per expert that it visits, so T tokens become ``S = T * K`` rows, sorted
by expert; the inverse weighs the K results of a token and sums them. All counts are in rows.
Shape suffixes: T tokens, K experts per token, S = T * K rows sorted by expert, D width, E experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Permutation(NamedTuple):
    """Where each of the S = T * K (token, choice) rows goes when sorted by expert."""

    choice_S: Tensor
    """Flat (token * K + choice) index of each sorted row, int64."""
    token_S: Tensor
    """Token of each sorted row, int64."""
    counts_E: Tensor
    """Rows of each expert, int64; they sum to S."""


def sort_by_expert(topk_ids_TK: Tensor, num_experts: int) -> Permutation:
    """Sort the (token, choice) pairs by expert, stable in the token order.

    Parameters
    ----------
    topk_ids_TK
        Expert of each choice, int64, ``[T, K]``, within ``0..num_experts - 1``.
    num_experts
        Experts ``E`` of the layer.

    Returns
    -------
    Permutation
        Sorted choices ``[S]``, their tokens ``[S]`` and the rows per expert ``[E]``.
    """
    flat_S = topk_ids_TK.reshape(-1)
    choice_S = torch.argsort(flat_S, stable=True)
    counts_E = torch.bincount(flat_S, minlength=num_experts)
    return Permutation(choice_S, choice_S // topk_ids_TK.shape[1], counts_E)


def permute(x_TD: Tensor, permutation: Permutation) -> Tensor:
    """Copy each token to its K rows: ``x_SD[s] = x_TD[token_S[s]]``."""
    return x_TD.index_select(0, permutation.token_S)


def combine(y_SD: Tensor, topk_weights_TK: Tensor, permutation: Permutation) -> Tensor:
    """Weigh the rows and add them up per token: ``y_TD[t] = sum_k w_tk y(t, k)``.

    Parameters
    ----------
    y_SD
        Results of the experts, ``[S, D]``, in the order of `permutation`.
    topk_weights_TK
        Combine weights, ``[T, K]``.
    permutation
        The order that `sort_by_expert` gave.

    Returns
    -------
    Tensor
        ``[T, D]``, in the dtype of ``y_SD``.
    """
    weights_S1 = topk_weights_TK.reshape(-1)[permutation.choice_S].unsqueeze(1).to(y_SD.dtype)
    y_TD = y_SD.new_zeros(topk_weights_TK.shape[0], y_SD.shape[1])
    return y_TD.index_add(0, permutation.token_S, y_SD * weights_S1)
