"""Quantised weights: the integers stored, their products, and the bound on the rounding error."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from basis.dtypes import bytes_of
from kernels_ref.quantised import (
    dequantise,
    dequantised_linear,
    pack_int4,
    quantise,
    unpack_int4,
)

examples = settings(max_examples=30, deadline=None)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])


@st.composite
def weights(draw):
    """Weights, their bits and the columns of a group; some groups zero, some tiny or huge."""
    bits = draw(st.sampled_from([8, 4]))
    group = draw(st.integers(1, 6)) * (2 if bits == 4 else 1)
    rows, groups = draw(st.integers(0, 5)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    scale = rng.choice([0.0, 1e-39, 1e-20, 1.0, 1e20], size=(rows, groups, 1))
    w = rng.normal(size=(rows, groups, group)) * scale
    return torch.from_numpy(w.reshape(rows, groups * group)).to(draw(dtypes)), bits, group


def integers(packed):
    """Unpack byte by byte, with Python's integers."""
    if packed.dtype == torch.int8:
        return packed.numpy().astype(np.int64)
    rows = [[half for byte in row for half in (byte % 16 - 8, byte // 16 - 8)]
            for row in packed.tolist()]  # fmt: skip
    return np.array(rows, dtype=np.int64).reshape(len(packed), 2 * packed.shape[1])


def oracle(packed, scales):
    """Multiply integers by scales one by one, in float64 (exact for scales of up to 32 bits)."""
    q, step = integers(packed), scales.double().numpy()
    group = q.shape[1] // step.shape[1]
    out = np.empty(q.shape)
    for n in range(q.shape[0]):
        for k in range(q.shape[1]):
            out[n, k] = float(q[n, k]) * step[n, k // group]
    return out


@examples
@given(weights())
def test_dequantise_is_exact_and_the_error_at_most_half_a_step(case):
    w, bits, group = case
    packed, scales = quantise(w, bits=bits, group=group)
    assert packed.dtype == (torch.int8 if bits == 8 else torch.uint8)
    assert scales.shape == (w.shape[0], w.shape[1] // group)
    expected = oracle(packed, scales)
    found = dequantise(packed, scales)
    assert found.dtype == w.dtype
    assert torch.equal(found, torch.from_numpy(expected).to(w.dtype))  # rounded once, if at all

    # the division is rounded too: a tie may fall to the other side, by so much
    slack = 1 + 1e-4
    half_step = np.repeat(scales.double().numpy(), group, axis=1) / 2
    assert (np.abs(w.double().numpy() - expected) <= half_step * slack).all()
    assert np.abs(integers(packed)).max(initial=0) <= (127 if bits == 8 else 7)


@pytest.mark.parametrize(("bits", "steps"), [(8, 127), (4, 7)])
def test_the_largest_weight_of_a_group_takes_the_largest_integer(bits, steps):
    w = torch.tensor([[1.0, -4.0, 0.25, 0.0, 3.0, 1.5]], dtype=torch.float64)
    packed, scales = quantise(w, bits=bits, group=2)
    torch.testing.assert_close(scales * steps, torch.tensor([[4.0, 0.25, 3.0]]).double())
    assert integers(packed)[0, [1, 2, 4]].tolist() == [-steps, steps, steps]


@examples
@given(
    m=st.integers(0, 5), case=weights(), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_product_equals_that_of_the_dequantised_weights(m, case, dtype, seed):
    w, bits, group = case
    generator = torch.Generator().manual_seed(seed)
    w = (w.sign() * torch.rand(w.shape, generator=generator)).to(dtype)  # no overflow in the sums
    x = torch.randn(m, w.shape[1], generator=generator).to(dtype)
    packed, scales = quantise(w, bits=bits, group=group)
    dequantised, x64 = oracle(packed, scales), x.double().numpy()
    expected = np.array([[sum(row * column) for column in dequantised] for row in x64])
    expected = expected.reshape(m, len(w))
    out = torch.full((m, len(w)), torch.nan, dtype=dtype)
    for found in (
        dequantised_linear(x, packed, scales),
        dequantised_linear(x, packed, scales, out_MN=out),
    ):
        # against the size of the summed terms: a sum of one or two may cancel
        terms = np.linalg.norm(np.abs(x64) @ np.abs(dequantised).T)
        error = np.linalg.norm(found.double().numpy() - expected)
        assert error <= (1e-5 if dtype == torch.float32 else 1e-2) * terms


@examples
@given(st.lists(st.lists(st.integers(-8, 7), min_size=6, max_size=6), max_size=5))
def test_packing_loses_nothing(rows):
    q = torch.tensor(rows, dtype=torch.int8).reshape(len(rows), 6)
    packed = pack_int4(q)
    assert packed.shape == (len(rows), 3)
    assert np.array_equal(integers(packed), q.numpy())
    assert torch.equal(unpack_int4(packed), q)


def test_stacked_experts_are_quantised_one_by_one():
    w = torch.randn(3, 5, 8)
    for bits in (8, 4):
        packed, scales = quantise(w, bits=bits, group=4)
        for expert in range(3):
            alone = quantise(w[expert], bits=bits, group=4)
            assert torch.equal(packed[expert], alone.packed_NP)
            assert torch.equal(scales[expert], alone.scales_NJ)
        assert torch.equal(dequantise(packed, scales)[1], dequantise(packed[1], scales[1]))


def test_bytes_are_those_that_the_formats_state():
    w = torch.randn(16, 256, dtype=torch.bfloat16)
    four = quantise(w, bits=4, group=128)
    assert four.packed_NP.nbytes + four.scales_NJ.nbytes == bytes_of("int4", w.numel())
    assert quantise(w, bits=8, group=256).packed_NP.nbytes == bytes_of("int8", w.numel())


@pytest.mark.parametrize(
    ("bits", "group", "message"),
    [
        (3, 4, "3 bits -- allowed are 8 and 4"),
        (8, 5, "groups of 5 columns -- at least 1, and dividing 12 columns"),
        (8, 0, "groups of 0 columns"),
        (4, 3, "groups of 3 columns -- even, at least 1"),
    ],
)
def test_impossible_groups_are_refused(bits, group, message):
    with pytest.raises(ValueError, match=message):
        quantise(torch.ones(2, 12), bits=bits, group=group)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_weights_that_are_no_numbers_are_refused(value):
    with pytest.raises(ValueError, match="infinite or not a number"):
        quantise(torch.tensor([[1.0, value]]), bits=8, group=2)


def test_integers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="2 columns of integers up to 8 -- an even number"):
        pack_int4(torch.tensor([[8, 0]], dtype=torch.int8))
    with pytest.raises(ValueError, match="1 columns of integers"):
        pack_int4(torch.tensor([[0]], dtype=torch.int8))


def test_parts_of_different_matrices_are_refused():
    packed, scales = quantise(torch.ones(2, 12), bits=8, group=4)
    with pytest.raises(ValueError, match=r"integers \[2, 12\] with scales \[2, 5\]"):
        dequantise(packed, torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"integers \[2, 12\] with scales \[3, 3\]"):
        dequantise(packed, torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"packed weights of torch\.float32"):
        dequantise(packed.float(), scales)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", [8, 4])
def test_a_cuda_device_gives_the_same(bits):
    w = torch.randn(5, 12, dtype=torch.float64)
    here, there = quantise(w, bits=bits, group=4), quantise(w.cuda(), bits=bits, group=4)
    assert torch.equal(there.packed_NP.cpu(), here.packed_NP)
    torch.testing.assert_close(dequantise(*there).cpu(), dequantise(*here))
