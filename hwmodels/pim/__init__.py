"""Processing in and near memory: from DRAM organisation to the figures of a processor.

A `PimMemory` (catalog/pim/*.yaml) says what a stack is and which units stand in it; the functions
answer with bandwidth, time, energy and what sharing leaves. See docs/background/pim.md.
"""

from hwmodels.pim.catalog import load_pim, pim_names, uncited
from hwmodels.pim.description import Pim, PimMemory
from hwmodels.pim.gemm import gemm_joules, gemm_seconds
from hwmodels.pim.processor import PimFigures, pim_processor, processor_fields, processor_yaml
from hwmodels.pim.sharing import Shared, at_once, in_turns
from hwmodels.pim.streaming import (
    command_interval,
    host_bandwidth,
    interleaved_read_power,
    peak_bandwidth,
    peak_flops,
    streaming_power,
    sustained_bandwidth,
)

__all__ = [
    "Pim",
    "PimFigures",
    "PimMemory",
    "Shared",
    "at_once",
    "command_interval",
    "gemm_joules",
    "gemm_seconds",
    "host_bandwidth",
    "in_turns",
    "interleaved_read_power",
    "load_pim",
    "peak_bandwidth",
    "peak_flops",
    "pim_names",
    "pim_processor",
    "processor_fields",
    "processor_yaml",
    "streaming_power",
    "sustained_bandwidth",
    "uncited",
]
