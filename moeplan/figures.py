"""Numbers as people read them: significant digits, thousands separators, prefixed units.

Every text and picture of the front door writes its quantities through these functions, so that
one number looks the same in the report, the comparison and on the terminal. Inputs are SI.
"""

import math

MISSING = "–"
_GAP = "\u00a0"  # a number and its unit stay on one line


def number(value: float | None, digits: int = 4) -> str:
    """Write a plain number with ``digits`` significant digits: ``12,350``, ``0.0412``."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")  # 999.96 becomes 1000, which has a digit more
    decimals = digits - 1 - math.floor(math.log10(abs(rounded)))
    return f"{rounded:,.{max(decimals, 0)}f}"


def count(value: int | None) -> str:
    """Write a count in full: ``8,192``."""
    return MISSING if value is None else f"{value:,}"


def _prefixed(value: float, unit: str, prefixes: list[tuple[float, str]], digits: int) -> str:
    limit = 1 - 0.5 * 10.0**-digits  # 0.9996 ms rounds to 1.000 ms and belongs to that prefix
    factor, prefix = next((p for p in prefixes if abs(value) >= p[0] * limit), prefixes[-1])
    return f"{number(value / factor, digits)}{_GAP}{prefix}{unit}"


def seconds(value: float | None, digits: int = 3) -> str:
    """Write a time: ``2.41 ms``."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return f"0{_GAP}s"
    return _prefixed(value, "s", [(1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n")], digits)


def data_size(value: float | None, digits: int = 3) -> str:
    """Write an amount of bytes with a decimal prefix: ``61.2 GB``."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return f"0{_GAP}B"
    prefixes = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, "")]
    return _prefixed(value, "B", prefixes, digits)


def fixed(value: float | None, decimals: int = 3) -> str:
    """Write a ratio with a fixed number of decimals: ``1.187``."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:.{decimals}f}"


def percent(fraction: float | None, *, signed: bool = False) -> str:
    """Write a fraction as per cent, two digits below 1 % and one above: ``+3.2 %``, ``0.04 %``."""
    if fraction is None or not math.isfinite(fraction):
        return MISSING
    decimals = 1 if abs(fraction) >= 0.00995 else 2
    text = f"{100 * fraction:{'+' if signed else ''}.{decimals}f}"
    return f"{text}{_GAP}%".replace("-", "−")


def interval(low: float | None, high: float | None, digits: int = 3) -> str:
    """Write an interval: ``11,200–13,400``; empty where an end is missing."""
    if low is None or high is None:
        return ""
    return f"{number(low, digits)}–{number(high, digits)}"
