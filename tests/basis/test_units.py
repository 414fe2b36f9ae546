import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from basis import format_quantity, parse_quantity

KNOWN = [
    ("3.35 TB/s", "bytes per second", 3.35e12),
    ("80 GB", "bytes", 80e9),
    ("80 GiB", "bytes", 80 * 2**30),
    ("400 Gbit/s", "bytes per second", 50e9),
    ("989 TFLOP/s", "FLOP per second", 989e12),
    ("2.5us", "seconds", 2.5e-6),
    ("1e3 ns", "seconds", 1e-6),
    (".5 kW", "watts", 500.0),
    ("1.98 GHz", "hertz", 1.98e9),
    ("0.44 pJ", "joules", 0.44e-12),
    (0, "seconds", 0.0),
]


@pytest.mark.parametrize(("text", "dimension", "value"), KNOWN)
def test_known_quantities(text: object, dimension: str, value: float) -> None:
    assert math.isclose(parse_quantity(text, dimension), value, rel_tol=1e-15)


@pytest.mark.parametrize(
    ("text", "dimension", "message"),
    [
        ("3.35", "bytes per second", "unit missing"),
        (3.35, "bytes per second", "unit missing"),
        (True, "bytes", "cannot read"),
        ("400 Gb/s", "bytes per second", "ambiguous unit 'Gb/s'"),
        ("400 Gbps", "bytes per second", "ambiguous unit"),
        ("3.35 TB", "bytes per second", "unknown unit 'TB'"),
        ("3.35 tb/s", "bytes per second", "unknown unit"),
        ("989 TFLOPS", "FLOP per second", "unknown unit"),
        ("fast", "seconds", "cannot read"),
        ("nan GB", "bytes", "cannot read"),
        (None, "bytes", "cannot read"),
    ],
)
def test_bad_quantities_say_what_to_write(text: object, dimension: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_quantity(text, dimension)
    assert "write" in str(caught.value)


@given(st.floats(1e-6, 1e18))
def test_formatting_keeps_three_digits(value: float) -> None:
    text = format_quantity(value, "B/s", digits=6)
    assert math.isclose(parse_quantity(text, "bytes per second"), value, rel_tol=1e-5)


def test_formatting_of_seconds_goes_down() -> None:
    assert format_quantity(12.5e-6, "s") == "12.5 us"
    assert format_quantity(0, "s") == "0 s"
    assert format_quantity(3.35e12, "B/s") == "3.35 TB/s"
