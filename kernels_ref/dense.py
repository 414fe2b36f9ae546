"""What a layer does to every token alike: dense products, norms, rotary positions, activation.

Each function is one kernel of a step, so that it can be timed by itself: `linear` is a GEMM, the
others stream activations through memory. Norms compute in float32 at least.
Shape suffixes: M rows, K input width, N output width; T tokens, D model width, H heads, C channels
of a head, R = C / 2 rotated pairs; F inner width of a network, G = 2F (gate over up).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class AddNorm(NamedTuple):
    """Result of `add_rms_norm`."""

    residual_TD: Tensor
    """The new residual stream, ``[T, D]``."""
    normed_TD: Tensor
    """Its norm, the input of the next block, ``[T, D]``."""


def linear(x_MK: Tensor, w_NK: Tensor, *, out_MN: Tensor | None = None) -> Tensor:
    """Dense product ``y = x W^T``.

    Parameters
    ----------
    x_MK
        Rows, ``[M, K]``; M may be 0.
    w_NK
        Weights, ``[N, K]``, as Hugging Face stores them.
    out_MN
        Buffer to write to, ``[M, N]`` (without gradients); None: a new tensor.

    Returns
    -------
    Tensor
        ``[M, N]``; ``out_MN`` itself where it is given.

    Raises
    ------
    ValueError
        When the buffer has another shape.
    """
    shape = (x_MK.shape[0], w_NK.shape[0])
    if out_MN is not None and out_MN.shape != shape:
        raise ValueError(
            f"out_MN has shape {list(out_MN.shape)} -- the product has {list(shape)} -- "
            "give a buffer of this shape"
        )
    return torch.mm(x_MK, w_NK.t(), out=out_MN)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float = 1e-6) -> Tensor:
    """Root-mean-square norm, ``y = x / sqrt(mean(x^2) + eps) * weight``.

    Parameters
    ----------
    x_TD
        Activations, ``[..., D]`` (a norm of queries or keys has heads there too).
    weight_D
        Learnt scale, ``[D]``.
    eps
        Added to the mean square, dimensionless.

    Returns
    -------
    Tensor
        As ``x_TD``, in its dtype.

    Notes
    -----
    Zhang and Sennrich, "Root Mean Square Layer Normalization" (arXiv:1910.07467).
    """
    return functional.rms_norm(x_TD, weight_D.shape, weight_D, eps)


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float = 1e-6) -> AddNorm:
    """Add a block's output to the residual stream, and norm the sum for the next block.

    ``r' = r + x`` and ``y = rms_norm(r')``: what a step has before attention and before the
    experts, reading and writing two tensors of ``[T, D]``.

    Parameters
    ----------
    x_TD
        Output of the block before, ``[T, D]``.
    residual_TD
        Residual stream, ``[T, D]``; it is left as it is.
    weight_D, eps
        As in `rms_norm`.

    Returns
    -------
    AddNorm
        The new residual stream and its norm.
    """
    summed_TD = residual_TD + x_TD
    return AddNorm(summed_TD, rms_norm(summed_TD, weight_D, eps))


def rope_table(
    positions_T: Tensor,
    channels: int,
    *,
    base: float = 10_000.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles, ``angle[t, r] = position_t * base^(-2r / C)``.

    Parameters
    ----------
    positions_T
        Positions of the tokens in their requests, ``[T]``, from 0.
    channels
        Rotated channels C of a head, even.
    base
        ``rope_theta`` of the model.
    dtype
        Of the result. Angles are float64: at position 10^5 float32 would miss by 10^-3 rad.

    Returns
    -------
    tuple of Tensor
        Cosine and sine, ``[T, C / 2]`` each.

    Raises
    ------
    ValueError
        When ``channels`` is odd.
    """
    if channels % 2:
        raise ValueError(f"{channels} rotated channels -- an even number -- they turn in pairs")
    pairs_R = torch.arange(channels // 2, dtype=torch.float64, device=positions_T.device)
    angle_TR = torch.outer(positions_T.double(), base ** (-2 * pairs_R / channels))
    return angle_TR.cos().to(dtype), angle_TR.sin().to(dtype)


def rope(x_THC: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotate the channel pairs ``(r, r + C / 2)`` of every head by their token's angle.

    ``(a, b) -> (a cos - b sin, b cos + a sin)``: the two halves of the channels form the pairs,
    as in Hugging Face's Llama.

    Parameters
    ----------
    x_THC
        Queries or keys, ``[T, H, C]``.
    cos_TR, sin_TR
        `rope_table` of the tokens' positions, ``[T, C / 2]`` each, in the dtype of ``x_THC``.

    Returns
    -------
    Tensor
        ``[T, H, C]``.

    Notes
    -----
    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (arXiv:2104.09864).
    """
    low_THR, high_THR = x_THC.chunk(2, dim=-1)
    cos_T1R, sin_T1R = cos_TR.unsqueeze(1), sin_TR.unsqueeze(1)
    turned = (low_THR * cos_T1R - high_THR * sin_T1R, high_THR * cos_T1R + low_THR * sin_T1R)
    return torch.cat(turned, dim=-1)


def silu_mul(gate_up_NG: Tensor) -> Tensor:
    """Gated activation, ``silu(gate) * up`` with ``silu(z) = z / (1 + exp(-z))`` (SwiGLU).

    Parameters
    ----------
    gate_up_NG
        The F gate columns, then the F up columns, ``[..., 2F]``.

    Returns
    -------
    Tensor
        ``[..., F]``.

    Notes
    -----
    Shazeer, "GLU Variants Improve Transformer" (arXiv:2002.05202).
    """
    gate_NF, up_NF = gate_up_NG.chunk(2, dim=-1)
    return functional.silu(gate_NF) * up_NF
