"""The rules that turn a Hugging Face ``config.json`` into the fields of a `ModelSpec`.

One row of a table per model family says what its configuration does not (biases, norms, which
key holds the expert width) and which parts it has of its own; everything else follows from
aliases that all families share. Sources: the configuration and modelling classes of Hugging Face
transformers 4.57 to 5.23; aiconfigurator-core 0.12 for Kimi-K3, which has no class there.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from basis.errors import InputError
from traces import config_encoder_decoder as both
from traces import config_parts as parts
from traces import config_sparse as sparse
from traces.config_attention import AttentionRules, attention
from traces.config_formats import formats
from traces.config_layers import moe_layers
from traces.config_parts import Build
from traces.config_reader import Config, Fields, text_model

_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
_TOP_K = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_k",
    "moe_top_k", "top_k_experts",
)  # fmt: skip
_SHARED_WIDTH = (
    "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "share_expert_dim",
    "shared_intermediate_size",
)  # fmt: skip
_SHARED_NUMBER = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")


_PLAIN = AttentionRules()


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the code of a model family fixes."""

    attention: AttentionRules = _PLAIN
    expert_width: str = "moe_intermediate_size"
    """Key of the routed expert's inner width."""
    dense_width: str = "intermediate_size"
    """Key of the inner width in layers without experts."""
    shared_width: str | None = None
    """Key of the inner width of what every token passes beside the experts, where it is none
    of the usual keys."""
    every_layer: bool = False
    """Whether all layers have experts, whatever the configuration says."""
    blocks: bool = False
    """Whether a layer is one block, of a kind that the configuration lists (Nemotron-H)."""
    first_is_required: bool = False
    """Whether a configuration without a layer rule must say how many layers are dense."""
    expert_bias: bool = False
    router_bias: bool = False
    shared_expert_gate: bool = False
    tied: bool = False
    """Whether the head reuses the embedding where the configuration does not say."""
    dense_beside: bool = False
    """Whether that is a dense network with the experts beside it (Gemma 4)."""
    nested: tuple[str, ...] = ()
    """Keys whose mappings belong to the configuration itself (DBRX)."""
    build: Build | None = None
    """Adds what the family has of its own."""
    whole: Callable[[Config], Fields] | None = None
    """Reads everything but the formats, for families that share no rule."""


_MLA = AttentionRules(kind="mla")
_NORMED = AttentionRules(bias="qkvo", qk_norm="head")
_GATED = AttentionRules(bias="qkvo", qk_norm="head", output_gate="element", windows="none")
_BIASED = AttentionRules(bias="qkvo")
_DEEPSEEK = Family(attention=_MLA, router_bias=True, first_is_required=True)
_INDEXED = Family(attention=_MLA, router_bias=True, first_is_required=True,
                  build=sparse.lightning_indexer)  # fmt: skip
_EXAMPLE = Family()
_QWEN3 = Family(attention=_NORMED)
_QWEN_HYBRID = Family(attention=_GATED, shared_expert_gate=True, build=parts.gated_delta_net)
_GEMMA4 = Family(
    attention=AttentionRules(qk_norm="head", windows="given"),
    shared_width="intermediate_size", dense_beside=True, every_layer=True, tied=True,
    build=sparse.gemma4,
)  # fmt: skip
_LLAMA4 = Family(
    attention=AttentionRules(bias="qkvo", windows="none"), expert_width="intermediate_size",
    dense_width="intermediate_size_mlp", shared_width="intermediate_size", build=sparse.llama4,
)  # fmt: skip
_MINIMAX_M3 = Family(
    attention=AttentionRules(qk_norm="head"), expert_width="intermediate_size",
    dense_width="dense_intermediate_size", router_bias=True, build=sparse.block_indexer,
)  # fmt: skip
_V4 = Family(
    attention=AttentionRules(kind="shared_kv", sinks=True), every_layer=True, router_bias=True,
    build=sparse.deepseek_v4,
)  # fmt: skip
_STEP = Family(
    attention=AttentionRules(qk_norm="head", output_gate="head", windows="given"),
    router_bias=True, first_is_required=True, build=sparse.step_heads,
)  # fmt: skip
_GRANITE = Family(attention=_BIASED, expert_width="intermediate_size", every_layer=True)

