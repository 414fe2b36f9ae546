"""Quantities with their unit in the text, held in SI: bytes, seconds, FLOP/s, watts, joules.

``3.35 TB/s`` is 3.35e12 bytes per second; ``80 GiB`` is 80 * 2**30 bytes. Decimal and
binary prefixes are both accepted and never mixed up; a bare ``Gb/s`` is refused,
because readers disagree whether it means bits (write ``Gbit/s``) or bytes (``GB/s``).
"""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator

_DECIMAL = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {f"{p}i": 1024.0**i for i, p in enumerate("KMGT", start=1)}


def _bytes_units() -> dict[str, float]:
    units = {f"{p}B": f for p, f in (_DECIMAL | _BINARY).items()}
    units |= {f"{p}bit": f / 8 for p, f in _DECIMAL.items()}
    return units


_UNITS: dict[str, dict[str, float]] = {
    "bytes": _bytes_units(),
    "bytes per second": {f"{u}/s": f for u, f in _bytes_units().items()},
    "FLOP per second": {f"{p}FLOP/s": f for p, f in _DECIMAL.items()},
    "seconds": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9},
    "watts": {"W": 1.0, "kW": 1e3, "MW": 1e6},
    "hertz": {f"{p}Hz": f for p, f in _DECIMAL.items()},
    "US dollars per hour": {"USD/h": 1.0},
    "joules": {"J": 1.0, "mJ": 1e-3, "uJ": 1e-6, "nJ": 1e-9, "pJ": 1e-12, "fJ": 1e-15},
}
_EXAMPLE = {
    "bytes": "80 GB or 80 GiB",
    "bytes per second": "3.35 TB/s or 400 Gbit/s",
    "FLOP per second": "989 TFLOP/s",
    "seconds": "2.5 us",
    "watts": "700 W",
    "hertz": "1.98 GHz",
    "US dollars per hour": "2.99 USD/h",
    "joules": "0.9 nJ",
}
_QUANTITY = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([^\s\d].*?)?\s*")


def parse_quantity(text: object, dimension: str) -> float:
    """Read ``text`` (``"3.35 TB/s"``) as a number in SI.

    Parameters
    ----------
    text : str
        Number and unit. A bare number is refused, except zero.
    dimension : str
        One of the keys of the unit table: "bytes", "bytes per second", ...

    Raises
    ------
    ValueError
        If the unit is missing, unknown, ambiguous, or of another dimension.
    """
    wanted = f"write a quantity in {dimension} with its unit, for example {_EXAMPLE[dimension]}"
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        if text == 0:
            return 0.0
        raise ValueError(f"unit missing in {text!r} -- {wanted}")
    match = _QUANTITY.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"cannot read {text!r} as a quantity -- {wanted}")
    number, unit = float(match[1]), match[2] or ""
    if not unit:
        raise ValueError(f"unit missing in {text!r} -- {wanted}")
    if re.fullmatch(r"[kMGTP]?b(ps|/s)?", unit):
        raise ValueError(
            f"ambiguous unit {unit!r} in {text!r} -- write bit (400 Gbit/s) or B (50 GB/s)"
        )
    if unit not in _UNITS[dimension]:
        raise ValueError(f"unknown unit {unit!r} in {text!r} -- {wanted}")
    return number * _UNITS[dimension][unit]


def _reader(dimension: str, *, positive: bool) -> BeforeValidator:
    def read(value: Any) -> float:
        number = parse_quantity(value, dimension)
        if number < 0 or (positive and number == 0):
            raise ValueError(f"{value!r} is not {'positive' if positive else 'at least zero'}")
        return number

    return BeforeValidator(read)


Bytes = Annotated[float, _reader("bytes", positive=True)]
BytesPerSecond = Annotated[float, _reader("bytes per second", positive=True)]
FlopPerSecond = Annotated[float, _reader("FLOP per second", positive=True)]
Seconds = Annotated[float, _reader("seconds", positive=False)]
Watts = Annotated[float, _reader("watts", positive=True)]
Hertz = Annotated[float, _reader("hertz", positive=True)]
Joules = Annotated[float, _reader("joules", positive=False)]
DollarsPerHour = Annotated[float, _reader("US dollars per hour", positive=True)]


def format_quantity(value: float, unit: str, digits: int = 3) -> str:
    """Write ``value`` with a decimal prefix, for people: ``3.35 TB/s``, ``12.5 us``."""
    if value == 0:
        return f"0 {unit}"
    prefixes = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, "")]
    if unit == "s":
        prefixes = [(1.0, ""), (1e-3, "m"), (1e-6, "u"), (1e-9, "n")]
    factor, prefix = next(((f, p) for f, p in prefixes if abs(value) >= f), prefixes[-1])
    return f"{value / factor:.{digits}g} {prefix}{unit}"
