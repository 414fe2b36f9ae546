"""Latent attention, expanded and absorbed, against float64 sums over tokens and heads."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_ref.mla import mla_decode, mla_prefill

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def written_out(q_nope, q_rope, latent, k_rope, w_uk, w_uv):
    """One request, query and head at a time: its keys and values from each token's latent."""
    batch, tokens, heads, nope = q_nope.shape
    out = np.zeros((batch, tokens, heads, w_uv.shape[1]))
    for b, s, h in np.ndindex(batch, tokens, heads):
        seen = range(latent.shape[1] - tokens + s + 1)
        query = np.concatenate([q_nope[b, s, h], q_rope[b, s, h]])
        keys = [np.concatenate([w_uk[h] @ latent[b, at], k_rope[b, at]]) for at in seen]
        scores = [float(query @ key) / math.sqrt(nope + q_rope.shape[3]) for key in keys]
        exponentials = [math.exp(score - max(scores)) for score in scores]
        for at, exponential in zip(seen, exponentials, strict=True):
            out[b, s, h] += exponential / sum(exponentials) * (w_uv[h] @ latent[b, at])
    return out


def draw(seed, dtype, *, b, s, length, h, n, p, z, v):
    """Operands of prefill; weights scaled as a trained projection's, so that keys are near 1."""
    generator = np.random.default_rng(seed)
    shapes = (b, s, h, n), (b, s, h, p), (b, length, z), (b, length, p), (h, n, z), (h, v, z)
    arrays = [generator.standard_normal(shape) for shape in shapes]
    arrays[4:] = [weights / math.sqrt(z) for weights in arrays[4:]]
    tensors = [torch.from_numpy(array).to(dtype) for array in arrays]
    return tensors, [tensor.double().numpy() for tensor in tensors]


def distance(found, expected):
    """Relative Frobenius norm of the difference."""
    return np.linalg.norm(found.double().numpy() - expected) / np.linalg.norm(expected)


def cache_of(latent, k_rope):
    return torch.cat([latent, k_rope], dim=-1).transpose(1, 2).contiguous()


# wide enough for bfloat16 roundings, about 4e-3 each, to average out
shapes = st.fixed_dictionaries(
    {
        "b": st.integers(1, 3),
        "h": st.integers(2, 5),
        "n": st.sampled_from([16, 32]),
        "p": st.sampled_from([6, 16]),
        "z": st.sampled_from([32, 48]),
        "v": st.sampled_from([16, 20]),
    }
)
dtypes = st.sampled_from(list(TOLERANCE))


@given(shapes, st.integers(1, 5), st.integers(0, 12), dtypes, st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_prefill_over_a_prefix(shape, tokens, past, dtype, seed):
    tensors, exact = draw(seed, dtype, s=tokens, length=past + tokens, **shape)
    found = mla_prefill(*tensors)
    assert found.dtype == dtype
    assert distance(found, written_out(*exact)) < TOLERANCE[dtype]


@given(shapes, st.integers(1, 20), dtypes, st.integers(0, 99), st.data())
@settings(deadline=None, max_examples=30)
def test_decode_at_unequal_lengths(shape, room, dtype, seed, data):
    lengths = data.draw(st.lists(st.integers(1, room), min_size=shape["b"], max_size=shape["b"]))
    tensors, exact = draw(seed, dtype, s=1, length=room, **shape)
    q_nope, q_rope, latent, k_rope, w_uk, w_uv = tensors
    cache = cache_of(latent, k_rope)
    for b, length in enumerate(lengths):
        cache[b, :, length:] = torch.nan
    queries, cached, weights = exact[:2], exact[2:4], exact[4:]
    expected = [
        written_out(*(a[b, None] for a in queries), *(a[b, None, :n] for a in cached), *weights)
        for b, n in enumerate(lengths)
    ]
    found = mla_decode(q_nope[:, 0], q_rope[:, 0], cache, lengths, w_uk, w_uv)
    assert found.dtype == dtype
    assert distance(found, np.concatenate(expected)[:, 0]) < TOLERANCE[dtype]


def test_decode_token_by_token_equals_prefill():
    tensors, _ = draw(0, torch.float64, b=2, s=9, length=9, h=3, n=8, p=4, z=16, v=6)
    q_nope, q_rope, latent, k_rope, w_uk, w_uv = tensors
    cache = cache_of(latent, k_rope)
    steps = [
        mla_decode(q_nope[:, s], q_rope[:, s], cache, [s + 1] * 2, w_uk, w_uv) for s in range(9)
    ]
    torch.testing.assert_close(torch.stack(steps, dim=1), mla_prefill(*tensors))


def test_no_requests_give_no_rows():
    q_nope, q_rope, latent, k_rope, w_uk, w_uv = draw(
        0, torch.float32, b=0, s=1, length=3, h=3, n=8, p=4, z=16, v=6
    )[0]
    found = mla_decode(q_nope[:, 0], q_rope[:, 0], cache_of(latent, k_rope), [], w_uk, w_uv)
    assert found.shape == (0, 3, 6)


def test_bad_shapes_are_refused():
    tensors, _ = draw(0, torch.float32, b=2, s=3, length=2, h=3, n=8, p=4, z=16, v=6)
    with pytest.raises(ValueError, match="2 keys for 3 queries"):
        mla_prefill(*tensors)
    q_nope, q_rope, latent, k_rope, w_uk, w_uv = tensors
    with pytest.raises(ValueError, match="length 3 -- allowed is 1 to the 2 positions"):
        mla_decode(q_nope[:, 0], q_rope[:, 0], cache_of(latent, k_rope), [1, 3], w_uk, w_uv)
