"""What the work is: model geometry, routing traces, their splits, batches and statistics."""

from traces.arrivals import Arrivals, Lengths, poisson, read_arrivals
from traces.batches import Batches, PrefillBatch, decode_batches, prefill_batches
from traces.caches import Replay, hit_rate_curve, lru_hits_by_size, replay
from traces.caches_inputs import active_experts, expert_scores, token_steps
from traces.caches_scores import needs
from traces.counts import expert_counts, step_counts
from traces.model_spec import Attention, ModelSpec, load_model
from traces.predictors import predict
from traces.request_source import RequestSource, draw_requests
from traces.routing_trace import (
    RoutingTrace,
    TraceMeta,
    TraceWarning,
    TraceWriter,
    check_against_model,
    iter_trace,
    read_trace,
    write_trace,
)
from traces.splits import split_requests
from traces.stats import TraceStatistics, trace_statistics

__all__ = [
    "Arrivals",
    "Attention",
    "Batches",
    "Lengths",
    "ModelSpec",
    "PrefillBatch",
    "Replay",
    "RequestSource",
    "RoutingTrace",
    "TraceMeta",
    "TraceStatistics",
    "TraceWarning",
    "TraceWriter",
    "active_experts",
    "check_against_model",
    "decode_batches",
    "draw_requests",
    "expert_counts",
    "expert_scores",
    "hit_rate_curve",
    "iter_trace",
    "load_model",
    "lru_hits_by_size",
    "needs",
    "poisson",
    "predict",
    "prefill_batches",
    "read_arrivals",
    "read_trace",
    "replay",
    "split_requests",
    "step_counts",
    "token_steps",
    "trace_statistics",
    "write_trace",
]