FAMILIES: dict[str, Family] = {
    "afmoe": Family(
        attention=AttentionRules(
            bias="qkvo", qk_norm="head", output_gate="element", windows="given"
        ),
        router_bias=True, build=lambda _, fields: fields.update(norm_vectors=4),
    ),
    "dbrx": Family(
        attention=AttentionRules(windows="none"), expert_width="ffn_hidden_size",
        every_layer=True, nested=("attn_config", "ffn_config"),
    ),
    "deepseek_ref": _V4,  # as SGLang's conversions name it
    "deepseek_v2": Family(attention=_MLA, first_is_required=True),
    "deepseek_v3": _DEEPSEEK,  # R1 has the same model_type
    "deepseek_v32": _INDEXED,
    "deepseek_v4": _V4,
    "dots1": Family(
        attention=AttentionRules(bias="qkvo", qk_norm="head", windows="given"), router_bias=True
    ),
    "ernie4_5_moe": Family(router_bias=True, tied=True),
    "flex_olmo": Family(
        attention=AttentionRules(bias="qkvo", qk_norm="full"), expert_width="intermediate_size"
    ),
    "gemma4": _GEMMA4,
    "gemma4_text": _GEMMA4,
    "glm4_moe": Family(
        attention=AttentionRules(bias="qkv", qk_norm="head", qk_norm_switch=True),
        router_bias=True, first_is_required=True,
    ),
    "glm_moe_dsa": _INDEXED,
    "gpt_oss": Family(
        attention=AttentionRules(bias="qkvo", bias_default=True, sinks=True, windows="alternate"),
        expert_width="intermediate_size", expert_bias=True, router_bias=True,
    ),
    "granitemoe": _GRANITE,
    "granitemoehybrid": Family(
        attention=_BIASED, expert_width="intermediate_size", every_layer=True,
        build=parts.granite_hybrid,
    ),
    "granitemoeshared": _GRANITE,
    "hunyuan_v1_moe": Family(
        attention=_NORMED, expert_width="intermediate_size", shared_width="intermediate_size",
        every_layer=True,
    ),
    "jamba": Family(
        attention=AttentionRules(windows="none"), expert_width="intermediate_size",
        build=parts.jamba,
    ),
    "kimi_k2": _DEEPSEEK,
    "kimi_linear": Family(
        attention=_MLA, router_bias=True, first_is_required=True, build=parts.kimi_delta
    ),
    "lfm2_moe": Family(
        attention=AttentionRules(qk_norm="head", windows="none"), tied=True,
        build=parts.short_conv,
    ),
    "llama4": _LLAMA4,
    "llama4_text": _LLAMA4,
    "longcat_flash": Family(
        attention=_MLA, expert_width="expert_ffn_hidden_size", every_layer=True, router_bias=True,
        build=sparse.longcat,
    ),
    "mimo_v2_flash": Family(
        attention=AttentionRules(windows="none"), router_bias=True, build=sparse.other_kv_heads,
    ),
    "minimax": Family(
        attention=AttentionRules(windows="none"), expert_width="intermediate_size",
        every_layer=True, build=parts.lightning,
    ),
    "minimax_m2": Family(
        attention=AttentionRules(qk_norm="full"), expert_width="intermediate_size",
        every_layer=True, router_bias=True,
    ),
    "minimax_m3": _MINIMAX_M3,
    "minimax_m3_vl": _MINIMAX_M3,
    "minimax_m3_vl_text": _MINIMAX_M3,
    "mixtral": Family(
        attention=AttentionRules(windows="given"), expert_width="intermediate_size"
    ),
    "moeplan_example": _EXAMPLE,
    "moeplan_example_moe": _EXAMPLE,
    "nemotron_h": Family(
        attention=AttentionRules(windows="none"), router_bias=True, blocks=True,
        build=parts.nemotron,
    ),
    "nllb-moe": Family(whole=both.nllb),
    "olmoe": Family(
        attention=AttentionRules(bias="qkvo", qk_norm="full"), expert_width="intermediate_size"
    ),
    "phimoe": Family(
        attention=AttentionRules(bias="qkvo", windows="given"), expert_width="intermediate_size",
        every_layer=True, build=sparse.phimoe,
    ),
    "qwen2_moe": Family(
        attention=AttentionRules(bias="qkv", bias_default=True), shared_expert_gate=True
    ),
    "qwen3_5_moe": _QWEN_HYBRID,
    "qwen3_5_moe_text": _QWEN_HYBRID,
    "qwen3_moe": _QWEN3,
    "qwen3_next": _QWEN_HYBRID,
    "qwen3_vl_moe": _QWEN3,
    "qwen3_vl_moe_text": _QWEN3,
    "step3p5": _STEP,
    "step3p7": _STEP,
    "switch_transformers": Family(whole=both.switch),
}  # fmt: skip


