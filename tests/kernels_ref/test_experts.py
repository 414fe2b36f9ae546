"""Expert networks, all forms, against one dense float64 einsum and against loops over tokens."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import gelu
from torch.utils._python_dispatch import TorchDispatchMode

from kernels_ref.dense import silu_mul
from kernels_ref.experts import (
    experts_loop,
    experts_padded,
    experts_sorted,
    gated_ffn,
    grouped_ffn,
    padded_ffn,
    plain_ffn,
    shared_experts,
    zero_experts,
)

T, D, F, E, K = 60, 12, 7, 6, 2
BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
both = pytest.mark.parametrize("dtype", list(BOUND))
forms = pytest.mark.parametrize("kernel", [experts_loop, experts_sorted, experts_padded])
examples = settings(max_examples=30, deadline=None)
TOKENS = st.just(0) | st.integers(24, 32)  # a relative error of few numbers has a long tail


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


@forms
def test_equals_dense_einsum(kernel, case):
    torch.testing.assert_close(kernel(*case), dense_oracle(*case), rtol=1e-10, atol=1e-10)


@forms
def test_float32_is_near_float64(kernel, case):
    single = [tensor.float() if tensor.is_floating_point() else tensor for tensor in case]
    torch.testing.assert_close(kernel(*single).double(), dense_oracle(*case), rtol=1e-4, atol=1e-4)


@forms
def test_gradients_equal_those_of_the_dense_einsum(kernel, case):
    def gradients(function):
        leaves = [t.clone().requires_grad_() if t.is_floating_point() else t for t in case]
        function(*leaves).square().sum().backward()
        return [leaf.grad for leaf in leaves if leaf.is_floating_point()]

    for found, expected in zip(gradients(kernel), gradients(dense_oracle), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@forms
def test_a_cuda_device_gives_the_same(kernel, case):
    found = kernel(*(tensor.cuda() for tensor in case)).cpu()
    torch.testing.assert_close(found, dense_oracle(*case), rtol=1e-9, atol=1e-9)


def test_grouped_rows_meet_their_own_expert(case):
    x, _, _, w13, w2 = case
    counts = [0, 20, 1, 0, 39, 0]
    y = grouped_ffn(x, counts, w13, w2)
    torch.testing.assert_close(y[:20], gated_ffn(x[:20], w13[1], w2[1]))
    torch.testing.assert_close(y[20:21], gated_ffn(x[20:21], w13[2], w2[2]))
    torch.testing.assert_close(y[21:], gated_ffn(x[21:], w13[4], w2[4]))


# Written-out networks, one token and one number after the other, in float64.


def of_gate(up):
    half = len(up) // 2
    return [g / (1 + math.exp(-g)) * u for g, u in zip(up[:half], up[half:], strict=True)]


def of_relu(up):
    return [max(value, 0.0) for value in up]


def of_gelu(up):
    return [value * (1 + math.erf(value / math.sqrt(2))) / 2 for value in up]


NETWORKS = {silu_mul: of_gate, torch.relu: of_relu, gelu: of_gelu}


def network(x, w1, w2, activation):
    hidden = np.array(NETWORKS[activation]([sum(row * x) for row in w1]))
    return np.array([sum(row * hidden) for row in w2])


def draw(seed, *shapes, dtype):
    """Random activations and weights, and the same (rounded) numbers in float64.

    Weights are scaled as a model's, so that products stay near 1: at -5, gelu would magnify the
    rounding of bfloat16 25 times.
    """
    rng = np.random.default_rng(seed)
    drawn = [rng.normal(size=shape) for shape in shapes]
    scaled = drawn[:1] + [w / math.sqrt(w.shape[-1]) for w in drawn[1:]]
    tensors = [torch.from_numpy(numbers).to(dtype) for numbers in scaled]
    return tensors, [tensor.double().numpy() for tensor in tensors]


def near(found, expected):
    error = np.linalg.norm(found.double().numpy() - expected) / max(np.linalg.norm(expected), 1e-30)
    assert found.shape == expected.shape
    assert error < BOUND[found.dtype]


def draw_layer(data, dtype, activation, extra=0):
    """Draw a layer's tensors and their float64 twins; ids from -1 (dropped) to E + extra - 1."""
    tokens, experts = data.draw(TOKENS), data.draw(st.integers(1, 5))
    top_k = data.draw(st.integers(1, experts + extra))
    inner = data.draw(st.integers(8, 16))
    first = 2 * inner if activation is silu_mul else inner
    shapes = (tokens, 12), (experts, first, 12), (experts, 12, inner)
    seed = data.draw(st.integers(0, 9999))
    tensors, twins = draw(seed, *shapes, dtype=dtype)
    rng = np.random.default_rng(seed)
    weights = torch.from_numpy(rng.uniform(0.1, 1.0, size=(tokens, top_k))).to(dtype)
    tensors.insert(1, weights)
    twins.insert(1, weights.double().numpy())
    ids = [rng.permutation(np.arange(-1, experts + extra))[:top_k] for _ in range(tokens)]
    return tensors, twins, np.array(ids, dtype=np.int64).reshape(tokens, top_k)


