"""What a trace in memory says about its model: how skewed, how local, how predictable it is.

The main figures of `traces.measures` in one record. All are shares or ratios without a unit. Each
comes with what chance alone would give: the reuse of independent tokens with the same loads, the
best unconditional guess.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from basis.errors import InputError
from traces.measures.base import About, Floats, measure
from traces.measures.flow import Flow
from traces.measures.load import Load
from traces.measures.reuse import Reuse
from traces.routing_trace import RoutingTrace


@dataclass(frozen=True, kw_only=True, eq=False)
class TraceStatistics:
    """Figures of one trace; arrays are per layer, NaN where the trace cannot say."""

    model: str
    synthetic: bool
    num_tokens: int
    num_requests: int
    num_experts: int
    top_k: int
    moe_layer_ids: tuple[int, ...]
    decode_share: float
    """Share of the tokens that were recorded in the decode phase."""
    tokens_per_domain: dict[str, int]
    load_max_over_mean: Floats
    """``[L]``, see `traces.measures.load`."""
    load_standard_error: float
    """Standard error of an average expert's load over that load, were tokens independent:
    ``sqrt((1 - K/E) / (T K/E))``. A load max/mean within a few of these of 1 is no skew."""
    reuse: Floats
    """``[L]`` at lag 1, see `traces.measures.reuse`."""
    reuse_independent: Floats
    predictability: Floats
    """``[adjacent layer pairs]``, see `traces.measures.flow`; empty with a single request."""
    predictability_unconditional: Floats

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; every per-layer list has its mean beside it."""
        values = asdict(self) | {
            "load_max_over_mean_worst": float(np.max(self.load_max_over_mean)),
        }
        for name, value in list(values.items()):
            if isinstance(value, np.ndarray):
                values[name] = [None if np.isnan(v) else float(v) for v in value]
                known = value[~np.isnan(value)]
                values[f"{name}_mean"] = float(known.mean()) if len(known) else None
        return values | {"moe_layer_ids": list(self.moe_layer_ids)}


def trace_statistics(trace: RoutingTrace) -> TraceStatistics:
    """Compute all figures of `TraceStatistics`.

    Raises
    ------
    InputError
        If the trace has no tokens.
    """
    if not trace.num_tokens:
        raise InputError(f"trace of {trace.meta.model}: no tokens -- nothing to measure")
    meta, about = trace.meta, About.of(trace)
    counted, followed, flowing = Load(about), Reuse(about, lags=(1,)), Flow(about)
    measure(trace, [counted, followed, flowing])
    load, reuse, flow = counted.result(), followed.result(), flowing.result()
    per_domain = np.bincount(trace.domain, minlength=len(trace.domains))
    share = meta.top_k / meta.num_experts
    several = about.num_requests > 1
    return TraceStatistics(
        model=meta.model,
        synthetic=meta.synthetic,
        num_tokens=trace.num_tokens,
        num_requests=about.num_requests,
        num_experts=meta.num_experts,
        top_k=meta.top_k,
        moe_layer_ids=meta.moe_layer_ids,
        decode_share=float(trace.decode.mean()),
        tokens_per_domain=dict(zip(trace.domains, per_domain.tolist(), strict=True)),
        load_max_over_mean=load.loads.max_over_mean,
        load_standard_error=float(np.sqrt((1 - share) / (trace.num_tokens * share))),
        reuse=reuse.observed[0],
        reuse_independent=reuse.independent,
        predictability=flow.predictability if several else np.empty(0),
        predictability_unconditional=flow.unconditional if several else np.empty(0),
    )
