"""The expert layer's networks: routed, shared, and those that compute next to nothing.

Three forms of the same sum over the routed experts: `experts_loop` asks each expert which tokens
chose it (readable, the oracle); `experts_sorted` sorts the rows by expert first, so that each is
one GEMM over its exact number of rows (what grouped GEMM kernels do); `experts_padded` fills all
groups up to the longest and runs one batched GEMM, whose extra rows are what padding costs.
Shape suffixes: T tokens, K experts per token, S = T * K rows, N rows of one expert, A experts that
have rows, C rows of the longest of them, D model width, F expert width, G rows of the first
matrix: 2F (gate over up) or F (plain), E experts, Z zero-computation experts, J constant ones.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional

from kernels_ref.dense import silu_mul
from kernels_ref.permute import Permutation, combine, permute, sort_by_expert

Activation = Callable[[Tensor], Tensor]
"""From ``[..., G]`` to ``[..., F]``: `silu_mul` of a gated network, `torch.relu`,
`torch.nn.functional.gelu` or another elementwise function of a plain one."""
ZeroKind = Literal["identity", "zero", "constant"]
"""What a zero-computation expert gives, see `zero_experts`."""


class PaddedRows(NamedTuple):
    """Result of `padded_ffn`."""

    y_SD: Tensor
    """The rows' results, ``[S, D]``, without the padding."""
    padded_rows: int
    """Rows that were computed, A * C; those above S are padding."""


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
    return _ffn(x_ND, w13_GD, w2_DF, silu_mul)


def plain_ffn(
    x_ND: Tensor, w1_FD: Tensor, w2_DF: Tensor, activation: Activation = torch.relu
) -> Tensor:
    """One expert of two matrices, ``W2 activation(W1 x)`` (``GroupedGemm`` with gated = False).

    Parameters
    ----------
    x_ND
        Rows, ``[N, D]``; N may be 0.
    w1_FD, w2_DF
        Up and down projection, ``[F, D]`` and ``[D, F]``.
    activation
        Elementwise: `torch.relu`, `torch.nn.functional.gelu`, ...

    Returns
    -------
    Tensor
        ``[N, D]``.
    """
    return _ffn(x_ND, w1_FD, w2_DF, activation)


def experts_loop(
    x_TD: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    w13_EGD: Tensor,
    w2_EDF: Tensor,
    *,
    activation: Activation = silu_mul,
) -> Tensor:
    """Sum over experts of (combine weight x expert output), one expert after the other.

    Parameters
    ----------
    x_TD
        Hidden states, ``[T, D]``.
    topk_ids_TK, topk_weights_TK
        The router's decision, ``[T, K]`` each. Ids outside ``0 .. E - 1`` add nothing: dropped
        choices (-1), zero-computation experts (from E on, see `zero_experts`).
    w13_EGD, w2_EDF
        Expert weights, ``[E, G, D]`` and ``[E, D, F]``; G is 2F (gated) or F (plain).
    activation
        Between the two products.

    Returns
    -------
    Tensor
        ``[T, D]``.
    """
    y_TD = torch.zeros_like(x_TD)
    for expert in range(w13_EGD.shape[0]):
        token_N, choice_N = torch.where(topk_ids_TK == expert)
        if not len(token_N):
            continue
        y_ND = _ffn(x_TD[token_N], w13_EGD[expert], w2_EDF[expert], activation)
        weights_N1 = topk_weights_TK[token_N, choice_N].unsqueeze(1).to(x_TD.dtype)
        y_TD = y_TD.index_add(0, token_N, y_ND * weights_N1)
    return y_TD


def grouped_ffn(
    x_SD: Tensor,
    counts: list[int],
    w13_EGD: Tensor,
    w2_EDF: Tensor,
    *,
    activation: Activation = silu_mul,
) -> Tensor:
    """Apply expert ``e`` to its ``counts[e]`` consecutive rows: a grouped GEMM of exact sizes.

    Parameters
    ----------
    x_SD
        Rows sorted by expert, ``[S, D]``.
    counts
        Rows of each expert, length E, sum S; with 0 an expert's weights are not touched.
    w13_EGD, w2_EDF
        Expert weights, ``[E, G, D]`` and ``[E, D, F]``; G is 2F (gated) or F (plain).
    activation
        Between the two products.

    Returns
    -------
    Tensor
        ``[S, D]``, in the same order.

    Raises
    ------
    ValueError
        When the counts are not one per expert, or do not sum to S.
    """
    active = _active(counts, x_SD, w13_EGD)
    groups = torch.split(x_SD, [counts[expert] for expert in active])
    w13, w2 = _matrices(w13_EGD), _matrices(w2_EDF)
    results = [
        _ffn(x_ND, w13[expert], w2[expert], activation)
        for expert, x_ND in zip(active, groups, strict=True)
    ]
    return torch.cat(results or [x_SD])


