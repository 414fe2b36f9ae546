"""The reader of attention's tables against the raw files, geometry and rules."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from basis import InputError
from hwmodels.silicon.attention import attention_tables, bounds, limits
from hwmodels.silicon.mla import mla_tables
from hwmodels.silicon.wheel import newest

pytest.importorskip("aiconfigurator_core")


@pytest.fixture(scope="module")
def h100():
    return attention_tables("h100", ["sglang"])


@pytest.fixture(scope="module")
def latent():
    return mla_tables("h100", ["sglang", "vllm"])


def raw(name: str) -> pd.DataFrame:
    path = newest("h100", name.split("/")[0], "sglang", name.split("/")[1])
    assert isinstance(path, Path)
    return pd.read_parquet(path)


def test_every_raw_row_is_kept_or_counted(h100, latent):
    for tables, names in (
        (h100, ("attention/context_attention_perf", "attention/generation_attention_perf")),
        (latent, ("mla/context_mla_perf", "mla/generation_mla_perf")),
    ):
        kept = sum(len(t.frame) + sum(d.rows for d in t.dropped) for t in tables)
        assert kept == sum(len(raw(name)) for name in names)


def test_a_row_says_what_the_file_says(h100):
    table = next(
        t for t in h100 if (t.op, t.dtype, t.kernel) == ("attention_decode", "bf16", "fa3")
    )
    file = raw("attention/generation_attention_perf")
    where = {"num_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "batch_size": 16}
    of_file = file[(file[list(where)] == pd.Series(where)).all(axis=1)]
    of_file = of_file[(of_file.step == 4095) & (of_file.kv_cache_dtype == "bfloat16")]
    of_file = of_file[of_file.window_size == 0]
    rows = (table.frame[list(where)] == pd.Series(where)).all(axis=1)
    rows &= (table.frame.context == 4096) & (table.frame.window == 0)
    assert rows.sum() == len(of_file) == 1
    assert table.seconds[rows] == pytest.approx(of_file.latency.iloc[0] * 1e-3)
    column = np.concatenate([part.context for part in table.parts])
    tokens = np.concatenate([part.tokens for part in table.parts])
    assert column[rows] == 16 * 4096
    assert tokens[rows] == 16


def test_parts_have_the_rows_of_the_frame_and_its_geometry(h100):
    for table in h100:
        assert sum(len(part) for part in table.parts) == len(table.frame) == len(table.seconds)
        heads = np.concatenate([np.full(len(p), p.num_heads) for p in table.parts])
        widths = np.concatenate([np.full(len(p), p.head_dim) for p in table.parts])
        windows = np.concatenate([np.full(len(p), p.window) for p in table.parts])
        assert (heads == table.frame.num_heads).all()
        assert (widths == table.frame.head_dim).all()
        assert (windows == table.frame.window).all()
        assert all(p.kv_dtype == table.dtype and p.activation_dtype == "bf16" for p in table.parts)


def test_a_window_bounds_what_is_seen(h100):
    table = next(t for t in h100 if t.op == "attention_decode" and (t.frame.window > 0).any())
    seen = np.concatenate([part.context / part.tokens for part in table.parts])
    window = table.frame.window.to_numpy()
    assert (seen[window > 0] <= window[window > 0]).all()
    assert (seen == table.frame.context)[window == 0].all()


def test_no_row_beats_the_peaks_or_is_ten_times_its_bound(h100):
    for table in h100:
        at = 0
        for part in table.parts:
            seconds = table.seconds[at : at + len(part)]
            fast = limits("h100", table.dtype).flops
            least, roofline = bounds(part, limits("h100"), fast)
            assert (seconds >= least).all()
            assert (seconds <= 10 * (roofline + 1e-5)).all()
            at += len(part)


def test_held_out_are_whole_shapes(h100):
    table = min(h100, key=lambda t: len(t.frame))
    groups = table.frame.groupby(list(table.shape)).ngroup()
    assert (pd.Series(table.held_out).groupby(groups).nunique() == 1).all()
    assert 0.15 < table.held_out.mean() < 0.35


def test_latent_decode_is_absorbed_and_vllm_has_no_bare_kernel(latent):
    assert {t.source.engine for t in latent} == {"sglang"}
    for table in latent:
        for part in table.parts:
            assert (part.head_dim, part.v_head_dim, part.num_kv_heads) == (576, 512, 1)
            assert part.latent
    assert {(t.op, t.dtype) for t in latent} == {
        (op, dtype) for op in ("mla_decode", "mla_prefill") for dtype in ("bf16", "fp8")
    }


def test_latent_prefill_of_trtllm_is_expanded():
    table = next(t for t in mla_tables("h100", ["trtllm"]) if t.op == "mla_prefill")
    for part in table.parts:
        assert (part.head_dim, part.v_head_dim) == (192, 128)
        assert part.num_kv_heads == part.num_heads
        assert part.kv_dtype == "bf16"


def test_an_unknown_device_is_refused():
    with pytest.raises(InputError, match=r"none for device 'h101' -- there are some for a100"):
        attention_tables("h101")
