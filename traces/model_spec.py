"""Geometry of a Mixture-of-Experts transformer: how many parameters, bytes and KV elements.

Everything here is a count (parameters, elements) or a size (bytes) that follows from the
model's ``config.json``; nothing is a speed. Parameters are counted exactly, norms, biases and
embeddings included, and stored sizes include the block scales of the number format.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from basis.dtypes import DTYPES, bytes_of
from basis.errors import InputError
from basis.schema import Strict, read_data, validate
from traces.config_families import geometry


class Attention(Strict):
    """Attention of every layer, grouped-query (GQA) or multi-head latent (MLA)."""

    kind: Literal["gqa", "mla"]
    num_heads: PositiveInt
    """Query heads."""
    num_kv_heads: PositiveInt
    """Key/value heads before any compression; MLA stores none of them."""
    head_dim: PositiveInt
    """Elements per query and key head (MLA: without and with rotary position, together)."""
    v_head_dim: PositiveInt
    """Elements per value head."""
    q_lora_rank: PositiveInt | None = None
    """MLA: width of the compressed query; None where queries are not compressed."""
    kv_lora_rank: PositiveInt | None = None
    """MLA: width of the stored latent."""
    qk_rope_head_dim: PositiveInt | None = None
    """MLA: elements of the one shared rotary key that is stored beside the latent."""
    qk_nope_head_dim: PositiveInt | None = None
    """MLA: elements per head without rotary position."""
    windows: tuple[PositiveInt | None, ...] = ()
    """Tokens that each layer of the model attends to; None = all of them. Empty: all in all layers
    (filled in by the model)."""
    bias: Literal["none", "qkv", "qkvo"] = "none"
    """Projections that have a bias."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMS norm on queries and keys, over one head or over all heads together."""
    sinks: bool = False
    """One learnt sink logit per query head (gpt-oss)."""

    @model_validator(mode="after")
    def _mla_is_whole(self) -> "Attention":
        latent = (self.kv_lora_rank, self.qk_rope_head_dim, self.qk_nope_head_dim)
        if self.kind == "mla" and None in latent:
            raise ValueError("mla needs kv_lora_rank, qk_rope_head_dim and qk_nope_head_dim")
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
        return self.num_kv_heads * (self.head_dim + self.v_head_dim)

    def matrix_parameters(self, hidden_size: int) -> int:
        """Parameters of one layer's projection matrices."""
        query, value = self.num_heads * self.head_dim, self.num_heads * self.v_head_dim
        if self.kind == "gqa":
            return hidden_size * (query + self.kv_elements_per_token + value)
        latent, nope = self.kv_lora_rank or 0, self.qk_nope_head_dim or 0
        down_q = hidden_size * self.q_lora_rank if self.q_lora_rank else 0
        up_q = (self.q_lora_rank or hidden_size) * query
        up_kv = latent * self.num_heads * (nope + self.v_head_dim)
        down_kv = hidden_size * self.kv_elements_per_token
        return down_q + up_q + down_kv + up_kv + value * hidden_size

    def vector_parameters(self, hidden_size: int) -> int:
        """Parameters of one layer's biases, sinks and inner norms."""
        query = self.num_heads * self.head_dim
        key, value = self.num_kv_heads * self.head_dim, self.num_kv_heads * self.v_head_dim
        bias = {"none": 0, "qkv": query + key + value, "qkvo": query + key + value + hidden_size}
        norm = {"none": 0, "head": 2 * self.head_dim, "full": query + key}
        latent = (self.q_lora_rank or 0) + (self.kv_lora_rank or 0)  # MLA norms both latents
        sinks = self.num_heads if self.sinks else 0
        return bias[self.bias] + norm[self.qk_norm] + latent + sinks

    def parameters(self, hidden_size: int) -> int:
        """Parameters of one layer's attention, biases and inner norms included."""
        return self.matrix_parameters(hidden_size) + self.vector_parameters(hidden_size)


