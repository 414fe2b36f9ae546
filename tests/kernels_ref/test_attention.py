"""Grouped-query attention against a float64 sum written out query by query."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_ref.attention import (
    append_kv,
    attention_decode,
    attention_decode_ragged,
    attention_prefill,
    write_kv,
)

B, S, H, G, C = 3, 9, 6, 2, 4


def qkv(dtype=torch.float64):
    torch.manual_seed(0)
    shapes = (B, S, H, C), (B, S, G, C), (B, S, G, C)
    return tuple(torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)


def oracle(q, k, v):
    """One query head and one query at a time."""
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        for s in range(q.shape[1]):
            for h in range(q.shape[2]):
                g = h // (q.shape[2] // k.shape[2])
                scores = torch.einsum("c,lc->l", q[b, s, h], k[b, : s + 1, g]) / math.sqrt(C)
                share = scores.exp() / scores.exp().sum()
                out[b, s, h] = torch.einsum("l,lc->c", share, v[b, : s + 1, g])
    return out


def test_prefill_equals_written_out_sum():
    torch.testing.assert_close(attention_prefill(*qkv()), oracle(*qkv()), rtol=1e-12, atol=1e-12)


def test_prefill_equals_torch_fused_kernel():
    q, k, v = (tensor.transpose(1, 2) for tensor in qkv())
    fused = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(attention_prefill(*qkv()), fused.transpose(1, 2))


def test_float32_is_near_float64():
    single = attention_prefill(*qkv(torch.float32))
    torch.testing.assert_close(single.double(), oracle(*qkv()), rtol=1e-4, atol=1e-5)


def test_decode_token_by_token_equals_prefill():
    q, k, v = qkv()
    keys, values = torch.full((2, B, S + 3, G, C), torch.nan, dtype=torch.float64)
    keys, values = keys.nan_to_num(1e6), values.nan_to_num(1e6)  # unread, whatever it holds
    steps = []
    for s in range(S):
        length = torch.full((B,), s)
        keys, values = append_kv(keys, k[:, s], length), append_kv(values, v[:, s], length)
        steps.append(attention_decode(q[:, s], keys, values, length + 1))
    torch.testing.assert_close(torch.stack(steps, 1), attention_prefill(q, k, v))


def test_decode_of_requests_of_unequal_length():
    q, k, v = qkv()
    length = torch.tensor([1, 5, S])
    rows = torch.arange(B)
    out = attention_decode(q[rows, length - 1], k, v, length)
    torch.testing.assert_close(out, attention_prefill(q, k, v)[rows, length - 1])


def test_append_leaves_the_old_cache_alone():
    cache = torch.zeros(B, S, G, C)
    after = append_kv(cache, torch.ones(B, G, C), torch.tensor([0, 3, 8]))
    assert cache.abs().sum() == 0
    assert after.sum() == B * G * C
    assert after[1, 3].eq(1).all()


def test_heads_must_divide():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="5 query heads over 2 key/value heads"):
        attention_prefill(q[:, :, :5], k, v)


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def written_out(q, k, v, window):
    """Float64, one request, query and head at a time; the last query stands at the last key."""
    out = np.zeros((*q.shape[:3], v.shape[3]))
    for b, s, h in np.ndindex(q.shape[:3]):
        g = h * k.shape[2] // q.shape[2]
        position = k.shape[1] - q.shape[1] + s
        seen = range(max(0, position - window + 1) if window else 0, position + 1)
        scores = [float(q[b, s, h] @ k[b, at, g]) / math.sqrt(q.shape[3]) for at in seen]
        exponentials = [math.exp(score - max(scores)) for score in scores]
        for at, exponential in zip(seen, exponentials, strict=True):
            out[b, s, h] += exponential / sum(exponentials) * v[b, at, g]
    return out


def distance(found, expected):
    """Relative Frobenius norm of the difference."""
    difference = found.double().numpy() - expected
    return np.linalg.norm(difference) / np.linalg.norm(expected)


def draw(seed, dtype, *shapes):
    """Random tensors of the dtype, and the same numbers in float64."""
    generator = np.random.default_rng(seed)
    tensors = [torch.from_numpy(generator.standard_normal(shape)).to(dtype) for shape in shapes]
    return tensors, [tensor.double().numpy() for tensor in tensors]


# wide enough for bfloat16 roundings, about 4e-3 each, to average out
cases = given(
    requests=st.integers(1, 3),
    kv_heads=st.integers(2, 4),
    share=st.integers(1, 3),
    channels=st.sampled_from([16, 40]),
    width=st.sampled_from([16, 20]),
    window=st.sampled_from([0, 1, 3, 70, 200]),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 99),
    data=st.data(),
)


@cases
@settings(deadline=None, max_examples=30)
def test_prefill_over_a_prefix(
    requests, kv_heads, share, channels, width, window, dtype, seed, data
):
    past = data.draw(st.sampled_from([0, 1, 7, 90]))
    tokens = data.draw(st.sampled_from([1, 2, 9]))
    (q, k, v), exact = draw(
        seed, dtype, (requests, tokens, kv_heads * share, channels),
        (requests, past + tokens, kv_heads, channels), (requests, past + tokens, kv_heads, width),
    )  # fmt: skip
    found = attention_prefill(q, k, v, window=window)
    assert found.shape == (requests, tokens, kv_heads * share, width)
    assert found.dtype == dtype
    assert distance(found, written_out(*exact, window)) < TOLERANCE[dtype]


@pytest.mark.parametrize("window", [0, 1, 50, 64, 65, 100, 1000])
@pytest.mark.parametrize("past", [0, 5, 130])
def test_prefill_of_several_tiles(past, window):
    (q, k, v), exact = draw(1, torch.float32, (1, 150, 2, 2), *[(1, past + 150, 1, 2)] * 2)
    expected = written_out(*exact, window)
    assert distance(attention_prefill(q, k, v, window=window), expected) < 1e-5


def test_chunks_equal_the_whole_prompt():
    q, k, v = qkv()
    whole = attention_prefill(q, k, v, window=4)
    for start, end in [(0, 4), (4, 5), (5, S)]:
        chunk = attention_prefill(q[:, start:end], k[:, :end], v[:, :end], window=4)
        torch.testing.assert_close(chunk, whole[:, start:end])


@cases
@settings(deadline=None, max_examples=30)
def test_decode_padded_and_ragged(
    requests, kv_heads, share, channels, width, window, dtype, seed, data
):
    room = data.draw(st.integers(1, 80))
    lengths = data.draw(st.lists(st.integers(1, room), min_size=requests, max_size=requests))
    (q, k, v), (q64, k64, v64) = draw(
        seed, dtype, (requests, kv_heads * share, channels), (requests, room, kv_heads, channels),
        (requests, room, kv_heads, width),
    )  # fmt: skip
    expected = np.concatenate(
        [
            written_out(q64[b, None, None], k64[b, None, :n], v64[b, None, :n], window)[:, 0]
            for b, n in enumerate(lengths)
        ]
    )
    padded = attention_decode(q, k, v, torch.tensor(lengths), window=window)
    keys, values = k.permute(0, 2, 3, 1).contiguous(), v.transpose(1, 2).contiguous()
    for b, n in enumerate(lengths):  # ragged decode does not read what lies beyond
        keys[b, :, :, n:], values[b, :, n:] = torch.nan, torch.nan
    ragged = attention_decode_ragged(q, keys, values, lengths, window=window)
    views = attention_decode_ragged(q, list(keys), list(values), lengths, window=window)
    assert distance(padded, expected) < TOLERANCE[dtype]
    assert distance(ragged, expected) < TOLERANCE[dtype]
    assert torch.equal(views, ragged)


def test_ragged_decode_over_a_cache_written_token_by_token():
    q, k, v = qkv()
    keys, values = (torch.zeros(B + 2, G, *sides, dtype=q.dtype) for sides in ((C, S), (S, C)))
    rows = torch.tensor([4, 0, 2])  # requests need not lie in the order of the batch
    expected = attention_prefill(q, k, v, window=5)
    for s in range(S):
        write_kv(keys, values, k[:, s], v[:, s], rows, torch.full((B,), s))
        lists = [keys[row] for row in rows], [values[row] for row in rows]
        found = attention_decode_ragged(q[:, s], *lists, [s + 1] * B, window=5)
        torch.testing.assert_close(found, expected[:, s])
    assert not keys[[1, 3]].any()
    assert not values[[1, 3]].any()


def test_write_places_each_token():
    keys, values = torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 4, 3)
    new = torch.arange(1.0, 7).view(2, 1, 3)
    write_kv(keys, values, new, -new, torch.tensor([1, 0]), torch.tensor([3, 2]))
    assert torch.equal(keys[1, 0, :, 3], new[0, 0])
    assert torch.equal(values[0, 0, 2], -new[1, 0])
    assert keys.count_nonzero() == values.count_nonzero() == 6


def test_no_requests_give_no_rows():
    found = attention_decode_ragged(
        torch.ones(0, 4, 8), torch.ones(0, 2, 8, 5), torch.ones(0, 2, 5, 3), []
    )
    assert found.shape == (0, 4, 3)
    assert attention_decode_ragged(torch.ones(0, 4, 8), [], [], []).shape == (0, 4, 8)


@pytest.mark.parametrize("lengths", [[1, 0, 2], [1, S + 1, 2], [1, 2, -1]])
def test_length_within_the_cache(lengths):
    q, k, v = qkv()
    caches = k.permute(0, 2, 3, 1), v.transpose(1, 2)
    for keys, values in (caches, tuple(list(cache) for cache in caches)):
        with pytest.raises(ValueError, match=rf"length -?\d+ -- allowed is 1 to the {S} positions"):
            attention_decode_ragged(q[:, 0], keys, values, lengths)


def test_one_cache_and_length_per_request():
    q, k, v = qkv()
    keys, values = k.permute(0, 2, 3, 1), v.transpose(1, 2)
    with pytest.raises(ValueError, match="3 queries, 3 and 2 caches, 3 lengths"):
        attention_decode_ragged(q[:, 0], keys, values[:2], [1, 1, 1])


def test_heads_must_divide_in_decode():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="5 query heads over 2 key/value heads"):
        attention_decode(q[:, 0, :5], k, v, torch.tensor([1, 1, 1]))
    with pytest.raises(ValueError, match="5 query heads over 2 key/value heads"):
        attention_decode_ragged(q[:, 0, :5], k.permute(0, 2, 3, 1), v.transpose(1, 2), [1, 1, 1])


def test_window_is_not_negative():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="window is -1 tokens"):
        attention_prefill(q, k, v, window=-1)


def test_every_query_has_its_key():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="8 keys for 9 queries"):
        attention_prefill(q, k[:, 1:], v[:, 1:])
