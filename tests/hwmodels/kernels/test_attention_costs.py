"""Attention's cost models against hand calculations, brute force over tiles, and bounds."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels import AttentionDecode, AttentionPrefill
from hwmodels.kernels.attention import AttentionKernels, shares_keys
from hwmodels.kernels.attention_decode import AttentionDecodeCost
from hwmodels.kernels.attention_prefill import AttentionPrefillCost, _keys_of_tiles, prompt
from hwmodels.kernels.base import Limits
from hwmodels.silicon.attention import causal_pairs

LIMITS = Limits(flops=1e15, bandwidth=1e12, units=100.0)
CACHED = Limits(flops=1e15, bandwidth=1e12, units=100.0, cache=1e8)
DECODE = {
    "launch": "5 us", "item": "1 us", "item_rate": 1e11, "compute_share": 1.0, "memory_share": 0.5,
    "cache_share": 0.8, "cache_speed": 4.0, "combine": "2 us", "overlap": 1.0, "tail": 1.0,
}  # fmt: skip
PREFILL = {
    "launch": "5 us", "item": "1 us", "compute_share": 1.0, "exponentials": 1e20,
    "query_passes": 0.0, "key_passes": 0.0, "cache_share": 0.8, "cache_speed": 2.0, "token": "0 s",
    "tail": 0.0,
}  # fmt: skip


def decode(tokens=1, context=1024, heads=8, kv_heads=2, dim=128, window=0, dtype="bf16"):
    return AttentionDecode(
        tokens=tokens, context=context, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim,
        v_head_dim=dim, kv_elements=2 * kv_heads * dim, kv_dtype=dtype, activation_dtype="bf16",
        window=window,
    )  # fmt: skip


def prefill(tokens, pairs, heads=8, kv_heads=2, dim=128, window=0):
    return AttentionPrefill(
        tokens=tokens, pairs=pairs, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim,
        v_head_dim=dim, kv_elements=2 * kv_heads * dim, kv_dtype="bf16", activation_dtype="bf16",
        window=window,
    )  # fmt: skip


def test_decode_by_hand():
    """2 sequences x 50 KV heads are 100 items on 100 units: one wave, no split, nothing cached."""
    op = decode(tokens=2, context=2 * 256, heads=200, kv_heads=50)
    keys = 256 * 2 * 128 * 2  # bytes of keys and values of one item
    item = 1e-6 + keys / 1e11
    moved = 100 * keys + 2 * 2 * 200 * 2 * 128  # and queries, results
    assert item > 1e-6 + 2 * 64 * 256 * 256 * 100 / 1e15  # the products are not what limits
    seconds = AttentionDecodeCost(**DECODE).seconds(op, LIMITS)
    assert seconds == pytest.approx(5e-6 + item + moved / 0.5e12)


def test_decode_splits_keys_to_fill_the_units():
    """4 KV heads alone split 25 ways; log2 of it counts, and partial results in fp32."""
    cost = AttentionDecodeCost(**DECODE | {"memory_share": 1.0})
    op = decode(context=25 * 1024, heads=16, kv_heads=4)
    features = cost.features(op, LIMITS)
    assert features["ratio"] == 1.0
    assert features["waves"] == 1.0
    assert features["item_bytes"] == 1024 * 2 * 128 * 2
    assert features["partial"] == pytest.approx(16 * 128 * 25 * 2 * 4 / 1e12)
    combined = math.log2(25) * 2e-6 + features["partial"] / 4.0
    item = 1e-6 + features["item_bytes"] / 1e11
    expected = 5e-6 + combined + item + features["memory"]
    assert cost.seconds(op, LIMITS) == pytest.approx(expected)


@given(
    items=st.integers(1, 3000), keys=st.integers(1, 200_000), fill=st.sampled_from([1, 2, 8]),
    fewest=st.sampled_from([64, 128, 512]),
)  # fmt: skip
def test_splits_fill_and_do_not_overfill(items, keys, fill, fewest):
    cost = AttentionDecodeCost(**DECODE, fill=fill, split_keys=fewest, most_splits=64)
    aim = 100.0 * fill
    splits = cost._splits(np.array([float(items)]), np.array([float(keys)]), aim)[0]
    assert splits == int(splits)
    assert 1 <= splits <= 64
    assert splits == 1 or (items * splits <= aim and keys / splits >= fewest)
    if items < 0.5 * aim and keys >= 2 * fewest:
        assert splits > 1


@given(
    tokens=st.integers(1, 500), keys=st.integers(1, 50_000), group=st.sampled_from([1, 2, 7, 16]),
    kv_heads=st.sampled_from([1, 4, 8]), dim=st.sampled_from([64, 128, 256]),
    overlap=st.floats(1, 12),
)  # fmt: skip
def test_decode_is_never_below_its_bounds(tokens, keys, group, kv_heads, dim, overlap):
    op = decode(tokens, tokens * keys, group * kv_heads, kv_heads, dim)
    cost = AttentionDecodeCost(**DECODE | {"memory_share": 1.0, "overlap": overlap})
    seconds = cost.seconds(op, LIMITS)[0]
    assert seconds >= op.bytes_moved()[0] / LIMITS.bandwidth
    assert seconds >= op.flops()[0] / LIMITS.flops


@given(tokens=st.integers(1, 200), keys=st.integers(1, 20_000))
def test_a_cache_helps_and_more_so_if_it_is_larger(tokens, keys):
    op, cost = decode(tokens, tokens * keys), AttentionDecodeCost(**DECODE)
    cold, warm = cost.seconds(op, LIMITS)[0], cost.seconds(op, CACHED)[0]
    assert warm <= cold * (1 + 1e-12)
    larger = Limits(flops=1e15, bandwidth=1e12, units=100.0, cache=1e12)
    assert cost.seconds(op, larger)[0] <= warm * (1 + 1e-12)


def test_a_full_window_costs_its_edge_and_half_a_block():
    cost = AttentionDecodeCost(**DECODE, edge="3 us")
    narrow = decode(tokens=200, context=200 * 128, window=128)
    plain = decode(tokens=200, context=200 * 128)
    not_full = decode(tokens=200, context=200 * 100, window=128)
    a, b = cost.features(narrow, LIMITS), cost.features(plain, LIMITS)
    assert a["item_bytes"] == 2 * b["item_bytes"]  # 192 keys touch two blocks
    more = a["waves"] * 128 * 2 * 128 * 2 / 1e11
    got = cost.seconds(narrow, LIMITS) - cost.seconds(plain, LIMITS)
    assert got == pytest.approx(3e-6 + more)
    assert cost.features(not_full, LIMITS)["full"] == 0.0


def test_no_work_costs_nothing():
    assert AttentionDecodeCost(**DECODE).seconds(decode(0, 0), LIMITS) == 0.0
    assert AttentionPrefillCost(**PREFILL).seconds(prefill(0, 0), LIMITS) == 0.0


@given(queries=st.integers(1, 300), before=st.integers(0, 300), window=st.integers(0, 200))
def test_pairs_are_those_counted_one_by_one(queries, before, window):
    seen = np.arange(1, queries + 1) + before
    counted = (np.minimum(seen, window) if window else seen).sum()
    assert causal_pairs(np.array([queries]), np.array([before]), window)[0] == counted


@given(
    length=st.integers(1, 20_000), sequences=st.integers(1, 64),
    window=st.sampled_from([0, 128, 1024]),
)  # fmt: skip
def test_equal_prompts_are_told_from_their_sums(length, sequences, window):
    length = min(length, window * (window - 1)) if window else length
    pairs = sequences * causal_pairs(np.array([length]), np.array([0]), window)
    queries, before = prompt(np.array([float(sequences * length)]), pairs.astype(float), window)
    assert queries[0] == pytest.approx(length, rel=1e-9)
    assert before[0] == pytest.approx(0, abs=1e-6 * length)


@given(queries=st.integers(1, 4096), before=st.integers(4096, 100_000))
def test_a_chunk_behind_a_prefix_is_told_from_its_sums(queries, before):
    pairs = causal_pairs(np.array([queries]), np.array([before])).astype(float)
    got = prompt(np.array([float(queries)]), pairs)
    assert got[0][0] == queries
    assert got[1][0] == pytest.approx(before)


@given(
    tiles=st.integers(1, 40), span=st.sampled_from([128, 256]), prefix=st.integers(0, 20),
    window=st.sampled_from([0, 128, 1024]),
)  # fmt: skip
def test_keys_of_tiles_by_brute_force(tiles, span, prefix, window):
    """Tiles and prefix of whole blocks: each tile walks to its last query's key, windows cut."""
    before, queries = 128 * prefix, tiles * span
    ends = before + span * np.arange(1, tiles + 1)
    counted = np.minimum(ends, window + span) if window else ends
    got = _keys_of_tiles(
        np.array([float(tiles)]),
        span,
        np.array([float(before)]),
        np.array([float(queries)]),
        window,
    )
    assert got[0] == counted.sum()