class ModelSpec(Strict):
    """Geometry of one model. Multi-token-prediction layers are not part of it."""

    name: str
    family: str
    """``model_type`` of the configuration."""
    num_layers: PositiveInt
    hidden_size: PositiveInt
    vocab_size: PositiveInt
    tie_embeddings: bool
    """Whether the head reuses the input embedding."""
    moe_layer_ids: tuple[int, ...] = Field(min_length=1)
    """Indices (from 0) of the layers with routed experts, ascending."""
    num_experts: PositiveInt
    top_k: PositiveInt
    """Routed experts that a token uses in each MoE layer."""
    expert_width: PositiveInt
    """Inner width of one routed expert."""
    gated: bool = True
    """Three matrices per expert, shared expert and dense FFN (gate, up, down); two where False."""
    expert_bias: bool = False
    """Whether the experts' projections have biases (gpt-oss)."""
    router_bias: bool = False
    """One bias per expert in the router, or DeepSeek-V3's score correction."""
    shared_expert_width: int = Field(default=0, ge=0)
    """Inner width of all shared experts together; 0 = none."""
    shared_expert_gate: bool = False
    """Whether a learnt gate scales the shared expert (Qwen2-MoE)."""
    dense_width: int = Field(default=0, ge=0)
    """Inner width of the FFN in layers without experts; 0 = there are none."""
    num_expert_groups: PositiveInt = 1
    """Groups of the group-limited router (DeepSeek)."""
    attention: Attention
    weight_dtype: str
    """Format of the matrices outside the routed experts; embeddings, head and router are not
    quantised and follow ``activation_dtype``."""
    expert_dtype: str
    """Format of the routed experts' matrices."""
    activation_dtype: str
    """Format of activations, norms, biases, router, embeddings and head."""
    kv_dtype: str
    """Format of the KV cache."""
    comm_size: PositiveInt
    """Elements per token that dispatch and combine send."""

    @model_validator(mode="before")
    @classmethod
    def _full_attention(cls, data: Any) -> Any:
        """Name every layer's window where none is given."""
        if isinstance(data, dict) and isinstance(data.get("attention"), dict):
            layers = data.get("num_layers")
            if not data["attention"].get("windows") and isinstance(layers, int):
                return data | {"attention": data["attention"] | {"windows": (None,) * layers}}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> "ModelSpec":
        ids = self.moe_layer_ids
        if list(ids) != sorted(set(ids)) or ids[0] < 0 or ids[-1] >= self.num_layers:
            raise ValueError(f"moe_layer_ids must ascend within 0..{self.num_layers - 1}")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} is above num_experts {self.num_experts}")
        windows = len(self.attention.windows)
        if windows != self.num_layers:
            raise ValueError(f"windows names {windows} layers, the model has {self.num_layers}")
        if self.num_moe_layers < self.num_layers and not self.dense_width:
            raise ValueError("layers without experts need dense_width")
        for dtype in (self.weight_dtype, self.expert_dtype, self.activation_dtype, self.kv_dtype):
            if dtype not in DTYPES:
                raise ValueError(f"unknown dtype {dtype!r} -- known are {', '.join(DTYPES)}")
        return self

    @property
    def num_moe_layers(self) -> int:
        """Layers with routed experts."""
        return len(self.moe_layer_ids)

    @property
    def ffn_matrices(self) -> int:
        """Matrices of a feed-forward network, expert or dense."""
        return 3 if self.gated else 2

    @property
    def expert_matrix_params(self) -> int:
        """Parameters of one routed expert's matrices."""
        return self.ffn_matrices * self.hidden_size * self.expert_width

    @property
    def expert_vector_params(self) -> int:
        """Parameters of one routed expert's biases."""
        inner = (2 if self.gated else 1) * self.expert_width
        return inner + self.hidden_size if self.expert_bias else 0

    @property
    def params_per_expert(self) -> int:
        """Parameters of one routed expert in one layer."""
        return self.expert_matrix_params + self.expert_vector_params

    @property
    def bytes_per_expert(self) -> float:
        """Bytes of one routed expert in one layer, block scales included."""
        matrices = bytes_of(self.expert_dtype, self.expert_matrix_params)
        return matrices + bytes_of(self.activation_dtype, self.expert_vector_params)

    @property
    def total_params(self) -> int:
        """All parameters, embeddings included, multi-token prediction not."""
        experts = self.num_moe_layers * self.num_experts * self.params_per_expert
        return experts + self._outer_matrix_params + self._outer_vector_params

    @property
    def active_params(self) -> int:
        """Parameters without the routed experts that a token does not use.

        Embedding and head are both included, whole (some publishers leave the embedding out).
        """
        idle = self.num_moe_layers * (self.num_experts - self.top_k)
        return self.total_params - idle * self.params_per_expert

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes that one token adds to the KV cache of all layers together.

        A sliding-window layer forgets it again: see `kv_bytes` for a whole sequence.
        """
        return bytes_of(self.kv_dtype, self.num_layers * self.attention.kv_elements_per_token)

    def kv_bytes(self, context: int) -> float:
        """Bytes of KV cache of one sequence of ``context`` tokens, windows respected."""
        tokens = sum(min(context, window or context) for window in self.attention.windows)
        return bytes_of(self.kv_dtype, tokens * self.attention.kv_elements_per_token)

    @property
    def bytes_outside_experts(self) -> float:
        """Bytes of every parameter that is not a routed expert."""
        vectors = bytes_of(self.activation_dtype, self._outer_vector_params)
        return bytes_of(self.weight_dtype, self._outer_matrix_params) + vectors

    @property
    def _outer_matrix_params(self) -> int:
        """Matrices that a quantised checkpoint quantises: attention, shared and dense FFN."""
        dense = (self.num_layers - self.num_moe_layers) * self.dense_width
        shared = self.num_moe_layers * self.shared_expert_width
        ffn = self.ffn_matrices * self.hidden_size * (dense + shared)
        return self.num_layers * self.attention.matrix_parameters(self.hidden_size) + ffn

    @property
    def _outer_vector_params(self) -> int:
        """What stays in full precision: embeddings, head, routers, norms, biases."""
        embeddings = (1 if self.tie_embeddings else 2) * self.vocab_size * self.hidden_size
        router = self.num_experts * (self.hidden_size + self.router_bias)
        gate = self.hidden_size if self.shared_expert_gate else 0
        inner = self.attention.vector_parameters(self.hidden_size)
        layers = self.num_layers * (2 * self.hidden_size + inner)
        return embeddings + self.num_moe_layers * (router + gate) + layers + self.hidden_size


def load_model(path: Path) -> ModelSpec:
    """Read the geometry from a Hugging Face ``config.json``.

    Parameters
    ----------
    path : Path
        The file (JSON, or YAML with the same keys), or the folder that holds ``config.json``. For a
        model that never had one, the fields of `ModelSpec` themselves.

    Raises
    ------
    InputError
        If the file cannot be read, its ``model_type`` is not supported, keys are missing
        (all are listed at once), values are impossible, or the quantisation is not known.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    config = read_data(path)
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected a mapping, got {type(config).__name__}")
    beside = path.with_name(path.name.replace("config", "hf_quant_config"))
    if beside != path and beside.is_file():
        raise InputError(
            f"{path}: {beside.name} beside it says that the checkpoint is quantised by modelopt, "
            "which is not supported -- give the config of the unquantised or FP8 checkpoint"
        )
    if "moe_layer_ids" in config:
        return validate(config, ModelSpec, str(path))
    fields = geometry(config, str(path))
    stem = path.parent.name if path.stem == "config" else path.stem.removesuffix("_config")
    return validate({"name": stem, **fields}, ModelSpec, str(path))
