"""Expert ids equal, bit for bit, to those of the router classes of Hugging Face transformers.

The router modules themselves are built, with the models' own numbers of experts and groups and
random weights, and see the same hidden states. Where they sort (softmax top-k, gpt-oss) the ids are
compared in place. DeepSeek's ask for ``sorted=False``, whose order torch leaves open, so each
token's ids are compared in ascending order: equal if and only if the same experts were chosen.
Weights are compared per expert.
"""

import importlib

import pytest
import torch

from kernels_ref.router import route_group_limited, route_sigmoid, route_topk, route_topk_logits

pytest.importorskip("transformers")

TOKENS, WIDTH = 300, 256


def inputs(module, config, router, dtype):
    """Return a real router of random weights, and hidden states, both of this dtype."""
    configs = importlib.import_module(f"transformers.models.{module}.configuration_{module}")
    models = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    name, settings = config
    router = getattr(models, router)(getattr(configs, name)(hidden_size=WIDTH, **settings))
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in (*router.parameters(), *router.buffers()):
            tensor.normal_(std=0.1)
    return router.to(dtype).eval(), torch.randn(TOKENS, WIDTH, dtype=dtype)


def dense(ids, weights, experts):
    """Weights by expert, 0 where not chosen: whatever the order of the ids."""
    return torch.zeros(len(ids), experts).scatter(1, ids, weights.float())


@torch.no_grad()
def compare(router, x, found, *, in_place):
    _, weights, ids = router(x)
    assert ids.unique().numel() > router.top_k  # the case is not degenerate
    if in_place:
        assert torch.equal(found.topk_ids_TK, ids)
    else:
        assert torch.equal(found.topk_ids_TK.sort().values, ids.sort().values)
    ours = dense(found.topk_ids_TK, found.topk_weights_TK, router.num_experts)
    theirs = dense(ids, weights, router.num_experts)
    rounding = 2**-7 if weights.dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(ours, theirs, rtol=rounding, atol=0)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize(
    ("module", "config", "router", "renormalise"),
    [
        ("mixtral", ("MixtralConfig", {}), "MixtralTopKRouter", True),
        ("qwen2_moe", ("Qwen2MoeConfig", {"norm_topk_prob": False}), "Qwen2MoeTopKRouter", False),
        ("qwen3_moe", ("Qwen3MoeConfig", {"norm_topk_prob": True}), "Qwen3MoeTopKRouter", True),
        ("olmoe", ("OlmoeConfig", {"norm_topk_prob": False}), "OlmoeTopKRouter", False),
    ],
)
def test_softmax_top_k(module, config, router, renormalise, dtype):
    theirs, x = inputs(module, config, router, dtype)
    found = route_topk(x, theirs.weight, theirs.top_k, renormalise=renormalise)
    compare(theirs, x, found, in_place=True)


@DTYPES
def test_gpt_oss_softmax_of_the_chosen_logits(dtype):
    theirs, x = inputs("gpt_oss", ("GptOssConfig", {}), "GptOssTopKRouter", dtype)
    found = route_topk_logits(x, theirs.weight, theirs.top_k, bias_E=theirs.bias)
    if dtype == torch.bfloat16:  # logits tie here, and ties are decided alike
        logits = torch.nn.functional.linear(x, theirs.weight, theirs.bias).sort().values
        assert (logits[:, -theirs.top_k] == logits[:, -theirs.top_k - 1]).any()
    compare(theirs, x, found, in_place=True)


@DTYPES
@pytest.mark.parametrize("renormalise", [True, False])
def test_deepseek_v3_sigmoid_with_correction_and_groups(renormalise, dtype):
    config = "DeepseekV3Config", {"norm_topk_prob": renormalise}
    theirs, x = inputs("deepseek_v3", config, "DeepseekV3TopkRouter", dtype)
    assert (theirs.num_group, theirs.topk_group) == (8, 4)
    found = route_sigmoid(
        x, theirs.weight, theirs.top_k, correction_E=theirs.e_score_correction_bias,
        num_groups=theirs.num_group, kept_groups=theirs.topk_group, renormalise=renormalise,
        scaling=theirs.routed_scaling_factor,
    )  # fmt: skip
    compare(theirs, x, found, in_place=False)


@DTYPES
@pytest.mark.parametrize(
    ("method", "experts", "groups", "kept", "scaling"),
    [("greedy", 64, 1, 1, 1.0), ("group_limited_greedy", 160, 8, 3, 16.0)],
    ids=["V2-Lite", "V2"],
)
def test_deepseek_v2_softmax_with_groups(method, experts, groups, kept, scaling, dtype):
    settings = {
        "topk_method": method, "n_routed_experts": experts, "n_group": groups,
        "topk_group": kept, "routed_scaling_factor": scaling, "num_experts_per_tok": 6,
    }  # fmt: skip
    theirs, x = inputs("deepseek_v2", ("DeepseekV2Config", settings), "DeepseekV2TopkRouter", dtype)
    found = route_group_limited(
        x, theirs.weight, 6, num_groups=groups, kept_groups=kept, scaling=scaling
    )
    compare(theirs, x, found, in_place=False)
