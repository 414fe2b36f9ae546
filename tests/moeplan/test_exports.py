"""Exports against the engines' own rules, applied here independently of the writer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from basis.errors import InputError
from moeplan.exports import export_notes, export_plan

Plan = dict[str, Any]
Sample = Callable[[str], Plan]


def load_sglang(text: str, *, hidden: int, experts: int, redundant: int, ep: int) -> np.ndarray:
    """Read a file as SGLang does at start: its keys are the arguments of init_by_mapping."""

    def init_by_mapping(physical_to_logical_map: list[list[int]]) -> np.ndarray:
        return np.array(physical_to_logical_map)

    mapping = init_by_mapping(**json.loads(text))
    assert mapping.shape == (hidden, experts + redundant)
    assert mapping.dtype.kind == "i"
    assert (experts + redundant) % ep == 0
    for row in mapping:
        assert set(row.tolist()) == set(range(experts))
    return mapping


def load_trtllm(text: str, *, moe_layers: list[int], experts: int, ep: int) -> dict[int, list[int]]:
    """Read a file as TensorRT-LLM's strict configuration class and its layers do."""
    data = yaml.safe_load(text)
    assert set(data) <= {"num_slots", "initial_global_assignments", "layer_updates_per_iter"}
    slots, assigned = data["num_slots"], data["initial_global_assignments"]
    assert type(slots) is int
    assert slots >= experts
    assert slots % ep == 0
    assert data["layer_updates_per_iter"] == 0
    assert all(type(layer) is int for layer in assigned)
    for layer in moe_layers:
        row = assigned[layer]  # the engine's KeyError
        assert len(row) == slots
        assert all(type(expert) is int for expert in row)
        assert set(row) == set(range(experts))
    return assigned


def sglang_facts(plan: Plan) -> dict[str, int]:
    slots = len(plan["physical_to_logical_map"][0])
    return {
        "hidden": plan["num_hidden_layers"],
        "experts": plan["num_experts"],
        "redundant": slots - plan["num_experts"],
        "ep": plan["parallelism"]["experts"]["ep"],
    }


def trtllm_facts(plan: Plan) -> dict[str, Any]:
    ep = plan["parallelism"]["experts"]["ep"]
    return {"moe_layers": plan["moe_layer_ids"], "experts": plan["num_experts"], "ep": ep}


@pytest.mark.parametrize("size", ["one_node", "two_nodes", "large"])
def test_sglang_loads_the_map(sample_plan: Sample, tmp_path: Path, size: str) -> None:
    plan = sample_plan(size)
    files = export_plan(plan, "sglang", tmp_path / "new")
    mapping = load_sglang(files[0].read_text(), **sglang_facts(plan))
    assert mapping[plan["moe_layer_ids"]].tolist() == plan["physical_to_logical_map"]


def test_sglang_gives_dense_layers_a_full_row(sample_plan: Sample, tmp_path: Path) -> None:
    plan = sample_plan("large")
    mapping = load_sglang(
        export_plan(plan, "sglang", tmp_path)[0].read_text(), **sglang_facts(plan)
    )
    for dense in range(3):
        assert mapping[dense].tolist() == [s % 256 for s in range(288)]


@pytest.mark.parametrize("size", ["one_node", "two_nodes", "large"])
def test_trtllm_loads_the_map(sample_plan: Sample, tmp_path: Path, size: str) -> None:
    plan = sample_plan(size)
    files = export_plan(plan, "trtllm", tmp_path)
    assigned = load_trtllm(files[0].read_text(), **trtllm_facts(plan))
    assert list(assigned) == plan["moe_layer_ids"]
    assert list(assigned.values()) == plan["physical_to_logical_map"]
    options = yaml.safe_load((tmp_path / "extra_llm_api_options.yaml").read_text())
    assert set(options) == {"moe_config", "enable_attention_dp"}
    assert options["moe_config"]["backend"].upper() == "WIDEEP"
    balancer = tmp_path / options["moe_config"]["load_balancer"]
    assert balancer.samefile(files[0])
    assert options["enable_attention_dp"] is True


