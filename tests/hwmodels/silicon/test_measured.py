"""The measured mode on tables made by hand: exact where it must be, refusing where it must."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from basis import InputError
from hwmodels.kernels.base import Limits
from hwmodels.ops import AttentionDecode, AttentionPrefill, Elementwise, Gemm, GroupedGemm
from hwmodels.prices import Price
from hwmodels.silicon.measured import (
    Interpolated,
    held_out_seconds,
    left_out,
    price_measured,
    scatter,
    take,
)
from hwmodels.silicon.table import Table
from hwmodels.silicon.wheel import Source

LIMITS = Limits(flops=1e15, bandwidth=1e12, units=100)
SOURCE = Source(device="toy", engine="ours", version="1", path="-", sha256="-", package="hand")
ROWS = np.array([1, 2, 4, 8, 16, 32, 64, 128, 256, 512])


def _table(parts, frame, op, shape, swept, dtype="bf16"):
    return Table(
        source=SOURCE, op=op, dtype=dtype, kernel="toy", parts=parts, frame=frame,
        shape=shape, swept=swept,
    )  # fmt: skip


def _gemm(m, n=64, k=32):
    return Gemm(m=m, n=n, k=k, weight_dtype="bf16", activation_dtype="bf16")


def gemm_table() -> Table:
    """Two matrices whose seconds are 5 us + m n k / 1e13, linear in the rows."""
    frame = pd.concat([pd.DataFrame({"m": ROWS, "n": n, "k": 32}) for n in (64, 256)])
    frame = frame.reset_index(drop=True)
    frame["seconds"] = 5e-6 + frame["m"] * frame["n"] * 32 / 1e13
    parts = [_gemm(frame["m"].to_numpy(), frame["n"].to_numpy())]
    return _table(parts, frame, "gemm", ("n", "k"), ("m",))


def _attention(kind, batch, length, **more):
    geometry = {
        "num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "v_head_dim": 64, "kv_elements": 256,
        "kv_dtype": "bf16", "activation_dtype": "bf16",
    }  # fmt: skip
    batch, length = np.asarray(batch), np.asarray(length)
    if kind is AttentionDecode:
        return kind(tokens=batch, context=batch * length, **(geometry | more))
    pairs = batch * length * (length + 1) // 2
    return kind(tokens=batch * length, pairs=pairs, **(geometry | more))


def attention_table(kind, truth) -> Table:
    batch, length = (g.ravel() for g in np.meshgrid([1, 2, 4, 8, 16], [16, 64, 256, 1024, 4096]))
    frame = pd.DataFrame({"num_heads": 8, "window": 0, "batch_size": batch, "context": length})
    frame["step"] = frame["context"] - 1 if kind is AttentionDecode else 0
    frame["seconds"] = truth(batch, length)
    op = "attention_decode" if kind is AttentionDecode else "attention_prefill"
    parts = [_attention(kind, batch, length)]
    return _table(parts, frame, op, ("num_heads", "window"), ("batch_size", "context", "step"))


def _experts(loads, tokens=None, **more):
    geometry = {"hidden": 128, "width": 64, "gated": True, "weight_dtype": "bf16"}
    return GroupedGemm(
        tokens_per_expert=np.asarray(loads), activation_dtype="bf16", tokens=tokens,
        **(geometry | more),
    )  # fmt: skip


TOKENS = np.array([8, 16, 32, 64, 128, 256])


def expert_table() -> Table:
    """Four experts, k = 1: even loads take 10 us + 10 ns a token, one-sided ones twice that."""
    even = np.repeat(TOKENS[:, None] // 4, 4, axis=1)
    lone = np.zeros_like(even)
    lone[:, 0] = TOKENS
    frame = pd.DataFrame(
        {"layer": "toy", "distribution": ["even"] * 6 + ["lone"] * 6, "num_tokens": [*TOKENS] * 2}
    )
    frame["seconds"] = (10e-6 + 1e-8 * frame["num_tokens"]) * np.repeat([2, 1], 6)
    parts = [_experts(np.concatenate([even, lone]), np.concatenate([TOKENS, TOKENS]))]
    return _table(parts, frame, "grouped_gemm", ("layer",), ("num_tokens",))


def test_measured_points_come_back_and_lines_between_them():
    cost = Interpolated.of(gemm_table(), LIMITS)
    assert cost.seconds(_gemm(ROWS), LIMITS) == pytest.approx(gemm_table().seconds[:10])
    between = np.array([3, 100, 300, 511])
    assert cost.seconds(_gemm(between), LIMITS) == pytest.approx(5e-6 + between * 2048 / 1e13)
    assert cost.evidence == "measured"
    assert cost.held_out is not None
    assert cost.held_out.median < 1e-9


def test_no_rows_cost_nothing_even_where_nothing_is_known():
    cost = Interpolated.of(gemm_table(), LIMITS)
    assert list(cost.seconds(_gemm([0, 0], n=7), LIMITS)) == [0, 0]
    assert cost.covers(_gemm([0, 3], n=7)).tolist() == [True, False]


def test_unknown_shapes_and_ranges_are_refused_by_name():
    cost = Interpolated.of(gemm_table(), LIMITS)
    with pytest.raises(InputError, match=r"no rows of n 100, k 32 .* measured: n 64, k 32, rows"):
        cost.seconds(_gemm([4], n=100), LIMITS)
    with pytest.raises(InputError, match=r"row 1 lies outside .* n 64, k 32 .* rows 1 to 512"):
        cost.seconds(_gemm([4, 513]), LIMITS)
    assert cost.covers(_gemm([4, 513])).tolist() == [True, False]


def test_another_device_is_refused():
    cost = Interpolated.of(gemm_table(), LIMITS)
    faster = Limits(flops=1e15, bandwidth=2e12, units=100)
    with pytest.raises(InputError, match=r"bandwidth 2e\+12 asked for, measured at 1e\+12"):
        cost.seconds(_gemm([4]), faster)


def test_steps_at_tiles_are_followed():
    # a kernel with tiles of 128 rows; measured at both sides of every step but the third
    rows = np.array([1, 64, 128, 129, 256, 257, 384, 512, 513, 640, 641, 768])
    frame = pd.DataFrame({"m": rows, "n": 64, "k": 32, "seconds": np.ceil(rows / 128) * 1e-5})
    table = _table([_gemm(rows)], frame, "gemm", ("n", "k"), ("m",))
    cost = Interpolated.of(table, LIMITS)
    # 385 rows need a fourth tile like 512; a plain line would say 3.01e-5
    assert cost.seconds(_gemm([385]), LIMITS)[0] > 3.5e-5


def test_decode_is_a_surface_over_sequences_and_context():
    truth = lambda b, c: 8e-6 + 1e-7 * b + 2e-9 * b * c  # noqa: E731
    cost = Interpolated.of(attention_table(AttentionDecode, truth), LIMITS)
    batch, context = np.array([1, 3, 16, 11]), np.array([16, 100, 4096, 3000])
    found = cost.seconds(_attention(AttentionDecode, batch, context), LIMITS)
    assert found == pytest.approx(truth(batch, context))
    for outside in (([17], [100]), ([1], [5000])):
        assert not cost.covers(_attention(AttentionDecode, *outside)).any()
    other_cache = _attention(AttentionDecode, [2], [64], kv_dtype="fp8")
    assert not cost.covers(other_cache).any()
    assert not cost.covers(_attention(AttentionPrefill, [2], [64])).any()


def test_prompts_with_a_cached_prefix_count_as_as_much_work():
    truth = lambda b, c: 1e-5 + 1e-10 * b * c * c  # noqa: E731
    cost = Interpolated.of(attention_table(AttentionPrefill, truth), LIMITS)
    whole = _attention(AttentionPrefill, [2], [1024])
    assert cost.seconds(whole, LIMITS) == pytest.approx(truth(2, 1024))
    # 64 tokens after 4000 are less than one prompt of their length: refused, not guessed
    chunk = AttentionPrefill(
        tokens=[64], pairs=[64 * 4000], num_heads=8, num_kv_heads=2, head_dim=64, v_head_dim=64,
        kv_elements=256, kv_dtype="bf16", activation_dtype="bf16",
    )  # fmt: skip
    assert not cost.covers(chunk).any()


def test_windowed_prompts_are_found_again_by_length():
    batch, length = (g.ravel() for g in np.meshgrid([1, 2, 4], [64, 128, 256, 1024, 8192]))
    pairs = batch * np.array([min(i, 128) for i in range(1, 8193)]).cumsum()[length - 1]
    seconds = 1e-6 * batch * length
    frame = pd.DataFrame({"window": 128, "batch_size": batch, "context": length, "step": 0})
    frame["seconds"] = seconds
    op = dataclasses.replace(_attention(AttentionPrefill, batch, length), pairs=pairs, window=128)
    table = _table([op], frame, "attention_prefill", ("window",), ("batch_size", "context"))
    cost = Interpolated.of(table, LIMITS)
    assert cost.seconds(op, LIMITS) == pytest.approx(seconds)
    whole = _attention(AttentionPrefill, [2], [128])
    assert not cost.covers(whole).any()


def test_experts_between_the_measured_kinds_of_load():
    cost = Interpolated.of(expert_table(), LIMITS)
    even, lone = _experts([[12] * 4], [48]), _experts([[48, 0, 0, 0]], [48])
    assert cost.seconds(even, LIMITS) == pytest.approx([2 * (10e-6 + 48e-8)])
    assert cost.seconds(lone, LIMITS) == pytest.approx([10e-6 + 48e-8])
    half = cost.seconds(_experts([[24, 24, 0, 0]], [48]), LIMITS)[0]
    assert 10e-6 + 48e-8 < half < 2 * (10e-6 + 48e-8)


def test_experts_without_tokens_shown_take_the_layout_that_fits():
    cost = Interpolated.of(expert_table(), LIMITS)
    found = cost.seconds(_experts([[12] * 4]), LIMITS)
    assert found == pytest.approx(cost.seconds(_experts([[12] * 4], [48]), LIMITS))


def test_loads_beyond_those_measured_are_refused():
    cost = Interpolated.of(expert_table(), LIMITS)
    assert not cost.covers(_experts([[300, 0, 0, 0]], [48])).any()
    assert not cost.covers(_experts([[48, 0, 0, 0, 0]], [48])).any()
    with pytest.raises(InputError, match=r"no rows of hidden 128, width 64, matrices 3, slots 5"):
        cost.seconds(_experts([[48, 0, 0, 0, 0]], [48]), LIMITS)


def test_held_out_rows_are_inside_and_not_seen():
    table = gemm_table()
    held = left_out(table)
    assert 0 < held.sum() < len(held) / 2
    assert not held[table.frame["m"].isin([1, 512])].any()
    predicted, mask = held_out_seconds(table, LIMITS)
    assert predicted == pytest.approx(table.seconds[mask])
    broken = table.frame.assign(seconds=np.where(held, 1.0, table.seconds))
    changed = _table(table.parts, broken, "gemm", ("n", "k"), ("m",))
    assert held_out_seconds(changed, LIMITS)[0] == pytest.approx(predicted)


def test_scatter_of_noise_is_its_size():
    rng = np.random.default_rng(0)
    rows = np.arange(1, 4001)
    noisy = 1e-5 * np.exp(0.03 * rng.standard_normal(4000))
    frame = pd.DataFrame({"m": rows, "n": 64, "k": 32, "seconds": noisy})
    table = _table([_gemm(rows)], frame, "gemm", ("n", "k"), ("m",))
    assert scatter(table, LIMITS) == pytest.approx(0.03 * 0.6745, rel=0.1)  # median of |normal|


def test_fastest_table_row_by_row_and_another_model_for_the_rest():
    slow = Interpolated.of(gemm_table(), LIMITS)
    frame = gemm_table().frame
    half = frame[frame["n"] == 64].assign(seconds=lambda f: f["seconds"] / 2)
    fast = Interpolated.of(
        _table([_gemm(half["m"].to_numpy())], half, "gemm", ("n", "k"), ("m",)), LIMITS
    )
    op = _gemm([4, 4, 4], n=[64, 256, 999])
    ones = np.ones(3)
    other = Price(seconds=ones, low=ones / 2, high=ones * 2, evidence="fitted")
    price = price_measured(op, LIMITS, [slow, fast], other)
    known = slow.seconds(take(op, np.array([0, 1])), LIMITS)
    assert price.seconds == pytest.approx([known[0] / 2, known[1], 1.0])
    assert price.high[2] == 2
    assert price.evidence == "fitted"
    covered = price_measured(take(op, np.array([0, 1])), LIMITS, [slow, fast], other)
    assert covered.evidence == "measured"
    with pytest.raises(InputError, match="no rows of n 999"):
        price_measured(op, LIMITS, [slow, fast], None)


def test_operations_without_interpolation_are_refused():
    frame = pd.DataFrame({"kind": ["a"], "bytes": [1.0], "seconds": [1.0]})
    table = _table([Elementwise(bytes=[1])], frame, "stream", ("kind",), ("bytes",))
    with pytest.raises(InputError, match="Elementwise has no interpolation"):
        Interpolated.of(table, LIMITS)


def test_real_table_held_out_tokens():
    pytest.importorskip("aiconfigurator_core")
    from hwmodels.silicon.mla import mla_tables

    tables = mla_tables("h100", ("sglang",))
    decode = next(t for t in tables if t.op == "mla_decode" and t.dtype == "bf16")
    predicted, held = held_out_seconds(decode, LIMITS)
    known = ~np.isnan(predicted)
    error = np.abs(predicted[known] / decode.seconds[held][known] - 1)
    assert known.mean() > 0.95
    assert np.median(error) < 0.03
