"""The rules that turn a Hugging Face ``config.json`` into the fields of a `ModelSpec`.

One row of a table per model family says what its configuration does not (biases, norms, which
key holds the expert width); everything else follows from aliases that all families share.
Sources: the configuration and modelling classes of Hugging Face transformers 4.57 to 5.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from basis.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the code of a model family fixes."""

    mla: bool = False
    expert_width: str = "moe_intermediate_size"
    """Key of the routed expert's inner width."""
    bias: Literal["none", "qkv", "qkvo"] = "none"
    """Biases of the attention projections where ``attention_bias`` (``qkv_bias``) is true."""
    bias_default: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    sinks: bool = False
    expert_bias: bool = False
    router_bias: bool = False
    shared_expert_gate: bool = False
    window_default: bool = False
    """Whether ``sliding_window`` counts where ``use_sliding_window`` is not given."""
    alternate_windows: bool = False
    """Whether even layers slide and odd layers do not where ``layer_types`` is not given."""


_EXAMPLE = Family()

FAMILIES: dict[str, Family] = {
    "deepseek_v2": Family(mla=True),
    "deepseek_v3": Family(mla=True, router_bias=True),  # R1 has the same model_type
    "gpt_oss": Family(
        expert_width="intermediate_size", bias="qkvo", bias_default=True, sinks=True,
        expert_bias=True, router_bias=True, window_default=True, alternate_windows=True,
    ),
    "mixtral": Family(expert_width="intermediate_size", window_default=True),
    "moeplan_example": _EXAMPLE,
    "moeplan_example_moe": _EXAMPLE,
    "olmoe": Family(expert_width="intermediate_size", bias="qkvo", qk_norm="full"),
    "qwen2_moe": Family(bias="qkv", bias_default=True, shared_expert_gate=True),
    "qwen3_moe": Family(bias="qkvo", qk_norm="head"),
}  # fmt: skip

_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


class _Config:
    """A configuration with aliases; gathers every missing or wrong key before it complains."""

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data, self.where = data, where
        self.problems: list[str] = []

    def get(self, *aliases: str) -> Any:
        """Return the first alias that is present and not null, else None."""
        return next((self.data[a] for a in aliases if self.data.get(a) is not None), None)

    def count(self, *aliases: str, default: int | None = None, least: int = 1) -> int:
        """Return a whole number; without ``default`` the key is required."""
        value = self.get(*aliases)
        if value is None:
            if default is None:
                self.problems.append(f"{' or '.join(aliases)}: missing -- this key is required")
            return least if default is None else default
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            key = next(a for a in aliases if self.data.get(a) is not None)
            self.problems.append(f"{key}: {value!r} -- a whole number of at least {least}")
            return least
        return value

    def finish(self) -> None:
        """Raise one `InputError` with all problems, if there are any."""
        if self.problems:
            head = f"{self.where}: cannot read the geometry"
            raise InputError("\n  ".join([head, *self.problems]))


