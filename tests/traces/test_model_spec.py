"""Geometry against published parameter counts and closed forms."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from basis.errors import InputError
from traces.model_spec import ModelSpec, load_model

# Configurations that the wheel does not ship, values as published on the Hugging Face hub.
QWEN15_MOE = {
    "model_type": "qwen2_moe", "hidden_size": 2048, "num_hidden_layers": 24, "vocab_size": 151936,
    "num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 5632,
    "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_experts": 60,
    "num_experts_per_tok": 4, "decoder_sparse_step": 1, "sliding_window": 32768,
    "use_sliding_window": False, "max_window_layers": 21, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN2_57B = QWEN15_MOE | {
    "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "intermediate_size": 18944, "moe_intermediate_size": 2560,
    "shared_expert_intermediate_size": 20480, "num_experts": 64, "num_experts_per_tok": 8,
}  # fmt: skip
OLMOE = {
    "model_type": "olmoe", "hidden_size": 2048, "num_hidden_layers": 16, "vocab_size": 50304,
    "num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 1024,
    "num_experts": 64, "num_experts_per_tok": 8, "attention_bias": False, "clip_qkv": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
DEEPSEEK_V2 = {
    "model_type": "deepseek_v2", "hidden_size": 5120, "num_hidden_layers": 60,
    "vocab_size": 102400, "num_attention_heads": 128, "num_key_value_heads": 128,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "intermediate_size": 12288, "moe_intermediate_size": 1536,
    "n_routed_experts": 160, "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 8,
    "topk_group": 3, "first_k_dense_replace": 1, "moe_layer_freq": 1,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
DEEPSEEK_V2_LITE = DEEPSEEK_V2 | {
    "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16,
    "num_key_value_heads": 16, "q_lora_rank": None, "intermediate_size": 10944,
    "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_group": 1, "topk_group": 1,
}  # fmt: skip
EXAMPLE = {
    "model_type": "moeplan_example", "hidden_size": 128, "num_hidden_layers": 12,
    "vocab_size": 4096, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 64,
    "tie_word_embeddings": True, "dtype": "float32",
}  # fmt: skip

# (file, total and active in units of 1e9, digits as printed), from meta-device instantiation
GOLDEN = [
    ("mistralai--Mixtral-8x7B-v0.1", "46.7", "12.9"),
    ("mistralai--Mixtral-8x22B-v0.1", "140.6", "39.2"),
    ("Qwen--Qwen3-30B-A3B", "30.53", "3.35"),
    ("Qwen--Qwen3-235B-A22B", "235.1", "22.2"),
    ("openai--gpt-oss-120b", "116.8", "5.7"),
    ("openai--gpt-oss-20b", "20.9", "4.2"),
    ("deepseek-ai--DeepSeek-V3", "671.03", "37.55"),
    ("deepseek-ai--DeepSeek-R1", "671.03", "37.55"),
]
# Published to two or three digits: held to half a unit of the last one.
PUBLISHED = [
    (OLMOE, "6.92", "1.28"),
    (QWEN15_MOE, "14.3", "2.7"),
    (QWEN2_57B, "57.4", "14.2"),
    (DEEPSEEK_V2, "236", "21"),
]


@pytest.fixture
def published_config() -> Callable[[str], Path]:
    spec = find_spec("aiconfigurator_core")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("install the test dependency aiconfigurator-core for its model configs")
    folder = Path(spec.submodule_search_locations[0]) / "model_configs"
    return lambda name: folder / f"{name}_config.json"


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., ModelSpec]:
    def build(config: dict[str, Any], **changes: Any) -> ModelSpec:
        path = tmp_path / "model.json"
        path.write_text(json.dumps(config | changes))
        return load_model(path)

    return build


def rounded(value: int, like: str) -> str:
    return f"{value / 1e9:.{len(like.partition('.')[2])}f}"


@pytest.mark.parametrize(("name", "total", "active"), GOLDEN)
def test_golden_totals(
    published_config: Callable[[str], Path], name: str, total: str, active: str
) -> None:
    model = load_model(published_config(name))
    assert rounded(model.total_params, total) == total
    assert rounded(model.active_params, active) == active
    assert model.name == name


@pytest.mark.parametrize(("config", "total", "active"), PUBLISHED)
def test_published_totals(
    load: Callable[..., ModelSpec], config: dict[str, Any], total: str, active: str
) -> None:
    model = load(config)
    assert rounded(model.total_params, total) == total
    assert rounded(model.active_params, active) == active


def test_deepseek_v2_lite(load: Callable[..., ModelSpec]) -> None:
    model = load(DEEPSEEK_V2_LITE)
    assert rounded(model.total_params, "15.7") == "15.7"
    # its publishers leave the input embedding out of "2.4 B active" (and cut 2.45): within 0.06
    without_embedding = model.active_params - model.vocab_size * model.hidden_size
    assert without_embedding == pytest.approx(2.4e9, abs=0.06e9)


def test_exact_parameter_counts(published_config: Callable[[str], Path]) -> None:
    # the counts that the hub shows for these checkpoints
    exact = {
        "mistralai--Mixtral-8x7B-v0.1": 46_702_792_704,
        "openai--gpt-oss-20b": 20_914_757_184,
        "Qwen--Qwen3-30B-A3B": 30_532_122_624,
    }
    for name, total in exact.items():
        assert load_model(published_config(name)).total_params == total


def test_kv_bytes(published_config: Callable[[str], Path], load: Callable[..., ModelSpec]) -> None:
    v3 = load_model(published_config("deepseek-ai--DeepSeek-V3"))
    assert v3.kv_bytes_per_token == (512 + 64) * 2 * 61 == 70_272
    assert v3.kv_bytes(1000) == 1000 * 70_272
    oss = load_model(published_config("openai--gpt-oss-20b"))
    assert oss.kv_bytes_per_token == 24 * 2 * 8 * 64 * 2
    assert oss.attention.windows == (128, None) * 12
    # half of the layers keep 128 tokens
    assert oss.kv_bytes(1000) == 12 * (1000 + 128) * 2 * 8 * 64 * 2
    assert oss.kv_bytes(100) == 100 * oss.kv_bytes_per_token
    assert load(DEEPSEEK_V2_LITE).kv_bytes_per_token == (512 + 64) * 2 * 27
    assert load(QWEN15_MOE).attention.windows == (None,) * 24


def test_bytes_follow_the_quantisation(published_config: Callable[[str], Path]) -> None:
    v3 = load_model(published_config("deepseek-ai--DeepSeek-V3"))
    assert (v3.expert_dtype, v3.weight_dtype, v3.kv_dtype) == ("fp8_block", "fp8_block", "bf16")
    matrix = 3 * 7168 * 2048
    assert v3.bytes_per_expert == matrix + 4 * matrix / 128**2
    # embedding, head, routers and norms stay bf16: more than a byte per parameter
    outside = v3.total_params - 58 * 256 * v3.params_per_expert
    high = 2 * 129280 * 7168 + 58 * 256 * (7168 + 1) + 61 * (2 * 7168 + 1536 + 512) + 7168
    assert v3.bytes_outside_experts == pytest.approx((outside - high) * (1 + 4 / 128**2) + 2 * high)
    oss = load_model(published_config("openai--gpt-oss-20b"))
    assert (oss.expert_dtype, oss.weight_dtype) == ("mxfp4", "bf16")
    bias = 2 * 2880 + 2880
    assert oss.bytes_per_expert == 3 * 2880 * 2880 * 4.25 / 8 + 2 * bias
    # the published checkpoint: 13.76 GB of safetensors
    total = 24 * 32 * oss.bytes_per_expert + oss.bytes_outside_experts
    assert total == pytest.approx(13.76e9, rel=0.001)
    fp8 = load_model(published_config("Qwen--Qwen3-30B-A3B-FP8"))
    assert fp8.expert_dtype == "fp8_block"


def test_unquantised_bytes_are_two_per_parameter(load: Callable[..., ModelSpec]) -> None:
    for config in (OLMOE, QWEN15_MOE, DEEPSEEK_V2):
        model = load(config)
        experts = model.num_moe_layers * model.num_experts * model.bytes_per_expert
        assert experts + model.bytes_outside_experts == 2 * model.total_params


def test_moe_layer_rules(load: Callable[..., ModelSpec]) -> None:
    assert load(DEEPSEEK_V2).moe_layer_ids == tuple(range(1, 60))
    every_third = load(DEEPSEEK_V2, moe_layer_freq=3, first_k_dense_replace=2)
    assert every_third.moe_layer_ids == tuple(range(3, 60, 3))
    sparse = load(QWEN15_MOE, decoder_sparse_step=2, mlp_only_layers=[3])
    assert sparse.moe_layer_ids == tuple(i for i in range(1, 24, 2) if i != 3)
    assert sparse.dense_width == 5632
    assert load(OLMOE).dense_width == 0


def test_dense_layers_are_counted(load: Callable[..., ModelSpec]) -> None:
    all_moe, first_dense = load(DEEPSEEK_V2, first_k_dense_replace=0), load(DEEPSEEK_V2)
    moe_layer = 160 * 3 * 5120 * 1536 + 3 * 5120 * 2 * 1536 + 160 * 5120
    dense_layer = 3 * 5120 * 12288
    assert all_moe.total_params - first_dense.total_params == moe_layer - dense_layer


def test_example_model_equals_its_closed_form(load: Callable[..., ModelSpec]) -> None:
    model = load(EXAMPLE)
    attention = 128 * 4 * 32 + 2 * 128 * 2 * 32 + 4 * 32 * 128
    layer = attention + 2 * 128 + 32 * 128 + 32 * 3 * 128 * 64
    assert model.total_params == 4096 * 128 + 12 * layer + 128
    assert model.active_params == model.total_params - 12 * 28 * 3 * 128 * 64
    assert model.activation_dtype == "fp32"
    assert load(EXAMPLE | {"model_type": "moeplan_example_moe"}).total_params == model.total_params


def test_attention_parameters(load: Callable[..., ModelSpec]) -> None:
    qwen = load(QWEN15_MOE).attention
    assert qwen.parameters(2048) == 4 * 2048**2 + 3 * 2048  # q, k, v biases, no norms
    lite = load(DEEPSEEK_V2_LITE).attention
    assert lite.q_lora_rank is None
    down = 2048 * (512 + 64)
    up = 512 * 16 * (128 + 128)
    assert lite.parameters(2048) == 2048 * 16 * 192 + down + up + 16 * 128 * 2048 + 512
    assert load(OLMOE).attention.vector_parameters(2048) == 2 * 2048


def test_windows(load: Callable[..., ModelSpec]) -> None:
    sliding = load(QWEN15_MOE, use_sliding_window=True).attention.windows
    assert sliding == (None,) * 21 + (32768,) * 3
    kinds = ["full_attention", "sliding_attention"] * 12
    named = load(QWEN15_MOE, use_sliding_window=True, layer_types=kinds).attention.windows
    assert named == (None, 32768) * 12


def test_folder_yaml_and_bare_infinity(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    text = json.dumps(OLMOE | {"time_limit": float("inf")})
    assert "Infinity" in text
    (folder / "config.json").write_text(text)
    assert load_model(folder).name == "my-model"
    (tmp_path / "imagined.yaml").write_text(
        "\n".join(f"{k}: {json.dumps(v)}" for k, v in OLMOE.items())
    )
    assert load_model(tmp_path / "imagined.yaml").total_params == load_model(folder).total_params


def test_unknown_family_names_the_known(load: Callable[..., ModelSpec]) -> None:
    with pytest.raises(InputError, match=r"model_type 'llama' is not supported.*mixtral"):
        load(OLMOE, model_type="llama")
    with pytest.raises(
        InputError, match=r"'qwen3_mo' is not supported \(the nearest is 'qwen3_moe'"
    ):
        load(OLMOE, model_type="qwen3_mo")
    with pytest.raises(InputError, match="model_type None"):
        load({"hidden_size": 8})


def test_all_missing_and_wrong_keys_at_once(load: Callable[..., ModelSpec]) -> None:
    gone = ("vocab_size", "kv_lora_rank", "moe_intermediate_size", "first_k_dense_replace")
    config = {k: v for k, v in DEEPSEEK_V2.items() if k not in gone}
    with pytest.raises(InputError) as caught:
        load(config, n_routed_experts=0, num_experts_per_tok="six")
    message = str(caught.value)
    for part in (*(f"{key}: missing" for key in gone), "n_routed_experts: 0", "'six'"):
        assert part in message
    assert message.count("hidden_size") == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 65}, "top_k 65 is above num_experts 64"),
        ({"num_key_value_heads": 5}, "not a multiple of num_kv_heads"),
        ({"torch_dtype": "float8"}, "torch_dtype: 'float8'"),
        ({"quantization_config": {"quant_method": "modelopt"}}, "quant_algo: None -- known are"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
            "weight_block_size",
        ),
        ({"quantization_config": "fp8"}, "quant_method None is not supported"),
        ({"mlp_only_layers": 3}, "mlp_only_layers: 3 -- a list"),
        ({"tie_word_embeddings": False, "num_hidden_layers": True}, "num_hidden_layers: True"),
        ({"decoder_sparse_step": 99}, "none of the 16 layers has routed experts"),
    ],
)
def test_impossible_values(
    load: Callable[..., ModelSpec], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load(OLMOE, **changes)


def test_fp8_without_blocks(load: Callable[..., ModelSpec]) -> None:
    model = load(OLMOE, quantization_config={"quant_method": "fp8"})
    assert model.bytes_per_expert == model.params_per_expert


def test_quantisation_beside_the_config_is_not_overlooked(
    published_config: Callable[[str], Path],
) -> None:
    model = load_model(published_config("nvidia--Qwen3-235B-A22B-NVFP4"))
    assert (model.expert_dtype, model.kv_dtype) == ("nvfp4", "fp8")
    assert model.bytes_per_expert == 3 * 4096 * 1536 * 9 / 16


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_model(tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text('{"model_type": ')
    with pytest.raises(InputError, match="not valid YAML or JSON"):
        load_model(tmp_path / "broken.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(InputError, match="expected a mapping"):
        load_model(tmp_path / "list.json")
