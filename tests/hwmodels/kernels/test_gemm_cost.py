"""Dense products: hand calculations, a scalar second version, bounds and monotonicity."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.fitting.write import plain
from hwmodels.kernels.base import Limits
from hwmodels.kernels.gemm import BY_ROWS, LONG, TILES, GemmCost
from hwmodels.ops import Gemm

LIMITS = Limits(flops=1e15, bandwidth=1e12, units=100, cache=50e6)
NUMBERS = {
    "launch": "2 us",
    "compute_efficiency": 0.5,
    "sustained": 0.8,
    "memory_efficiency": 0.9,
    "feed": "100 GB/s",
    "step": "1 ns",
    "store": 0.4,
    "sharpness": 2.0,
    "split": "3 us",
    "quantise": 2.0,
    "quantise_row": "0.5 ns",
    "kept": 0.5,
    "cache_speed": 4.0,
}


def cost(**changes: Any) -> GemmCost:
    return GemmCost.model_validate(NUMBERS | changes)


def product(m: Any, n: Any, k: Any, dtype: str = "bf16") -> Gemm:
    return Gemm(m=m, n=n, k=k, weight_dtype=dtype, activation_dtype="bf16")


def by_hand(c: GemmCost, m: int, n: int, k: int, weight: float, taken: float) -> float:
    """The docstring's model once more, one call, one tile after the other."""
    p, limits = c.numbers(), LIMITS
    ideal = 2 * m * n * k / limits.flops
    share = ideal / (ideal + LONG)
    rate = p["compute_efficiency"] * (1 - share * (1 - p["sustained"])) * limits.flops
    if c.tiles == "fastest":
        candidates = [(rows, columns, 1) for rows, columns in TILES]
    else:
        candidates = [next((a, b, together) for top, a, b, together in BY_ROWS if m <= top)]
    compute = math.inf
    for rows, columns, cluster in candidates:
        tiles = math.ceil(m / (rows * cluster)) * cluster * math.ceil(n / columns)
        waves = math.ceil(tiles / limits.units)
        products = 2 * rows * columns / (rate / limits.units)
        operands = (rows * taken + columns * weight) / p["feed"]
        loop = k * max(products, operands, p["step"])
        if c.split_k:
            parts = min(max(limits.units // tiles, 1), max(math.ceil(k / 256), 1))
            loop = min(loop, loop / parts + p["split"])
        written = min(rows, m) * min(columns, n) * 2 * limits.units / limits.bandwidth
        compute = min(compute, waves * (loop + p["store"] * written))
    passed = (n * k * weight + m * k * taken + m * n * 2) / limits.bandwidth
    memory = passed / p["memory_efficiency"]
    if c.copies is not None:
        held = min(p["kept"] * limits.cache / (c.copies * n * k * weight), 1)
        memory *= 1 - held + held / p["cache_speed"]
    s = p["sharpness"]
    both = (compute**s + memory**s) ** (1 / s)
    quantising = p["quantise"] * m * k * (2 + taken) / limits.bandwidth + p["quantise_row"] * m
    return p["launch"] + quantising + both


def test_one_tile_by_hand() -> None:
    # one 64 x 64 tile on one of 100 units of 10 TFLOP/s, half achieved: 1.6384 ns for each k;
    # one pass over 264,192 bytes at 1 TB/s; nothing overlaps
    c = cost(
        tiles="by_rows", sharpness=1.0, memory_efficiency=1.0, sustained=1.0, step="0.1 ns",
        feed="800 GB/s", store=0.0, quantise=0.0, quantise_row="0 s",
    )  # fmt: skip
    seconds = c.seconds(product(64, 64, 1000), LIMITS)
    np.testing.assert_allclose(seconds, [2e-6 + 1.6384e-6 + 0.264192e-6], rtol=1e-12)


shapes = st.tuples(*(st.integers(1, top) for top in (40_000, 70_000, 70_000)))
choices = st.fixed_dictionaries(
    {
        "tiles": st.sampled_from(["fastest", "by_rows"]),
        "split_k": st.booleans(),
        "copies": st.sampled_from([None, 1, 6]),
    }
)


@given(shape=shapes, choice=choices, quantised=st.booleans())
def test_as_the_scalar_version(
    shape: tuple[int, int, int], choice: dict[str, Any], quantised: bool
) -> None:
    c = cost(**choice)
    dtype, taken, weight = ("fp8", 1.0, 1.0) if quantised else ("bf16", 2.0, 2.0)
    seconds = c.seconds(product(*shape, dtype), LIMITS)
    np.testing.assert_allclose(seconds, [by_hand(c, *shape, weight, taken)], rtol=1e-9)


def test_weight_only_formats_feed_bf16_activations() -> None:
    c = cost(sharpness=1.0)
    bits = 4 + 16 / 128
    expected = by_hand(c, 300, 5000, 2000, bits / 8, 2.0)
    np.testing.assert_allclose(
        c.seconds(product(300, 5000, 2000, "int4"), LIMITS), [expected], rtol=1e-9
    )


@given(shape=shapes, choice=choices)
def test_never_below_its_achieved_peaks(
    shape: tuple[int, int, int], choice: dict[str, Any]
) -> None:
    c = cost(**choice | {"copies": None})
    op = product(*shape)
    bound = max(
        op.flops()[0] / (0.5 * LIMITS.flops), op.bytes_moved()[0] / (0.9 * LIMITS.bandwidth)
    )
    assert c.seconds(op, LIMITS)[0] >= (2e-6 + bound) * (1 - 1e-12)


@given(shape=shapes, split_k=st.booleans(), more=st.tuples(*[st.integers(0, 3000)] * 2))
def test_more_rows_or_columns_take_no_less(
    shape: tuple[int, int, int], split_k: bool, more: tuple[int, int]
) -> None:
    m, n, k = shape
    op = product([m, m + more[0]], [n, n + more[1]], k)
    less, greater = cost(split_k=split_k).seconds(op, LIMITS)
    assert greater >= less * (1 - 1e-12)


@given(shape=shapes, more=st.integers(0, 3000))
def test_deeper_takes_no_less_unsplit(shape: tuple[int, int, int], more: int) -> None:
    m, n, k = shape
    less, greater = cost().seconds(product(m, n, [k, k + more]), LIMITS)
    assert greater >= less * (1 - 1e-12)


@given(shape=shapes)
def test_splitting_is_taken_only_where_it_helps(shape: tuple[int, int, int]) -> None:
    op = product(*shape)
    assert cost(split_k=True).seconds(op, LIMITS)[0] <= cost().seconds(op, LIMITS)[0]


def test_few_deep_tiles_are_split() -> None:
    # 1 tile of 100,000: 100 parts of 1,000 elements each, at 10 ns of latency
    c = cost(split_k=True, step="10 ns", sharpness=20.0, quantise=0.0, quantise_row="0 s")
    seconds = c.seconds(product(16, 64, 100_000), LIMITS)[0]
    memory = (100_000 * 80 * 2 + 16 * 64 * 2) / 0.9e12
    assert seconds == pytest.approx(2e-6 + max(3e-6 + 1e-5, memory), rel=0.05)


def test_large_calls_reach_the_sustained_rate() -> None:
    c = cost(sharpness=20.0, store=0.0, feed="800 GB/s", quantise=0.0, quantise_row="0 s")
    op = product(65_536, 65_536, 65_536)
    assert c.seconds(op, LIMITS)[0] == pytest.approx(op.flops()[0] / (0.4 * 1e15), rel=0.01)


def test_nothing_to_do_costs_nothing() -> None:
    c = cost(split_k=True, copies=6)
    op = product([0, 8, 8, 8], [64, 0, 64, 64], [64, 64, 0, 64])
    assert (c.seconds(op, LIMITS) > 0).tolist() == [False, False, False, True]


def test_many_rows_as_one_by_one() -> None:
    rng = np.random.default_rng(0)
    m, n, k = (rng.integers(1, 5000, 20_000) for _ in range(3))
    c = cost(split_k=True)
    seconds = c.seconds(product(m, n, k), LIMITS)
    for row in (0, 8191, 8192, 19_999):
        alone = c.seconds(product(m[row], n[row], k[row]), LIMITS)
        assert seconds[row] == pytest.approx(alone[0], rel=1e-12)


def test_cold_weights_come_from_memory() -> None:
    warm = cost(copies=6, sharpness=20.0)
    small, large = product(1, 1000, 1000), product(1, 50_000, 50_000)
    assert warm.seconds(small, LIMITS)[0] < warm.in_service().seconds(small, LIMITS)[0]
    np.testing.assert_allclose(
        warm.seconds(large, LIMITS), warm.in_service().seconds(large, LIMITS), rtol=0.01
    )
    np.testing.assert_allclose(
        warm.in_service().seconds(small, LIMITS), cost(sharpness=20.0).seconds(small, LIMITS)
    )


def test_fixed_times_scale_apart_from_rates() -> None:
    scaled = cost().with_fixed(3.0)
    assert (scaled.launch, scaled.split) == pytest.approx((6e-6, 9e-6))
    assert scaled.step == cost().step


def test_written_and_read_again() -> None:
    c = cost(split_k=True, copies=5, tiles="fastest")
    again = GemmCost.model_validate(plain(c))
    assert again.numbers() == pytest.approx(c.numbers(), rel=1e-3)
    assert (again.split_k, again.copies, again.tiles) == (True, 5, "fastest")
