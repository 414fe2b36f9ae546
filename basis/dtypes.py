"""Number formats and the bytes that a weight takes in memory, scale factors included.

A block-scaled format stores one scale per block of elements; the figures here are
bits per element *with* the scale, so that ``elements * bits / 8`` is what is read.
"""

from dataclasses import dataclass

from basis.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class DType:
    """A storage format."""

    name: str
    bits: float
    """Bits per element in memory, block scales included."""
    compute: str
    """Key of the device's FLOP/s table that multiplies in this format use."""
    block: int = 1
    """Elements of a row that share a scale: a slice of a matrix is padded to whole blocks."""


DTYPES: dict[str, DType] = {
    d.name: d
    for d in (
        DType(name="fp32", bits=32, compute="tf32"),
        DType(name="bf16", bits=16, compute="bf16"),
        DType(name="fp16", bits=16, compute="bf16"),
        DType(name="fp8", bits=8, compute="fp8"),
        # one fp32 scale per 128 x 128 block (DeepSeek-V3)
        DType(name="fp8_block", bits=8 + 32 / (128 * 128), compute="fp8", block=128),
        # OCP microscaling: 8-bit elements, one 8-bit scale per 32 (MiniMax-M3)
        DType(name="mxfp8", bits=8 + 8 / 32, compute="fp8", block=32),
        # OCP microscaling: 4-bit elements, one 8-bit scale per 32; engines multiply in bf16 or fp8
        DType(name="mxfp4", bits=4 + 8 / 32, compute="bf16", block=32),
        # the same weights with activations quantised to microscaled fp8 (w4a8)
        DType(name="mxfp4_mxfp8", bits=4 + 8 / 32, compute="fp8", block=32),
        # 4-bit elements, one fp8 scale per 16
        DType(name="nvfp4", bits=4 + 8 / 16, compute="fp4", block=16),
        # the same weights, activations not quantised (w4a16); multiplied in bf16
        DType(name="nvfp4_w4a16", bits=4 + 8 / 16, compute="bf16", block=16),
        DType(name="int8", bits=8, compute="int8"),
        # group-wise int4 with an fp16 scale per 128 (GPTQ, AWQ); multiplied in bf16
        DType(name="int4", bits=4 + 16 / 128, compute="bf16", block=128),
        # one bf16 scale per 32 (compressed-tensors, Kimi-K2.5)
        DType(name="int4_g32", bits=4 + 16 / 32, compute="bf16", block=32),
    )
}


def slice_width(dtype: str, width: int, slices: int) -> int:
    """Return the width of one of several slices of a row, padded to whole blocks of the format."""
    block = DTYPES[dtype].block
    return width if slices == 1 else -(-(width // slices) // block) * block


def bytes_of(dtype: str, elements: float) -> float:
    """Bytes of ``elements`` numbers stored as ``dtype``.

    Raises
    ------
    InputError
        If ``dtype`` is not a known format.
    """
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r} -- known are {', '.join(DTYPES)}")
    return elements * DTYPES[dtype].bits / 8
