"""What some families have besides attention and feed-forward networks, and layers of other kinds.

Mamba, linear attention, short convolutions and attention with other heads stand in for attention
in some layers; each becomes a part of the model with its parameters and what it keeps of a token.
Sources of the counts: the modelling code of Hugging Face transformers 5.23.
"""

from collections.abc import Callable, Sequence
from typing import Any

from traces.config_reader import MOST_LAYERS, Config, Fields

Build = Callable[[Config, Fields], None]
"""Adds to the fields of a `ModelSpec` what a family has of its own."""


def part(
    name: str,
    layers: Sequence[int] | None = None,
    *,
    matrices: int = 0,
    vectors: int = 0,
    kv: float = 0.0,
    window: int | None = None,
    works: bool = True,
) -> Fields | None:
    """Return the fields of a `Part`, None where no layer has it; the counts are of one layer.

    Without ``layers`` it is there once, outside the layers.
    """
    if layers is not None and not len(layers):
        return None
    return {
        "name": name,
        "layers": tuple(layers or ()),
        "matrix_params": matrices,
        "vector_params": vectors,
        "kv_elements": kv,
        "window": window,
        "works": works,
    }


def add(fields: Fields, *parts: Fields | None) -> None:
    """Add parts to a model."""
    fields["parts"] = (*fields.get("parts", ()), *(one for one in parts if one is not None))


def mixed(config: Config, fields: Fields, name: str, others: Sequence[int], **counts: Any) -> None:
    """Let a part stand in for attention in some layers."""
    others = sorted(others)
    taken = set(others)
    fields["attention_layers"] = tuple(i for i in range(fields["num_layers"]) if i not in taken)
    if not fields["attention_layers"]:
        config.problem("no layer has attention -- give a configuration with at least one")
    add(fields, part(name, others, **counts))


def layers_of(config: Config, layers: int, *kinds: str) -> list[int]:
    """Return the layers that ``layer_types`` (``layers_block_type``) gives one of the kinds."""
    key = "layer_types" if config.get("layer_types") is not None else "layers_block_type"
    found = config.per_layer(key, layers)
    if found is None:
        config.problem("layer_types: missing -- this key is required")
    return [i for i, kind in enumerate(found or []) if kind in kinds]


def gated_delta_net(config: Config, fields: Fields) -> None:
    """Gated DeltaNet in three of four layers (Qwen3-Next, Qwen3.5)."""
    hidden, layers = fields["hidden_size"], fields["num_layers"]
    heads = config.count("linear_num_value_heads")
    head = config.count("linear_value_head_dim")
    key = config.count("linear_key_head_dim") * config.count("linear_num_key_heads")
    value, kernel = heads * head, config.count("linear_conv_kernel_dim")
    if config.get("layer_types") is not None:
        linear = layers_of(config, layers, "linear_attention")
    else:
        every = config.count("full_attention_interval")
        linear = [i for i in range(layers) if (i + 1) % every]
    mixed(
        config, fields, "Gated DeltaNet (linear attention)", linear,
        matrices=hidden * (2 * key + 2 * value + 2 * heads) + value * hidden,
        vectors=(2 * key + value) * kernel + 2 * heads + head,
    )  # fmt: skip


def kimi_delta(config: Config, fields: Fields) -> None:
    """Kimi Delta Attention; Kimi-K3 adds an output gate to attention and a latent for experts."""
    linear = config.inner("linear_attn_config")
    hidden, layers = fields["hidden_size"], fields["num_layers"]
    heads, head = linear.count("num_heads"), linear.count("head_dim")
    width, kernel = heads * head, linear.count("short_conv_kernel_size")
    low_rank = hidden * head + head * width
    gate = hidden * width if linear.flag("use_full_rank_gate") else low_rank
    mixed(
        config, fields, "Kimi Delta Attention (linear attention)",
        linear.indices("kda_layers", layers, first=1),
        matrices=4 * hidden * width + low_rank + gate + hidden * heads,
        vectors=3 * width * kernel + width + heads + head,
    )  # fmt: skip
    if config.flag("mla_use_output_gate"):
        fields["attention"]["output_gate"] = "element"
    if config.flag("latent_moe_use_norm"):
        add(fields, part("norm of the experts' latent", fields["moe_layer_ids"],
                         vectors=fields["comm_size"], works=False))  # fmt: skip


