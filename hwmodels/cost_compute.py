"""What kernels of one processor take: a roofline with achieved efficiencies and a launch time.

``t = launch + max(FLOP / (e_c F), bytes / (e_m W))`` in seconds, F the dense peak of the weight
format, W the bandwidth at which the processor reads its memory; FLOP count whole tiles, bytes
count what moves, weights of active experts only. See docs/reference/cost-model.md for the sources.
"""

import numpy as np

from basis.evidence import Evidence, weakest
from hwmodels.device import Kernel, Processor
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


def price_compute(op: ComputeOp, on: Processor, bandwidth: Figure[float]) -> Price:
    """Price each row of a compute column on one processor.

    Parameters
    ----------
    op : ComputeOp
        The column.
    on : Processor
        Its kernels and peaks are used.
    bandwidth : Figure
        Peak at which this processor reads its memory, bytes per second.

    Returns
    -------
    Price
        Seconds [n]; rows without work cost nothing.
    """
    match op:
        case Gemm():
            return _gemm(op, on, bandwidth)
        case GroupedGemm():
            return _grouped_gemm(op, on, bandwidth)
        case AttentionDecode():
            return _attention("attention_decode", op, on, bandwidth)
        case AttentionPrefill():
            return _attention("attention_prefill", op, on, bandwidth)
        case Route():
            return _roofline(
                "route", op.activation_dtype, op.flops(), op.bytes_moved(), on, bandwidth
            )
        case Permute():
            return _streaming("permute", op.bytes_moved(), on, bandwidth)
        case Elementwise():
            return _streaming("stream", op.bytes_moved(), on, bandwidth)


def _streaming(name: Kernel, moved: Floats, on: Processor, bandwidth: Figure[float]) -> Price:
    return _roofline(name, "bf16", np.zeros_like(moved), moved, on, bandwidth)


def _gemm(op: Gemm, on: Processor, bandwidth: Figure[float]) -> Price:
    cost, _ = on.kernel("gemm", op.weight_dtype)
    m, n, k = (np.asarray(x, dtype=np.float64) for x in (op.m, op.n, op.k))
    padded = 2 * _whole_tiles(m, cost.tile_rows) * n * k
    moved = np.where(m > 0, op.bytes_moved() + cost.ramp_bytes, 0.0)
    return _roofline("gemm", op.weight_dtype, padded, moved, on, bandwidth)


def _grouped_gemm(op: GroupedGemm, on: Processor, bandwidth: Figure[float]) -> Price:
    """FLOP of padded rows; weights of active experts, each with its bandwidth ramp."""
    cost, _ = on.kernel("grouped_gemm", op.weight_dtype)
    tiles = -(-op.tokens_per_expert // cost.tile_rows)
    padded = tiles.sum(axis=1, dtype=np.float64) * cost.tile_rows * op.flops_per_row()
    moved = op.bytes_moved() + op.active() * cost.ramp_bytes
    return _roofline("grouped_gemm", op.weight_dtype, padded, moved, on, bandwidth)


def _attention(
    name: Kernel, op: AttentionDecode | AttentionPrefill, on: Processor, bandwidth: Figure[float]
) -> Price:
    """Attention multiplies in the activations' format; its cache may be stored narrower."""
    cost, evidence = on.kernel(name, op.kv_dtype)
    flops = on.flops_for(op.activation_dtype)
    return _time(op.flops(), op.bytes_moved(), cost, evidence, flops, bandwidth)


def _roofline(
    name: Kernel, dtype: str, flops: Floats, moved: Floats, on: Processor, bandwidth: Figure[float]
) -> Price:
    cost, evidence = on.kernel(name, dtype)
    return _time(flops, moved, cost, evidence, on.flops_for(dtype), bandwidth)


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
    bandwidth: Figure[float],
) -> Price:
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