def padded_ffn(
    x_SD: Tensor,
    counts: list[int],
    w13_EGD: Tensor,
    w2_EDF: Tensor,
    *,
    activation: Activation = silu_mul,
) -> PaddedRows:
    """Compute `grouped_ffn` as one batched GEMM of ``[A, C, D]`` (parameters, errors as there).

    The rows of each expert that has any are filled up with zeros to the longest group; unless all
    have rows, the weights of those that do are first gathered, which copies them.

    Returns
    -------
    PaddedRows
        Results ``[S, D]`` in the same order, and the rows that were computed for them.
    """
    active = _active(counts, x_SD, w13_EGD)
    sizes, longest = [counts[expert] for expert in active], max(counts, default=0)
    device, rows = x_SD.device, len(x_SD)
    # row s of the a-th group moves from s to a * C + (s - rows of the groups before)
    sizes_A = torch.tensor(sizes, dtype=torch.int64, device=device)
    shift_A = torch.arange(len(active), device=device) * longest - (sizes_A.cumsum(0) - sizes_A)
    place_S = shift_A.repeat_interleave(sizes_A, output_size=rows)
    place_S = place_S + torch.arange(rows, device=device)
    if len(active) < len(w13_EGD):
        active_A = torch.tensor(active, dtype=torch.int64, device=device)
        w13_EGD, w2_EDF = w13_EGD.index_select(0, active_A), w2_EDF.index_select(0, active_A)
    x_ACD = x_SD.new_zeros(len(active) * longest, x_SD.shape[1]).index_copy(0, place_S, x_SD)
    x_ACD = x_ACD.view(len(active), longest, x_SD.shape[1])
    y_ACD = torch.bmm(activation(torch.bmm(x_ACD, w13_EGD.mT)), w2_EDF.mT)
    return PaddedRows(y_ACD.flatten(0, 1).index_select(0, place_S), len(active) * longest)


def experts_sorted(
    x_TD: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    w13_EGD: Tensor,
    w2_EDF: Tensor,
    *,
    activation: Activation = silu_mul,
) -> Tensor:
    """Compute `experts_loop` by permute, grouped GEMM and combine (parameters as there)."""
    permutation, counts = _routed(topk_ids_TK, w13_EGD.shape[0])
    x_SD = permute(x_TD, permutation)
    y_SD = grouped_ffn(x_SD, counts, w13_EGD, w2_EDF, activation=activation)
    return combine(y_SD, topk_weights_TK, permutation)


def experts_padded(
    x_TD: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    w13_EGD: Tensor,
    w2_EDF: Tensor,
    *,
    activation: Activation = silu_mul,
) -> Tensor:
    """Compute `experts_loop` by permute, batched GEMM and combine (parameters as there)."""
    permutation, counts = _routed(topk_ids_TK, w13_EGD.shape[0])
    x_SD = permute(x_TD, permutation)
    padded = padded_ffn(x_SD, counts, w13_EGD, w2_EDF, activation=activation)
    return combine(padded.y_SD, topk_weights_TK, permutation)


def shared_experts(
    x_TD: Tensor,
    w13_GD: Tensor,
    w2_DF: Tensor,
    gate_1D: Tensor | None = None,
    *,
    activation: Activation = silu_mul,
) -> Tensor:
    """Network that every token passes beside its routed experts, ``sigmoid(g x) * ffn(x)``.

    Several shared experts are one network of their widths together (DeepSeek); the gate is
    Qwen2-MoE's ``shared_expert_gate``, other models have none (factor 1).

    Parameters
    ----------
    x_TD
        Hidden states, ``[T, D]``.
    w13_GD, w2_DF
        Weights of all shared experts together, ``[G, D]`` and ``[D, F]``.
    gate_1D
        Weights of the gate, ``[1, D]``.
    activation
        Between the two products.

    Returns
    -------
    Tensor
        ``[T, D]``.
    """
    y_TD = _ffn(x_TD, w13_GD, w2_DF, activation)
    return y_TD if gate_1D is None else torch.sigmoid(functional.linear(x_TD, gate_1D)) * y_TD