def mamba2(config: Config, hidden: int) -> Fields:
    """Return the counts of a Mamba-2 mixer of one layer."""
    heads = config.count("mamba_num_heads", "mamba_n_heads")
    expanded = config.count("mamba_expand", default=1) * hidden
    head = config.get("mamba_head_dim", "mamba_d_head")
    inner = expanded if head == "auto" else heads * config.count("mamba_head_dim", "mamba_d_head")
    state = config.count("ssm_state_size", "mamba_d_state")
    conv = inner + 2 * config.count("n_groups", "mamba_n_groups") * state
    kernel = config.count("conv_kernel", "mamba_d_conv")
    projected = inner + conv + heads
    biases = conv * config.flag("use_conv_bias", "mamba_conv_bias", default=True)
    biases += (projected + hidden) * config.flag("use_bias", "mamba_proj_bias")
    return {
        "matrices": hidden * projected + inner * hidden,
        "vectors": conv * kernel + 3 * heads + inner + biases,
    }


def granite_hybrid(config: Config, fields: Fields) -> None:
    """Mamba-2 in most layers (Granite 4)."""
    others = layers_of(config, fields["num_layers"], "mamba", "linear_attention")
    mixed(config, fields, "Mamba-2", others, **mamba2(config, fields["hidden_size"]))


def jamba(config: Config, fields: Fields) -> None:
    """Mamba in all layers but every eighth (Jamba)."""
    hidden = fields["hidden_size"]
    inner, state = config.count("mamba_expand") * hidden, config.count("mamba_d_state")
    given = config.get("mamba_dt_rank")
    rank = -(-hidden // 16) if given in (None, "auto") else config.count("mamba_dt_rank")
    period = config.count("attn_layer_period")
    offset = config.count("attn_layer_offset", least=0)
    biases = inner * config.flag("mamba_conv_bias", default=True)
    biases += (2 * inner + hidden) * config.flag("mamba_proj_bias")
    mixed(
        config, fields, "Mamba", [i for i in range(fields["num_layers"]) if i % period != offset],
        matrices=3 * hidden * inner + inner * (rank + 2 * state) + rank * inner,
        vectors=inner * config.count("mamba_d_conv") + inner * (state + 2) + rank + 2 * state
        + biases,
    )  # fmt: skip


def nemotron(config: Config, fields: Fields) -> None:
    """Layers of one block each, Mamba-2, attention, experts or dense (Nemotron-H, Nemotron 3)."""
    kinds = nemotron_blocks(config)

    def of(*names: str) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(kinds) if kind in names)

    fields["attention_layers"] = of("attention", "full_attention", "*")
    fields["moe_layer_ids"] = of("moe", "E")
    fields["dense_layer_ids"] = of("mlp", "-")
    if not fields["moe_layer_ids"]:
        config.problem(f"none of the {len(kinds)} layers has routed experts")
    fields["gated"], fields["norm_vectors"] = False, 1
    if fields["dense_layer_ids"]:
        fields["dense_width"] = config.count("intermediate_size")
    config.refuse("mlp_bias", "biases of its networks are not known for this family")
    mamba = of("mamba", "linear_attention", "M")
    if mamba:
        add(fields, part("Mamba-2", mamba, **mamba2(config, fields["hidden_size"])))


def nemotron_blocks(config: Config) -> list[str]:
    """Return the kind of each layer, from ``layers_block_type`` or ``hybrid_override_pattern``."""
    known = ("attention", "full_attention", "moe", "mlp", "mamba", "linear_attention", *"*E-M")
    blocks = config.get("layers_block_type", "hybrid_override_pattern")
    if not isinstance(blocks, str | list) or not blocks:
        config.problem("layers_block_type or hybrid_override_pattern: missing -- one is required")
        return ["E"]
    if len(blocks) > MOST_LAYERS:
        config.problem(f"layers_block_type: {len(blocks)} layers -- at most {MOST_LAYERS}")
    blocks = blocks[:MOST_LAYERS]
    wrong = sorted({str(block) for block in blocks if block not in known})
    if wrong:
        config.problem(f"layers_block_type: {', '.join(wrong)} -- known are {', '.join(known)}")
    return [str(block) for block in blocks]


def lightning(config: Config, fields: Fields) -> None:
    """Lightning Attention, linear, in the layers that say so (MiniMax-Text-01)."""
    attention, hidden = fields["attention"], fields["hidden_size"]
    width = attention["num_heads"] * attention["head_dim"]
    others = layers_of(config, fields["num_layers"], "linear_attention")
    mixed(
        config, fields, "Lightning Attention (linear attention)", others,
        matrices=5 * hidden * width, vectors=width,
    )  # fmt: skip


def short_conv(config: Config, fields: Fields) -> None:
    """Gated short convolutions in most layers (LFM2)."""
    hidden, kernel = fields["hidden_size"], config.count("conv_L_cache")
    biases = 5 * hidden * config.flag("conv_bias")
    mixed(
        config, fields, "short convolution", layers_of(config, fields["num_layers"], "conv"),
        matrices=4 * hidden**2, vectors=hidden * kernel + biases,
    )  # fmt: skip
    fields["router_bias"] = config.flag("use_expert_bias", default=True)
