"""Tiny random models of many families: what is recorded is what their own routers said.

The oracle is a hook of the test on the router modules. Which of the router's rows belongs to which
token is counted here with plain loops, from the lengths of the prompts. Where a router's output
does not hold the choice (DBRX, Llama 4) it is computed anew from its logits.
"""

import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from traces.record_model import record  # noqa: E402
from traces.routing_trace import read_trace  # noqa: E402

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MLA = {
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
LINEAR = {
    "head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip

# family: (settings, what its router makes of the logits; None where candidates are refused)
FAMILIES = {
    "mixtral": (LOCAL, "softmax"),
    "qwen2_moe": (
        EXPERTS | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
        "softmax",
    ),
    "qwen3_moe": (EXPERTS | {"moe_intermediate_size": 16, "head_dim": 8}, "softmax"),
    "qwen3_next": (EXPERTS | LINEAR, "softmax"),
    "qwen3_5_moe_text": (EXPERTS | LINEAR, "softmax"),
    "olmoe": (EXPERTS, "softmax"),
    "flex_olmo": (EXPERTS, "softmax"),
    "deepseek_v2": (
        ROUTED | MLA | {"first_k_dense_replace": 1, "topk_method": "greedy", "n_group": 1},
        "softmax",
    ),
    "deepseek_v3": (
        ROUTED
        | MLA
        | {"num_hidden_layers": 3, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2},
        "sigmoid",
    ),
    "deepseek_v4": (
        ROUTED
        | {
            "mlp_layer_types": ["hash_moe", "moe"],
            "head_dim": 16,
            "qk_rope_head_dim": 8,
            "index_n_heads": 2,
            "index_head_dim": 8,
        },
        "sqrtsoftplus",
    ),
    "aria_text": ({"moe_num_experts": 8, "moe_topk": 2, "head_dim": 8}, "softmax"),
    "gpt_oss": (LOCAL | {"head_dim": 8, "sliding_window": 4}, "softmax"),
    "granitemoe": (LOCAL, "softmax"),
    "granitemoehybrid": (
        LOCAL
        | {
            "shared_intermediate_size": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
        },
        "softmax",
    ),
    "granitemoeshared": (LOCAL | {"shared_intermediate_size": 16}, "softmax"),
    "phimoe": (LOCAL, None),
    "jamba": (
        EXPERTS
        | {
            "num_hidden_layers": 4,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 0,
            "mamba_d_state": 4,
            "use_mamba_kernels": False,
        },
        "softmax",
    ),
    "minimax": (
        LOCAL | {"layer_types": ["linear_attention", "full_attention"], "block_size": 4},
        "softmax",
    ),
    "minimax_m2": (LOCAL | {"head_dim": 8}, "sigmoid"),
    "glm4_moe": (ROUTED | {"first_k_dense_replace": 1, "num_hidden_layers": 3}, "sigmoid"),
    "glm4_moe_lite": (ROUTED | MLA | {"mlp_layer_types": ["dense", "sparse"]}, "sigmoid"),
    "ernie4_5_moe": ({"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 16}, "softmax"),
    "hunyuan_v1_moe": ({"num_experts": 8, "moe_topk": 2, "head_dim": 8}, "softmax"),
    "dots1": (ROUTED | {"first_k_dense_replace": 1, "n_shared_experts": 1}, "sigmoid"),
    "lfm2_moe": (
        EXPERTS
        | {
            "moe_intermediate_size": 16,
            "num_dense_layers": 1,
            "num_hidden_layers": 3,
            "layer_types": ["conv", "full_attention", "conv"],
        },
        "sigmoid",
    ),
    "longcat_flash": (
        MLA
        | {
            "num_layers": 2,
            "moe_topk": 3,
            "n_routed_experts": 6,
            "zero_expert_num": 2,
            "ffn_hidden_size": 32,
            "expert_ffn_hidden_size": 16,
            "head_dim": 8,
        },
        "softmax",
    ),
    "nemotron_h": (
        ROUTED
        | {
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
            "moe_shared_expert_intermediate_size": 16,
            "head_dim": 8,
        },
        "sigmoid",
    ),
    "llama4_text": (
        LOCAL
        | {
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 32,
            "head_dim": 8,
            "interleave_moe_layer_step": 1,
        },
        "sigmoid",
    ),
    "dbrx": (
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {
                "hidden_size": 32,
                "ffn_hidden_size": 16,
                "moe_num_experts": 8,
                "moe_top_k": 2,
            },
        },
        "softmax",
    ),
    "afmoe": (
        EXPERTS | {"moe_intermediate_size": 16, "num_dense_layers": 1, "head_dim": 8},
        "sigmoid",
    ),
    "gemma4_text": (
        {
            "num_experts": 8,
            "top_k_experts": 2,
            "moe_intermediate_size": 16,
            "enable_moe_block": True,
            "head_dim": 8,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 0,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "as returned",
    ),
}

PROMPTS = [[5, 9, 33, 7, 21], [11, 3, 40], [60, 8, 17, 17, 2, 30]]
NEW = 4


@functools.cache
def tiny(family):
    settings = SMALL | FAMILIES[family][0]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                tensor.uniform_(-0.5, 0.5)  # so that the choice is not the best logits
            if name.endswith("router.gate.weight"):
                tensor.normal_()  # AFMoE begins with zeros
            if name.endswith("tid2eid"):  # DeepSeek-V4's first layers: from token to experts
                tensor.copy_(torch.stack([torch.randperm(8)[:2] for _ in tensor]))
    model.generation_config.eos_token_id = None  # every row goes on to the end
    return model


class RouterLog:
    """What each router returned, pass by pass."""

    def __init__(self, model):
        self.outputs, self.handles = {}, []
        modules = dict(model.named_modules())
        for name, module in modules.items():
            block, _, last = name.rpartition(".")
            if last in ("gate", "router") and f"{block}.experts" in modules:
                self.outputs[name] = []
                self.handles.append(module.register_forward_hook(self.hook(name)))

    def hook(self, name):
        def keep(module, args, output):
            self.outputs[name].append(output)

        return keep

    def layers(self):
        """Router outputs by layer, in the order of the layers."""
        return sorted(
            (int(next(part for part in name.split(".") if part.isdigit())), outputs)
            for name, outputs in self.outputs.items()
        )

    def close(self):
        for handle in self.handles:
            handle.remove()


def chosen(family, output):
    """Ids and weights ``[T, k]`` of a router's output."""
    if family == "dbrx":
        probabilities = output.softmax(-1)
        weights, ids = probabilities.topk(2, dim=-1)
        return ids, weights / weights.sum(-1, keepdim=True)
    if family == "llama4_text":
        ids = output[1].argmax(-1, keepdim=True)
        return ids, output[1].gather(-1, ids).sigmoid()
    _, weights, ids, *_ = output
    return ids, weights


def left_padded(prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def cells_of(family, log, calls):
    """Ids and weights by (request, position), counted from the lengths of the prompts."""
    cells = {}
    for at, (_, outputs) in enumerate(log.layers()):
        passes, request = iter(outputs), 0
        for prompts in calls:
            width = max(map(len, prompts))
            for step in range(NEW):  # the last of NEW + 1 sampled tokens is never fed
                ids, weights = chosen(family, next(passes))
                ids, weights = (x.reshape(len(prompts), -1, x.shape[-1]) for x in (ids, weights))
                for row, prompt in enumerate(prompts):
                    pads = width - len(prompt)
                    places = range(pads, width) if step == 0 else [0]
                    for place in places:
                        position = place - pads if step == 0 else len(prompt) + step - 1
                        cell = cells.setdefault((request + row, position), [])
                        assert len(cell) == at
                        cell.append((ids[row, place].tolist(), weights[row, place].tolist()))
            request += len(prompts)
        assert next(passes, None) is None
    return cells


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_generate_records_what_its_routers_said(family, tmp_path):
    model, calls = tiny(family), [PROMPTS, PROMPTS[:1]]
    log = RouterLog(model)
    try:
        with record(model, tmp_path / "out.parquet"):
            for prompts in calls:
                model.generate(**left_padded(prompts), max_new_tokens=NEW, do_sample=False)
    finally:
        log.close()
    trace = read_trace(tmp_path / "out.parquet")
    expected = cells_of(family, log, calls)

    assert trace.meta.moe_layer_ids == tuple(number for number, _ in log.layers())
    assert trace.meta.num_experts == 8
    found = list(zip(trace.request_id.tolist(), trace.position.tolist(), strict=True))
    assert found == sorted(expected)
    ids = np.array([[cell[0] for cell in expected[key]] for key in found])
    weights = np.array([[cell[1] for cell in expected[key]] for key in found])
    np.testing.assert_array_equal(trace.experts, ids)
    np.testing.assert_array_equal(trace.weights, weights.astype(np.float16))
    assert len(np.unique(ids)) > trace.meta.top_k  # the case is not degenerate
    lengths = np.array([len(p) for prompts in calls for p in prompts])
    np.testing.assert_array_equal(trace.decode, trace.position >= lengths[trace.request_id])
    step = np.maximum(trace.position - lengths[trace.request_id] + 1, 0)
    np.testing.assert_array_equal(trace.step, step)


SCORES = {
    "softmax": lambda logits: logits.double().softmax(-1),
    "sigmoid": lambda logits: logits.double().sigmoid(),
    "sqrtsoftplus": lambda logits: torch.nn.functional.softplus(logits.double()).sqrt(),
    "as returned": lambda logits: logits.double(),
}


@pytest.mark.parametrize("family", [name for name, (_, rule) in FAMILIES.items() if rule])
@torch.no_grad()
def test_a_familys_candidates_are_its_routers_best_scores(family, tmp_path):
    model, best = tiny(family), 5
    log = RouterLog(model)
    try:
        with record(model, tmp_path / "out.parquet", candidates=best):
            model(torch.tensor(PROMPTS[:1]))
    finally:
        log.close()
    trace = read_trace(tmp_path / "out.parquet")
    score = SCORES[FAMILIES[family][1]]
    for at, (_, [output]) in enumerate(log.layers()):
        logits = {"dbrx": lambda out: out, "llama4_text": lambda out: out[1]}.get(
            family, lambda out: out[0]
        )(output).reshape(trace.num_tokens, 8)
        order = logits.argsort(-1, descending=True)[:, :best]
        np.testing.assert_array_equal(trace.candidates[:, at], order)
        scores = score(logits).gather(-1, order).numpy()
        np.testing.assert_allclose(trace.candidate_scores[:, at], scores, rtol=1e-3, atol=1e-7)
