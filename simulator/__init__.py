"""What would happen: a deployment replays a trace on a cluster, step by step, in seconds."""

from simulator.deployment import Deployment, Parallelism, Workload
from simulator.dispatch import Dispatch, Dispatcher, homes
from simulator.memory import MemoryNeed
from simulator.metrics import sampling_floor, straggler
from simulator.placement import Placement
from simulator.result import Result
from simulator.simulate import simulate
from simulator.timeline import check_timeline

__all__ = [
    "Deployment",
    "Dispatch",
    "Dispatcher",
    "MemoryNeed",
    "Parallelism",
    "Placement",
    "Result",
    "Workload",
    "check_timeline",
    "homes",
    "sampling_floor",
    "simulate",
    "straggler",
]
