"""Files that a serving engine loads to place its experts as a plan says.

SGLang takes one JSON map over all hidden layers, TensorRT-LLM one YAML over the MoE layers; both
number slots so that slot s lives on expert-parallel rank s // (slots / ep). What an engine does
differently from the plan is written beside the file and returned by `export_notes`.
"""

import json
import textwrap
from pathlib import Path
from typing import Any

from basis.errors import InputError
from moeplan.exports_layout import check_layout, layout_notes, num_lanes, places_experts

ENGINES = ("sglang", "trtllm")

_SGLANG_HOOK = frozenset({"deepseek_v2", "deepseek_v3", "qwen2_moe", "qwen3_moe", "glm4_moe"})
"""Families whose SGLang model class says where its experts are (read in SGLang's model files)."""
_SGLANG_NO_HOOK = frozenset({"mixtral", "granitemoe", "llama4", "olmoe"})
_TRTLLM_NAMED = frozenset({"deepseek_v3", "llama4", "qwen3_moe"})
"""Families that TensorRT-LLM's wide-EP page names."""


def export_plan(plan: dict[str, Any], engine: str, out: Path) -> list[Path]:
    """Write the files with which ``engine`` starts with the plan's expert placement.

    Parameters
    ----------
    plan : dict
        plan.json; read are moe_layer_ids, physical_to_logical_map, num_hidden_layers,
        num_experts, model_family, parallelism and dispatch.
    engine : str
        One of `ENGINES`.
    out : Path
        Folder; made if missing.

    Returns
    -------
    list of Path
        The file with the placement first.

    Raises
    ------
    InputError
        If the plan breaks a rule of the engine, or splits tokens by given shares.
    """
    notes = export_notes(plan, engine)  # refuses what cannot be expressed before anything is made
    out.mkdir(parents=True, exist_ok=True)
    files = _sglang_files(plan, notes) if engine == "sglang" else _trtllm_files(plan, notes)
    for name, text in files.items():
        (out / name).write_text(text, encoding="utf-8")
    return [out / name for name in files]


def export_notes(plan: dict[str, Any], engine: str) -> list[str]:
    """Return what ``engine`` will do otherwise than the plan assumes, one sentence or two each.

    Raises
    ------
    InputError
        As `export_plan`.
    """
    if engine not in ENGINES:
        raise InputError(f"unknown engine {engine!r} -- known: {', '.join(ENGINES)}")
    _check(plan)
    check_layout(plan, engine)
    if plan["dispatch"] == "shares" and _has_replicas(plan):
        raise InputError(
            f"dispatch 'shares' cannot be exported to {engine} -- engines split an expert's tokens "
            "evenly or by nearness, never by given shares -- plan again with dispatch even or "
            "nearest"
        )
    if not places_experts(plan):
        return layout_notes(plan, engine)
    notes = _sglang_notes(plan) if engine == "sglang" else _trtllm_notes(plan)
    notes += layout_notes(plan, engine)
    gathers = plan["parallelism"]["experts"].get("exchange") == "all_gather"
    if not _has_replicas(plan) or (engine == "sglang" and gathers):
        return notes
    return notes + _DISPATCH_NOTES[engine][plan["dispatch"]]


_DISPATCH_NOTES = {
    "sglang": {
        "even": [
            "The plan divides an expert's tokens evenly over its replicas; no SGLang setting does "
            "this together with all-to-all. Command 1 in flags.txt keeps the all-to-all that the "
            "plan priced, but each rank then uses one fixed replica of each expert (its own GPU, "
            "else its node, else a fair random choice); some versions send every rank of a node "
            "to the first replica there. Command 2 divides evenly (replica = token row % "
            "replicas), but exchanges tokens by all-gather and all-reduce. Measure both, or plan "
            "again with dispatch nearest, which command 1 follows.",
        ],
        "nearest": [
            "Dispatch nearest is SGLang's static algorithm, with one difference: where no replica "
            "is on the token's GPU, SGLang sends all tokens of a rank to one fixed replica, the "
            "plan goes round the nearest replicas.",
        ],
    },
    "trtllm": {
        "even": [
            "TensorRT-LLM goes round an expert's replicas in token order on each rank, starting at "
            "the rank's number: this is dispatch even, up to remainders.",
        ],
        "nearest": [
            "The plan prefers the nearest replica; TensorRT-LLM goes round all replicas in turn "
            "(dispatch even), so the predicted cross-rank and cross-node sends will not be "
            "reached. Plan again with dispatch even for a prediction that fits.",
        ],
    },
}


