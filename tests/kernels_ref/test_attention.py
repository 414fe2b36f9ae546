"""Grouped-query attention against a float64 sum written out query by query."""

import math

import pytest
import torch

from kernels_ref import append_kv, attention_decode, attention_prefill

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
