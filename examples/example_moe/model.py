"""The example model: a decoder-only transformer whose every layer is a Mixture of Experts.

Pre-norm RMSNorm, rotary grouped-query attention, softmax router with renormalised top-k, gated
SiLU experts from `kernels_ref`, tied embeddings. Modules are named as in Hugging Face models
(``model.layers.N.mlp.experts``), so that the project's recorder hooks it like any other.
Shape suffixes: B requests, S tokens of each, T = B * S, D width, H heads, G key/value heads,
C channels of a head, E experts, K experts per token, V vocabulary.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels_ref import Routing, experts_sorted, route_topk


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Geometry of the model, with the field names of a Hugging Face ``config.json``."""

    vocab_size: int = 4096
    hidden_size: int = 128
    num_hidden_layers: int = 12
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    num_experts: int = 32
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 64
    max_position_embeddings: int = 512
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    norm_topk_prob: bool = True
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02

    def to_json(self) -> dict[str, object]:
        """Give the fields of a Hugging Face ``config.json``."""
        return {
            "architectures": ["MoeplanExampleForCausalLM"],
            "model_type": "moeplan_example_moe",
            "hidden_act": "silu",
            "dtype": "float32",
            **asdict(self),
        }

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "ModelConfig":
        """Read the fields that `to_json` wrote."""
        return cls(**{field.name: raw[field.name] for field in fields(cls)})


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * g``."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_table(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles, ``[S, C]`` each."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-torch.arange(half) / half)
    angle = torch.outer(torch.arange(config.max_position_embeddings), frequency)
    return angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)


def rotate(x_BHSC: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> Tensor:
    """Rotate channel pairs (c, c + C/2) by their position's angle."""
    low, high = x_BHSC.chunk(2, dim=-1)
    return x_BHSC * cos_SC + torch.cat((-high, low), dim=-1) * sin_SC


class Attention(nn.Module):
    """Causal grouped-query attention; torch's fused kernel, equal to `kernels_ref`'s."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(
            config.hidden_size, config.num_attention_heads * config.head_dim, bias=False
        )
        self.k_proj = nn.Linear(
            config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False
        )
        self.v_proj = nn.Linear(
            config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False
        )
        self.o_proj = nn.Linear(
            config.num_attention_heads * config.head_dim, config.hidden_size, bias=False
        )

    def forward(self, x_BSD: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> Tensor:
        """Mix the tokens of a request; ``[B, S, D]``."""
        q_BHSC, k_BGSC, v_BGSC = (
            projection(x_BSD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_BHSC, k_BGSC = rotate(q_BHSC, cos_SC, sin_SC), rotate(k_BGSC, cos_SC, sin_SC)
        mixed_BHSC = functional.scaled_dot_product_attention(
            q_BHSC, k_BGSC, v_BGSC, is_causal=True, enable_gqa=True
        )
        out: Tensor = self.o_proj(mixed_BHSC.transpose(1, 2).flatten(2))
        return out


class Experts(nn.Module):
    """The expert weights of a layer, called as Hugging Face's fused experts are."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, width, inner = (
            config.num_experts,
            config.hidden_size,
            config.moe_intermediate_size,
        )
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``[T, D]`` to ``[T, D]``, each token through its K experts."""
        return experts_sorted(
            hidden_states, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj
        )


class MoE(nn.Module):
    """Router and experts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k, self.renormalise = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.experts = Experts(config)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Routing]:
        """Give the experts' output ``[B, S, D]`` and the routing of the T = B * S tokens."""
        x_TD = x_BSD.flatten(0, 1)
        routing = route_topk(x_TD, self.gate, self.top_k, renormalise=self.renormalise)
        y_TD = self.experts(x_TD, routing.topk_ids_TK, routing.topk_weights_TK)
        return y_TD.view_as(x_BSD), routing


class Layer(nn.Module):
    """Attention, then Mixture of Experts, each on a normalised residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config)

    def forward(self, x_BSD: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> tuple[Tensor, Routing]:
        """One layer; ``[B, S, D]`` and the routing."""
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), cos_SC, sin_SC)
        y_BSD, routing = self.mlp(self.post_attention_layernorm(x_BSD))
        return x_BSD + y_BSD, routing


class Decoder(nn.Module):
    """Embedding, layers, final norm."""

    cos_SC: Tensor
    sin_SC: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        for name, table in zip(("cos_SC", "sin_SC"), rotary_table(config), strict=True):
            self.register_buffer(name, table, persistent=False)

    def forward(self, ids_BS: Tensor) -> tuple[Tensor, list[Routing]]:
        """Give the final hidden states ``[B, S, D]`` and each layer's routing."""
        x_BSD = self.embed_tokens(ids_BS)
        tokens = ids_BS.shape[1]
        routings = []
        for layer in self.layers:
            x_BSD, routing = layer(x_BSD, self.cos_SC[:tokens], self.sin_SC[:tokens])
            routings.append(routing)
        return self.norm(x_BSD), routings


class ExampleMoE(nn.Module):
    """The language model; the output matrix is the embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        std, depth = config.initializer_range, 2 * config.num_hidden_layers
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                writes_residual = name.endswith(("o_proj.weight", "down_proj"))
                nn.init.normal_(parameter, std=std / depth**0.5 if writes_residual else std)

    def forward(self, ids_BS: Tensor) -> tuple[Tensor, list[Routing]]:
        """Next-token logits ``[B, S, V]`` and each layer's routing."""
        x_BSD, routings = self.model(ids_BS)
        return functional.linear(x_BSD, self.model.embed_tokens.weight), routings


def balance_loss(routings: list[Routing]) -> Tensor:
    """Load-balancing loss ``E sum_e f_e p_e``, mean over layers; 1 when perfectly even.

    ``f_e`` is expert e's share of the choices, ``p_e`` its mean probability (Switch Transformer,
    arXiv:2101.03961, equation 4, with top-k shares).
    """
    losses = []
    for routing in routings:
        experts = routing.probs_TE.shape[1]
        share_E = torch.bincount(routing.topk_ids_TK.flatten(), minlength=experts)
        share_E = share_E / routing.topk_ids_TK.numel()
        losses.append(experts * (share_E * routing.probs_TE.mean(0)).sum())
    return torch.stack(losses).mean()
