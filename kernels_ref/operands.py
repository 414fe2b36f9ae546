"""Random operands that come from memory, not from a cache, as a model's weights do.

A decoder touches each weight once per step, long after the last-level cache has lost it. Here all
operations cut their operands out of one shared buffer, several times as large as that cache, and
one mark walks through it: whoever runs next takes the bytes behind it. Between two uses of the
same bytes, more than the cache holds is touched, whatever runs in between; and many prepared
operations cost the memory of one buffer. Only operands below 1/16384 of the cache (kilobytes) are
too small to displace themselves. Activations have tensors of their own: a step has just written
them. Sizes in bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

_ALIGN = 64  # bytes: a cache line
_CACHES = 3  # times the cache that the mark passes between two uses; at most half is left out
_SMALL = 2**16  # bytes up to which sets do not overlap, as far as `_MOST_SETS` allows
_MOST_SETS = 2**14  # of one rotation: each is a tensor or more
_SPREAD = 0.02  # standard deviation of weights, as models are initialised: results stay finite


@dataclass
class _Buffer:
    data: Tensor
    """Flat random numbers."""
    cache: int
    """Elements that the last-level cache holds."""
    mark: int = 0
    """Elements before it were touched last."""


class Rotation:
    """Sets of operands, cut from one buffer, that follow each other through it."""

    def __init__(self, buffer: _Buffer, shapes: Sequence[tuple[int, ...]], *, cold: bool) -> None:
        item = buffer.data.element_size()
        line = _ALIGN // item
        sizes = [_up(prod(shape), line) for shape in shapes]
        self._buffer, self._size = buffer, sum(sizes)
        # sets start close to each other, so that little is left out before the next one
        apart = max(min(self._size // 4, buffer.cache // 2), min(self._size, _SMALL // item))
        self._apart = _up(max(apart, len(buffer.data) // _MOST_SETS, 1), line)
        room = len(buffer.data) - self._size
        starts = range(0, room + 1, self._apart) if cold else range(1)
        self.sets = tuple(_cut(buffer.data, start, shapes, sizes) for start in starts)
        """What `next` gives, one after the other; one set only when warm."""
        self.bytes = (starts[-1] + self._size) * item
        """Memory that the sets cover together."""

    def next(self) -> tuple[Tensor, ...]:
        """Operands of one call: the set behind the buffer's mark."""
        index = -(-self._buffer.mark // self._apart)
        if index >= len(self.sets):
            index = 0
        self._buffer.mark = index * self._apart + self._size
        return self.sets[index]


class Operands:
    """The source of random operands on one device, shared by all that is measured together.

    Parameters
    ----------
    device
        ``"cpu"`` or a CUDA device.
    cache_bytes
        Last-level cache of the device (`Machine.cache_bytes`); 0 where only warm sets are asked.
    limit_bytes
        Largest buffer that may be made.
    """

    def __init__(
        self, *, device: str = "cpu", cache_bytes: int, limit_bytes: int = 1_500_000_000
    ) -> None:
        self.device = torch.device(device)
        self.cache_bytes = cache_bytes
        self.limit_bytes = limit_bytes
        self._buffers: dict[tuple[torch.dtype, bool], _Buffer] = {}
        self._given: list[Tensor] = []

    def activations(self, *shape: int, dtype: torch.dtype, fresh: bool = True) -> Tensor:
        """Return a new tensor of standard normal numbers.

        ``fresh`` says that the kernel before writes it in a step (see `take_given`).
        """
        made = torch.randn(shape, dtype=dtype, device=self.device)
        if fresh:
            self._given.append(made)
        return made

    def take_given(self) -> tuple[Tensor, ...]:
        """Return the fresh activations that were made since this was asked last."""
        given, self._given = tuple(self._given), []
        return given

    def rotate(
        self,
        shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype,
        *,
        cold: bool,
        on_host: bool = False,
    ) -> Rotation:
        """Cut sets of operands of these shapes.

        Parameters
        ----------
        shapes
            Of the operands of one call.
        dtype
            Of all of them.
        cold
            True: each call meets operands that have left the cache. False: always the same ones.
        on_host
            Page-locked host memory instead of the device's own, for copies to a CUDA device.

        Returns
        -------
        Rotation

        Raises
        ------
        ValueError
            When cold sets are asked of an unknown cache, or the buffer would exceed the limit.
        """
        one = sum(_up(prod(shape) * dtype.itemsize, _ALIGN) for shape in shapes)
        if cold and shapes:
            buffer = self._shared(one, dtype, on_host)
        else:  # its own: warm operands at the mark's place would warm those of others
            self._check_size(one)
            buffer = self._buffer(one, dtype, on_host)
        return Rotation(buffer, shapes, cold=cold)

    def _shared(self, one: int, dtype: torch.dtype, on_host: bool) -> _Buffer:
        """Find or make the buffer for sets of ``one`` bytes; what was cut before keeps its own."""
        if not self.cache_bytes:
            raise ValueError(
                "cache_bytes is 0 -- cold operands must exceed the last-level cache -- state its "
                "bytes, or measure warm"
            )
        between = _CACHES * self.cache_bytes
        self._check_size(one, between)
        buffer = self._buffers.get((dtype, on_host))
        if buffer is None or buffer.data.nbytes < one + between:
            size = (_CACHES + 1) * self.cache_bytes
            while size < one + between:  # doubled: sizes that grow step by step make few buffers
                size *= 2
            buffer = self._buffer(min(size, self.limit_bytes), dtype, on_host)
            self._buffers[dtype, on_host] = buffer
        return buffer

    def _check_size(self, one: int, between: int = 0) -> None:
        if one + between > self.limit_bytes:
            raise ValueError(
                f"operands of {one} bytes, and {between} between two uses of the same -- allowed "
                f"are {self.limit_bytes} together -- take a smaller shape, or raise limit_bytes"
            )

    def _buffer(self, size: int, dtype: torch.dtype, on_host: bool) -> _Buffer:
        device = torch.device("cpu") if on_host else self.device
        elements, cache = size // dtype.itemsize, self.cache_bytes // dtype.itemsize
        data = torch.empty(elements, dtype=dtype, device=device, pin_memory=on_host)
        return _Buffer(data.normal_(0, _SPREAD), cache)


def _up(number: int, multiple: int) -> int:
    """Round up to a multiple."""
    return -(-number // multiple) * multiple


def _cut(
    data: Tensor, start: int, shapes: Sequence[tuple[int, ...]], sizes: Sequence[int]
) -> tuple[Tensor, ...]:
    operands = []
    for shape, size in zip(shapes, sizes, strict=True):
        operands.append(data[start : start + prod(shape)].view(shape))
        start += size
    return tuple(operands)
