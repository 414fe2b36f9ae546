"""Dense product, norms, rotary positions and the gated activation against loops in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_ref.dense import add_rms_norm, linear, rms_norm, rope, rope_table, silu_mul

BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
both = pytest.mark.parametrize("dtype", list(BOUND))
examples = settings(max_examples=30, deadline=None)
size = st.integers(1, 40)
seeds = st.integers(0, 999)


def draw(seed, *shapes, dtype):
    """Random tensors, and the same (rounded) numbers in float64."""
    rng = np.random.default_rng(seed)
    tensors = [torch.from_numpy(rng.normal(size=shape)).to(dtype) for shape in shapes]
    return tensors, [tensor.double().numpy() for tensor in tensors]


def near(found, expected):
    error = np.linalg.norm(found.double().numpy() - expected) / max(np.linalg.norm(expected), 1e-30)
    assert found.shape == expected.shape
    assert error < BOUND[found.dtype]


def norm_oracle(rows, weight, eps):
    out = np.empty_like(rows)
    for t, row in enumerate(rows):
        root = math.sqrt(sum(value * value for value in row) / len(row) + eps)
        for d, value in enumerate(row):
            out[t, d] = value / root * weight[d]
    return out


@both
@examples
@given(m=st.integers(0, 9), n=st.integers(8, 40), k=size, seed=seeds)
def test_linear_equals_sums_written_out(dtype, m, n, k, seed):
    (x, w), (x64, w64) = draw(seed, (m, k), (n, k), dtype=dtype)
    # at least 8 columns: of one or two sums all may cancel to nearly 0
    expected = np.array([[sum(x64[i] * w64[j]) for j in range(n)] for i in range(m)])
    near(linear(x, w), expected.reshape(m, n))
    out = torch.full((m, n), torch.nan, dtype=dtype)
    assert linear(x, w, out_MN=out) is out
    near(out, expected.reshape(m, n))


def test_linear_refuses_a_buffer_of_another_shape():
    with pytest.raises(ValueError, match=r"shape \[3, 4\] -- the product has \[3, 5\] -- give"):
        linear(torch.zeros(3, 2), torch.zeros(5, 2), out_MN=torch.zeros(3, 4))


@both
@examples
@given(tokens=st.integers(0, 9), width=size, scale=st.sampled_from([1e-4, 1.0, 1e3]), seed=seeds)
def test_norms_equal_their_formula(dtype, tokens, width, scale, seed):
    shapes = (tokens, width), (tokens, width), (width,)
    (x, residual, weight), (x64, residual64, weight64) = draw(seed, *shapes, dtype=dtype)
    x, x64 = x * scale, (x * scale).double().numpy()
    near(rms_norm(x, weight, 1e-5), norm_oracle(x64, weight64, 1e-5))

    before = residual.clone()
    found = add_rms_norm(x, residual, weight, 1e-5)
    near(found.residual_TD, residual64 + x64)
    near(found.normed_TD, norm_oracle(residual64 + x64, weight64, 1e-5))
    assert torch.equal(residual, before)


def test_norm_of_a_wide_bfloat16_row_is_summed_in_float32():
    # in bfloat16 the running sum of 4096 squares would stop growing at 256
    ones = torch.ones(1, 4096, dtype=torch.bfloat16)
    assert rms_norm(ones, ones[0], 0.0).eq(1).all()


def test_norm_works_over_heads():
    (x, weight), _ = draw(0, (5, 3, 8), (8,), dtype=torch.float64)
    expected = torch.stack([rms_norm(x[:, head], weight) for head in range(3)], dim=1)
    torch.testing.assert_close(rms_norm(x, weight), expected)


@both
@examples
@given(
    tokens=st.integers(0, 6), heads=st.integers(1, 4), pairs=st.integers(1, 9),
    base=st.sampled_from([1e4, 5e5]), seed=seeds,
)  # fmt: skip
def test_rope_turns_each_pair_by_its_angle(dtype, tokens, heads, pairs, base, seed):
    (x,), (x64,) = draw(seed, (tokens, heads, 2 * pairs), dtype=dtype)
    positions = np.random.default_rng(seed).integers(0, 200_000, tokens)
    expected = np.empty_like(x64)
    for t in range(tokens):
        for r in range(pairs):
            angle = float(positions[t]) / base ** (r / pairs)
            for h in range(heads):
                turned = complex(x64[t, h, r], x64[t, h, r + pairs]) * complex(
                    math.cos(angle), math.sin(angle)
                )
                expected[t, h, r], expected[t, h, r + pairs] = turned.real, turned.imag
    cos, sin = rope_table(torch.from_numpy(positions), 2 * pairs, base=base, dtype=dtype)
    near(rope(x, cos, sin), expected)


def test_scores_of_rotated_queries_depend_on_the_distance_alone():
    (q, k), _ = draw(0, (1, 1, 8), (1, 1, 8), dtype=torch.float64)

    def score(query_at, key_at):
        table = rope_table(torch.tensor([query_at, key_at]), 8, dtype=torch.float64)
        q_cos, k_cos = table[0].split(1)
        q_sin, k_sin = table[1].split(1)
        return (rope(q, q_cos, q_sin) * rope(k, k_cos, k_sin)).sum()

    torch.testing.assert_close(score(17, 5), score(1012, 1000))
    assert abs(score(17, 5) - score(17, 6)) > 1e-3


def test_rope_of_an_odd_width_is_refused():
    with pytest.raises(ValueError, match="7 rotated channels -- an even number"):
        rope_table(torch.arange(3), 7)


@both
@examples
@given(rows=st.integers(0, 9), width=size, seed=seeds)
def test_silu_mul_equals_its_formula(dtype, rows, width, seed):
    (x,), (x64,) = draw(seed, (rows, 2 * width), dtype=dtype)
    expected = np.empty((rows, width))
    for n in range(rows):
        for f in range(width):
            gate, up = x64[n, f], x64[n, width + f]
            expected[n, f] = gate / (1 + math.exp(-gate)) * up
    near(silu_mul(x), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_gives_the_same():
    (x, w, weight), _ = draw(0, (5, 3, 8), (16, 8), (8,), dtype=torch.float64)

    def every(device):
        there = x.to(device)
        cos, sin = rope_table(torch.arange(5, device=device), 8, dtype=torch.float64)
        turned = rope(there, cos, sin)
        normed = rms_norm(turned, weight.to(device)).flatten(0, 1)
        return silu_mul(linear(normed, w.to(device))).cpu()

    torch.testing.assert_close(every("cuda"), every("cpu"))
