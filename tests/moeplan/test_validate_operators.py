"""Operators beside their prices: errors, verdicts, and which figure of the machine is wrong."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")

from basis import validate
from hwmodels.cluster import Cluster
from hwmodels.cost import price
from kernels_ref.sweep import draw_cases
from moeplan.validate_operators import Timed, compare_operators
from moeplan.validate_predict import with_limit


def _machine() -> Cluster:
    product = {"compute_efficiency": 0.9, "memory_efficiency": 0.6}
    packed = product | {"packing": 0.3, "rows": 0.5}
    rows = {"model": "library_rows", "launch": "9 us", "row": "10 ns", "memory_efficiency": 0.5,
            "cache_speed": 2.0, "kept": 0.5}  # fmt: skip
    looped = {"model": "looped_attention", "launch": "10 us", "call": "9 us", "rows": 2.0,
              "exponentials": 2e9} | product  # fmt: skip
    kernels = {
        "gemm": {"model": "library_gemm", "launch": "5 us"} | packed,
        "grouped_gemm": {"model": "looped_experts", "launch": "9 us", "call": "17 us"} | packed,
        "attention_decode": looped,
        "attention_prefill": looped,
        "route": {"model": "library_route", "launch": "15 us", "score": "1 ns", "select": "7 ns",
                  "choice": "16 ns"} | packed,
        "permute": rows, "unpermute": rows, "norm": rows, "rope": rows, "activation": rows,
        "embedding": rows,
        "stream": {"model": "stream", "launch": "2 us", "memory_efficiency": 0.8,
                   "cache_speed": 4.0, "kept": 0.7},
    }  # fmt: skip
    device = {
        "name": "t",
        "memories": {"host": {"kind": "t", "capacity": "20 GB", "bandwidth": "40 GB/s"}},
        "processors": {
            "cpu": {
                "memory": "host",
                "flops": {"fp32": "100 GFLOP/s", "bf16": "400 GFLOP/s"},
                "cache": "32 MiB",
                "kernels": {name: {"bf16": cost} for name, cost in kernels.items()},
            }
        },
    }
    return validate({"name": "t", "device": device, "node": {"devices": 1}}, Cluster, "t")


def _measured(machine: Cluster, noise: float = 0.03) -> list[Timed]:
    """Let a machine measure itself, with some noise."""
    rng = np.random.default_rng(0)
    return [
        Timed(
            kernel=case.kernel,
            op=case.op,
            seconds=float(price(case.op, machine).seconds[0] * np.exp(noise * rng.normal())),
            floor=noise,
        )
        for case in draw_cases(seed=1, scale=0.25)
    ]


def test_a_right_machine_passes():
    machine = _machine()
    found = compare_operators(_measured(machine), machine)
    assert found.passed
    assert found.summary.median < 0.05
    assert {each.label for each in found.by_limit} == {"bandwidth", "FLOP/s", "fixed time"}


@pytest.mark.parametrize(
    ("limit", "wrong", "right"),
    [("bandwidth", 2.0, 0.5), ("FLOP/s", 2.0, 0.5), ("fixed time", 0.1, 0.1)],
)
def test_a_wrong_figure_fails_and_is_named(limit, wrong, right):
    """Bandwidth x2, FLOP/s x2, latency x10, one at a time."""
    machine = _machine()
    found = compare_operators(_measured(machine), with_limit(machine, limit, wrong))
    assert not found.passed
    first = found.suspects[0]
    assert first.limit == limit
    assert first.named
    assert first.factor == pytest.approx(right, rel=0.3)
    worst = max(found.by_limit, key=lambda each: each.median)
    assert worst.label == limit


def test_noisy_operators_are_undecidable_and_never_passed():
    machine = _machine()
    noisy = [replace(each, floor=0.2) for each in _measured(machine)]
    found = compare_operators(noisy, machine)
    assert not found.passed
    assert found.suspects == ()
    assert all(row.verdict == "undecidable" for row in found.rows)