def geometry(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the fields of a `ModelSpec` from a configuration.

    Raises
    ------
    InputError
        If ``model_type`` is not supported, keys are missing or wrong (all at once), or the
        quantisation is not known.
    """
    family_name = data.get("model_type")
    if not isinstance(family_name, str) or family_name not in FAMILIES:
        raise InputError(
            f"{where}: model_type {family_name!r} is not supported -- supported are "
            f"{', '.join(sorted(FAMILIES))}"
        )
    family, config = FAMILIES[family_name], _Config(data, where)
    layers = config.count("num_hidden_layers")
    experts = config.count("n_routed_experts", "num_local_experts", "num_experts")
    width = config.count(family.expert_width)
    moe_layers = _moe_layers(config, family, layers)
    fields = {
        "family": family_name,
        "num_layers": layers,
        "hidden_size": config.count("hidden_size"),
        "vocab_size": config.count("vocab_size"),
        "tie_embeddings": bool(config.get("tie_word_embeddings")),
        "moe_layer_ids": moe_layers,
        "num_experts": experts,
        "top_k": config.count("num_experts_per_tok", "experts_per_token"),
        "expert_width": width,
        "expert_bias": family.expert_bias,
        "router_bias": family.router_bias,
        "shared_expert_width": _shared_width(config, width),
        "shared_expert_gate": family.shared_expert_gate,
        "dense_width": config.count("intermediate_size") if len(moe_layers) < layers else 0,
        "num_expert_groups": config.count("n_group", default=1),
        "attention": _attention(config, family, layers),
        "comm_size": config.count("hidden_size"),
        **_dtypes(config),
    }
    name = config.get("name", "_name_or_path")
    if name:
        fields["name"] = name
    config.problems = list(dict.fromkeys(config.problems))
    config.finish()
    return fields


def _moe_layers(config: _Config, family: Family, layers: int) -> tuple[int, ...]:
    default = None if family.mla else 0  # every DeepSeek has dense layers first: never guess
    first = config.count("first_k_dense_replace", default=default, least=0)
    every = config.count("moe_layer_freq", default=1)
    step = config.count("decoder_sparse_step", default=1)
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        config.problems.append(f"mlp_only_layers: {dense!r} -- a list of layer indices")
        dense = []
    found = tuple(
        i
        for i in range(layers)
        if i >= first and i % every == 0 and (i + 1) % step == 0 and i not in dense
    )
    if not found:
        config.problems.append(f"none of the {layers} layers has routed experts")
    return found


def _shared_width(config: _Config, expert_width: int) -> int:
    if config.get("shared_expert_intermediate_size") is not None:
        return config.count("shared_expert_intermediate_size", least=0)
    return config.count("n_shared_experts", default=0, least=0) * expert_width


def _attention(config: _Config, family: Family, layers: int) -> dict[str, Any]:
    heads = config.count("num_attention_heads")
    has_bias = config.get("attention_bias", "qkv_bias")
    has_bias = family.bias_default if has_bias is None else bool(has_bias)
    if has_bias and family.bias == "none":
        config.problems.append("attention_bias: true -- this family has no such bias")
    fields: dict[str, Any] = {
        "kind": "mla" if family.mla else "gqa",
        "num_heads": heads,
        "num_kv_heads": config.count("num_key_value_heads", default=heads),
        "windows": _windows(config, family, layers),
        "bias": family.bias if has_bias else "none",
        "qk_norm": family.qk_norm,
        "sinks": family.sinks,
    }
    if family.mla:
        rope, nope = config.count("qk_rope_head_dim"), config.count("qk_nope_head_dim")
        compressed = config.get("q_lora_rank") is not None
        return fields | {
            "head_dim": rope + nope,
            "qk_rope_head_dim": rope,
            "qk_nope_head_dim": nope,
            "v_head_dim": config.count("v_head_dim"),
            "kv_lora_rank": config.count("kv_lora_rank"),
            "q_lora_rank": config.count("q_lora_rank") if compressed else None,
        }
    default = max(config.count("hidden_size") // heads, 1)
    head_dim = config.count("head_dim", default=default)
    return fields | {"head_dim": head_dim, "v_head_dim": head_dim}


def _windows(config: _Config, family: Family, layers: int) -> tuple[int | None, ...]:
    """Tokens that each layer attends to (None = all), as transformers derives them."""
    used = config.get("use_sliding_window")
    used = family.window_default if used is None else bool(used)
    if config.get("sliding_window") is None or not used:
        return (None,) * layers
    window, kinds = config.count("sliding_window"), config.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) < layers:
            config.problems.append(f"layer_types: must name all {layers} layers")
            return (None,) * layers
        return tuple(window if kind == "sliding_attention" else None for kind in kinds[:layers])
    if family.alternate_windows:
        return tuple(window if i % 2 == 0 else None for i in range(layers))
    first = config.count("max_window_layers", default=0, least=0)
    return tuple(window if i >= first else None for i in range(layers))


def _dtypes(config: _Config) -> dict[str, str]:
    """Return the number formats; without a statement bf16, as all these families are."""
    stated = config.get("torch_dtype", "dtype") or "bfloat16"
    base = _DTYPES.get(str(stated).removeprefix("torch."))
    if base is None:
        config.problems.append(f"torch_dtype: {stated!r} -- one of {', '.join(_DTYPES)}")
        base = "bf16"
    dtypes = dict.fromkeys(("weight_dtype", "expert_dtype", "activation_dtype", "kv_dtype"), base)
    quantization = config.get("quantization_config")
    if quantization is None:
        return dtypes
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method == "mxfp4":
        return dtypes | {"expert_dtype": "mxfp4"}
    if method == "fp8":
        block = quantization.get("weight_block_size")
        if block in (None, [128, 128]):
            stored = "fp8" if block is None else "fp8_block"
            return dtypes | {"expert_dtype": stored, "weight_dtype": stored}
        config.problems.append(f"weight_block_size: {block!r} -- only [128, 128] is known")
        return dtypes
    if method in ("gptq", "awq"):
        packed = (quantization.get("bits"), quantization.get("group_size"))
        if packed == (4, 128):
            return dtypes | {"expert_dtype": "int4", "weight_dtype": "int4"}
        config.problems.append(f"bits, group_size: {packed} -- only 4 bits in groups of 128")
        return dtypes
    config.problems.append(
        f"quantization_config: quant_method {method!r} is not supported -- supported are fp8, "
        "mxfp4, gptq and awq; give the config of the unquantised or FP8 checkpoint"
    )
    return dtypes
