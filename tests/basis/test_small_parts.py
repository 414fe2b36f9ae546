import ast
from pathlib import Path

import pytest

import basis
from basis import DTYPES, InputError, bytes_of, weakest


def test_weakest_evidence() -> None:
    assert weakest(["datasheet", "measured"]) == "datasheet"
    assert weakest(["fitted", "transfer"]) == "transfer"
    assert weakest(["measured"]) == "measured"


@pytest.mark.parametrize(
    ("dtype", "elements", "size"),
    [
        ("bf16", 10, 20),
        ("fp8", 10, 10),
        ("mxfp4", 32, 17),
        ("nvfp4", 16, 9),
        ("int4", 128, 66),
        ("mxfp8", 32, 33),
        ("nvfp4_w4a16", 16, 9),
        ("int4_g32", 32, 18),
    ],
)
def test_bytes_include_scales(dtype: str, elements: int, size: float) -> None:
    assert bytes_of(dtype, elements) == size


def test_unknown_dtype_names_the_known() -> None:
    with pytest.raises(InputError, match="known are fp32, bf16"):
        bytes_of("fp7", 1)


def test_compute_formats_exist() -> None:
    assert {d.compute for d in DTYPES.values()} <= {"fp32", "tf32", "bf16", "fp8", "fp4", "int8"}


def test_exported_names_are_exact() -> None:
    """``__all__`` is sorted as ruff sorts it, complete, and every name is there."""
    tree = ast.parse(Path(basis.__file__).read_text())
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(basis.__all__) == imported
