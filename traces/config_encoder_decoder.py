"""Encoder-decoder families with experts: Switch Transformers and NLLB-MoE.

Layers are numbered through, the encoder's first. Only the decoder's own attention adds to the KV
cache with every token; cross-attention keeps keys of the source, which are not counted.
Source: the modelling code of Hugging Face transformers 5.23.
"""

from traces.config_parts import add, part
from traces.config_reader import Config, Fields


def switch(config: Config) -> Fields:
    """Return the fields of a Switch Transformer."""
    hidden, width = config.count("d_model"), config.count("d_ff")
    heads, head = config.count("num_heads"), config.count("d_kv")
    encoder = config.layers("num_layers")
    decoder = config.layers("num_decoder_layers", default=encoder)
    sparse = [
        *_alternating(config, "num_sparse_encoder_layers", encoder),
        *(encoder + i for i in _alternating(config, "num_sparse_decoder_layers", decoder)),
    ]
    projections = 4 * hidden * heads * head
    fields = _shared(config, hidden, width, encoder, decoder, sparse)
    fields |= {
        "top_k": 1,  # the router of this family takes one
        "attention": {"kind": "gqa", "num_heads": heads, "num_kv_heads": heads,
                      "head_dim": head, "v_head_dim": head},
    }  # fmt: skip
    buckets = config.count("relative_attention_num_buckets", default=32)
    add(
        fields,
        part("attention of the encoder", range(encoder), matrices=projections),
        part("cross-attention", range(encoder, encoder + decoder), matrices=projections,
             vectors=hidden),
        part("relative positions and the encoder's last norm",
             vectors=2 * buckets * heads + hidden),
    )  # fmt: skip
    return fields


def nllb(config: Config) -> Fields:
    """Return the fields of an NLLB-MoE model."""
    hidden, width = config.count("d_model"), config.count("encoder_ffn_dim")
    heads = config.count("encoder_attention_heads")
    encoder, decoder = config.layers("encoder_layers"), config.layers("decoder_layers")
    for ours, theirs in (("encoder_ffn_dim", "decoder_ffn_dim"),
                         ("encoder_attention_heads", "decoder_attention_heads")):  # fmt: skip
        if config.get(ours) != config.get(theirs):
            config.problem(f"{theirs}: {config.get(theirs)!r} -- only the same as {ours}")
    steps = (
        config.count("encoder_sparse_step", least=0),
        config.count("decoder_sparse_step", least=0),
    )
    sparse = [i for i in range(encoder) if steps[0] and (i + 1) % steps[0] == 0]
    sparse += [encoder + i for i in range(decoder) if steps[1] and (i + 1) % steps[1] == 0]
    fields = _shared(config, hidden, width, encoder, decoder, sparse)
    head = max(hidden // heads, 1)
    fields |= {
        "top_k": 2,  # the router of this family takes two
        "expert_bias": True,
        "norm_vectors": 4,  # layer norms have biases
        "attention": {"kind": "gqa", "num_heads": heads, "num_kv_heads": heads,
                      "head_dim": head, "v_head_dim": head, "bias": "qkvo"},
    }  # fmt: skip
    dense = sorted(set(range(encoder + decoder)) - set(sparse))
    add(
        fields,
        part("attention of the encoder", range(encoder), matrices=4 * hidden**2,
             vectors=4 * hidden),
        part("cross-attention", range(encoder, encoder + decoder), matrices=4 * hidden**2,
             vectors=6 * hidden),
        part("biases of the dense networks", dense, vectors=width + hidden, works=False),
        part("biases and norm at the ends of the stacks", vectors=3 * hidden, works=False),
    )  # fmt: skip
    return fields


def _alternating(config: Config, key: str, layers: int) -> list[int]:
    """Return the sparse layers of a Switch stack; transformers puts one into each run of layers."""
    wanted = config.count(key, least=0)
    step = layers // wanted if wanted else layers
    return [i for i in range(layers) if step == 1 or (step and i % step == 1)]


def _shared(
    config: Config, hidden: int, width: int, encoder: int, decoder: int, sparse: list[int]
) -> Fields:
    if not sparse:
        config.problem(f"none of the {encoder + decoder} layers has routed experts")
    return {
        "num_layers": encoder + decoder,
        "encoder_layers": encoder,
        "hidden_size": hidden,
        "vocab_size": config.count("vocab_size"),
        "tie_embeddings": config.flag("tie_word_embeddings", default=True),
        "moe_layer_ids": tuple(sparse),
        "num_experts": config.count("num_experts"),
        "expert_width": width,
        "dense_width": width if len(sparse) < encoder + decoder else 0,
        "gated": False,
        "router_bias": config.flag("router_bias"),
        "attention_layers": tuple(range(encoder, encoder + decoder)),
        "comm_size": hidden,
    }
