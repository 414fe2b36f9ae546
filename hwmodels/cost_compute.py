"""What kernels of one processor take: a physical cost model where one is given, else a roofline.

The roofline is ``t = launch + max(FLOP / (e_c F), bytes / (e_m W))`` in seconds, F the dense peak
of the weight format, W the bandwidth at which the processor reads its memory; FLOP count whole
tiles, bytes count what moves, weights of active experts only. See docs/reference/cost-model.md
for the sources, and `hwmodels.kernels` for the physical models.
"""

import numpy as np

from basis.evidence import Evidence, weakest
from hwmodels.device import Kernel, Processor
from hwmodels.figures import CostModel, Figure, KernelCost
from hwmodels.kernels.base import Limits, OwnPrice, PhysicalCost
from hwmodels.kernels.models import Fastest
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
from hwmodels.prices import Price, fastest, priced

ComputeOp = Gemm | GroupedGemm | AttentionDecode | AttentionPrefill | Route | Permute | Elementwise


def kernel_of(op: ComputeOp, on: Processor) -> tuple[Kernel, str, str]:
    """Return what prices an operation on a processor.

    Returns
    -------
    tuple
        The kernel's name, the format whose parameters it takes (weights; the cache for
        attention), and the format in which it multiplies.
    """
    match op:
        case Gemm():
            return "gemm", op.weight_dtype, op.weight_dtype
        case GroupedGemm():
            return "grouped_gemm", op.weight_dtype, op.weight_dtype
        case AttentionDecode():
            latent = op.latent and "mla_decode" in on.kernels
            return "mla_decode" if latent else "attention_decode", op.kv_dtype, op.activation_dtype
        case AttentionPrefill():
            latent = op.latent and "mla_prefill" in on.kernels
            name: Kernel = "mla_prefill" if latent else "attention_prefill"
            return name, op.kv_dtype, op.activation_dtype
        case Route():
            return "route", op.activation_dtype, op.activation_dtype
        case Permute():
            own = op.back and "unpermute" in on.kernels
            return "unpermute" if own else "permute", "bf16", "bf16"
        case Elementwise():
            part: Kernel = op.part if op.part and op.part in on.kernels else "stream"
            return part, "bf16", "bf16"


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
    name, dtype, multiplied = kernel_of(op, on)
    cost, evidence = on.kernel(name, dtype)
    if isinstance(op, GroupedGemm) and op.cached:
        bandwidth = _near(op, on, bandwidth)
    evidence = weakest([evidence, *peaks(on.flops_for(multiplied), bandwidth)])
    limits = on.limits(multiplied, bandwidth.value)
    return price_by(op, cost, evidence, limits)


def _near(op: GroupedGemm, on: Processor, bandwidth: Figure[float]) -> Figure[float]:
    """Return what weights are read at that fit into the processor's cache and were just there."""
    if on.cache is None or on.cache_bandwidth is None:
        return bandwidth
    fits = op.weight_bytes().max(initial=0) <= on.cache.value
    return on.cache_bandwidth if fits else bandwidth


def price_by(op: ComputeOp, cost: CostModel, evidence: Evidence, limits: Limits) -> Price:
    """Price each row of a column with one cost model, on a processor with these limits."""
    match cost:
        case OwnPrice():
            return cost.price(op, limits)
        case Fastest():
            return fastest([price_by(op, c, evidence, limits) for c in cost.of])
        case KernelCost():
            work, flops, moved = _roofline_terms(op, cost)
            seconds = roofline(flops, moved, cost, limits.flops, limits.bandwidth)
            return priced(np.where(work > 0, seconds, 0.0), cost, evidence)
        case PhysicalCost():
            return priced(cost.seconds(op, limits), cost, evidence)
    raise TypeError(f"{type(cost).__name__} prices no kernel")


def _roofline_terms(op: ComputeOp, cost: KernelCost) -> tuple[Floats, Floats, Floats]:
    """Return what says whether a row runs, its FLOP on whole tiles, and its bytes with ramps."""
    moved = op.bytes_moved()
    match op:
        case Gemm():
            m, n, k = (np.asarray(x, dtype=np.float64) for x in (op.m, op.n, op.k))
            padded = 2 * _whole_tiles(m, cost.tile_rows) * n * k
            ramped = np.where(m > 0, moved + cost.ramp_bytes, 0.0)
            return ramped, padded, ramped
        case GroupedGemm():
            tiles = -(-op.tokens_per_expert // cost.tile_rows)
            padded = tiles.sum(axis=1, dtype=np.float64) * cost.tile_rows * op.flops_per_row()
            ramped = moved + op.active() * cost.ramp_bytes
            return ramped, padded, ramped
        case Permute() | Elementwise():
            return moved, np.zeros_like(moved), moved
        case _:
            return moved, op.flops(), moved


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


def peaks(*figures: Figure[float]) -> list[Evidence]:
    """Return the evidence of peak rates that an efficiency multiplies.

    An efficiency was fitted against this very peak, so the pair is as good as the fit; only a
    peak that is itself assumed weakens it.
    """
    return [f.evidence for f in figures if f.evidence == "assumed"]


def _whole_tiles(rows: Floats, tile: int) -> Floats:
    return np.ceil(rows / tile) * tile
