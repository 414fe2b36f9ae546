"""Prepared operations: torch counts the FLOPs they run, shapes give the bytes they keep."""

import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from hwmodels.ops import (
    PARTS,
    AllGather,
    AllReduce,
    AllToAll,
    AttentionDecode,
    AttentionPrefill,
    Copy,
    Elementwise,
    Gemm,
    GroupedGemm,
    Permute,
    ReduceScatter,
    Route,
)
from kernels_ref.operands import Operands
from kernels_ref.prepare import prepare

CACHE = 2**15
TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16}
DTYPES = st.sampled_from(sorted(TORCH))
SMALL = st.integers(1, 40)


def plain(dtype="fp32"):
    return {"weight_dtype": dtype, "activation_dtype": dtype}


def heads(num=4, groups=2, width=8, v_width=8, dtype="fp32", kv_elements=None):
    return {
        "num_heads": num,
        "num_kv_heads": groups,
        "head_dim": width,
        "v_head_dim": v_width,
        "kv_elements": groups * (width + v_width) if kv_elements is None else kv_elements,
        "kv_dtype": dtype,
        "activation_dtype": dtype,
    }


def of(op, row=0, **how):
    return prepare(op, row, Operands(cache_bytes=CACHE), **how)


def flops(prepared):
    with FlopCounterMode(display=False) as counter:
        result = prepared.run()
    return counter.get_total_flops(), result


def kept(prepared):
    """Bytes of the operands of one call."""
    return sum(tensor.nbytes for tensor in prepared.sets[0])


@settings(deadline=None, max_examples=30)
@given(SMALL, SMALL, SMALL, DTYPES)
def test_gemm(m, n, k, dtype):
    op = Gemm(m=[9, m], n=n, k=k, **plain(dtype))
    prepared = of(op, 1)
    counted, result = flops(prepared)
    assert (result.shape, result.dtype) == ((m, n), TORCH[dtype])
    assert (counted, kept(prepared)) == (op.flops()[1], op.weight_bytes()[1])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), SMALL, SMALL, st.booleans(), DTYPES)
def test_grouped_gemm_keeps_the_slots_with_rows(counts, hidden, width, gated, dtype):
    counts = [*counts, 1]
    op = GroupedGemm(
        tokens_per_expert=[counts], hidden=hidden, width=width, gated=gated, **plain(dtype)
    )
    prepared = of(op)
    counted, result = flops(prepared)
    assert (result.shape, result.dtype) == ((sum(counts), hidden), TORCH[dtype])
    assert (counted, kept(prepared)) == (op.flops()[0], op.weight_bytes()[0])


@settings(deadline=None, max_examples=30)
@given(SMALL, SMALL, SMALL, DTYPES)
def test_route(tokens, hidden, experts, dtype):
    top_k = 1 + experts // 3
    op = Route(tokens=tokens, hidden=hidden, experts=experts, top_k=top_k, activation_dtype=dtype)
    prepared = of(op)
    counted, result = flops(prepared)
    assert [each.shape for each in result] == [(tokens, top_k)] * 2
    assert counted == op.flops()[0]
    assert kept(prepared) == hidden * experts * TORCH[dtype].itemsize


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 30), st.integers(0, 4), DTYPES)
def test_decode_reads_what_its_contexts_say(tokens, length, more, dtype):
    """The cache has room for the longest, in whole lines."""
    context = tokens * length + more % tokens
    op = AttentionDecode(tokens=tokens, context=context, **heads(v_width=6, dtype=dtype))
    prepared = of(op)
    counted, result = flops(prepared)
    assert (result.shape, result.dtype) == ((tokens, 4, 6), TORCH[dtype])
    assert counted == op.flops()[0]
    per_key = op.kv_bytes()[0] / context
    room = kept(prepared) / (tokens * per_key)
    assert room % 16 == 0
    assert 1.5 * (context // tokens) < room <= 1.5 * (context // tokens) + 65


@pytest.mark.parametrize("dtype", sorted(TORCH))
def test_decode_over_a_latent_keeps_it_once(dtype):
    op = AttentionDecode(tokens=3, context=60, **heads(4, 1, 24, 16, dtype, kv_elements=24))
    assert op.latent
    prepared = of(op)
    counted, result = flops(prepared)
    assert (result.shape, len(prepared.sets[0])) == ((3, 4, 16), 1)
    assert counted == op.flops()[0]
    assert kept(prepared) % op.kv_bytes()[0] != 0  # one tensor, with room for more
    assert kept(prepared) == 3 * 64 * op.kv_bytes()[0] / 60


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 20), DTYPES)
def test_prefill_of_equal_prompts(batch, tokens, dtype):
    op = AttentionPrefill(
        tokens=batch * tokens,
        pairs=batch * tokens * (tokens + 1) // 2,
        **heads(4, 4, 12, 8, dtype),
    )
    prepared = of(op)
    counted, result = flops(prepared)
    assert result.shape == (batch, tokens, 4, 8)
    assert op.flops()[0] <= counted <= op.flops()[0] * 2 * tokens / (tokens + 1)  # whole squares
    assert prepared.sets == ((),)  # keys and values were just projected