@both
@pytest.mark.parametrize("activation", list(NETWORKS))
@examples
@given(data=st.data())
def test_all_forms_equal_the_network_written_out(dtype, activation, data):
    (x, weights, w1, w2), twins, ids = draw_layer(data, dtype, activation, extra=1)
    x64, weights64, w1_64, w2_64 = twins
    expected = np.zeros(x64.shape)
    for t, k in np.ndindex(*ids.shape):
        if 0 <= ids[t, k] < len(w1):  # the others were dropped, or cost nothing
            e = ids[t, k]
            expected[t] += weights64[t, k] * network(x64[t], w1_64[e], w2_64[e], activation)
    for kernel in (experts_loop, experts_sorted, experts_padded):
        near(kernel(x, torch.from_numpy(ids), weights, w1, w2, activation=activation), expected)


@examples
@given(counts=st.lists(st.integers(0, 6), min_size=1, max_size=6), seed=st.integers(0, 999))
def test_padding_costs_the_longest_group_for_each_that_is_there(counts, seed):
    rows, experts = sum(counts), len(counts)
    shapes = (rows, 5), (experts, 6, 5), (experts, 5, 3)
    (x, w13, w2), _ = draw(seed, *shapes, dtype=torch.float64)
    padded = padded_ffn(x, counts, w13, w2)
    torch.testing.assert_close(padded.y_SD, grouped_ffn(x, counts, w13, w2))
    assert padded.padded_rows == max(counts) * sum(count > 0 for count in counts)


