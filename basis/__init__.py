"""What every other package stands on: errors, units, dtypes, evidence, the strict schema base."""

from basis.dtypes import DTYPES, DType, bytes_of
from basis.errors import InfeasibleError, InputError, MoeplanError, SolverError
from basis.evidence import Evidence, weakest
from basis.schema import Strict, load, read_data, validate
from basis.units import (
    Bytes,
    BytesPerSecond,
    DollarsPerHour,
    FlopPerSecond,
    Hertz,
    Joules,
    Seconds,
    Watts,
    format_quantity,
    parse_quantity,
)

__all__ = [
    "DTYPES",
    "Bytes",
    "BytesPerSecond",
    "DType",
    "DollarsPerHour",
    "Evidence",
    "FlopPerSecond",
    "Hertz",
    "InfeasibleError",
    "InputError",
    "Joules",
    "MoeplanError",
    "Seconds",
    "SolverError",
    "Strict",
    "Watts",
    "bytes_of",
    "format_quantity",
    "load",
    "parse_quantity",
    "read_data",
    "validate",
    "weakest",
]
