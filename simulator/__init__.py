"""What would happen: a deployment replays a trace on a cluster, step by step, in seconds."""

from simulator.deployment import Deployment, Workload
from simulator.dispatch import Dispatch, Dispatcher, homes
from simulator.layout import Layout
from simulator.memory import MemoryNeed, memory_of
from simulator.metrics import sampling_floor, straggler
from simulator.offload import Offload
from simulator.offload_memory import TierNeed
from simulator.offload_result import OffloadResult
from simulator.parallelism import Parallelism
from simulator.placement import Placement
from simulator.result import Result
from simulator.serving import ClosedLoop, ServingOptions, Slo, serve
from simulator.serving_metrics import ServingResult
from simulator.simulate import simulate
from simulator.timeline import check_timeline

__all__ = [
    "ClosedLoop",
    "Deployment",
    "Dispatch",
    "Dispatcher",
    "Layout",
    "MemoryNeed",
    "Offload",
    "OffloadResult",
    "Parallelism",
    "Placement",
    "Result",
    "ServingOptions",
    "ServingResult",
    "Slo",
    "TierNeed",
    "Workload",
    "check_timeline",
    "homes",
    "memory_of",
    "sampling_floor",
    "serve",
    "simulate",
    "straggler",
]
