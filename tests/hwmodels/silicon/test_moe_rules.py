"""Rules that leave measured rows of expert layers out, on rows made by hand."""

import numpy as np
import pandas as pd
import pytest

from hwmodels.kernels.base import Limits
from hwmodels.ops import GroupedGemm
from hwmodels.silicon.moe_rules import known_loads, unbelievable, untuned

TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]


def curves(**factors: float) -> pd.DataFrame:
    """Two shapes, sharded twice as far in the second; time grows with work, times a factor."""
    rows = [
        {
            "hidden_size": 64, "inter_size": 32, "num_experts": 8, "topk": 2, "moe_tp_size": tp,
            "moe_ep_size": 1, "distribution": "balanced", "num_tokens": tokens,
            "seconds": (1 + tokens / 512) * 1e-4 / tp * factors.get(f"tp{tp}_{tokens}", 1.0),
        }
        for tp in (1, 2)
        for tokens in TOKENS
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_more_work_in_more_time_is_kept() -> None:
    slower, beside = untuned(curves())
    assert not slower.any()
    assert not beside.any()


def test_a_call_twice_as_slow_as_a_larger_one_goes() -> None:
    # half of the work in five times the time of the whole
    rows = curves(tp2_64=10.0)
    slower, beside = untuned(rows)
    assert rows[slower][["moe_tp_size", "num_tokens"]].to_numpy().tolist() == [[2, 64]]
    assert not beside.any()  # one of twelve rows is less than a tenth


def test_a_spike_is_seen_from_more_tokens() -> None:
    rows = curves(tp1_8=9.0)
    slower, _ = untuned(rows)
    assert rows[slower][["moe_tp_size", "num_tokens"]].to_numpy().tolist() == [[1, 8]]


def test_a_run_with_many_such_rows_goes_as_a_whole() -> None:
    slower, beside = untuned(curves(tp2_64=10.0, tp2_128=10.0))
    assert slower.sum() == 2
    assert beside.sum() == len(TOKENS) - 2


@pytest.mark.parametrize(("law", "ranks", "goes"), [(3.0, 1, True), (3.0, 8, False)])
def test_laws_are_compared(law: float, ranks: int, goes: bool) -> None:
    """On one rank a law takes as long as the balanced loads; a busier rank may take longer."""
    even = curves().assign(moe_ep_size=ranks)
    skewed = even.assign(distribution="power_law_1.2", seconds=even["seconds"] * law)
    slower, beside = untuned(pd.concat([even, skewed], ignore_index=True))
    assert (slower | beside).tolist() == [False] * len(even) + [goes] * len(skewed)


def test_balanced_loads_are_no_slower_than_skewed_ones() -> None:
    even = curves().assign(moe_ep_size=8)
    skewed = even.assign(distribution="power_law_1.2", seconds=even["seconds"] / 3)
    slower, _ = untuned(pd.concat([even, skewed], ignore_index=True))
    assert slower[: len(even)].all()
    assert not slower[len(even) :].any()


def test_the_order_of_rows_does_not_matter() -> None:
    rows = curves(tp2_64=10.0, tp1_8=9.0)
    mixed = rows.sample(frac=1, random_state=1)
    slower, _ = untuned(mixed)
    expected = pd.Series(untuned(rows)[0], index=rows.index)
    assert pd.Series(slower, index=mixed.index).sort_index().tolist() == expected.tolist()


def rows_of(
    kernel: str, hidden: int = 7168, ranks: int = 1, dtype: str = "fp8_block"
) -> pd.DataFrame:
    return pd.DataFrame(
        [{"hidden_size": hidden, "inter_size": 2048, "num_experts": 256, "topk": 8,
          "moe_ep_size": ranks, "kernel_source": kernel, "moe_dtype": dtype}]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("engine", "version", "rows", "kept"),
    [
        ("vllm", "0.24.0", rows_of("triton"), 0),  # DeepSeek-V3's gate
        ("vllm", "0.24.0", rows_of("triton", hidden=6144), 1),
        ("trtllm", "1.3.0rc20", rows_of("moe_torch_flow_cutlass"), 1),
        ("trtllm", "1.3.0rc20", rows_of("moe_torch_flow_min_latency"), 1),
        ("sglang", "0.5.14", rows_of("sglang_fused_moe_triton", 6144, ranks=8), 0),
        ("sglang", "0.5.14", rows_of("sglang_fused_moe_triton", 6144), 1),
        ("sglang", "0.5.14", rows_of("sglang_marlin_moe", 6144, 8, "int4_wo"), 1),
        ("sglang", "0.5.10", rows_of("sglang_marlin_moe", 6144, 8, "int4_wo"), 0),
        ("vllm", "0.24.0", rows_of("vllm_triton", 6144, ranks=8), 1),
    ],
)
def test_rows_of_unknown_loads_are_left_out(
    engine: str, version: str, rows: pd.DataFrame, kept: int
) -> None:
    known, dropped = known_loads(rows, engine, version)
    assert len(known) == kept
    assert sum(d.rows for d in dropped) == 1 - kept


def test_bounds_by_hand() -> None:
    # two experts of 3 x 64 x 32 bytes; 1 MB/s reads them in 12.288 ms, 10 kB of cache hold the rest
    op = GroupedGemm(
        tokens_per_expert=np.array([[1, 1, 0]] * 4), hidden=64, width=32, gated=True,
        weight_dtype="fp8", activation_dtype="bf16", tokens=np.full(4, 2),
    )  # fmt: skip
    limits = Limits(flops=1e12, bandwidth=1e6, units=1, cache=10_000)
    least = (2 * 6144 - 10_000) / 1e6
    # rows: 2 x (2 x 64 + 3 x 32) elements of 2 bytes; door: 2 tokens in and out, 64 x 2 bytes
    bound = (2 * 6144 + 2 * 224 * 2 + 2 * 2 * 2 * 64) / 1e6
    seconds = np.array([0.99 * least, 1.01 * least, 9.99 * bound, 10.1 * (bound + 10e-6)])
    beats, slow = unbelievable(seconds, [op], limits)
    assert beats.tolist() == [True, False, False, False]
    assert slow.tolist() == [False, False, False, True]
