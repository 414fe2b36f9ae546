"""Fitting attention: known parameters come back, and held-out shapes of a real table are met."""

import numpy as np
import pandas as pd
import pytest

from basis import InputError
from hwmodels import AttentionDecode
from hwmodels.fitting.attention import fit_attention
from hwmodels.fitting.fit import score
from hwmodels.kernels.attention_decode import AttentionDecodeCost
from hwmodels.kernels.base import Limits
from hwmodels.silicon.table import Table
from hwmodels.silicon.wheel import Source

LIMITS = Limits(flops=1e15, bandwidth=3e12, units=132.0, cache=5e7)
TRUTH = AttentionDecodeCost(
    head_tile=64, row_step=8, resident=1, split_keys=128, fill=1, most_splits=32, block_keys=128,
    launch="7 us", item="2 us", item_rate=5e10, compute_share=0.3, memory_share=0.9,
    cache_share=0.8, cache_speed=2.5, combine="0.7 us", overlap=1.8, tail=0.9,
)  # fmt: skip
SOURCE = Source(
    device="h100", engine="vllm", version="1", path="made/up", sha256="", package="none"
)


def table(shapes: int) -> Table:
    """Decode rows priced by known parameters: batches and contexts of different head counts."""
    parts, frames = [], []
    for number in range(shapes):
        kv_heads, group = 1 + number % 8, (1, 2, 4, 8, 16)[number % 5]
        batch, keys = np.meshgrid(2 ** np.arange(10), 2 ** np.arange(3, 15), indexing="ij")
        batch, keys = batch.ravel(), keys.ravel()
        part = AttentionDecode(
            tokens=batch, context=batch * keys, num_heads=kv_heads * group, num_kv_heads=kv_heads,
            head_dim=128, v_head_dim=128, kv_elements=256 * kv_heads, kv_dtype="bf16",
            activation_dtype="bf16",
        )  # fmt: skip
        parts.append(part)
        seconds = TRUTH.seconds(part, LIMITS)
        frames.append(
            pd.DataFrame({"shape": number, "batch": batch, "keys": keys, "seconds": seconds})
        )
    return Table(
        source=SOURCE, op="attention_decode", dtype="bf16", kernel="made up", parts=parts,
        frame=pd.concat(frames, ignore_index=True), shape=("shape",), swept=("batch", "keys"),
    )  # fmt: skip


def test_known_parameters_come_back():
    made = table(24)
    cost = fit_attention(made, LIMITS)
    assert cost.rule == "width"
    assert [k.width for k in cost.of] == [128]
    assert cost.held_out is not None
    assert cost.held_out.rows == made.held_out.sum()
    assert cost.held_out.median < 0.01
    assert cost.held_out.mean < 0.03
    assert cost.of[0].launch == pytest.approx(7e-6, rel=0.1)
    assert cost.of[0].memory_share == pytest.approx(0.9, rel=0.1)
    assert cost.low <= 1 <= cost.high
    assert cost.evidence == "fitted"
    assert cost.warm
    assert cost.of[0].edge == 0.0  # no windows, so nothing tells of their edge


def test_the_score_is_of_the_held_out_rows():
    made = table(12)
    cost = fit_attention(made, LIMITS)
    predicted = np.concatenate([cost.seconds(part, LIMITS) for part in made.parts])
    held = made.held_out
    assert cost.held_out == score(predicted[held], made.seconds[held])


def test_too_little_to_fit_is_refused():
    with pytest.raises(InputError, match=r"0 rows to fit|to score -- at least 60 and one"):
        fit_attention(table(1), LIMITS)


def test_a_measured_table_is_met_on_unseen_heads():
    pytest.importorskip("aiconfigurator_core")
    from hwmodels.silicon.attention import limits
    from hwmodels.silicon.mla import mla_tables

    measured = next(t for t in mla_tables("h100", ["sglang"]) if t.op == "mla_prefill")
    cost = fit_attention(measured, limits("h100"))
    peaks = limits("h100")
    roofline = np.concatenate(
        [np.maximum(p.flops() / peaks.flops, p.bytes_moved() / peaks.bandwidth)
         for p in measured.parts]
    )  # fmt: skip
    held = measured.held_out
    assert cost.held_out is not None
    assert cost.held_out.median < 0.08
    assert cost.held_out.median < score(roofline[held], measured.seconds[held]).median / 5
