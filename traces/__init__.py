"""What the work is: model geometry, routing traces, their splits, batches and statistics."""

from traces.arrivals import (
    Arrivals,
    ConvertedWorkload,
    Lengths,
    PrefixBlocks,
    convert_workload,
    deterministic,
    gamma,
    is_workload,
    poisson,
    read_arrivals,
    read_lengths,
)
from traces.batches import Batches, PrefillBatch, decode_batches, prefill_batches
from traces.caches import Replay, hit_rate_curve, lru_hits_by_size, replay
from traces.caches_inputs import active_experts, expert_scores, token_steps
from traces.caches_scores import needs
from traces.counts import expert_counts, step_counts
from traces.model_spec import Attention, ModelSpec, load_model
from traces.predictors import predict
from traces.record_model import Recording, TraceOrigin, record
from traces.recorder import RoutingRecorder
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
    "ConvertedWorkload",
    "Lengths",
    "ModelSpec",
    "PrefillBatch",
    "PrefixBlocks",
    "Recording",
    "Replay",
    "RequestSource",
    "RoutingRecorder",
    "RoutingTrace",
    "TraceMeta",
    "TraceOrigin",
    "TraceStatistics",
    "TraceWarning",
    "TraceWriter",
    "active_experts",
    "check_against_model",
    "convert_workload",
    "decode_batches",
    "deterministic",
    "draw_requests",
    "expert_counts",
    "expert_scores",
    "gamma",
    "hit_rate_curve",
    "is_workload",
    "iter_trace",
    "load_model",
    "lru_hits_by_size",
    "needs",
    "poisson",
    "predict",
    "prefill_batches",
    "read_arrivals",
    "read_lengths",
    "read_trace",
    "record",
    "replay",
    "split_requests",
    "step_counts",
    "token_steps",
    "trace_statistics",
    "write_trace",
]