def _sglang_notes(plan: dict[str, Any]) -> list[str]:
    family, notes = str(plan["model_family"]), []
    if family == "gpt_oss":
        notes.append(
            "WARNING: SGLang's gpt_oss loader of MXFP4 weights (gpt_oss.py, read at commit "
            "009c680) gives each rank a contiguous range of experts: it does not follow the map "
            "and loads no redundant expert. Unless your version loads by the map, the answers are "
            "WRONG: compare them with and without the map before serving."
        )
    elif family in _SGLANG_NO_HOOK:
        notes.append(
            f"WARNING: SGLang's model class for {family!r} does not implement "
            "get_model_config_for_expert_location, so --init-expert-location has no effect for it "
            "or stops the start. The file is written for reference only."
        )
    elif family not in _SGLANG_HOOK:
        notes.append(
            f"WARNING: not checked whether SGLang's model class for {family!r} implements "
            "get_model_config_for_expert_location; without it the map has no effect. Look for that "
            "method in its model file."
        )
    return [*notes, "Do not set --enable-eplb: it would replace this placement while serving."]


def _trtllm_notes(plan: dict[str, Any]) -> list[str]:
    family, notes = str(plan["model_family"]), []
    if family not in _TRTLLM_NAMED:
        notes.append(
            f"WARNING: the load balancer belongs to the wide-EP backend, whose documentation names "
            f"DeepSeek-V3/R1, Llama 4 and Qwen3; not checked for {family!r}."
        )
    keep = "Keep layer_updates_per_iter at 0: any other value moves experts while serving."
    return [*notes, keep]


def _sglang_files(plan: dict[str, Any], notes: list[str]) -> dict[str, str]:
    slots, experts = _num_slots(plan), int(plan["num_experts"])
    flags = {"flags.txt": flags_page(_sglang_commands(plan, slots - experts), notes)}
    if not places_experts(plan):
        return flags
    rows = dict(zip(plan["moe_layer_ids"], plan["physical_to_logical_map"], strict=True))
    unused = [s % experts for s in range(slots)]  # layers without experts need a full row as well
    mapping = [list(rows.get(layer, unused)) for layer in range(plan["num_hidden_layers"])]
    text = "[\n" + ",\n".join(json.dumps(row, separators=(",", ":")) for row in mapping) + "\n]"
    return {
        "expert_location.json": '{"physical_to_logical_map": ' + text + "}\n",
        **flags,
    }


def _sglang_commands(plan: dict[str, Any], redundant: int) -> list[str]:
    attention, experts = plan["parallelism"]["attention"], plan["parallelism"]["experts"]
    world = num_lanes(plan)
    flags = [f"--tp-size {world}"]
    if attention["dp"] > 1:
        flags.append(f"--dp-size {attention['dp']} --enable-dp-attention")
    if places_experts(plan):
        flags += [f"--ep-size {experts['ep']}", f"--ep-num-redundant-experts {redundant}"]
        flags.append("--init-expert-location expert_location.json")
    per_node = plan.get("scenario", {}).get("ranks_per_node") or world
    if per_node < world:
        nodes = world // per_node
        flags.append(f"--nnodes {nodes} --node-rank NODE --dist-init-addr FIRST_NODE:PORT")
    head = "python -m sglang.launch_server --model-path MODEL \\\n  " + " \\\n  ".join(flags)
    if not places_experts(plan):
        return [head]
    if experts.get("exchange") == "all_gather":
        return [f"{head} \\\n  --moe-a2a-backend none --ep-dispatch-algorithm dynamic"]
    commands = [f"{head} \\\n  --moe-a2a-backend deepep --ep-dispatch-algorithm static"]
    if redundant and plan["dispatch"] == "even":
        commands.append(f"{head} \\\n  --moe-a2a-backend none --ep-dispatch-algorithm dynamic")
    return commands


