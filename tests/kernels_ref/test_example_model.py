"""The example model: its attention is the reference kernel's, its routing is causal."""

from pathlib import Path

import pytest
import torch

from kernels_ref import attention_prefill


@pytest.fixture
def model(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    from example_moe.model import ExampleMoE, ModelConfig

    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=3, head_dim=8, num_experts=8,
        moe_intermediate_size=8, initializer_range=0.3,
    )  # fmt: skip
    return ExampleMoE(config).double().eval()


@torch.no_grad()
def test_attention_equals_the_reference_kernel(model):
    from example_moe.model import rotate

    attention, (cos, sin) = (
        model.model.layers[0].self_attn,
        (model.model.cos_SC, model.model.sin_SC),
    )
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    q, k, v = (
        projection(x).unflatten(-1, (-1, 8))
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = (rotate(t.transpose(1, 2), cos[:7], sin[:7]).transpose(1, 2) for t in (q, k))
    expected = attention.o_proj(attention_prefill(q, k, v).flatten(2))
    torch.testing.assert_close(attention(x, cos[:7], sin[:7]), expected)


@torch.no_grad()
def test_one_pass_routes_each_token_as_token_by_token_decoding_would(model):
    ids = torch.randint(64, (1, 12))
    _, whole = model(ids)
    for length in range(1, 13):
        _, prefix = model(ids[:, :length])
        for routing, expected in zip(prefix, whole, strict=True):
            assert torch.equal(routing.topk_ids_TK[-1], expected.topk_ids_TK[length - 1])


def test_balance_loss_is_one_when_even_and_the_expert_count_when_collapsed(model):
    from example_moe.model import balance_loss

    from kernels_ref import Routing

    even = torch.arange(8).view(4, 2)
    flat = torch.full((4, 8), 1 / 8)
    assert balance_loss([Routing(even, flat[:, :2], flat)]).item() == pytest.approx(1.0)
    first = torch.zeros(4, 8)
    first[:, 0] = 1.0
    collapsed = Routing(torch.zeros(4, 1, dtype=torch.int64), first[:, :1], first)
    assert balance_loss([collapsed]).item() == pytest.approx(8.0)


def test_config_survives_json(model):
    assert type(model.config).from_json(model.config.to_json()) == model.config
