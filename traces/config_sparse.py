"""Families whose attention is not one geometry: indexers, compression, layers with other heads.

An indexer scores the cache with few small heads and attention reads what it chose; its keys are
cached besides. DeepSeek-V4 keeps a window of tokens and one compressed entry for 4 or 128 more.
Sources: the modelling code of Hugging Face transformers 5.23; formats of Kimi-K3 and Step-3.7
from their configurations.
"""

from traces.config_parts import add, mixed, part
from traces.config_reader import Config, Fields

_COMPRESSED = {"0": "sliding_attention", "4": "compressed_sparse_attention",
               "128": "heavily_compressed_attention"}  # fmt: skip


def lightning_indexer(config: Config, fields: Fields) -> None:
    """DeepSeek Sparse Attention: an indexer in each layer that does not share one (V3.2, GLM-5)."""
    hidden, layers = fields["hidden_size"], fields["num_layers"]
    heads, head = config.count("index_n_heads"), config.count("index_head_dim")
    queries = config.count("q_lora_rank") * heads * head
    kinds = config.per_layer("indexer_types", layers) or _shared_by_frequency(config, layers)
    add(fields, part(
        "sparse attention (lightning indexer)", [i for i, k in enumerate(kinds) if k == "full"],
        matrices=queries + hidden * (head + heads), vectors=2 * head, kv=head,
    ))  # fmt: skip


def _shared_by_frequency(config: Config, layers: int) -> list[str]:
    pattern = config.per_layer("index_topk_pattern", layers)
    if pattern is not None:
        return [{"F": "full", "S": "shared"}.get(kind, kind) for kind in pattern]
    every = config.count("index_topk_freq", default=1)
    skip = config.count("index_skip_topk_offset", default=2, least=0)
    return ["full" if max(i - skip + 1, 0) % every == 0 else "shared" for i in range(layers)]


def block_indexer(config: Config, fields: Fields) -> None:
    """Sparse attention over blocks of keys (MiniMax-M3)."""
    sparse, hidden = config.inner("sparse_attention_config"), fields["hidden_size"]
    heads, head = sparse.count("sparse_num_index_heads"), sparse.count("sparse_index_dim")
    flags = sparse.per_layer("sparse_attention_freq", fields["num_layers"])
    if flags is None:
        sparse.problem("sparse_attention_freq: missing -- this key is required")
    add(fields, part(
        "sparse attention (block indexer)", [i for i, flag in enumerate(flags or []) if flag],
        matrices=hidden * head * (heads + 1), vectors=2 * head, kv=head,
    ))  # fmt: skip


def deepseek_v4(config: Config, fields: Fields) -> None:
    """Compressed attention, hyper-connections and hash-routed first layers (DeepSeek-V4)."""
    hidden, layers = fields["hidden_size"], fields["num_layers"]
    window = config.count("sliding_window")
    fields["attention"]["windows"] = (window,) * layers
    kinds = _compression(config, layers)
    # without a statement the rates that ``compress_ratios`` of the published models name
    rates = config.inner("compress_rates")
    wide, narrow = (
        rates.count(f"{name}_attention", default=config.count(f"compress_rate_{short}", default=n))
        for name, short, n in (("heavily_compressed", "hca", 128), ("compressed_sparse", "csa", 4))
    )
    width = fields["attention"]["head_dim"]
    index, heads = config.count("index_head_dim"), config.count("index_n_heads")
    streams = config.count("hc_mult")
    weights = (2 + streams) * streams
    scored = config.count("q_lora_rank") * heads * index + hidden * heads
    add(
        fields,
        part(
            "compressed attention (heavily compressed)",
            [i for i, kind in enumerate(kinds) if kind == "heavily_compressed_attention"],
            matrices=2 * hidden * width, vectors=(wide + 1) * width, kv=width / wide,
        ),
        part(
            "compressed sparse attention (with indexer)",
            [i for i, kind in enumerate(kinds) if kind == "compressed_sparse_attention"],
            matrices=4 * hidden * (width + index) + scored,
            vectors=(2 * narrow + 1) * (width + index), kv=(width + index) / narrow,
        ),
        part("hyper-connections", range(layers),
             vectors=2 * (weights * streams * hidden + weights + 3)),
        part("head of the hyper-connections", vectors=streams * (streams * hidden + 1) + 1),
    )  # fmt: skip
    if config.get("mlp_layer_types") is not None:
        routed = config.per_layer("mlp_layer_types", layers) or []
        fields["hash_layers"] = tuple(i for i, kind in enumerate(routed) if kind == "hash_moe")
    else:
        fields["hash_layers"] = tuple(range(min(config.count("num_hash_layers", least=0), layers)))


def _compression(config: Config, layers: int) -> list[str]:
    """Return the kind of attention of each layer."""
    named = config.per_layer("layer_types", layers)
    ratios = config.per_layer("compress_ratios", layers)
    if named is None and ratios is None:
        config.problem("compress_ratios or layer_types: missing -- one is required")
    kinds = named or [_COMPRESSED.get(str(ratio), str(ratio)) for ratio in ratios or []]
    wrong = sorted({str(kind) for kind in kinds if kind not in _COMPRESSED.values()})
    if wrong:
        config.problem(f"layer_types or compress_ratios: {', '.join(wrong)} -- not known")
    return kinds


