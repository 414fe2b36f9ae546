"""Weights of 8 or 4 bits: rounded in groups, packed, and dequantised before they are multiplied.

Symmetric: an integer ``q`` and the scale of its group stand for ``q * scale``, without offset. The
weights take less memory and bandwidth; the product itself runs in the activations' dtype.
Shape suffixes: M rows, N rows of the weights (any leading shape: experts may be stacked), K
columns, L columns of a group, J = K / L groups of a row, P packed columns (K for 8 bits, K / 2 for
4 bits).
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kernels_ref.dense import linear

_LARGEST = {8: 127, 4: 7}
"""Largest integer by bits: -128 and -8 stay unused, so that the range is symmetric."""


class Quantised(NamedTuple):
    """Integers and scales of a weight matrix; the dtype of the first tells the bits."""

    packed_NP: Tensor
    """8 bits: int8, ``[N, K]``; 4 bits: uint8, ``[N, K / 2]``, see `pack_int4`."""
    scales_NJ: Tensor
    """Step of each (row, group), ``[N, K / L]``, in the dtype that the weights had."""


def quantise(w_NK: Tensor, *, bits: Literal[8, 4], group: int) -> Quantised:
    """Round weights to integers, ``q = round(w / scale)`` with ``scale = max|w| / q_max``.

    The maximum is that of a group of consecutive columns of one row; ``q_max`` is 127 or 7, so
    that ``|w - q scale| <= scale / 2``.

    Parameters
    ----------
    w_NK
        Weights, ``[N, K]`` or with more leading dimensions; finite floating point.
    bits
        8 or 4.
    group
        Columns that share a scale; divides K (and is even for 4 bits). K itself: one per row.

    Returns
    -------
    Quantised
        Packed integers and scales.

    Raises
    ------
    ValueError
        When the bits are others, K is not made of such groups, or a weight is not finite.
    """
    if bits not in _LARGEST:
        raise ValueError(f"{bits} bits -- allowed are 8 and 4 -- choose one of them")
    columns = w_NK.shape[-1]
    if group < 1 or columns % group or (bits == 4 and group % 2):
        even = "even, " if bits == 4 else ""
        raise ValueError(
            f"groups of {group} columns -- {even}at least 1, and dividing {columns} columns -- "
            "choose another size"
        )
    wide_NJL = w_NK.reshape(*w_NK.shape[:-1], columns // group, group)
    wide_NJL = wide_NJL.to(torch.promote_types(w_NK.dtype, torch.float32))
    scales_NJ = (wide_NJL.abs().amax(dim=-1) / _LARGEST[bits]).to(w_NK.dtype)
    if not scales_NJ.isfinite().all():
        raise ValueError("weights that are infinite or not a number -- finite ones -- mend them")
    # where a group is zero (or so small that its scale is) any step serves: its integers are 0
    scales_NJ = scales_NJ.where(scales_NJ >= torch.finfo(w_NK.dtype).tiny, 1.0)
    q_NJL = torch.round(wide_NJL / scales_NJ.unsqueeze(-1))
    q_NK = q_NJL.clamp(-_LARGEST[bits], _LARGEST[bits]).to(torch.int8).flatten(-2)
    return Quantised(q_NK if bits == 8 else pack_int4(q_NK), scales_NJ)


def pack_int4(q_NK: Tensor) -> Tensor:
    """Put two integers into a byte: columns 2p (low half) and 2p + 1 (high half), 8 added to each.

    Parameters
    ----------
    q_NK
        Integers within -8..7, int8, ``[N, K]`` with K even.

    Returns
    -------
    Tensor
        uint8, ``[N, K / 2]``.

    Raises
    ------
    ValueError
        When K is odd or an integer is out of range.
    """
    if q_NK.shape[-1] % 2 or ((q_NK < -8) | (q_NK > 7)).any():
        raise ValueError(
            f"{q_NK.shape[-1]} columns of integers up to {q_NK.abs().max()} -- an even number of "
            "columns, integers within -8..7 -- two share a byte"
        )
    halves_NP2 = (q_NK + 8).to(torch.uint8).reshape(*q_NK.shape[:-1], q_NK.shape[-1] // 2, 2)
    return halves_NP2[..., 0] | (halves_NP2[..., 1] << 4)


def unpack_int4(packed_NP: Tensor) -> Tensor:
    """Take the integers of `pack_int4` out again: uint8 ``[N, K / 2]`` to int8 ``[N, K]``."""
    halves_NP2 = torch.stack((packed_NP & 15, packed_NP >> 4), dim=-1)
    return halves_NP2.to(torch.int8).flatten(-2) - 8


def dequantise(packed_NP: Tensor, scales_NJ: Tensor) -> Tensor:
    """Multiply the integers by the scales of their groups, ``w = q * scale``.

    Parameters
    ----------
    packed_NP, scales_NJ
        As `quantise` gives them; the size of a group follows from the shapes.

    Returns
    -------
    Tensor
        ``[N, K]``, in the dtype of the scales.

    Raises
    ------
    ValueError
        When the integers are neither int8 nor uint8, or the scales are not theirs by shape.
    """
    if packed_NP.dtype not in (torch.int8, torch.uint8):
        raise ValueError(
            f"packed weights of {packed_NP.dtype} -- int8 (8 bits) or uint8 (two of 4 bits) -- "
            "pass what quantise returned"
        )
    q_NK = packed_NP if packed_NP.dtype == torch.int8 else unpack_int4(packed_NP)
    columns, groups = q_NK.shape[-1], scales_NJ.shape[-1]
    if q_NK.shape[:-1] != scales_NJ.shape[:-1] or not groups or columns % groups:
        raise ValueError(
            f"integers {list(q_NK.shape)} with scales {list(scales_NJ.shape)} -- as many rows, and "
            "scales that divide the columns -- pass both parts of what quantise returned"
        )
    q_NJL = q_NK.reshape(*scales_NJ.shape, columns // groups).to(scales_NJ.dtype)
    return (q_NJL * scales_NJ.unsqueeze(-1)).flatten(-2)


def dequantised_linear(
    x_MK: Tensor, packed_NP: Tensor, scales_NJ: Tensor, *, out_MN: Tensor | None = None
) -> Tensor:
    """Dense product with quantised weights, ``y = x W^T`` with ``W = q * scale`` written out first.

    Parameters
    ----------
    x_MK
        Rows, ``[M, K]``; the product runs in their dtype.
    packed_NP, scales_NJ
        As `quantise` gives them.
    out_MN
        Buffer to write to, ``[M, N]`` (without gradients); None: a new tensor.

    Returns
    -------
    Tensor
        ``[M, N]``.

    Raises
    ------
    ValueError
        As `dequantise` and `linear`.
    """
    return linear(x_MK, dequantise(packed_NP, scales_NJ).to(x_MK.dtype), out_MN=out_MN)