@pytest.mark.parametrize("engine", ["sglang", "trtllm"])
def test_slots_are_on_the_ranks_of_the_plan(
    sample_plan: Sample, tmp_path: Path, engine: str
) -> None:
    plan = sample_plan("one_node")
    text = export_plan(plan, engine, tmp_path)[0].read_text()
    if engine == "sglang":
        row = json.loads(text)["physical_to_logical_map"][plan["moe_layer_ids"][5]]
    else:
        row = yaml.safe_load(text)["initial_global_assignments"][plan["moe_layer_ids"][5]]
    per_rank = len(row) // 8
    hosted = {rank: {e for s, e in enumerate(row) if s // per_rank == rank} for rank in range(8)}
    planned = np.reshape(plan["physical_to_logical_map"][5], (8, -1))
    assert hosted == {rank: set(planned[rank].tolist()) for rank in range(8)}


def _sglang_mutations() -> dict[str, Callable[[dict[str, Any]], None]]:
    def lose_expert(data: dict[str, Any]) -> None:
        row = data["physical_to_logical_map"][0]
        data["physical_to_logical_map"][0] = [1 if e == 0 else e for e in row]

    return {
        "extra key": lambda d: d.update(version=1),
        "key misspelt": lambda d: d.update(physical_to_logical=d.pop("physical_to_logical_map")),
        "layer missing": lambda d: d["physical_to_logical_map"].pop(),
        "slot missing": lambda d: [row.pop() for row in d["physical_to_logical_map"]],
        "ragged": lambda d: d["physical_to_logical_map"][2].pop(),
        "unknown expert": lambda d: d["physical_to_logical_map"][1].__setitem__(0, 999),
        "expert lost": lose_expert,
    }


@pytest.mark.parametrize("name", list(_sglang_mutations()))
def test_the_sglang_check_fails_on_broken_files(
    sample_plan: Sample, tmp_path: Path, name: str
) -> None:
    plan = sample_plan("one_node")
    data = json.loads(export_plan(plan, "sglang", tmp_path)[0].read_text())
    _sglang_mutations()[name](data)
    with pytest.raises((AssertionError, TypeError, ValueError)):
        load_sglang(json.dumps(data), **sglang_facts(plan))


def _trtllm_mutations() -> dict[str, Callable[[dict[str, Any]], None]]:
    def renumber(data: dict[str, Any]) -> None:
        rows = data["initial_global_assignments"]
        data["initial_global_assignments"] = dict(enumerate(rows.values()))

    def lose_expert(data: dict[str, Any]) -> None:
        row = data["initial_global_assignments"][3]
        data["initial_global_assignments"][3] = [1 if e == 0 else e for e in row]

    return {
        "extra key": lambda d: d.update(ep_size=32),
        "MoE indices for layer ids": renumber,
        "layer missing": lambda d: d["initial_global_assignments"].pop(6),
        "slot missing": lambda d: d["initial_global_assignments"][4].pop(),
        "slots do not divide": lambda d: d.update(num_slots=11),
        "moves experts": lambda d: d.update(layer_updates_per_iter=2),
        "expert lost": lose_expert,
    }


@pytest.mark.parametrize("name", list(_trtllm_mutations()))
def test_the_trtllm_check_fails_on_broken_files(
    sample_plan: Sample, tmp_path: Path, name: str
) -> None:
    plan = sample_plan("small")
    data = yaml.safe_load(export_plan(plan, "trtllm", tmp_path)[0].read_text())
    _trtllm_mutations()[name](data)
    with pytest.raises((AssertionError, KeyError)):
        load_trtllm(yaml.safe_dump(data), **trtllm_facts(plan))


def test_sglang_flags_match_the_map(sample_plan: Sample, tmp_path: Path) -> None:
    plan = sample_plan("one_node") | {"dispatch": "nearest"}
    export_plan(plan, "sglang", tmp_path)
    words = (tmp_path / "flags.txt").read_text().replace("\\\n", " ").split()
    flag = {word: words[i + 1] for i, word in enumerate(words) if word.startswith("--")}
    assert (flag["--ep-size"], flag["--tp-size"], flag["--dp-size"]) == ("8", "8", "8")
    assert flag["--ep-num-redundant-experts"] == "8"
    assert (tmp_path / flag["--init-expert-location"]).is_file()
    assert flag["--ep-dispatch-algorithm"] == "static"
    assert words.count("sglang.launch_server") == 1
    assert "--nnodes" not in flag
    assert "Do not set --enable-eplb" in (tmp_path / "flags.txt").read_text()


def test_even_dispatch_names_both_imperfect_settings(sample_plan: Sample, tmp_path: Path) -> None:
    export_plan(sample_plan("one_node"), "sglang", tmp_path)
    text = (tmp_path / "flags.txt").read_text()
    assert text.count("python -m sglang.launch_server") == 2
    assert "--moe-a2a-backend deepep --ep-dispatch-algorithm static" in text
    assert "--moe-a2a-backend none --ep-dispatch-algorithm dynamic" in text


@pytest.mark.parametrize("dispatch", ["even", "nearest", "shares"])
def test_without_replicas_dispatch_does_not_matter(
    sample_plan: Sample, tmp_path: Path, dispatch: str
) -> None:
    plan = sample_plan("two_nodes") | {"dispatch": dispatch}
    export_plan(plan, "sglang", tmp_path)
    text = (tmp_path / "flags.txt").read_text()
    assert text.count("python -m sglang.launch_server") == 1
    assert "--nnodes 2 " in text
    assert len(export_notes(plan, "sglang")) == 1


@pytest.mark.parametrize("engine", ["sglang", "trtllm"])
def test_shares_are_refused_and_nothing_is_written(
    sample_plan: Sample, tmp_path: Path, engine: str
) -> None:
    plan = sample_plan("one_node") | {"dispatch": "shares"}
    with pytest.raises(InputError, match="plan again with dispatch even or nearest"):
        export_plan(plan, engine, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("engine", "family", "word"),
    [
        ("sglang", "mixtral", "no effect"),
        ("sglang", "gpt_oss", "answers are WRONG"),
        ("sglang", "never_heard_of", "not checked"),
        ("trtllm", "mixtral", "not checked"),
    ],
)
def test_models_that_an_engine_may_not_place_are_warned_of(
    sample_plan: Sample, tmp_path: Path, engine: str, family: str, word: str
) -> None:
    plan = sample_plan("one_node") | {"model_family": family}
    warnings = [note for note in export_notes(plan, engine) if note.startswith("WARNING")]
    assert len(warnings) == 1
    assert word in warnings[0]
    export_plan(plan, engine, tmp_path)
    page = " ".join((tmp_path / "flags.txt").read_text().replace("#", "").split())
    assert warnings[0] in page


def _broken_plans() -> dict[str, tuple[Callable[[Plan], None], str]]:
    return {
        "part missing": (lambda p: p.pop("num_experts"), "lacks num_experts"),
        "layer id too large": (lambda p: p.update(num_hidden_layers=20), "below 20"),
        "layer ids not ascending": (lambda p: p["moe_layer_ids"].reverse(), "ascending"),
        "row missing": (lambda p: p["physical_to_logical_map"].pop(), "23 rows"),
        "ragged": (lambda p: p["physical_to_logical_map"][3].pop(), "layer 3 has 39 slots"),
        "ranks": (lambda p: p["parallelism"]["experts"].update(ep=7), "do not divide over 7"),
        "pipeline": (lambda p: p["parallelism"]["attention"].update(pp=2), "pp 1"),
        "expert lost": (
            lambda p: p["physical_to_logical_map"].__setitem__(2, [1] * 40),
            "layer 2: experts missing",
        ),
        "no layers": (lambda p: p.update(moe_layer_ids=[]), "ascending"),
    }


@pytest.mark.parametrize("name", list(_broken_plans()))
@pytest.mark.parametrize("engine", ["sglang", "trtllm"])
def test_broken_plans_are_refused(
    sample_plan: Sample, tmp_path: Path, name: str, engine: str
) -> None:
    plan = sample_plan("one_node")
    damage, message = _broken_plans()[name]
    damage(plan)
    with pytest.raises(InputError, match=message):
        export_plan(plan, engine, tmp_path)


def test_unknown_engine_is_refused(sample_plan: Sample, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="known: sglang, trtllm"):
        export_plan(sample_plan("one_node"), "vllm", tmp_path)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_valid_plan_exports(data: st.DataObject, tmp_path_factory: Any) -> None:
    experts = data.draw(st.integers(1, 12))
    ep = data.draw(st.sampled_from([1, 2, 3, 4]))
    slots = -(-experts // ep) * ep + ep * data.draw(st.integers(0, 2))
    hidden = data.draw(st.integers(1, 6))
    layers = sorted(data.draw(st.sets(st.integers(0, hidden - 1), min_size=1)))
    row = st.permutations([*range(experts), *(s % experts for s in range(slots - experts))])
    plan = {
        "moe_layer_ids": layers,
        "physical_to_logical_map": [data.draw(row) for _ in layers],
        "num_hidden_layers": hidden,
        "num_experts": experts,
        "model_family": "qwen3_moe",
        "dispatch": data.draw(st.sampled_from(["even", "nearest"])),
        "parallelism": {"attention": {"dp": ep, "tp": 1, "pp": 1}, "experts": {"ep": ep, "tp": 1}},
    }
    folder = tmp_path_factory.mktemp("export")
    mapping = load_sglang(export_plan(plan, "sglang", folder)[0].read_text(), **sglang_facts(plan))
    assert mapping[layers].tolist() == plan["physical_to_logical_map"]
    assigned = load_trtllm(export_plan(plan, "trtllm", folder)[0].read_text(), **trtllm_facts(plan))
    assert list(assigned.values()) == plan["physical_to_logical_map"]
