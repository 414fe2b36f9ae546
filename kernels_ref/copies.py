"""Copies of weights between memories: host to host, and host to a CUDA device.

One call moves one tensor, converts nothing, and returns when the bytes are there. Host memory is
pageable, or pinned: page-locked, so that the device reads it by itself (``torch.empty`` gives
either). Reads from a file are `kernels_ref.expert_file`'s.
"""

import torch
from torch import Tensor


def copy_host(dst: Tensor, src: Tensor) -> None:
    """Copy a host tensor to another of the same shape and dtype: one memcpy.

    Raises
    ------
    ValueError
        When one is not contiguous host memory, or shapes or dtypes differ.
    """
    _check_pair(dst, src)
    for name, tensor in (("dst", dst), ("src", src)):
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(
                f"{name} is on {tensor.device}, contiguous: {tensor.is_contiguous()} -- allowed is "
                "contiguous host memory -- make it contiguous, or use to_device"
            )
    dst.copy_(src)


def to_device(src: Tensor, dst: Tensor, *, pinned: bool) -> None:
    """Copy a host tensor to a CUDA tensor and wait until the bytes are there.

    Parameters
    ----------
    src, dst
        Host and CUDA tensor of the same shape and dtype.
    pinned
        Which kind of host memory this copy is about: page-locked, which the device reads by
        itself, or pageable, which the driver stages through a buffer of its own. ``src`` must be
        of that kind.

    Raises
    ------
    ValueError
        Without CUDA, when ``src`` is not of the stated kind, or shapes or dtypes differ.
    """
    if not torch.cuda.is_available() or dst.device.type != "cuda":
        raise ValueError(
            f"dst is on {dst.device}, CUDA available: {torch.cuda.is_available()} -- allowed is a "
            "CUDA tensor -- use copy_host between host memories"
        )
    _check_pair(dst, src)
    if src.device.type != "cpu" or src.is_pinned() != pinned:
        raise ValueError(
            f"src is on {src.device}, pinned: {src.device.type == 'cpu' and src.is_pinned()} -- "
            f"allowed is host memory with pinned = {pinned} -- allocate it so, or say what it is"
        )
    dst.copy_(src, non_blocking=pinned)
    torch.cuda.current_stream(dst.device).synchronize()


def _check_pair(dst: Tensor, src: Tensor) -> None:
    if dst.shape != src.shape or dst.dtype != src.dtype:
        raise ValueError(
            f"src is {src.dtype} {tuple(src.shape)}, dst {dst.dtype} {tuple(dst.shape)} -- allowed "
            "is one shape and dtype -- a copy converts nothing"
        )