@pytest.mark.parametrize(("queries", "before"), [(1, 7), (5, 1), (70, 200)])
def test_prefill_of_one_chunk_keeps_its_prefix(queries, before):
    pairs = sum(before + query + 1 for query in range(queries))
    op = AttentionPrefill(tokens=queries, pairs=pairs, **heads())
    prepared = of(op)
    assert prepared.run().shape == (1, queries, 4, 8)
    assert kept(prepared) == (before + queries) * op.kv_elements * 4


def test_prefill_under_a_window():
    seen = [min(query + 1, 8) for query in range(50)]
    op = AttentionPrefill(tokens=100, pairs=2 * sum(seen), window=8, **heads())
    counted, result = flops(of(op))
    assert result.shape == (2, 50, 4, 8)
    assert counted >= op.flops()[0]


@pytest.mark.parametrize("dtype", sorted(TORCH))
def test_permute_gathers_a_tokens_row_for_each_choice(dtype):
    prepared = of(Permute(rows=100, row_bytes=64), dtype=dtype)
    before, result = prepared.run(), prepared.run()
    assert (result.shape, result.dtype) == ((100, 64 // TORCH[dtype].itemsize), TORCH[dtype])
    _, copies = torch.unique(result, dim=0, return_counts=True)
    assert copies.tolist() == [4] * 25
    assert torch.equal(result, before)  # activations stay where they are


@pytest.mark.parametrize(("rows", "tokens"), [(100, 25), (102, 51), (7, 7)])
def test_unpermute_adds_the_rows_of_a_token(rows, tokens):
    result = of(Permute(rows=rows, row_bytes=64, back=True)).run()
    assert result.shape == (tokens, 16)
    assert torch.all(result != 0)


@pytest.mark.parametrize("part", PARTS)
def test_elementwise_parts_touch_what_a_token_states(part):
    widths = {"norm": 4 * 96, "rope": 2 * (4 + 2 + 2) * 64, "activation": 3 * 96, "embedding": 192}
    op = Elementwise(bytes=5 * widths[part] * 4, part=part, tokens=5)
    prepared = of(op)
    result = prepared.run()
    if part == "norm":
        assert [each.shape for each in result] == [(5, 96), (5, 96)]
    elif part == "rope":  # 5 tokens, 2 groups of 64 channels: keys and values each
        assert result is None
        assert [each.shape[:3] for each in prepared.sets[0]] == [(5, 2, 64), (5, 2, 256)]
    else:
        assert result.shape == (5, 96)


@pytest.mark.parametrize("dtype", sorted(TORCH))
def test_elementwise_writes_half_of_its_bytes(dtype):
    prepared = of(Elementwise(bytes=4096), dtype=dtype)
    assert (prepared.run().nbytes, prepared.run().dtype) == (2048, TORCH[dtype])
    assert prepared.run().data_ptr() == prepared.run().data_ptr()


def test_copy_moves_all_bytes_between_changing_places():
    prepared = of(Copy(bytes=5000, source="disk", target="hbm"))
    places = [prepared.run() for _ in range(5)]
    assert len({place.data_ptr() for place in places}) == 5
    source, target = next(one for one in prepared.sets if one[1] is places[-1])
    assert target.nbytes == 5000
    assert torch.equal(source, target)
    assert source.data_ptr() != target.data_ptr()


@pytest.mark.parametrize("dtype", sorted(TORCH))
def test_cold_weights_change_and_warm_ones_do_not(dtype):
    op = Gemm(m=4, n=32, k=16, **plain(dtype))
    cold, warm = of(op), of(op, cold=False)
    assert len({one[0].data_ptr() for one in cold.sets}) == len(cold.sets) > 10
    assert cold.bytes >= 3 * CACHE
    assert not torch.equal(cold.run(), cold.run())
    assert warm.bytes == kept(warm) == op.weight_bytes()[0]
    assert torch.equal(warm.run(), warm.run())


def test_memory_goes_with_the_last_user():
    operands = Operands(cache_bytes=CACHE)
    prepared = prepare(Gemm(m=4, n=32, k=16, **plain()), 0, operands)
    held = weakref.ref(prepared.sets[0][0])
    del prepared, operands
    gc.collect()
    assert held() is None


@pytest.mark.parametrize(
    "op",
    [
        AllToAll(traffic=np.zeros((1, 2, 2))),
        AllReduce(bytes=8, ranks=(0, 1)),
        AllGather(bytes=8, ranks=(0, 1)),
        ReduceScatter(bytes=8, ranks=(0, 1)),
    ],
)
def test_collectives_need_their_processes(op):
    with pytest.raises(ValueError, match=f"{type(op).__name__} is not executed by one process"):
        of(op)


WRONG = [
    (Gemm(m=[1, 2], n=3, k=4, **plain()), {"row": 2}, "row 2 -- Gemm has rows 0 to 1"),
    (Gemm(m=0, n=3, k=4, **plain()), {}, "row 0 of Gemm: m 0, nothing to execute"),
    (Gemm(m=1.5, n=3, k=4, **plain()), {}, "row 0 of Gemm: m 1.5 -- whole numbers"),
    (Gemm(m=1, n=3, k=4, **plain("fp8")), {}, "dtype 'fp8' -- executed are fp32, bf16"),
    (
        Gemm(m=1, n=3, k=4, weight_dtype="int8", activation_dtype="bf16"),
        {},
        "weight_dtype int8 with activations in bf16 -- executed are products of one dtype",
    ),
    (
        GroupedGemm(tokens_per_expert=[[0, 0]], hidden=2, width=2, gated=True, **plain()),
        {},
        "tokens_per_expert 0, nothing to execute",
    ),
    (Elementwise(bytes=8), {"dtype": "int8"}, "dtype 'int8' -- executed are fp32, bf16"),
    (Permute(rows=2, row_bytes=6), {}, r"row_bytes 6 -- whole numbers of fp32 \(4 bytes each\)"),
    (AttentionDecode(tokens=3, context=2, **heads()), {}, "context 2 of 3 tokens -- at least one"),
    (
        AttentionDecode(tokens=3, context=9, **heads(kv_elements=31)),
        {},
        "kv_elements 31 -- executed are keys and values of every head, or one latent: 32 here",
    ),
    (
        AttentionPrefill(tokens=7, pairs=6 + 10, **heads()),  # prompts of 3 and 4 tokens
        {},
        "7 tokens with 16 pairs -- executed are equal prompts",
    ),
]


@pytest.mark.parametrize(("op", "how", "message"), WRONG)
def test_what_cannot_be_executed(op, how, message):
    with pytest.raises(ValueError, match=message):
        of(op, **how)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize(
    "op",
    [
        Gemm(m=4, n=32, k=16, **plain("bf16")),
        GroupedGemm(tokens_per_expert=[[2, 0, 1]], hidden=8, width=8, gated=True, **plain("bf16")),
        Route(tokens=4, hidden=8, experts=8, top_k=2, activation_dtype="bf16"),
        AttentionDecode(tokens=3, context=30, **heads(dtype="bf16")),
        AttentionPrefill(tokens=8, pairs=36, **heads(dtype="bf16")),
        Permute(rows=8, row_bytes=64),
        Elementwise(bytes=4096),
        Copy(bytes=4096, source="host", target="hbm"),
    ],
)
def test_everything_runs_on_cuda(op):
    result = prepare(op, 0, Operands(device="cuda", cache_bytes=CACHE)).run()
    first = result[0] if isinstance(result, tuple) else result
    assert first.is_cuda
