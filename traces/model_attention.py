"""Attention of a model's layers, and the parts that only some families have.

Counts are parameters and elements; see `traces.model_spec` for what a whole model adds up to.
"""

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from basis.schema import Strict


class Attention(Strict):
    """Attention: grouped-query (GQA), multi-head latent (MLA), or one shared head (DeepSeek-V4)."""

    kind: Literal["gqa", "mla", "shared_kv"]
    """``shared_kv``: one key per token that is the value as well, queries and output of low
    rank."""
    num_heads: PositiveInt
    """Query heads."""
    num_kv_heads: PositiveInt
    """Key/value heads before any compression; MLA stores none of them."""
    head_dim: PositiveInt
    """Elements per query and key head (MLA: without and with rotary position, together)."""
    v_head_dim: PositiveInt
    """Elements per value head."""
    q_lora_rank: PositiveInt | None = None
    """MLA, shared_kv: width of the compressed query; None where queries are not compressed."""
    o_lora_rank: PositiveInt | None = None
    """shared_kv: width of the output of one group of heads."""
    o_groups: PositiveInt | None = None
    """shared_kv: groups of heads, each projected by itself."""
    kv_lora_rank: PositiveInt | None = None
    """MLA: width of the stored latent."""
    qk_rope_head_dim: PositiveInt | None = None
    """MLA: elements of the one shared rotary key that is stored beside the latent."""
    qk_nope_head_dim: PositiveInt | None = None
    """MLA: elements per head without rotary position."""
    windows: tuple[PositiveInt | None, ...] = ()
    """Tokens that each layer of the model attends to; None = all of them. Empty: all in all layers
    (filled in by the model)."""
    chunked: bool = False
    """Whether a window is a chunk of fixed place, of which a token sees what is before it."""
    bias: Literal["none", "qkv", "qkvo"] = "none"
    """Projections that have a bias."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMS norm on queries and keys, over one head or over all heads together."""
    sinks: bool = False
    """One learnt sink logit per query head (gpt-oss)."""
    output_gate: Literal["none", "head", "element"] = "none"
    """A projection of the input that scales the output, with one factor per head or element."""

    @model_validator(mode="after")
    def _is_whole(self) -> "Attention":
        latent = (self.kv_lora_rank, self.qk_rope_head_dim, self.qk_nope_head_dim)
        if self.kind == "mla" and None in latent:
            raise ValueError("mla needs kv_lora_rank, qk_rope_head_dim and qk_nope_head_dim")
        grouped = (self.q_lora_rank, self.o_lora_rank, self.o_groups)
        if self.kind == "shared_kv" and None in grouped:
            raise ValueError("shared_kv needs q_lora_rank, o_lora_rank and o_groups")
        if self.kind == "gqa" and self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        return self

    @property
    def kv_elements_per_token(self) -> int:
        """Elements that one token adds to the KV cache of one layer."""
        if self.kind == "mla":
            return (self.kv_lora_rank or 0) + (self.qk_rope_head_dim or 0)
        if self.kind == "shared_kv":
            return self.head_dim
        return self.num_kv_heads * (self.head_dim + self.v_head_dim)

    def matrix_parameters(self, hidden_size: int) -> int:
        """Parameters of one layer's projection matrices."""
        query, value = self.num_heads * self.head_dim, self.num_heads * self.v_head_dim
        gates = {"none": 0, "head": self.num_heads, "element": value}
        gate = hidden_size * gates[self.output_gate]
        if self.kind == "gqa":
            return hidden_size * (query + self.kv_elements_per_token + value) + gate
        down_q = hidden_size * self.q_lora_rank if self.q_lora_rank else 0
        up_q = (self.q_lora_rank or hidden_size) * query
        down_kv = hidden_size * self.kv_elements_per_token
        if self.kind == "shared_kv":
            grouped = (self.o_lora_rank or 0) * (value + (self.o_groups or 0) * hidden_size)
            return down_q + up_q + down_kv + grouped + gate
        latent, nope = self.kv_lora_rank or 0, self.qk_nope_head_dim or 0
        up_kv = latent * self.num_heads * (nope + self.v_head_dim)
        return down_q + up_q + down_kv + up_kv + value * hidden_size + gate

    def vector_parameters(self, hidden_size: int) -> int:
        """Parameters of one layer's biases, sinks and inner norms."""
        query = self.num_heads * self.head_dim
        key, value = self.num_kv_heads * self.head_dim, self.num_kv_heads * self.v_head_dim
        bias = {"none": 0, "qkv": query + key + value, "qkvo": query + key + value + hidden_size}
        norm = {"none": 0, "head": 2 * self.head_dim, "full": query + key}
        latent = (self.q_lora_rank or 0) + (self.kv_lora_rank or 0)  # both latents have a norm
        latent += self.head_dim if self.kind == "shared_kv" else 0
        sinks = self.num_heads if self.sinks else 0
        return bias[self.bias] + norm[self.qk_norm] + latent + sinks

    def parameters(self, hidden_size: int) -> int:
        """Parameters of one layer's attention, biases and inner norms included."""
        return self.matrix_parameters(hidden_size) + self.vector_parameters(hidden_size)


class Part(Strict):
    """Something that some layers have and no other field describes; counts are of one layer."""

    name: str
    """What it is, in words."""
    layers: tuple[int, ...] = ()
    """Layers that have it; empty = it is there once, outside the layers."""
    matrix_params: int = Field(default=0, ge=0)
    """Parameters that follow ``weight_dtype``."""
    vector_params: int = Field(default=0, ge=0)
    """Parameters that follow ``activation_dtype``."""
    kv_elements: float = Field(default=0.0, ge=0)
    """Elements that a token adds to what it keeps, a share of one where it keeps one entry for
    several tokens. A state of fixed size is not counted."""
    window: PositiveInt | None = None
    """Tokens that are kept; None = all."""
    works: bool = True
    """Whether it does work of its own; False: scales, norms and biases beside other work."""

    @property
    def times(self) -> int:
        """How often the model has it."""
        return len(self.layers) or 1