class Products(TorchDispatchMode):
    """Rows of each matrix product that runs."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            self.rows.append(math.prod(args[0].shape[:-1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_experts_without_rows_run_nothing(requires_grad):
    (x, w13, w2), _ = draw(0, (5, 4), (6, 6, 4), (6, 4, 3), dtype=torch.float32)
    w13.requires_grad_(requires_grad)
    with Products() as products:
        grouped_ffn(x, [0, 2, 0, 0, 3, 0], w13, w2)
    assert products.rows == [2, 2, 3, 3]
    with Products() as products:
        padded_ffn(x, [0, 2, 0, 0, 3, 0], w13, w2)
    assert products.rows == [6, 6]
    with Products() as products:
        ids = torch.tensor([[1], [4], [4]])
        experts_loop(x[:3], ids, torch.ones(3, 1), w13, w2)
    assert products.rows == [1, 1, 2, 2]


@pytest.mark.parametrize("kernel", [grouped_ffn, padded_ffn])
@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([2, 3], "2 counts that sum to 5 -- one for each of 3 experts, and 5 rows together"),
        ([2, 3, 1], "3 counts that sum to 6 -- one for each of 3 experts, and 5 rows together"),
    ],
)
def test_counts_that_do_not_fit_are_refused(kernel, counts, message):
    with pytest.raises(ValueError, match=message):
        kernel(torch.zeros(5, 4), counts, torch.zeros(3, 6, 4), torch.zeros(3, 4, 3))


def test_plain_network_is_relu_unless_told():
    (x, w1, w2), (x64, w1_64, w2_64) = draw(0, (5, 12), (7, 12), (12, 7), dtype=torch.float32)
    for activation, found in (
        (torch.relu, plain_ffn(x, w1, w2)),
        (gelu, plain_ffn(x, w1, w2, gelu)),
    ):
        near(found, np.array([network(row, w1_64, w2_64, activation) for row in x64]))


@both
@examples
@given(
    tokens=TOKENS, inner=st.integers(8, 16), gated=st.booleans(),
    activation=st.sampled_from(list(NETWORKS)), seed=st.integers(0, 999),
)  # fmt: skip
def test_shared_experts_equal_the_network_written_out(
    dtype, tokens, inner, gated, activation, seed
):
    first = 2 * inner if activation is silu_mul else inner
    shapes = (tokens, 12), (first, 12), (12, inner), (1, 12)
    (x, w1, w2, gate), (x64, w1_64, w2_64, gate64) = draw(seed, *shapes, dtype=dtype)
    expected = np.zeros(x64.shape)
    for t, row in enumerate(x64):
        share = 1 / (1 + math.exp(-sum(gate64[0] * row))) if gated else 1.0
        expected[t] = share * network(row, w1_64, w2_64, activation)
    near(shared_experts(x, w1, w2, gate if gated else None, activation=activation), expected)


def test_two_shared_experts_are_one_of_their_widths_together():
    (x, a, b, down), _ = draw(0, (5, 12), (8, 12), (6, 12), (12, 7), dtype=torch.float64)
    gate_up = torch.cat([a[:4], b[:3], a[4:], b[3:]])  # widths 4 and 3
    alone = gated_ffn(x, a, down[:, :4]) + gated_ffn(x, b, down[:, 4:])
    torch.testing.assert_close(shared_experts(x, gate_up, down), alone)


KINDS = st.lists(st.sampled_from(["identity", "zero", "constant"]), max_size=4)


@both
@examples
@given(data=st.data(), kinds=KINDS)
def test_zero_experts_equal_their_definitions(dtype, data, kinds):
    (x, weights, w1, _), (x64, weights64, *_), ids = draw_layer(
        data, dtype, silu_mul, extra=len(kinds)
    )
    number = kinds.count("constant")
    tensors, (constants64, gates64) = draw(1, (number, 12), (number, 2, 12), dtype=dtype)
    expected = np.zeros(x64.shape)
    for t, k in np.ndindex(*ids.shape):
        z = ids[t, k] - len(w1)
        if z >= 0 and kinds[z] == "identity":
            expected[t] += weights64[t, k] * x64[t]
        elif z >= 0 and kinds[z] == "constant":
            j = kinds[:z].count("constant")
            a, b = (math.exp(sum(row * x64[t])) for row in gates64[j])
            mixed = (a * x64[t] + b * constants64[j]) / (a + b)
            expected[t] += weights64[t, k] * mixed
    found = zero_experts(
        x, torch.from_numpy(ids), weights, len(w1), kinds,
        constants_JD=tensors[0], gates_J2D=tensors[1],
    )  # fmt: skip
    near(found, expected)


def test_identities_and_routed_experts_together_are_the_longcat_layer(case):
    x, ids, weights, w13, w2 = case
    ids = torch.where(ids == 0, E + 3, ids)  # expert 0's tokens go to the fourth of 5 identities
    found = experts_sorted(x, ids, weights, w13, w2)
    found = found + zero_experts(x, ids, weights, E, ["identity"] * 5)
    one_more = torch.where(ids == E + 3, 0, ids)
    share = torch.where(ids == E + 3, weights, 0.0)
    routed = dense_oracle(x, one_more, weights - share, w13, w2)
    torch.testing.assert_close(found, routed + share.sum(1, keepdim=True) * x)


def test_zero_experts_that_are_not_whole_are_refused():
    x, ids, weights = torch.zeros(3, 4), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    with pytest.raises(ValueError, match="experts: copy -- allowed are identity, zero, constant"):
        zero_experts(x, ids, weights, 2, ["identity", "copy"])
    with pytest.raises(ValueError, match="1 constant experts with 0 vectors and 0 gates"):
        zero_experts(x, ids, weights, 2, ["constant"])
    with pytest.raises(ValueError, match="0 constant experts with 1 vectors and 0 gates"):
        zero_experts(x, ids, weights, 2, ["zero"], constants_JD=torch.zeros(1, 4))