def other_kv_heads(config: Config, fields: Fields) -> None:
    """Sliding layers with key/value heads of their own (MiMo-V2)."""
    layers, heads = fields["num_layers"], config.count("swa_num_attention_heads")
    if config.get("layer_types") is not None:
        kinds = config.per_layer("layer_types", layers) or []
        slides = [i for i, kind in enumerate(kinds) if kind == "sliding_attention"]
    else:
        flags = config.per_layer("hybrid_layer_pattern", layers)
        if flags is None:
            config.problem("hybrid_layer_pattern: missing -- this key is required")
        slides = [i for i, flag in enumerate(flags or []) if flag]
    kv_heads = config.count("swa_num_key_value_heads")
    key, value = config.count("swa_head_dim"), config.count("swa_v_head_dim")
    kept = kv_heads * (key + value)
    mixed(
        config, fields, "sliding attention with heads of its own", slides,
        matrices=fields["hidden_size"] * (heads * (key + value) + kept),
        vectors=heads * config.flag("add_swa_attention_sink_bias"),
        kv=kept, window=config.count("sliding_window"),
    )  # fmt: skip
    fields["attention"]["sinks"] = config.flag("add_full_attention_sink_bias")
    config.refuse("n_shared_experts", "shared experts are not known for this family")


def gemma4(config: Config, fields: Fields) -> None:
    """Sliding and global layers with different heads, a dense network beside the experts."""
    hidden, layers = fields["hidden_size"], fields["num_layers"]
    heads, head = fields["attention"]["num_heads"], config.count("global_head_dim")
    same = config.flag("attention_k_eq_v")
    kv_heads = (
        config.count("num_global_key_value_heads")
        if same and config.get("num_global_key_value_heads") is not None
        else fields["attention"]["num_kv_heads"]
    )
    kinds = config.per_layer("layer_types", layers)
    if kinds is None:
        config.problem("layer_types: missing -- this key is required")
    slides = [i for i, kind in enumerate(kinds or []) if kind == "sliding_attention"]
    mixed(
        config, fields, "global attention with heads of its own",
        sorted(set(range(layers)) - set(slides)) if kinds else [],
        matrices=hidden * head * (2 * heads + kv_heads * (1 if same else 2)),
        vectors=2 * head, kv=2 * kv_heads * head,
    )  # fmt: skip
    add(fields, part("scales of the router and the layer", fields["moe_layer_ids"],
                     vectors=hidden + fields["num_experts"] + 1, works=False))  # fmt: skip
    fields["norm_vectors"] = 7
    for key in ("hidden_size_per_layer_input", "num_kv_shared_layers", "use_double_wide_mlp"):
        config.refuse(key, "not supported for a model with experts")
    if not config.flag("enable_moe_block"):
        config.problem("enable_moe_block: not true -- this model has no experts")


def step_heads(config: Config, fields: Fields) -> None:
    """Sliding layers with more query heads, where the configuration says so (Step-3.7)."""
    attention, hidden = fields["attention"], fields["hidden_size"]
    other = config.inner("attention_other_setting").count(
        "num_attention_heads", default=attention["num_heads"]
    )
    heads = config.count("num_sliding_attention_heads", default=other)
    if heads == attention["num_heads"]:
        return
    slides = [i for i, window in enumerate(attention["windows"]) if window]
    head, kept = attention["head_dim"], 2 * attention["num_kv_heads"] * attention["head_dim"]
    mixed(
        config, fields, "sliding attention with heads of its own", slides,
        matrices=hidden * (2 * heads * head + kept + heads), vectors=2 * head, kv=kept,
        window=config.count("sliding_window"),
    )  # fmt: skip


def llama4(config: Config, fields: Fields) -> None:
    """Attention within chunks in the layers that have rotary positions (Llama 4)."""
    layers, chunk = fields["num_layers"], config.count("attention_chunk_size")
    if config.get("layer_types") is not None:
        kinds = config.per_layer("layer_types", layers) or []
        chunked = [kind == "chunked_attention" for kind in kinds]
    elif config.get("no_rope_layers"):
        chunked = [bool(rotary) for rotary in config.per_layer("no_rope_layers", layers) or []]
    else:
        every = config.count("no_rope_layer_interval", default=4)  # of Llama4TextConfig
        chunked = [(i + 1) % every != 0 for i in range(layers)]
    fields["attention"]["windows"] = tuple(chunk if own else None for own in chunked)
    fields["attention"]["chunked"] = any(chunked)


def longcat(config: Config, fields: Fields) -> None:
    """Two attentions and two dense networks around the experts of each layer (LongCat-Flash)."""
    hidden, every = fields["hidden_size"], range(fields["num_layers"])
    fields["zero_experts"] = config.count("zero_expert_num", default=0, least=0)
    fields["norm_vectors"] = 4
    a = fields["attention"]
    latent, rope = a["kv_lora_rank"], a["qk_rope_head_dim"]
    rank = a["q_lora_rank"]
    if rank is None:
        config.problem("q_lora_rank: missing -- this key is required")
        return
    heads = a["num_heads"]
    add(
        fields,
        part(
            "second attention of a layer", every,
            matrices=hidden * (rank + latent + rope) + rank * heads * a["head_dim"]
            + latent * heads * (a["qk_nope_head_dim"] + a["v_head_dim"])
            + heads * a["v_head_dim"] * hidden,
            vectors=rank + latent, kv=latent + rope,
        ),
        part("two dense networks beside the experts", every,
             matrices=6 * hidden * config.count("ffn_hidden_size")),
    )  # fmt: skip
    config.refuse("router_bias", "a bias in this family's router is not supported")


def phimoe(config: Config, fields: Fields) -> None:
    """Layer norms with biases, and a bias in the head where the configuration says so (Phi-3.5)."""
    fields["norm_vectors"] = 4
    head = fields["vocab_size"] if config.flag("lm_head_bias") else 0
    add(fields, part("biases of the last norm and the head",
                     vectors=fields["hidden_size"] + head, works=False))  # fmt: skip
