"""Copies between memories: bytes arrive, and nothing is converted or taken for another kind."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_ref.copies import copy_host, to_device

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
    st.lists(st.integers(0, 40), min_size=1, max_size=3),
)
@settings(deadline=None, max_examples=30)
def test_host_copy_is_exact(dtype, shape):
    src = torch.randint(-100, 100, shape).to(dtype)
    dst = torch.full_like(src, 101)
    copy_host(dst, src)
    assert dst.tolist() == src.tolist()


@pytest.mark.parametrize("other", [torch.zeros(3, 4), torch.zeros(4, 3, dtype=torch.float64)])
def test_host_copy_converts_nothing(other):
    with pytest.raises(ValueError, match="allowed is one shape and dtype"):
        copy_host(other, torch.zeros(4, 3))


def test_host_copy_is_of_contiguous_memory():
    with pytest.raises(ValueError, match="src is on cpu, contiguous: False"):
        copy_host(torch.zeros(4, 3), torch.zeros(3, 4).T)


def test_a_host_tensor_is_no_device():
    with pytest.raises(ValueError, match=r"dst is on cpu, CUDA available: .* use copy_host"):
        to_device(torch.zeros(3), torch.zeros(3), pinned=False)


@needs_cuda
@pytest.mark.parametrize("pinned", [False, True])
def test_device_copy_is_exact_and_done(pinned):
    src = torch.randn(1000, 1000, pin_memory=pinned)
    dst = torch.zeros(1000, 1000, device="cuda")
    to_device(src, dst, pinned=pinned)
    assert torch.cuda.current_stream().query()
    assert torch.equal(dst.cpu(), src)


@needs_cuda
@pytest.mark.parametrize("pinned", [False, True])
def test_the_kind_of_memory_is_checked(pinned):
    src = torch.randn(10, pin_memory=not pinned)
    with pytest.raises(ValueError, match=f"allowed is host memory with pinned = {pinned}"):
        to_device(src, torch.zeros(10, device="cuda"), pinned=pinned)
