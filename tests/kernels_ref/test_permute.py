"""Permute and combine: sorting loses nothing, and combining is the weighted sum."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_ref import combine, permute, sort_by_expert


def random_choice(tokens, experts, top_k, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])
    return ids, torch.rand(tokens, top_k, generator=generator, dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 40), experts=st.integers(1, 9), data=st.data(), seed=st.integers(0, 999)
)
def test_rows_are_grouped_and_complete(tokens, experts, data, seed):
    ids, weights = random_choice(tokens, experts, data.draw(st.integers(1, experts)), seed)
    permutation = sort_by_expert(ids, experts)
    sorted_ids = ids.flatten()[permutation.choice_S]
    assert torch.equal(sorted_ids, ids.flatten().sort().values)
    assert torch.equal(sorted_ids, torch.arange(experts).repeat_interleave(permutation.counts_E))
    assert torch.equal(permutation.choice_S.sort().values, torch.arange(ids.numel()))

    x = torch.randn(tokens, 3, dtype=torch.float64)
    rows = permute(x, permutation)
    assert torch.equal(rows, x[permutation.token_S])
    scale = sorted_ids.double().unsqueeze(1) + 1  # an "expert" that multiplies by its id + 1
    expected = torch.einsum("td,tk,tk->td", x, weights, ids.double() + 1)
    torch.testing.assert_close(combine(rows * scale, weights, permutation), expected)


def test_sort_is_stable_within_an_expert():
    permutation = sort_by_expert(torch.tensor([[1, 0], [0, 1], [1, 2]]), 4)
    assert permutation.choice_S.tolist() == [1, 2, 0, 3, 4, 5]
    assert permutation.token_S.tolist() == [0, 1, 0, 1, 2, 2]
    assert permutation.counts_E.tolist() == [2, 3, 1, 0]
