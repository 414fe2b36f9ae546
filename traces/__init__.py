"""What the work is: model geometry, routing traces, their splits, batches and statistics."""

from traces.batches import Batches, PrefillBatch, decode_batches, prefill_batches
from traces.counts import expert_counts, step_counts
from traces.model_spec import Attention, ModelSpec, load_model
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
    "Attention",
    "Batches",
    "ModelSpec",
    "PrefillBatch",
    "RoutingTrace",
    "TraceMeta",
    "TraceStatistics",
    "TraceWarning",
    "TraceWriter",
    "check_against_model",
    "decode_batches",
    "expert_counts",
    "iter_trace",
    "load_model",
    "prefill_batches",
    "read_trace",
    "split_requests",
    "step_counts",
    "trace_statistics",
    "write_trace",
]
