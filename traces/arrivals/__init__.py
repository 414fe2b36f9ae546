"""Request arrivals: when each request comes (seconds) and how many tokens it brings and asks for.

Read from published workload traces, drawn from a distribution, or written for the engines'
benchmarks. Arrival traces carry no expert routing; `traces.request_source` joins the two.
"""

from traces.arrivals.make import deterministic, gamma, poisson
from traces.arrivals.read import find_format, is_workload, read_arrivals, read_lengths
from traces.arrivals.requests import Arrivals, Lengths, PrefixBlocks
from traces.arrivals.write import ConvertedWorkload, convert_workload, write_mooncake

__all__ = [
    "Arrivals",
    "ConvertedWorkload",
    "Lengths",
    "PrefixBlocks",
    "convert_workload",
    "deterministic",
    "find_format",
    "gamma",
    "is_workload",
    "poisson",
    "read_arrivals",
    "read_lengths",
    "write_mooncake",
]
