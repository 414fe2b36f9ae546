"""Operands that come from memory: how much is touched between two uses of the same bytes."""

import itertools
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_ref.operands import Operands

CACHE = 2**18
KIND = torch.float32
SHAPES = st.lists(
    st.tuples(st.integers(1, 6), st.integers(1, 100), st.integers(1, 200)), min_size=1, max_size=3
)


def extent(tensor):
    """First byte of a tensor and the one after its last."""
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


@settings(deadline=None, max_examples=30)
@given(SHAPES, st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_set_has_the_shapes_and_no_byte_twice(shapes, dtype):
    operands = Operands(cache_bytes=CACHE).rotate(shapes, dtype, cold=True)
    for one in operands.sets:
        assert [(tuple(t.shape), t.dtype) for t in one] == [(s, dtype) for s in shapes]
        assert all(t.is_contiguous() and t.data_ptr() % 64 == 0 for t in one)
        extents = sorted(extent(t) for t in one)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(extents))
    ends = [extent(t) for one in operands.sets for t in one]
    covered = max(end for _, end in ends) - min(start for start, _ in ends)
    assert operands.bytes - 64 < covered <= operands.bytes


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(2**11, 2**19), min_size=1, max_size=4),
    st.lists(st.integers(0, 3), min_size=1, max_size=8),
)
def test_bytes_have_left_the_cache_when_they_come_again(sizes, order):
    """Whatever runs in whatever order, more than the cache was touched since the last use."""
    operands = Operands(cache_bytes=CACHE)
    pieces = [operands.rotate([(size,)], KIND, cold=True) for size in sorted(sizes, reverse=True)]
    low = min(extent(t)[0] for piece in pieces for one in piece.sets for t in one)
    high = max(extent(t)[1] for piece in pieces for one in piece.sets for t in one)
    last = np.full((high - low) // 64 + 1, -np.inf)  # bytes touched in all when a line was
    touched = 0
    while touched < 30 * CACHE:
        for number in order:
            (data,) = pieces[number % len(pieces)].next()
            start, end = (address - low for address in extent(data))
            lines = slice(start // 64, -(-end // 64))
            now = touched + 64.0 * np.arange(lines.stop - lines.start)  # in order of address
            assert (now - last[lines]).min() >= CACHE
            last[lines], touched = now, touched + end - start


def test_sets_change_from_call_to_call():
    rotation = Operands(cache_bytes=CACHE).rotate([(64, 64)], KIND, cold=True)
    places = [rotation.next()[0].data_ptr() for _ in range(20)]
    assert len(set(places)) == 20
    assert rotation.bytes >= 3 * CACHE


def test_warm_operands_stay():
    operands = Operands(cache_bytes=0)
    rotation, other = (operands.rotate([(64, 64)], KIND, cold=False) for _ in range(2))
    assert len({rotation.next()[0].data_ptr() for _ in range(5)}) == len(rotation.sets) == 1
    assert rotation.bytes == 64 * 64 * 4
    assert rotation.next()[0].data_ptr() != other.next()[0].data_ptr()


def test_warm_operands_do_not_turn_the_cold_back():
    operands = Operands(cache_bytes=CACHE)
    cold = operands.rotate([(4096,)], KIND, cold=True)
    warm = operands.rotate([(4096,)], KIND, cold=False)
    places = []
    for _ in range(10):
        places.append(cold.next()[0].data_ptr())
        warm.next()
    assert len(set(places)) == 10


def test_many_rotations_share_one_buffer():
    operands = Operands(cache_bytes=CACHE)
    many = [operands.rotate([(n, 100)], KIND, cold=True) for n in range(1, 50)]
    ends = [extent(t) for rotation in many for one in rotation.sets for t in one]
    assert max(end for _, end in ends) - min(start for start, _ in ends) <= 4 * CACHE


def test_a_larger_operand_gets_a_larger_buffer():
    operands = Operands(cache_bytes=CACHE)
    small = operands.rotate([(8,)], KIND, cold=True)
    large = operands.rotate([(10 * CACHE,)], KIND, cold=True)
    assert 40 * CACHE <= large.bytes < 90 * CACHE
    assert small.next()[0].isfinite().all()  # what was cut before is still there


def test_numbers_are_small_and_random():
    (first,), (second,) = Operands(cache_bytes=CACHE).rotate([(99, 99)], KIND, cold=True).sets[:8:7]
    assert 0.01 < first.std() < 0.03
    assert not torch.equal(first, second)


def test_activations():
    x = Operands(cache_bytes=0).activations(3, 5, dtype=torch.bfloat16)
    assert (x.shape, x.dtype) == (torch.Size([3, 5]), torch.bfloat16)


def test_no_operands_need_no_memory():
    rotation = Operands(cache_bytes=0).rotate([], KIND, cold=True)
    assert (rotation.sets, rotation.next(), rotation.bytes) == (((),), (), 0)


def test_an_unknown_cache_cannot_be_left():
    with pytest.raises(ValueError, match="cache_bytes is 0 -- cold operands must exceed"):
        Operands(cache_bytes=0).rotate([(8,)], KIND, cold=True)


@pytest.mark.parametrize(("cold", "between"), [(True, 3 * CACHE), (False, 0)])
def test_too_much_memory(cold, between):
    shape = (CACHE // 8,)
    limit = prod(shape) * 4 + between
    Operands(cache_bytes=CACHE, limit_bytes=limit).rotate([shape], KIND, cold=cold)
    with pytest.raises(ValueError, match=f"allowed are {limit - 1} together"):
        Operands(cache_bytes=CACHE, limit_bytes=limit - 1).rotate([shape], KIND, cold=cold)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_operands_on_cuda_and_in_page_locked_memory():
    operands = Operands(device="cuda", cache_bytes=CACHE)
    assert operands.rotate([(8,)], KIND, cold=True).next()[0].is_cuda
    assert operands.rotate([(8,)], KIND, cold=True, on_host=True).next()[0].is_pinned()