def zero_experts(
    x_TD: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    num_experts: int,
    kinds: Sequence[ZeroKind],
    *,
    constants_JD: Tensor | None = None,
    gates_J2D: Tensor | None = None,
) -> Tensor:
    """Sum over the zero-computation experts, whose ids follow those of the routed ones.

    By kind: ``identity`` gives x, ``zero`` nothing, and ``constant`` gives ``a x + b v`` with a
    learnt vector v and ``(a, b) = softmax(U x)``; each times its combine weight. Add the result to
    that of the routed experts; no dispatch is needed, since x is where the token is.

    Parameters
    ----------
    x_TD
        Hidden states, ``[T, D]``.
    topk_ids_TK, topk_weights_TK
        The router's decision, ``[T, K]`` each; ids below ``num_experts`` add nothing here.
    num_experts
        Routed experts E.
    kinds
        Of the experts ``E .. E + Z - 1``.
    constants_JD, gates_J2D
        v and U of the constant experts, in the order that they have among the kinds, ``[J, D]``
        and ``[J, 2, D]``.

    Returns
    -------
    Tensor
        ``[T, D]``, in the dtype of ``x_TD`` (computed in float32 at least).

    Raises
    ------
    ValueError
        When a kind is unknown, or the constant experts have not one v and one U each.

    Notes
    -----
    LongCat-Flash (arXiv:2509.01322) has identities only; MoE++ (arXiv:2410.07348) calls the kinds
    copy, zero and constant.
    """
    constants = _constants(kinds, constants_JD, gates_J2D)
    # column 0 takes the choices of routed experts
    column_TK = (topk_ids_TK - num_experts).clamp(min=-1) + 1
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    share_TZ = x_TD.new_zeros(len(x_TD), len(kinds) + 1, dtype=wide)
    share_TZ = share_TZ.scatter_add(1, column_TK, topk_weights_TK.to(wide))[:, 1:]
    identities = [z for z, kind in enumerate(kinds) if kind == "identity"]
    wide_TD = x_TD.to(wide)
    y_TD = wide_TD * share_TZ[:, identities].sum(dim=1, keepdim=True)
    for z, v_D, u_2D in constants:
        mix_T2 = functional.linear(wide_TD, u_2D.to(wide)).softmax(dim=-1) * share_TZ[:, z : z + 1]
        y_TD = y_TD + mix_T2[:, :1] * wide_TD + mix_T2[:, 1:] * v_D.to(wide)
    return y_TD.to(x_TD.dtype)


def _ffn(x_ND: Tensor, w13_GD: Tensor, w2_DF: Tensor, activation: Activation) -> Tensor:
    return functional.linear(activation(functional.linear(x_ND, w13_GD)), w2_DF)


def _active(counts: list[int], x_SD: Tensor, w13_EGD: Tensor) -> list[int]:
    """Experts that have rows."""
    if len(counts) != len(w13_EGD) or sum(counts) != len(x_SD):
        raise ValueError(
            f"{len(counts)} counts that sum to {sum(counts)} -- one for each of {len(w13_EGD)} "
            f"experts, and {len(x_SD)} rows together -- count the sorted rows of each expert"
        )
    return [expert for expert, count in enumerate(counts) if count]


def _matrices(w_EXY: Tensor) -> Sequence[Tensor] | Tensor:
    """Weights to be indexed by expert, at the least cost.

    Where gradients are kept, unbound: their gradient is one stack, where that of each ``w[e]``
    would be a zero tensor of full size. Elsewhere E views that nobody reads would cost time.
    """
    return w_EXY.unbind() if w_EXY.requires_grad and torch.is_grad_enabled() else w_EXY


def _routed(topk_ids_TK: Tensor, num_experts: int) -> tuple[Permutation, list[int]]:
    """Sort the choices of experts ``0 .. E - 1`` by expert, and count them; others are left out."""
    is_routed_TK = (topk_ids_TK >= 0) & (topk_ids_TK < num_experts)
    # the others are an expert of their own behind the last one, cut off again
    every = sort_by_expert(topk_ids_TK.where(is_routed_TK, num_experts), num_experts + 1)
    counts = every.counts_E.tolist()[:-1]
    rows = sum(counts)
    return Permutation(every.choice_S[:rows], every.token_S[:rows], every.counts_E[:-1]), counts


def _constants(
    kinds: Sequence[ZeroKind], constants_JD: Tensor | None, gates_J2D: Tensor | None
) -> list[tuple[int, Tensor, Tensor]]:
    """Place among the kinds, v and U of each constant expert."""
    unknown = sorted(set(kinds) - set(get_args(ZeroKind)))
    if unknown:
        raise ValueError(
            f"kinds of zero-computation experts: {', '.join(unknown)} -- allowed are "
            f"{', '.join(get_args(ZeroKind))} -- change them"
        )
    places = [z for z, kind in enumerate(kinds) if kind == "constant"]
    vectors = [] if constants_JD is None else list(constants_JD)
    gates = [] if gates_J2D is None else list(gates_J2D)
    if not len(places) == len(vectors) == len(gates):
        raise ValueError(
            f"{len(places)} constant experts with {len(vectors)} vectors and {len(gates)} gates -- "
            "one of each -- pass constants_JD and gates_J2D with a row for each of them"
        )
    return list(zip(places, vectors, gates, strict=True))
