"""Geometry of a Mixture-of-Experts transformer: how many parameters, bytes and KV elements.

Everything here is a count (parameters, elements) or a size (bytes) that follows from the
model's ``config.json``; nothing is a speed. Parameters are counted exactly, norms, biases and
embeddings included, and stored sizes include the block scales of the number format.
"""

from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt, model_validator

from basis.dtypes import DTYPES, bytes_of
from basis.errors import InputError
from basis.schema import Strict, read_data, validate
from traces.config_families import geometry
from traces.model_attention import Attention, Part

__all__ = ["Attention", "ModelSpec", "Part", "load_model"]


class ModelSpec(Strict):
    """Geometry of one model. Multi-token-prediction layers are not part of it."""

    name: str
    family: str
    """``model_type`` of the configuration."""
    num_layers: PositiveInt
    """Layers; of an encoder-decoder those of both, the encoder's first."""
    encoder_layers: int = Field(default=0, ge=0)
    """How many of them are an encoder's."""
    hidden_size: PositiveInt
    vocab_size: PositiveInt
    tie_embeddings: bool
    """Whether the head reuses the input embedding."""
    moe_layer_ids: tuple[int, ...] = Field(min_length=1)
    """Indices (from 0) of the layers with routed experts, ascending."""
    dense_layer_ids: tuple[int, ...] | None = None
    """Layers with a dense FFN; None = all that have no experts."""
    attention_layers: tuple[int, ...] | None = None
    """Layers that have ``attention``; None = all. What others have instead is in ``parts``."""
    num_experts: PositiveInt
    zero_experts: int = Field(default=0, ge=0)
    """Choices of the router beyond the experts, at which a token does no work (LongCat)."""
    top_k: PositiveInt
    """Choices that a token makes in each MoE layer."""
    hash_layers: tuple[int, ...] = ()
    """MoE layers in which the token's id alone chooses the experts (DeepSeek-V4)."""
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
    norm_vectors: PositiveInt = 2
    """Vectors of ``hidden_size`` in the norms of a layer, biases of layer norms among them."""
    num_expert_groups: PositiveInt = 1
    """Groups of the group-limited router (DeepSeek)."""
    attention: Attention
    parts: tuple[Part, ...] = ()
    """All that the other fields do not describe."""
    weight_dtype: str
    """Format of the matrices outside the routed experts, the widest if there are several;
    embeddings, head and router are not quantised and follow ``activation_dtype``."""
    mixed_weights: tuple[str, ...] = ()
    """Narrower formats that some of these matrices have; their bytes are then a bound from
    above."""
    expert_dtype: str
    """Format of the routed experts' matrices."""
    activation_dtype: str
    """Format of activations, norms, biases, router, embeddings and head."""
    kv_dtype: str
    """Format of the KV cache."""
    comm_size: PositiveInt
    """Width of what an expert takes and gives, in elements per token: dispatch and combine send
    it. Where it is not ``hidden_size``, two matrices per MoE layer project to it and back."""

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
        for name in ("moe_layer_ids", "dense_layer_ids", "attention_layers", "hash_layers"):
            ids = getattr(self, name) or ()
            wrong = list(ids) != sorted(set(ids))
            if wrong or (ids and (ids[0] < 0 or ids[-1] >= self.num_layers)):
                raise ValueError(f"{name} must ascend within 0..{self.num_layers - 1}")
        if self.top_k > self.num_experts + self.zero_experts:
            raise ValueError(f"top_k {self.top_k} is above num_experts {self.num_experts}")
        windows = len(self.attention.windows)
        if windows != self.num_layers:
            raise ValueError(f"windows names {windows} layers, the model has {self.num_layers}")
        if self.dense_layers and not self.dense_width:
            raise ValueError("layers without experts need dense_width")
        if set(self.dense_layers) & set(self.moe_layer_ids):
            raise ValueError("dense_layer_ids and moe_layer_ids have layers in common")
        if not set(self.hash_layers) <= set(self.moe_layer_ids):
            raise ValueError("hash_layers must be MoE layers")
        for part in self.parts:
            if part.layers and not 0 <= min(part.layers) <= max(part.layers) < self.num_layers:
                raise ValueError(f"parts: layers of {part.name} within 0..{self.num_layers - 1}")
        named = (self.weight_dtype, self.expert_dtype, self.activation_dtype, self.kv_dtype)
        for dtype in (*named, *self.mixed_weights):
            if dtype not in DTYPES:
                raise ValueError(f"unknown dtype {dtype!r} -- known are {', '.join(DTYPES)}")
        return self

    @property
    def num_moe_layers(self) -> int:
        """Layers with routed experts."""
        return len(self.moe_layer_ids)

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Layers with a dense FFN."""
        if self.dense_layer_ids is not None:
            return self.dense_layer_ids
        return tuple(sorted(set(range(self.num_layers)) - set(self.moe_layer_ids)))

    @property
    def kv_layers(self) -> tuple[int, ...]:
        """Layers whose ``attention`` keeps keys and values of every token."""
        own = self.attention_layers
        return tuple(range(self.num_layers)) if own is None else own

    @property
    def ffn_matrices(self) -> int:
        """Matrices of a feed-forward network, expert or dense."""
        return 3 if self.gated else 2

    @property
    def expert_matrix_params(self) -> int:
        """Parameters of one routed expert's matrices."""
        return self.ffn_matrices * self.comm_size * self.expert_width

    @property
    def expert_vector_params(self) -> int:
        """Parameters of one routed expert's biases."""
        inner = (2 if self.gated else 1) * self.expert_width
        return inner + self.comm_size if self.expert_bias else 0

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
    def latent_params(self) -> int:
        """Parameters of the projections to the experts' width and back, of one MoE layer."""
        return 0 if self.comm_size == self.hidden_size else 2 * self.hidden_size * self.comm_size

    @property
    def total_params(self) -> int:
        """All parameters, embeddings included, multi-token prediction not."""
        experts = self.num_moe_layers * self.num_experts * self.params_per_expert
        return experts + self._outer_matrix_params + self._outer_vector_params

    @property
    def active_params(self) -> int:
        """Parameters without the routed experts that a token does not use.

        Embedding and head are both included, whole (some publishers leave the embedding out).
        Where a token may choose no work (``zero_experts``), it is the most that it can use.
        """
        idle = self.num_moe_layers * max(self.num_experts - self.top_k, 0)
        return self.total_params - idle * self.params_per_expert

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes that one token adds to the KV cache of all layers together.

        A sliding-window layer forgets it again: see `kv_bytes` for a whole sequence.
        """
        parts = sum(len(part.layers) * part.kv_elements for part in self.parts)
        own = len(self.kv_layers) * self.attention.kv_elements_per_token
        return bytes_of(self.kv_dtype, own + parts)

    def kv_bytes(self, context: int) -> float:
        """Bytes of KV cache of one sequence of ``context`` tokens, windows respected."""
        windows = [self.attention.windows[layer] for layer in self.kv_layers]
        tokens = sum(min(context, window or context) for window in windows)
        parts = sum(
            len(part.layers) * min(context, part.window or context) * part.kv_elements
            for part in self.parts
        )
        return bytes_of(self.kv_dtype, tokens * self.attention.kv_elements_per_token + parts)

    @property
    def bytes_outside_experts(self) -> float:
        """Bytes of every parameter that is not a routed expert."""
        vectors = bytes_of(self.activation_dtype, self._outer_vector_params)
        return bytes_of(self.weight_dtype, self._outer_matrix_params) + vectors

    @property
    def unpriced(self) -> tuple[str, ...]:
        """What the model does that no simulation knows the time of, in words."""
        a = self.attention
        found = [part.name for part in self.parts if part.works]
        networks = {*self.dense_layers, *self.moe_layer_ids}
        if len(networks) < self.num_layers:
            found.append("layers without a feed-forward network")
        if len(self.kv_layers) < self.num_layers and not found:
            found.append("layers without attention")
        if a.kind == "shared_kv":
            found.append("one head that is key and value, with a grouped output projection")
        if a.output_gate != "none":
            found.append("an output gate on attention")
        if a.chunked:
            found.append("attention within chunks")
        if self.zero_experts:
            found.append("zero-computation experts")
        if self.encoder_layers:
            found.append("an encoder")
        return tuple(dict.fromkeys(found))

    @property
    def _outer_matrix_params(self) -> int:
        """Matrices that a quantised checkpoint quantises: attention, shared and dense FFN."""
        dense = len(self.dense_layers) * self.dense_width
        shared = self.num_moe_layers * self.shared_expert_width
        ffn = self.ffn_matrices * self.hidden_size * (dense + shared)
        attention = len(self.kv_layers) * self.attention.matrix_parameters(self.hidden_size)
        parts = sum(part.times * part.matrix_params for part in self.parts)
        return attention + ffn + self.num_moe_layers * self.latent_params + parts

    @property
    def _outer_vector_params(self) -> int:
        """What stays in full precision: embeddings, head, routers, norms, biases."""
        embeddings = (1 if self.tie_embeddings else 2) * self.vocab_size * self.hidden_size
        choices, routers = self.num_experts + self.zero_experts, self.num_moe_layers
        biased = (routers - len(self.hash_layers)) * self.router_bias
        router = choices * (routers * self.hidden_size + biased)
        gate = routers * self.hidden_size if self.shared_expert_gate else 0
        inner = len(self.kv_layers) * self.attention.vector_parameters(self.hidden_size)
        norms = (self.num_layers * self.norm_vectors + 1) * self.hidden_size
        parts = sum(part.times * part.vector_params for part in self.parts)
        return embeddings + router + gate + inner + norms + parts


def load_model(path: Path) -> ModelSpec:
    """Read the geometry from a Hugging Face ``config.json``.

    Parameters
    ----------
    path : Path
        The file (JSON, or YAML with the same keys), or the folder that holds ``config.json``. A
        ``hf_quant_config.json`` beside it counts where the configuration does not say how the
        checkpoint is quantised. For a model that never had one, the fields of `ModelSpec`
        themselves.

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
    if "moe_layer_ids" in config:
        return validate(config, ModelSpec, str(path))
    beside = path.with_name(path.name.replace("config", "hf_quant_config"))
    quantised = read_data(beside) if beside != path and beside.is_file() else None
    fields = geometry(config, str(path), quantised)
    stem = path.parent.name if path.stem == "config" else path.stem.removesuffix("_config")
    return validate({"name": stem, **fields}, ModelSpec, str(path))