def _trtllm_files(plan: dict[str, Any], notes: list[str]) -> dict[str, str]:
    rows = zip(plan["moe_layer_ids"], plan["physical_to_logical_map"], strict=True)
    attention, experts = plan["parallelism"]["attention"], plan["parallelism"]["experts"]
    balancer = [
        f"num_slots: {_num_slots(plan)}",
        "layer_updates_per_iter: 0",
        "initial_global_assignments:",
        *(f"  {layer}: {json.dumps(list(row))}" for layer, row in rows),
    ]
    placed = [
        "moe_config:",
        "  backend: WIDEEP",
        "  load_balancer: ./moe_load_balancer.yaml",
    ]
    options = [
        *(placed if places_experts(plan) else []),
        f"enable_attention_dp: {json.dumps(attention['dp'] > 1)}",
    ]
    command = (
        f"trtllm-serve MODEL --tp_size {num_lanes(plan)} --ep_size {experts['ep']} \\\n"
        "  --extra_llm_api_options extra_llm_api_options.yaml"
    )
    return {
        **({"moe_load_balancer.yaml": "\n".join(balancer) + "\n"} if places_experts(plan) else {}),
        "extra_llm_api_options.yaml": "\n".join(options) + "\n",
        "flags.txt": flags_page([command], notes),
    }


def flags_page(commands: list[str], notes: list[str]) -> str:
    """Write the commands, numbered if there are several, and the notes below."""
    many = len(commands) > 1
    blocks = [f"# command {i}\n{c}" if many else c for i, c in enumerate(commands, start=1)]
    wrapped = [
        textwrap.fill(note, 96, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)
        for note in notes
    ]
    return "\n\n".join([*blocks, *wrapped]) + "\n"


def _num_slots(plan: dict[str, Any]) -> int:
    return len(plan["physical_to_logical_map"][0])


def _has_replicas(plan: dict[str, Any]) -> bool:
    return _num_slots(plan) > int(plan["num_experts"])


def _check(plan: dict[str, Any]) -> None:
    """Check the rules that both engines share, so that no file is written that they refuse."""
    needed = ("moe_layer_ids", "physical_to_logical_map", "num_hidden_layers", "num_experts",
              "model_family", "parallelism", "dispatch")  # fmt: skip
    missing = [key for key in needed if key not in plan]
    if missing:
        raise InputError(
            f"the plan lacks {', '.join(missing)} -- export needs a plan.json that `moeplan plan` "
            "wrote -- plan again"
        )
    layers, mapping = list(plan["moe_layer_ids"]), plan["physical_to_logical_map"]
    hidden, experts, ep = plan["num_hidden_layers"], plan["num_experts"], _ep(plan)
    if not layers or layers != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= hidden:
        raise InputError(
            f"moe_layer_ids {layers} -- must be ascending layer indices below {hidden} "
            "(num_hidden_layers)"
        )
    if len(mapping) != len(layers):
        raise InputError(f"{len(mapping)} rows of slots for {len(layers)} MoE layers -- one each")
    slots = len(mapping[0])
    if slots % ep:
        raise InputError(f"{slots} slots do not divide over {ep} ranks -- engines need equal ranks")
    for layer, row in zip(layers, mapping, strict=True):
        if len(row) != slots:
            raise InputError(f"layer {layer} has {len(row)} slots, layer {layers[0]} {slots}")
        if set(row) != set(range(experts)):
            wrong = sorted(set(range(experts)) ^ set(row))
            raise InputError(
                f"layer {layer}: experts missing or unknown {wrong[:8]} -- every one of 0 to "
                f"{experts - 1} needs a slot"
            )


def _ep(plan: dict[str, Any]) -> int:
    attention, experts = plan["parallelism"]["attention"], plan["parallelism"]["experts"]
    if attention.get("pp", 1) != 1:
        raise InputError(
            f"pipeline parallelism {attention['pp']} cannot be exported -- one stage only -- plan "
            "with pp 1"
        )
    return int(experts["ep"])
