"""Peaks that a machine shows: its best dense products, and its fastest reading of memory.

They are what the cost models' shares refer to. No data sheet of a virtual machine says how many of
the socket's channels or how much of its clock a thread gets, so both are measured: the best of
several shapes, each the median of its repeats.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch

from hwmodels.silicon.own import flops_of
from hwmodels.silicon.table import Table
from kernels_ref.measure import Run, time_calls

_PRODUCTS = ((512, 512, 512), (1024, 1024, 1024), (512, 4096, 1024), (2048, 2048, 2048))
_READ = 4  # times the last-level cache
_LEAST = 2**28  # bytes


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """The best that was seen."""

    flops: dict[str, float]
    """Dense rate by format, FLOP/s."""
    bandwidth: float
    """Bytes read (and written) per second, from memory beyond the caches."""
    how: str
    """What reached the bandwidth."""

    def with_seen(self, dtype: str, tables: Sequence[Table]) -> Self:
        """Return peaks that no measured product of a format beats."""
        rates = [
            (flops_of(op) / seconds).max()
            for table in tables
            for op, seconds in zip(table.parts, table.seconds, strict=True)
        ]
        best = max([self.flops[dtype], *map(float, rates)])
        return replace(self, flops=self.flops | {dtype: best})


def measure_peaks(device: str, cache_bytes: int, dtypes: tuple[str, ...]) -> Peaks:
    """Measure dense rates and memory bandwidth.

    Parameters
    ----------
    device : str
        ``cpu`` or a CUDA device.
    cache_bytes : int
        Last-level cache; what is read is four times as large, and 256 MiB at least.
    dtypes : tuple of str
        Formats to multiply in: ``fp32``, ``bf16``.
    """
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    flops = {name: _best_product(device, kinds[name]) for name in dtypes}
    count = max(_LEAST, _READ * cache_bytes) // 4
    x_N = torch.ones(count, device=device)
    y_N = torch.empty_like(x_N)
    one_M = torch.ones(1024, device=device)
    x_NM = x_N[: count // 1024 * 1024].view(-1, 1024)
    ways: dict[str, tuple[Run, float]] = {
        "a sum": (lambda: x_N.sum(), 4.0 * count),
        "a copy": (lambda: y_N.copy_(x_N), 8.0 * count),
        "a product with a vector": (lambda: x_NM @ one_M, 4.0 * count),
    }
    rates = {
        name: moved / time_calls(run, device=device, budget=0.3).seconds
        for name, (run, moved) in ways.items()
    }
    how = max(rates, key=lambda name: rates[name])
    return Peaks(flops=flops, bandwidth=rates[how], how=how)


def _best_product(device: str, dtype: torch.dtype) -> float:
    best = 0.0
    for m, n, k in _PRODUCTS:
        x_MK = torch.randn(m, k, device=device).to(dtype)
        w_NK = torch.randn(n, k, device=device).to(dtype)
        run: Run = lambda x=x_MK, w=w_NK: torch.nn.functional.linear(x, w)  # type: ignore[misc]  # noqa: E731
        seconds = time_calls(run, device=device, budget=0.3).seconds
        best = max(best, 2.0 * m * n * k / seconds)
    return best
