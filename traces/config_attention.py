"""Attention's geometry from a configuration: heads, latents, biases, norms, windows.

It is that of the layers whose attention the family has most to say about; layers with another
kind of attention, or with none, are parts of their own (`traces.config_parts`).
"""

from dataclasses import dataclass
from typing import Literal

from traces.config_reader import Config, Fields


@dataclass(frozen=True, kw_only=True)
class AttentionRules:
    """What a family's code fixes about attention."""

    kind: Literal["gqa", "mla", "shared_kv"] = "gqa"
    bias: Literal["none", "qkv", "qkvo"] = "none"
    """Projections that have a bias where ``attention_bias`` (``qkv_bias``) is true."""
    bias_default: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    qk_norm_switch: bool = False
    """Whether ``use_qk_norm`` says if there is one."""
    sinks: bool = False
    output_gate: Literal["none", "head", "element"] = "none"
    windows: Literal["if_used", "given", "alternate", "none"] = "if_used"
    """Where ``sliding_window`` counts: where ``use_sliding_window`` is true, where it is given,
    where it is given in every second layer (unless ``layer_types`` says where), or nowhere."""


def attention(config: Config, rules: AttentionRules, layers: int) -> Fields:
    """Return the fields of `Attention`."""
    heads = config.count("num_attention_heads", "n_heads")
    keys = ("attention_bias", "qkv_bias", "use_bias")
    has_bias = config.flag(*keys, default=rules.bias_default)
    if has_bias and rules.bias == "none":
        key = next(key for key in keys if config.get(key))
        config.problem(f"{key}: true -- this family has no such bias")
    normed = not rules.qk_norm_switch or config.flag("use_qk_norm")
    fields: Fields = {
        "kind": rules.kind,
        "num_heads": heads,
        "num_kv_heads": config.count(
            "num_key_value_heads", "num_attention_groups", "kv_n_heads", default=heads
        ),
        "windows": windows(config, rules, layers),
        "bias": rules.bias if has_bias else "none",
        "qk_norm": rules.qk_norm if normed else "none",
        "sinks": rules.sinks,
        "output_gate": rules.output_gate,
    }
    if rules.kind == "mla":
        return fields | _latent(config)
    default = max(config.count("hidden_size", "d_model") // heads, 1)
    head_dim = config.count("head_dim", default=default)
    if rules.kind == "shared_kv":
        fields |= {
            "q_lora_rank": config.count("q_lora_rank"),
            "o_lora_rank": config.count("o_lora_rank"),
            "o_groups": config.count("o_groups"),
        }
        return fields | {"head_dim": head_dim, "v_head_dim": head_dim}
    value_dim = config.count("v_head_dim", default=head_dim)
    return fields | {"head_dim": head_dim, "v_head_dim": value_dim}


def _latent(config: Config) -> Fields:
    rope, nope = config.count("qk_rope_head_dim"), config.count("qk_nope_head_dim")
    compressed = config.get("q_lora_rank") is not None
    return {
        "head_dim": rope + nope,
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": nope,
        "v_head_dim": config.count("v_head_dim"),
        "kv_lora_rank": config.count("kv_lora_rank"),
        "q_lora_rank": config.count("q_lora_rank") if compressed else None,
    }


def windows(config: Config, rules: AttentionRules, layers: int) -> tuple[int | None, ...]:
    """Return the tokens that each layer attends to (None = all), as transformers derives them."""
    everywhere: tuple[int | None, ...] = (None,) * layers
    used = config.flag("use_sliding_window", default=rules.windows != "if_used")
    if config.get("sliding_window") is None or not used or rules.windows == "none":
        return everywhere
    window = config.count("sliding_window")
    if config.get("layer_types") is not None:
        kinds = config.per_layer("layer_types", layers)
        return tuple(window if k == "sliding_attention" else None for k in kinds or everywhere)
    if rules.windows == "alternate":
        return tuple(window if i % 2 == 0 else None for i in range(layers))
    every = config.count("global_attn_every_n_layers", default=0, least=0)
    if every:
        return tuple(window if (i + 1) % every else None for i in range(layers))
    first = config.count("max_window_layers", default=0, least=0)
    return tuple(window if i >= first else None for i in range(layers))