def test_prefill_by_hand():
    """One prompt of 512, 8 heads: 32 tiles of 128 on 100 units last as long as the longest."""
    op = prefill(512, 512 * 513 // 2)
    pair = 2 * 256 * 100 / 1e15
    cost = AttentionPrefillCost(**PREFILL)
    assert cost.seconds(op, LIMITS) == pytest.approx(5e-6 + 1e-6 + 512 * 128 * pair)
    many = prefill(100 * 512, 100 * 512 * 513 // 2)  # 3200 tiles: 32 on each unit
    work = 8 * (128 + 256 + 384 + 512) * 128 * pair
    assert cost.seconds(many, LIMITS) == pytest.approx(5e-6 + 32e-6 + work)
    moved = AttentionPrefillCost(**PREFILL | {"query_passes": 2.0, "key_passes": 3.0})
    extra = (2 * 8 + 3 * 2) * 256 * 2 * 512 / 1e12
    expected = cost.seconds(op, LIMITS) + extra
    assert moved.seconds(op, LIMITS) == pytest.approx(expected)
    half = cost.seconds(op, LIMITS) + extra / 2  # at twice the speed from the cache
    assert moved.seconds(op, CACHED) == pytest.approx(half)


def test_a_short_chunk_behind_a_long_prefix_reads_the_whole_prefix():
    before, queries = 1_000_000, 4
    op = prefill(queries, queries * before + queries * (queries + 1) // 2)
    read = before * 2 * 2 * 128 * 2 / 1e12
    cost = AttentionPrefillCost(**PREFILL, packed=True, split=True)
    assert cost.seconds(op, LIMITS) >= 5e-6 + read
    assert cost.features(op, LIMITS)["prefix"] == pytest.approx(read)
    whole = prefill(512, 512 * 513 // 2)
    assert cost.features(whole, LIMITS)["prefix"] == 0.0


def test_packed_heads_fill_a_tile_together():
    """Prompts of 16: a group of 8 heads fills one tile of 128 rows, where 8 were padded."""
    op = prefill(400 * 16, 400 * 16 * 17 // 2, heads=8, kv_heads=1)
    apart = AttentionPrefillCost(**PREFILL).features(op, LIMITS)
    packed = AttentionPrefillCost(**PREFILL, packed=True).features(op, LIMITS)
    assert apart["ratio"] == 8 * packed["ratio"] == 32
    assert apart["share"] == 8 * packed["share"]


def test_few_tiles_split_their_keys_at_the_price_of_two_rounds():
    op = prefill(2048, 2048 * 2049 // 2, heads=1, kv_heads=1)
    split = AttentionPrefillCost(**PREFILL, packed=True, split=True).features(op, LIMITS)
    whole = AttentionPrefillCost(**PREFILL, packed=True).features(op, LIMITS)
    assert whole["longest"] == 2048 * 128
    assert split["longest"] == 128 * 128
    assert split["rounds"] == 3
    assert whole["rounds"] == 1
    short = prefill(512, 512 * 513 // 2, heads=1, kv_heads=1)
    cost = AttentionPrefillCost(**PREFILL, packed=True, split=True)
    assert cost.features(short, LIMITS)["rounds"] == 1


@given(
    length=st.integers(1, 9000), sequences=st.integers(1, 40), group=st.sampled_from([1, 4, 8]),
    window=st.sampled_from([0, 128]), tile=st.sampled_from([64, 128, 256]), packed=st.booleans(),
)  # fmt: skip
def test_prefill_is_never_below_its_flop(length, sequences, group, window, tile, packed):
    pairs = sequences * causal_pairs(np.array([length]), np.array([0]), window)
    op = prefill(np.array([sequences * length]), pairs, 2 * group, 2, window=window)
    cost = AttentionPrefillCost(**PREFILL, tile=tile, packed=packed)
    assert cost.seconds(op, LIMITS)[0] >= op.flops()[0] / LIMITS.flops


def test_the_sharing_kernel_runs_where_its_blocks_fill_a_quarter_of_the_units():
    """100 units: 25 blocks of 128 keys and KV head are enough, 24 are not."""
    op = decode(tokens=np.array([24, 25, 8, 9]), context=np.array([24, 25, 8 * 384, 9 * 383]),
                heads=4, kv_heads=1)  # fmt: skip
    assert shares_keys("filled", op, LIMITS).tolist() == [False, True, False, False]
    assert shares_keys("grouped", op, LIMITS).all()
    alone = decode(tokens=1000, context=1000, heads=4, kv_heads=4)
    assert not shares_keys("filled", alone, LIMITS).any()
    wide = decode(tokens=1000, context=1000, heads=64, kv_heads=1)
    assert not shares_keys("grouped", wide, LIMITS).any()
    assert shares_keys("width", wide, LIMITS).all()


def test_latent_heads_leave_the_low_latency_kernel_where_work_is_plenty():
    """128 heads are 8 blocks of 16: 12 sequences fit 100 units, if 8 splits leave 1024 keys."""
    tokens = np.array([12, 13, 1, 1])
    op = AttentionDecode(
        tokens=tokens, context=tokens * np.array([1024, 1024, 12 * 1024, 12 * 1024 + 1]),
        num_heads=128, num_kv_heads=1, head_dim=576, v_head_dim=512, kv_elements=576,
        kv_dtype="bf16", activation_dtype="bf16",
    )  # fmt: skip
    assert shares_keys("latency", op, LIMITS).tolist() == [False, True, False, True]
    few = decode(tokens=1000, context=1000 * 4096, heads=32, kv_heads=1)
    assert not shares_keys("latency", few, LIMITS).any()


def test_kernels_are_chosen_by_width_and_rule():
    def one(width, shared, launch):
        return AttentionDecodeCost(**DECODE | {"launch": launch, "width": width, "shared": shared})

    of = [one(64, True, "1 us"), one(128, True, "2 us"), one(128, False, "3 us")]
    kernels = AttentionKernels(of=of, rule="filled")
    op = decode(tokens=np.array([1, 200]), context=np.array([64, 200 * 64]), dim=96)
    assert kernels.chosen(op, LIMITS).tolist() == [2, 1]
    parts = [of[2].seconds(op, LIMITS)[0], of[1].seconds(op, LIMITS)[1]]
    assert kernels.seconds(op, LIMITS).tolist() == parts
    wider = decode(tokens=200, context=200 * 64, dim=512)  # wider than any: the widest stands in
    assert kernels.chosen(wider, LIMITS) == [1]
    narrow = decode(tokens=200, context=200 * 64, dim=64)
    assert kernels.chosen(narrow, LIMITS) == [0]


def test_in_service_nothing_is_left_in_the_cache():
    cost = AttentionDecodeCost(**DECODE)
    kernels = AttentionKernels(of=[cost])
    op = decode(tokens=64, context=64 * 512)
    assert kernels.seconds(op, CACHED) == cost.seconds(op, CACHED)
    assert kernels.in_service().seconds(op, CACHED) == cost.seconds(op, LIMITS)
    assert cost.seconds(op, CACHED) < cost.seconds(op, LIMITS)


def test_a_price_carries_the_stated_interval_and_fixed_times_scale():
    kernels = AttentionKernels(
        of=[AttentionDecodeCost(**DECODE)], low=0.9, high=1.2, evidence="fitted"
    )
    op = decode()
    price = kernels.price(op, LIMITS)
    assert price.evidence == "fitted"
    assert price.low == pytest.approx(0.9 * price.seconds)
    assert price.high == pytest.approx(1.2 * price.seconds)
    doubled = kernels.with_fixed(2.0).of[0]
    got = (doubled.launch, doubled.item, doubled.combine)
    assert got == pytest.approx((1e-5, 2e-6, 4e-6))


def test_a_file_names_its_kernels_by_model():
    entry = {"model": "attention_kernels", "rule": "grouped", "of": [
        DECODE | {"model": "attention_decode"}, PREFILL | {"model": "attention_prefill"},
    ]}  # fmt: skip
    kernels = AttentionKernels.model_validate(entry)
    assert [type(cost) for cost in kernels.of] == [AttentionDecodeCost, AttentionPrefillCost]
    assert kernels.of[0].launch == pytest.approx(5e-6)
