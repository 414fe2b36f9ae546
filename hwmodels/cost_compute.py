"""What one rank's kernels take: a roofline with achieved efficiencies and a launch time.

``t = launch + max(FLOP / (e_c F), bytes / (e_m W))`` in seconds, F the dense peak of the weight
format, W the memory bandwidth; FLOP count whole tiles, bytes count what moves, weights of active
experts only. See docs/reference/cost-model.md for the sources.
"""

import numpy as np

from basis.evidence import Evidence, weakest
from hwmodels.device import Device, Kernel
from hwmodels.figures import Figure, KernelCost
from hwmodels.ops import (
    AttentionDecode,
    AttentionPrefill,
    Elementwise,
    Floats,
    Gemm,
    GroupedGemm,
    Permute,
    Route,
)
from hwmodels.prices import Price, priced

ComputeOp = Gemm | GroupedGemm | AttentionDecode | AttentionPrefill | Route | Permute | Elementwise


def price_compute(op: ComputeOp, device: Device) -> Price:
    """Price each row of a compute column on one device.

    Returns
    -------
    Price
        Seconds [n]; rows without work cost nothing.
    """
    match op:
        case Gemm():
            return _gemm(op, device)
        case GroupedGemm():
            return _grouped_gemm(op, device)
        case AttentionDecode():
            return _attention("attention_decode", op, device)
        case AttentionPrefill():
            return _attention("attention_prefill", op, device)
        case Route():
            return _roofline("route", op.activation_dtype, op.flops(), op.bytes_moved(), device)
        case Permute():
            return _streaming("permute", op.bytes_moved(), device)
        case Elementwise():
            return _streaming("stream", op.bytes_moved(), device)


def _streaming(name: Kernel, moved: Floats, device: Device) -> Price:
    return _roofline(name, "bf16", np.zeros_like(moved), moved, device)


def _gemm(op: Gemm, device: Device) -> Price:
    cost, _ = device.kernel("gemm", op.weight_dtype)
    m, n, k = (np.asarray(x, dtype=np.float64) for x in (op.m, op.n, op.k))
    padded = 2 * _whole_tiles(m, cost.tile_rows) * n * k
    moved = np.where(m > 0, op.bytes_moved() + cost.ramp_bytes, 0.0)
    return _roofline("gemm", op.weight_dtype, padded, moved, device)


def _grouped_gemm(op: GroupedGemm, device: Device) -> Price:
    """FLOP of padded rows; weights of active experts, each with its bandwidth ramp."""
    cost, _ = device.kernel("grouped_gemm", op.weight_dtype)
    tiles = -(-op.tokens_per_expert // cost.tile_rows)
    padded = tiles.sum(axis=1, dtype=np.float64) * cost.tile_rows * op.flops_per_row()
    moved = op.bytes_moved() + op.active() * cost.ramp_bytes
    return _roofline("grouped_gemm", op.weight_dtype, padded, moved, device)


def _attention(name: Kernel, op: AttentionDecode | AttentionPrefill, device: Device) -> Price:
    """Attention multiplies in the activations' format; its cache may be stored narrower."""
    cost, evidence = device.kernel(name, op.kv_dtype)
    flops = device.flops(op.activation_dtype)
    return _time(op.flops(), op.bytes_moved(), cost, evidence, flops, device)


def _roofline(name: Kernel, dtype: str, flops: Floats, moved: Floats, device: Device) -> Price:
    cost, evidence = device.kernel(name, dtype)
    return _time(flops, moved, cost, evidence, device.flops(dtype), device)


def roofline(
    flops: Floats, moved: Floats, cost: KernelCost, peak: float, bandwidth: float
) -> Floats:
    """Seconds of calls that compute ``flops`` and move ``moved`` bytes.

    The roofline of Williams, Waterman and Patterson (2009) with achieved shares of the peaks and
    a launch time in front.
    """
    compute = flops / (cost.compute_efficiency * peak)
    memory = moved / (cost.memory_efficiency * bandwidth)
    return np.asarray(cost.launch + np.maximum(compute, memory))


def _time(
    flops: Floats,
    moved: Floats,
    cost: KernelCost,
    evidence: Evidence,
    peak: Figure[float],
    device: Device,
) -> Price:
    bandwidth = device.memory.bandwidth
    seconds = roofline(flops, moved, cost, peak.value, bandwidth.value)
    weakest_part = weakest([evidence, *peaks(peak, bandwidth)])
    return priced(np.where(moved > 0, seconds, 0.0), cost, weakest_part)


def peaks(*figures: Figure[float]) -> list[Evidence]:
    """Return the evidence of peak rates that an efficiency multiplies.

    An efficiency was fitted against this very peak, so the pair is as good as the fit; only a
    peak that is itself assumed weakens it.
    """
    return [f.evidence for f in figures if f.evidence == "assumed"]


def _whole_tiles(rows: Floats, tile: int) -> Floats:
    return np.ceil(rows / tile) * tile
