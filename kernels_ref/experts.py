"""The expert FFN: a gated SiLU network per expert, applied to the tokens routed to it.

Two forms of the same sum: `experts_loop` asks each expert which tokens chose it (readable, the
oracle), `experts_sorted` sorts the rows by expert first, so that each expert is one GEMM over its
exact number of rows, without padding (what grouped GEMM kernels do).
Shape suffixes: T tokens, K experts per token, S = T * K rows, N rows of one expert, D model width,
F expert width, G = 2F (gate rows over up rows), E experts.
"""

import torch
from torch import Tensor
from torch.nn import functional

from kernels_ref.permute import combine, permute, sort_by_expert


def gated_ffn(x_ND: Tensor, w13_GD: Tensor, w2_DF: Tensor) -> Tensor:
    """One expert: ``W2 (silu(W1 x) * W3 x)``, with ``W13 = [W1; W3]`` stacked as in Hugging Face.

    Parameters
    ----------
    x_ND
        Rows, ``[N, D]``; N may be 0.
    w13_GD
        Gate over up projection, ``[2F, D]``.
    w2_DF
        Down projection, ``[D, F]``.

    Returns
    -------
    Tensor
        ``[N, D]``.
    """
    gate_NF, up_NF = functional.linear(x_ND, w13_GD).chunk(2, dim=-1)
    return functional.linear(functional.silu(gate_NF) * up_NF, w2_DF)


def experts_loop(
    x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, w13_EGD: Tensor, w2_EDF: Tensor
) -> Tensor:
    """Sum over experts of (combine weight x expert output), one expert after the other.

    Parameters
    ----------
    x_TD
        Hidden states, ``[T, D]``.
    topk_ids_TK, topk_weights_TK
        The router's decision, ``[T, K]`` each.
    w13_EGD, w2_EDF
        Expert weights, ``[E, 2F, D]`` and ``[E, D, F]``.

    Returns
    -------
    Tensor
        ``[T, D]``.
    """
    y_TD = torch.zeros_like(x_TD)
    for expert in range(w13_EGD.shape[0]):
        token_N, choice_N = torch.where(topk_ids_TK == expert)
        y_ND = gated_ffn(x_TD[token_N], w13_EGD[expert], w2_EDF[expert])
        weights_N1 = topk_weights_TK[token_N, choice_N].unsqueeze(1).to(x_TD.dtype)
        y_TD = y_TD.index_add(0, token_N, y_ND * weights_N1)
    return y_TD


def grouped_ffn(x_SD: Tensor, counts: list[int], w13_EGD: Tensor, w2_EDF: Tensor) -> Tensor:
    """Apply expert ``e`` to its ``counts[e]`` consecutive rows: a grouped GEMM of exact sizes.

    Parameters
    ----------
    x_SD
        Rows sorted by expert, ``[S, D]``.
    counts
        Rows of each expert, length E, sum S; zeros are allowed.
    w13_EGD, w2_EDF
        Expert weights, ``[E, 2F, D]`` and ``[E, D, F]``.

    Returns
    -------
    Tensor
        ``[S, D]``, in the same order.
    """
    # unbind, not indexing: its gradient is one stack, where w[e] costs a full-size zero tensor each
    groups = zip(torch.split(x_SD, counts), w13_EGD.unbind(), w2_EDF.unbind(), strict=True)
    return torch.cat([gated_ffn(x_ND, w13_GD, w2_DF) for x_ND, w13_GD, w2_DF in groups])


def experts_sorted(
    x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, w13_EGD: Tensor, w2_EDF: Tensor
) -> Tensor:
    """Compute `experts_loop` by permute, grouped GEMM and combine (parameters as there)."""
    permutation = sort_by_expert(topk_ids_TK, w13_EGD.shape[0])
    x_SD = permute(x_TD, permutation)
    y_SD = grouped_ffn(x_SD, permutation.counts_E.tolist(), w13_EGD, w2_EDF)
    return combine(y_SD, topk_weights_TK, permutation)
