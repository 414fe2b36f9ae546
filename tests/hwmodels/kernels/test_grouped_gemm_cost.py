"""The cost of expert layers, against arithmetic by hand, bounds and invariants."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basis import InputError
from hwmodels.kernels.base import Limits
from hwmodels.kernels.grouped_gemm import GroupedGemmCost
from hwmodels.ops import GroupedGemm

LIMITS = Limits(flops=1e12, bandwidth=1e9, units=10)
PLAIN: dict[str, Any] = {
    "launch": "0 s", "slot": "0 s", "step": "0 s", "sort": "0 s", "sort_tokens": 1,
    "token_bytes": 0, "row_hidden_bytes": 0, "row_width_bytes": 0, "wave": "0 s",
    "compute_efficiency": 1, "memory_efficiency": 1, "blend": 1, "tile_rows": (16,),
}  # fmt: skip


def cost(**fields: Any) -> GroupedGemmCost:
    return GroupedGemmCost(**{**PLAIN, **fields})


def column(counts: Any, tokens: Any = None, **fields: Any) -> GroupedGemm:
    given: dict[str, Any] = {"hidden": 256, "width": 128, "gated": True, "weight_dtype": "fp8"}
    return GroupedGemm(
        tokens_per_expert=np.array(counts), activation_dtype="bf16", tokens=tokens,
        **{**given, **fields},
    )  # fmt: skip


def test_products_by_hand() -> None:
    """17 tokens of one expert: two tiles of 16 rows, two columns of tiles in either product."""
    weights = 3 * 256 * 128 / 1e9
    # one wave of four tiles each; a tile takes 2 x 16 x 128 x depth FLOP of a tenth of the peak
    tiles = 2 * 16 * 128 * (256 + 128) / 1e11
    assert cost().seconds(column([[17, 0]]), LIMITS) == pytest.approx([weights + tiles])


def test_terms_around_the_products_by_hand() -> None:
    op = column([[3, 1, 0]], tokens=np.array([12]))
    bare = cost().seconds(op, LIMITS)
    full = cost(
        launch="20 us", slot="1 us", step="1 ns", sort="8 us", sort_tokens=4,
        token_bytes=2, row_hidden_bytes=3, row_width_bytes=5,
    ).seconds(op, LIMITS)  # fmt: skip
    moved = (2 * 12 * 256 + 3 * 4 * 256 + 5 * 4 * 128) / 1e9
    around = 20e-6 + 3 * 1e-6 + (256 + 128) * 1e-9 + 8e-6 * 12 / 16 + moved
    assert full - bare == pytest.approx([around])


def test_without_tokens_each_pair_counts_as_one() -> None:
    fields = {"token_bytes": 2, "sort": "8 us", "sort_tokens": 4}
    by_pair = cost(**fields).seconds(column([[3, 1, 0]]), LIMITS)
    assert by_pair == cost(**fields).seconds(column([[3, 1, 0]], tokens=4), LIMITS)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([1, 2, 3], r"3 numbers for 2 rows"), ([1, -1], r"tokens: smallest -1"), ([[1, 2]], r"1 dim")],
)
def test_tokens_that_do_not_fit_are_refused(tokens: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        column([[1, 0], [0, 2]], tokens=tokens)


def test_whole_waves() -> None:
    """Exactly as many tiles as units are one wave; one more is a second."""
    limits = Limits(flops=1e18, bandwidth=1e15, units=132)
    ungated = {"hidden": 128, "width": 128, "gated": False}  # one column of tiles in each product
    waved = cost(wave="1 ms")
    for tiles, waves in ((1, 1), (132, 1), (133, 2), (264, 2), (265, 3)):
        seconds = waved.seconds(column([[16 * tiles]], **ungated), limits)
        assert seconds == pytest.approx([2 * waves * 1e-3], rel=1e-3)


def test_the_better_tile_is_taken() -> None:
    op = column([[1, 1], [300, 300]])
    low, high = (cost(tile_rows=(t,), wave="100 us").seconds(op, LIMITS) for t in (16, 128))
    both = cost(tile_rows=(16, 128), wave="100 us").seconds(op, LIMITS)
    assert low[0] < high[0]
    assert high[1] < low[1]
    assert both == pytest.approx([low[0], high[1]])


def test_perfect_overlap_is_the_larger_of_reading_and_multiplying() -> None:
    op = column([[1, 0], [4000, 4000]])
    memory = cost(blend=20).seconds(op, Limits(flops=1e18, bandwidth=1e9, units=10))
    assert memory == pytest.approx(op.weight_bytes() / 1e9, rel=1e-3)
    compute = cost(blend=20, tile_rows=(1,)).seconds(
        op, Limits(flops=1e12, bandwidth=1e18, units=1)
    )
    assert compute == pytest.approx(op.flops() / 1e12, rel=1e-3)


def test_nothing_runs_without_tokens() -> None:
    assert cost(launch="20 us").seconds(column([[0, 0]]), LIMITS).tolist() == [0.0]


def test_a_cache_shortens_the_tables_but_not_the_price() -> None:
    op = column([[1, 1], [1, 0]])
    expert = 3 * 256 * 128
    cached = Limits(flops=1e18, bandwidth=1e9, units=10, cache=2 * expert)
    model = cost(cache_share=1.0)
    table = model.time(model.numbers(), model.features(op, cached))
    # two experts fill it: nothing is found again; one leaves half of it free
    assert table == pytest.approx([2 * expert / 1e9, 0], abs=1e-8)
    assert model.seconds(op, cached) == pytest.approx([2 * expert / 1e9, expert / 1e9], rel=1e-3)


def test_fewer_experts_with_tokens_are_read_faster() -> None:
    """The gain of skew at small batches: the same rows, fewer weights."""
    even, skewed = cost().seconds(column([[1] * 16, [4] * 4 + [0] * 12]), LIMITS)
    assert skewed < even / 3


LOADS = st.lists(st.integers(0, 600), min_size=6, max_size=6)
COSTS = st.sampled_from(
    [cost(wave="3 us", blend=b, tile_rows=t) for b in (1, 2, 9) for t in ((16,), (16, 64, 128))]
)


@settings(deadline=None)
@given(loads=LOADS, model=COSTS, expert=st.integers(0, 5), added=st.integers(1, 200))
def test_more_tokens_never_take_less(
    loads: list[int], model: GroupedGemmCost, expert: int, added: int
) -> None:
    more = list(loads)
    more[expert] += added
    fewer, longer = model.seconds(column([loads, more], tokens=1), LIMITS)
    assert fewer <= longer * (1 + 1e-12)


@settings(deadline=None)
@given(loads=LOADS, model=COSTS)
def test_never_faster_than_the_peaks(loads: list[int], model: GroupedGemmCost) -> None:
    op = column([loads])
    bound = np.maximum(op.weight_bytes() / LIMITS.bandwidth, op.flops() / LIMITS.flops)
    assert model.seconds(op, LIMITS) >= bound * (1 - 1e-12)


@settings(deadline=None)
@given(loads=LOADS, model=COSTS, order=st.permutations(range(6)))
def test_experts_are_alike(loads: list[int], model: GroupedGemmCost, order: list[int]) -> None:
    mixed = [loads[i] for i in order]
    first, second = model.seconds(column([loads, mixed]), LIMITS)
    assert first == pytest.approx(second)


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.int64, np.float64])
def test_kinds_of_counts_and_chunks_do_not_matter(kind: type) -> None:
    counts = np.random.default_rng(0).integers(0, 300, (700, 256))
    model, limits = cost(wave="1 us", tile_rows=(16, 128)), LIMITS
    whole = model.seconds(column(counts.astype(kind)), limits)
    rows = [model.seconds(column(counts[i : i + 1]), limits)[0] for i in (0, 255, 256, 699)]
    assert whole[[0, 255, 256, 699]] == pytest.approx(rows)


def test_shares_of_experts_count_as_started_tiles() -> None:
    """Expected loads may be fractions: half a token still needs its expert's weights and tile."""
    half, one = cost().seconds(column([[0.5, 0], [1, 0]]), LIMITS)
    assert half == one
