"""Number formats of checkpoints: what each quantiser's configuration says is stored how."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from basis.dtypes import DTYPES
from basis.errors import InputError
from traces.model_spec import ModelSpec, load_model

EXAMPLES = json.loads((Path(__file__).parent / "families.json").read_text())
# (file, expert format, format outside, narrower formats outside, cache)
PUBLISHED = [
    ("deepseek-ai--DeepSeek-V4-Flash", "mxfp4_mxfp8", "fp8_block", (), "bf16"),
    ("sgl-project--DeepSeek-V4-Flash-FP8", "fp8_block", "fp8_block", (), "bf16"),
    ("nvidia--DeepSeek-V4-Pro-NVFP4", "nvfp4", "fp8_block", (), "bf16"),
    ("nvidia--DeepSeek-V3.1-NVFP4", "nvfp4", "bf16", ("nvfp4",), "fp8"),
    ("nvidia--GLM-5-NVFP4", "nvfp4", "bf16", ("nvfp4",), "fp8"),
    ("nvidia--GLM-5.1-NVFP4", "nvfp4", "bf16", (), "fp8"),
    ("nvidia--Gemma-4-26B-A4B-NVFP4", "nvfp4", "bf16", (), "fp8"),
    ("nvidia--Qwen3-235B-A22B-NVFP4", "nvfp4", "nvfp4", (), "fp8"),
    ("nvidia--MiniMax-M2.5-NVFP4", "nvfp4", "bf16", (), "fp8"),
    ("nvidia--MiniMax-M3-NVFP4", "nvfp4", "mxfp8", (), "bf16"),
    ("nvidia--Qwen3.6-35B-A3B-NVFP4", "nvfp4_w4a16", "fp8", ("nvfp4_w4a16",), "fp8"),
    ("nvidia--NVIDIA-Nemotron-3-Super-120B-A12B-FP8", "fp8", "fp8", (), "fp8"),
    ("nvidia--NVIDIA-Nemotron-3.5-Lightning-30B-A3B-NVFP4", "nvfp4_w4a16", "bf16",
     ("fp8", "nvfp4_w4a16"), "fp8"),
    ("moonshotai--Kimi-K2.5", "int4_g32", "bf16", (), "bf16"),
    ("moonshotai--Kimi-K3", "mxfp4", "bf16", (), "bf16"),
    ("openai--gpt-oss-120b", "mxfp4", "bf16", (), "bf16"),
]  # fmt: skip


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., ModelSpec]:
    def build(name: str, quantization: object, **changes: Any) -> ModelSpec:
        given = {"quantization_config": quantization} if quantization else {}
        path = tmp_path / "config.json"
        path.write_text(json.dumps({"model_type": name} | EXAMPLES[name] | given | changes))
        return load_model(path)

    return build


def group(**weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


@pytest.mark.parametrize(("name", "experts", "weights", "mixed", "kv"), PUBLISHED)
def test_published_checkpoints(
    name: str, experts: str, weights: str, mixed: tuple[str, ...], kv: str
) -> None:
    spec = find_spec("aiconfigurator_core")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("install the test dependency aiconfigurator-core for its model configs")
    folder = Path(spec.submodule_search_locations[0]) / "model_configs"
    model = load_model(folder / f"{name}_config.json")
    assert (model.expert_dtype, model.weight_dtype) == (experts, weights)
    assert model.mixed_weights == mixed
    assert model.kv_dtype == kv
    assert model.activation_dtype == "bf16"
    assert model.bytes_per_expert == pytest.approx(
        model.params_per_expert * DTYPES[experts].bits / 8, rel=0.01
    )


def test_names_that_are_left_out_keep_the_base_format(load: Callable[..., ModelSpec]) -> None:
    def nvfp4(*ignored: str) -> ModelSpec:
        return load(
            "qwen3_moe", {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ignored}
        )

    whole = nvfp4("lm_head", "*.mlp.gate")
    assert (whole.expert_dtype, whole.weight_dtype) == ("nvfp4", "nvfp4")
    for patterns in (
        ["model.layers.*.self_attn.*", "model.layers.1.mlp*"],
        ["re:.*self_attn.*", r"re:.*mlp\.(gate|up|down)_proj.*"],
        ["self_attn", "mlp.gate_proj", "model.layers.1.mlp"],
    ):
        model = nvfp4(*patterns)  # layer 1 is the dense one
        assert (model.expert_dtype, model.weight_dtype) == ("nvfp4", "bf16"), patterns
        assert model.mixed_weights == ()
    some = nvfp4("model.layers.0.self_attn.o_proj")
    assert (some.weight_dtype, some.mixed_weights) == ("bf16", ("nvfp4",))
    none = nvfp4("gate", "up", "experts_gate")  # components, not parts of a word
    assert (none.expert_dtype, none.weight_dtype) == ("nvfp4", "nvfp4")


def test_a_wider_format_bounds_the_bytes(load: Callable[..., ModelSpec]) -> None:
    plain = load("qwen3_moe", None)
    ignore = ["model.layers.0.self_attn.o_proj"]
    mixed = load("qwen3_moe", {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ignore})
    assert mixed.bytes_outside_experts == plain.bytes_outside_experts
    assert mixed.bytes_per_expert == plain.bytes_per_expert / 2


def test_the_file_beside_counts_where_the_configuration_is_silent(
    load: Callable[..., ModelSpec], tmp_path: Path
) -> None:
    stated = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": stated}))
    silent = load("mixtral", None)
    assert (silent.expert_dtype, silent.weight_dtype, silent.kv_dtype) == ("nvfp4", "nvfp4", "fp8")
    own = load("mixtral", {"quant_method": "fp8"})
    assert (own.expert_dtype, own.kv_dtype) == ("fp8", "fp8")  # it says nothing of the cache
    cache = load("mixtral", {"quant_method": "fp8", "kv_cache_scheme": None})
    assert cache.kv_dtype == "bf16"


@pytest.mark.parametrize(
    ("weights", "stored"),
    [
        ({"type": "int", "num_bits": 4, "group_size": 32}, "int4_g32"),
        ({"type": "int", "num_bits": 4, "group_size": 128}, "int4"),
        ({"type": "float", "num_bits": 4, "group_size": 32}, "mxfp4"),
        ({"type": "float", "num_bits": 4, "group_size": 16}, "nvfp4"),
        ({"type": "float", "num_bits": 8, "strategy": "channel"}, "fp8"),
    ],
)
def test_compressed_tensors(
    load: Callable[..., ModelSpec], weights: dict[str, Any], stored: str
) -> None:
    assert load("mixtral", group(**weights)).expert_dtype == stored


def test_module_formats(load: Callable[..., ModelSpec]) -> None:
    layers = {
        f"model.layers.{i}.{name}": {"quant_algo": algorithm}
        for i in range(3)
        for name, algorithm in (
            ("mlp.experts", "NVFP4"),
            *((f"self_attn.{n}_proj", "FP8") for n in "qkvo"),
        )
    }
    given = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}
    model = load("mixtral", given | {"quantized_layers": layers})
    assert (model.expert_dtype, model.weight_dtype) == ("nvfp4", "fp8")
    layers["model.layers.1.mlp.experts"] = {"quant_algo": "FP8"}
    with pytest.raises(InputError, match="experts are stored as fp8, nvfp4 -- only one"):
        load("mixtral", given | {"quantized_layers": layers})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"quant_method": "modelopt", "quant_algo": "INT3"}, "quant_algo: 'INT3' -- known are"),
        ({"quant_method": "modelopt", "quant_algo": ["NVFP4"]}, "quant_algo: .* -- known are"),
        (
            {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"},
            "quantized_layers: missing",
        ),
        ({"quant_method": "quip"}, "quant_method 'quip' is not supported"),
        ("fp8", "quant_method None is not supported"),
        ({"quant_method": "awq", "bits": 3, "group_size": 64}, "only 4 bits in groups of 128 or"),
        ({"quant_method": "compressed-tensors"}, "config_groups: not one group"),
        (group(type="float", num_bits=6), "float with 6 bits"),
        (group(type="int", num_bits=4, group_size=[1]), "only 4 bits"),
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["re:(a"]},
            "not a pattern",
        ),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, r"only \[128, 128\] is known"),
        ({"quant_method": "fp8", "expert_dtype": "fp2"}, "expert_dtype: 'fp2' -- fp4 or fp8"),
    ],
)
def test_unknown_formats_are_refused(
    load: Callable[..., ModelSpec], given: object, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load("mixtral", given)
