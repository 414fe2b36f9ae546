"""Expert FFN, both forms, against one dense float64 einsum over all experts."""

import pytest
import torch

from kernels_ref import experts_loop, experts_sorted, gated_ffn, grouped_ffn

T, D, F, E, K = 60, 12, 7, 6, 2


@pytest.fixture
def case():
    torch.manual_seed(0)
    ids = torch.stack([torch.randperm(E - 1)[:K] for _ in range(T)])  # expert E - 1 gets nothing
    draw = torch.distributions.Normal(0.0, 1.0).sample
    tensors = draw((T, D)), torch.rand(T, K), draw((E, 2 * F, D)), draw((E, D, F))
    x, weights, w13, w2 = (tensor.double() for tensor in tensors)
    return x, ids, weights, w13, w2


def dense_oracle(x, ids, weights, w13, w2):
    """Every token through every expert, then the gate matrix (zero where not chosen)."""
    gate = torch.einsum("td,efd->tef", x, w13[:, :F])
    up = torch.einsum("td,efd->tef", x, w13[:, F:])
    hidden = gate / (1 + torch.exp(-gate)) * up
    out = torch.einsum("tef,edf->ted", hidden, w2)
    gates = torch.zeros(x.shape[0], E, dtype=x.dtype).scatter(1, ids, weights)
    return torch.einsum("ted,te->td", out, gates)


@pytest.mark.parametrize("kernel", [experts_loop, experts_sorted])
def test_equals_dense_einsum(kernel, case):
    torch.testing.assert_close(kernel(*case), dense_oracle(*case), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kernel", [experts_loop, experts_sorted])
def test_float32_is_near_float64(kernel, case):
    single = [tensor.float() if tensor.is_floating_point() else tensor for tensor in case]
    torch.testing.assert_close(kernel(*single).double(), dense_oracle(*case), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", [experts_loop, experts_sorted])
def test_gradients_equal_those_of_the_dense_einsum(kernel, case):
    def gradients(function):
        leaves = [t.clone().requires_grad_() if t.is_floating_point() else t for t in case]
        function(*leaves).square().sum().backward()
        return [leaf.grad for leaf in leaves if leaf.is_floating_point()]

    for found, expected in zip(gradients(kernel), gradients(dense_oracle), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-8)


def test_grouped_rows_meet_their_own_expert(case):
    x, _, _, w13, w2 = case
    counts = [0, 20, 1, 0, 39, 0]
    y = grouped_ffn(x, counts, w13, w2)
    torch.testing.assert_close(y[:20], gated_ffn(x[:20], w13[1], w2[1]))
    torch.testing.assert_close(y[20:21], gated_ffn(x[20:21], w13[2], w2[2]))
    torch.testing.assert_close(y[21:], gated_ffn(x[21:], w13[4], w2[4]))
