"""Geometry of every family against the parameters of the modelling code itself.

The oracle builds each model on torch's meta device (shapes without memory) and counts its
parameters by name, so that totals, experts and MoE layers are compared without our formulas.
"""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basis.errors import InputError
from basis.schema import validate
from traces.config_families import FAMILIES, geometry
from traces.model_spec import ModelSpec, load_model

transformers = pytest.importorskip("transformers", reason="needs the extra record")
torch = pytest.importorskip("torch", reason="needs the extra record")

EXAMPLES: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "families.json").read_text()
)
# model types of other names for the same geometry
TWINS = {
    "deepseek_ref": "deepseek_v4", "gemma4": "gemma4_text", "kimi_k2": "deepseek_v3",
    "llama4": "llama4_text", "minimax_m3": "minimax_m3_vl_text",
    "minimax_m3_vl": "minimax_m3_vl_text", "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen3_vl_moe": "qwen3_moe", "qwen3_vl_moe_text": "qwen3_moe", "step3p7": "step3p5",
}  # fmt: skip
# learnt numbers that transformers keeps as buffers: they are in the checkpoints
LEARNT = ("e_score_correction_bias", "expert_bias", "layer_scalar")
GOLDEN = [
    ("deepseek-ai--DeepSeek-V3", "671.03", "37.55"),
    ("deepseek-ai--DeepSeek-V4-Flash", "284.3", "13.8"),
    ("deepseek-ai--DeepSeek-V4-Pro", "1573", "49.8"),
    ("moonshotai--Kimi-K2.5", "1026.4", "32.9"),
    ("zai-org--GLM-5", "743.9", "41.8"),
    ("Qwen--Qwen3-30B-A3B", "30.53", "3.35"),
    ("Qwen--Qwen3-235B-A22B", "235.1", "22.2"),
    ("Qwen--Qwen3.5-397B-A17B", "396.346", "17.349"),  # 396,346,350,336 by its own class
    ("openai--gpt-oss-120b", "116.8", "5.7"),
    ("openai--gpt-oss-20b", "20.9", "4.2"),
    ("mistralai--Mixtral-8x7B-v0.1", "46.7", "12.9"),
    ("mistralai--Mixtral-8x22B-v0.1", "140.6", "39.2"),
    ("meta-llama--Llama-4-Scout-17B-16E-Instruct", "107.8", "17.2"),
    ("meta-llama--Llama-4-Maverick-17B-128E-Instruct", "400.7", "17.2"),
    ("MiniMaxAI--MiniMax-M2.5", "228.7", "11.0"),
    ("nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "31.6", "3.6"),
    ("nvidia--NVIDIA-Nemotron-3-Super-120B-A12B-FP8", "120.7", "12.8"),
    ("nvidia--NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16", "549.3", "56.1"),
]


def published() -> list[Path]:
    """All configurations in the wheel that have experts, decided without our code."""
    spec = find_spec("aiconfigurator_core")
    if spec is None or not spec.submodule_search_locations:
        return []
    folder = Path(spec.submodule_search_locations[0]) / "model_configs"
    found = []
    for path in sorted(folder.glob("*_config.json")):
        text = path.read_text()
        if path.name.endswith("hf_quant_config.json"):
            continue
        if re.search(r'"(n_routed_experts|num_local_experts|num_experts)": *[1-9]', text):
            found.append(path)
    return found


PUBLISHED = published()
needs_wheel = pytest.mark.skipif(not PUBLISHED, reason="install the dependency aiconfigurator-core")


def as_built(config: dict[str, Any]) -> Any:
    """The model of transformers on the meta device, from the same keys."""
    keys = {k: v for k, v in config.items() if k not in ("model_type", "quantization_config")}
    if config["vocab_size"] < 1000:  # default ids of special tokens are beyond a tiny vocabulary
        keys |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    made = transformers.AutoConfig.for_model(config["model_type"], **keys)
    auto = transformers.AutoModelForCausalLM
    if made.is_encoder_decoder:
        auto = transformers.AutoModelForSeq2SeqLM
    with torch.device("meta"):
        if config["model_type"] == "step3p5":  # has no causal class of its own
            return step(made)
        return auto.from_config(made)


def step(config: Any) -> Any:
    from transformers.models.step3p7.modeling_step3p7 import Step3p7TextModel

    body = Step3p7TextModel(config)
    return torch.nn.ModuleDict(
        {"model": body, "lm_head": torch.nn.Linear(config.hidden_size, config.vocab_size, False)}
    )


def counted(model: Any) -> dict[str, int]:
    """Parameters by name, tied ones once, and the learnt buffers."""
    found = {name: p.numel() for name, p in model.named_parameters()}
    buffers = {n: b.numel() for n, b in model.named_buffers() if n.endswith(LEARNT)}
    return found | buffers


def expert_parameters(counts: dict[str, int]) -> dict[str, int]:
    """Parameters of routed experts, those of each layer by the layer's path."""
    found: dict[str, int] = {}
    for name, number in counts.items():
        hit = re.match(r"(.*(?:layers|blocks?)\.\d+)\..*experts\.(?!.*shared)", name)
        if hit and "shared_expert" not in name:
            found[hit[1]] = found.get(hit[1], 0) + number
    return found


def load(tmp_path: Path, name: str, **changes: Any) -> ModelSpec:
    path = tmp_path / "model.json"
    path.write_text(json.dumps({"model_type": name} | EXAMPLES[name] | changes))
    return load_model(path)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_family_has_the_parameters_of_its_code(tmp_path: Path, name: str) -> None:
    model = load(tmp_path, name)
    counts = counted(as_built({"model_type": name} | EXAMPLES[name]))
    routed = expert_parameters(counts)
    if name == "longcat_flash":
        # its class gives zero-computation experts a first matrix too, which nothing reads
        phantom = model.zero_experts * 2 * 64 * 40
        routed = {layer: number - phantom for layer, number in routed.items()}
        counts["phantom"] = -phantom * model.num_layers
    assert model.total_params == sum(counts.values())
    assert set(routed.values()) == {model.num_experts * model.params_per_expert}
    assert len(routed) == model.num_moe_layers
    if not model.encoder_layers:
        layers = tuple(sorted(int(layer.rsplit(".", 1)[1]) for layer in routed))
        assert model.moe_layer_ids == layers


def test_every_family_has_an_example() -> None:
    own = {name for name in FAMILIES if not name.startswith("moeplan_")}
    assert own == set(EXAMPLES) | set(TWINS)
    for name, twin in TWINS.items():
        assert FAMILIES[name] == FAMILIES[twin]


@needs_wheel
def test_all_published_configurations_parse() -> None:
    assert len(PUBLISHED) == 68
    for path in PUBLISHED:
        model = load_model(path)
        assert 1e9 < model.active_params < model.total_params, path.name


@needs_wheel
@pytest.mark.parametrize(("name", "total", "active"), GOLDEN)
def test_golden_totals(name: str, total: str, active: str) -> None:
    model = load_model(PUBLISHED[0].parent / f"{name}_config.json")
    for count, printed in ((model.total_params, total), (model.active_params, active)):
        digits = len(printed.partition(".")[2])
        assert f"{count / 1e9:.{digits}f}" == printed


def built_as_published() -> list[Any]:
    """One configuration of each geometry that transformers has a class for."""
    seen, found = set(), []
    for path in PUBLISHED:
        data = json.loads(path.read_text())
        text = data.get("text_config", data)
        kind = text.get("model_type") or data["model_type"]
        if kind in ("kimi_linear", "deepseek_ref", "step3p7", "minimax_m3", "minimax_m3_vl"):
            continue
        kind = {"kimi_k2": "deepseek_v3"}.get(kind, kind)
        shape = tuple(text.get(k) for k in ("hidden_size", "num_hidden_layers", "num_experts"))
        if (kind, shape) not in seen:
            seen.add((kind, shape))
            name = path.name.removesuffix("_config.json")
            found.append(pytest.param(path, kind, text, id=name))
    return found


@needs_wheel
@pytest.mark.parametrize(("path", "kind", "text"), built_as_published())
def test_published_models_have_the_parameters_of_their_code(
    path: Path, kind: str, text: dict[str, Any]
) -> None:
    model = load_model(path)
    kind = {"qwen3_vl_moe_text": "qwen3_moe"}.get(kind, kind)  # its class brings the vision tower
    assert model.total_params == sum(counted(as_built(text | {"model_type": kind})).values())


def test_zero_computation_experts_are_choices_and_no_parameters(tmp_path: Path) -> None:
    with_zero, without = (load(tmp_path, "longcat_flash", zero_expert_num=n) for n in (4, 0))
    assert with_zero.zero_experts == 4
    assert with_zero.total_params - without.total_params == 3 * 4 * (64 + 1)
    assert with_zero.active_params <= with_zero.total_params


def test_a_latent_narrows_experts_and_what_is_sent(tmp_path: Path) -> None:
    wide, narrow = (load(tmp_path, "nemotron_h", moe_latent_size=n) for n in (None, 32))
    assert (wide.comm_size, narrow.comm_size) == (64, 32)
    assert wide.params_per_expert == 2 * 64 * 40 == 2 * narrow.params_per_expert
    experts = 3 * 8 * narrow.params_per_expert
    assert wide.total_params - narrow.total_params == experts - 3 * (2 * 64 * 32)


def test_hybrid_layers_keep_no_keys(tmp_path: Path) -> None:
    nemotron = load(tmp_path, "nemotron_h")
    assert nemotron.kv_layers == (3,)
    assert nemotron.moe_layer_ids == (1, 4, 7)
    assert nemotron.dense_layers == (5,)
    assert nemotron.kv_bytes(100) == 100 * 2 * 2 * 24 * 2 == 100 * nemotron.kv_bytes_per_token
    mimo = load(tmp_path, "mimo_v2_flash")
    assert mimo.kv_layers == (0, 4)
    full, slides = 2 * 2 * (24 + 16), 3 * 4 * (24 + 16)
    assert mimo.kv_bytes(100) == 2 * (100 * full + 16 * slides)
    assert mimo.kv_bytes(10) == 10 * mimo.kv_bytes_per_token == 10 * 2 * (full + slides)


def test_compressed_attention_keeps_few_entries(tmp_path: Path) -> None:
    model = load(tmp_path, "deepseek_v4")
    assert model.hash_layers == (0, 1)
    window = 7 * 16 * 32  # every layer keeps 16 tokens of one head of 32
    sparse = 3 * (1024 / 4) * (32 + 16)  # one entry and one index key for 4 tokens
    heavy = 2 * (1024 / 128) * 32
    assert model.kv_bytes(1024) == pytest.approx(2 * (window + sparse + heavy))


def test_an_indexer_caches_its_keys(tmp_path: Path) -> None:
    model = load(tmp_path, "glm_moe_dsa")
    own = [part for part in model.parts if "indexer" in part.name]
    assert own[0].layers == (0, 1, 2, 6)  # full where max(i - 2, 0) is a multiple of 4
    assert model.kv_bytes_per_token == 2 * (8 * (24 + 8) + 4 * 16)
    shared = load(tmp_path, "glm_moe_dsa", index_topk_pattern="FSSSFSSS")
    assert shared.parts[0].layers == (0, 4)


@needs_wheel
def test_multi_token_prediction_is_no_part(tmp_path: Path) -> None:
    name = "deepseek_v3"
    model = load(tmp_path, name, num_nextn_predict_layers=1)
    assert model.total_params == load(tmp_path, name).total_params


PRICED = {
    "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "dbrx", "flex_olmo", "glm4_moe",
    "gpt_oss", "granitemoe", "granitemoeshared", "hunyuan_v1_moe", "minimax_m2", "mixtral",
    "olmoe", "phimoe", "qwen2_moe", "qwen3_moe",
}  # fmt: skip


def test_what_is_priced_is_a_plain_transformer(tmp_path: Path) -> None:
    for name in EXAMPLES:
        model = load(tmp_path, name)
        assert (not model.unpriced) == (name in PRICED), (name, model.unpriced)
        if name in PRICED:
            assert not model.parts or not any(part.works for part in model.parts)


def answer(config: dict[str, Any]) -> ModelSpec | str:
    """The model, or the one message that refuses it."""
    try:
        return validate({"name": "x"} | geometry(config, "here"), ModelSpec, "here")
    except InputError as error:
        return str(error)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_key_that_counts_is_asked_for(name: str) -> None:
    """Without a key the model is refused by that key's name, or is the same model."""
    example = {"model_type": name} | EXAMPLES[name]
    whole = answer(example)
    assert isinstance(whole, ModelSpec)
    for key in ("hidden_size", "d_model", "vocab_size", "num_experts", "moe_intermediate_size"):
        without = answer({k: v for k, v in example.items() if k != key})
        assert without == whole or (isinstance(without, str) and key in without), key


STRANGE = (None, -1, 0, "x", [], {}, [0], [None] * 9, {"a": 1}, 1.5, True, 10**30, ["x"] * 9)
NESTED = (
    "quantization_config", "layer_types", "mlp_layer_types", "moe_layer_freq", "text_config",
    "moe_layers", "compress_rates", "attention_other_setting", "layers_block_type",
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(EXAMPLES)), value=st.sampled_from(STRANGE))
def test_strange_values_are_one_message(data: st.DataObject, name: str, value: Any) -> None:
    key = data.draw(st.sampled_from([*EXAMPLES[name], *NESTED]))
    found = answer({"model_type": name} | EXAMPLES[name] | {key: value})
    assert isinstance(found, ModelSpec) or found.startswith("here: ")


def test_layers_are_bounded_before_lists_are_made() -> None:
    many = answer({"model_type": "mixtral"} | EXAMPLES["mixtral"] | {"num_hidden_layers": 10**9})
    assert "num_hidden_layers: 1000000000 layers -- at most 4096" in str(many)