def geometry(data: Mapping[str, Any], where: str, beside: object = None) -> dict[str, Any]:
    """Return the fields of a `ModelSpec` from a configuration.

    Parameters
    ----------
    data : mapping
        Content of the ``config.json``; of a multimodal model its language model is read.
    where : str
        The file, for messages.
    beside : object, optional
        Content of the ``hf_quant_config.json`` beside it.

    Raises
    ------
    InputError
        If ``model_type`` is not supported, keys are missing or wrong (all at once), or the
        quantisation is not known.
    """
    own, types = text_model(data)
    name = next((t for t in types if isinstance(t, str) and t in FAMILIES), None)
    if name is None:
        stated = next((t for t in types if isinstance(t, str) and t), None)
        near = difflib.get_close_matches(stated or "", FAMILIES, n=1)
        hint = f" (the nearest is {near[0]!r})" if near else ""
        raise InputError(
            f"{where}: model_type {stated!r} is not supported{hint} -- supported are "
            f"{', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[name]
    for key in family.nested:
        inner = own.get(key)
        own |= {k: v for k, v in inner.items() if k not in own} if isinstance(inner, dict) else {}
    config = Config(own, where)
    fields = family.whole(config) if family.whole else _decoder(config, family)
    fields["family"] = name
    fields |= formats(config, fields, beside, dense_beside=family.dense_beside)
    if given := config.get("name", "_name_or_path"):
        fields["name"] = given
    config.finish()
    return fields


def _decoder(config: Config, family: Family) -> Fields:
    """Return what all decoder-only families share, and what this one adds."""
    if family.blocks:
        layers = len(parts.nemotron_blocks(config))
    else:
        layers = config.layers("num_hidden_layers", "num_layers", "n_layers")
    hidden, width = config.count("hidden_size", "d_model"), config.count(family.expert_width)
    if family.every_layer or family.blocks:
        moe = tuple(range(layers))
    else:
        moe = moe_layers(config, layers, first_is_required=family.first_is_required)
    fields: Fields = {
        "num_layers": layers,
        "hidden_size": hidden,
        "vocab_size": config.count("vocab_size"),
        "tie_embeddings": config.flag("tie_word_embeddings", "tie_embedding", default=family.tied),
        "moe_layer_ids": moe,
        "num_experts": config.count(*_EXPERTS, lists=True),
        "top_k": config.count(*_TOP_K, lists=True),
        "expert_width": width,
        "expert_bias": family.expert_bias,
        "router_bias": family.router_bias,
        "shared_expert_width": _shared_width(config, family, width),
        "shared_expert_gate": family.shared_expert_gate,
        "dense_width": config.count(family.dense_width) if len(moe) < layers else 0,
        "num_expert_groups": config.count("n_group", "num_expert_group", default=1),
        "attention": attention(config, family.attention, layers),
        "comm_size": config.count("moe_latent_size", "routed_expert_hidden_size", default=hidden),
    }
    if family.build is not None:
        family.build(config, fields)
    return fields


def _shared_width(config: Config, family: Family, expert_width: int) -> int:
    if family.shared_width is not None:
        return config.count(family.shared_width)
    if config.get(*_SHARED_WIDTH) is not None:
        return config.count(*_SHARED_WIDTH, least=0)
    return config.count(*_SHARED_NUMBER, default=0, least=0) * expert_width
