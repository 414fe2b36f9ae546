"""Files and flags with which an engine keeps the experts of an offload plan on the GPU.

sglang-kt keeps the experts that a file counts most, over all layers: counts of one and zero force
any set. llama.cpp names tensors by regular expressions, and a layer's experts are one tensor each
of up, gate and down, so only whole layers can be chosen there.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from moeplan.exports import flags_page

OFFLOAD_ENGINES = ("sglang-kt", "llama.cpp")
_TENSORS = r"ffn_(up|down|gate|gate_up)_(ch|)exps"
"""Expert tensors of a block, as llama.cpp's own ``--n-cpu-moe`` names them."""


def export_offload(plan: dict[str, Any], engine: str, out: Path) -> list[Path]:
    """Write what ``engine`` needs to keep the plan's experts on the GPU.

    Parameters
    ----------
    plan : dict
        plan.json of an offload plan; read are moe_layer_ids, num_hidden_layers, num_experts and
        offload.engine: gpu_experts (ids per MoE layer), gpu_layers and last_gpu_layers (indices of
        the model's layers), step_time_s (predicted, by these three and ``plan``).
    engine : str
        One of `OFFLOAD_ENGINES`.
    out : Path
        Folder; made if missing.

    Returns
    -------
    list of Path
        The file that the engine reads first.

    Raises
    ------
    InputError
        For an unknown engine, a plan without these entries, or ``sglang-kt`` without torch.
    """
    notes = export_offload_notes(plan, engine)
    if engine == "sglang-kt":
        return _write_kt(plan, notes, out)
    commands = llama_commands(plan)
    out.mkdir(parents=True, exist_ok=True)
    flags = out / "flags.txt"
    flags.write_text(flags_page(commands, notes), encoding="utf-8")
    return [flags]


def export_offload_notes(plan: dict[str, Any], engine: str) -> list[str]:
    """Return what ``engine`` does otherwise than the plan assumes, a sentence or two each.

    Raises
    ------
    InputError
        As `export_offload`, torch apart.
    """
    if engine not in OFFLOAD_ENGINES:
        raise InputError(f"unknown engine {engine!r} -- known: {', '.join(OFFLOAD_ENGINES)}")
    chosen = _engine_part(plan)
    return _kt_notes(chosen) if engine == "sglang-kt" else _llama_notes(chosen)


def logical_count(plan: dict[str, Any]) -> NDArray[np.int64]:
    """Return the counts that make sglang-kt's ``frequency`` keep exactly the plan's experts.

    Returns
    -------
    int64 array [1, hidden layers, experts]
        1 for an expert on the GPU, 0 for the others; dense layers are all 0.
    """
    count = np.zeros((1, plan["num_hidden_layers"], plan["num_experts"]), dtype=np.int64)
    kept = _engine_part(plan)["gpu_experts"]
    for layer, experts in zip(plan["moe_layer_ids"], kept, strict=True):
        count[0, layer, list(experts)] = 1
    return count


def gpu_experts_ratio(plan: dict[str, Any]) -> float:
    """Return the ratio of which sglang-kt keeps ``int(ratio x layers x experts)`` experts.

    Half an expert more than the number keeps rounding down from losing one.
    """
    kept = sum(len(row) for row in _engine_part(plan)["gpu_experts"])
    total = len(plan["moe_layer_ids"]) * int(plan["num_experts"])
    return min((kept + 0.5) / total, 1.0)


def override_tensor(layers: list[int]) -> str:
    """Return the value of ``-ot`` that leaves the experts of these layers on the CPU.

    No comma and no ``=`` inside the expression: llama.cpp splits the value there.
    """
    return rf"blk\.({'|'.join(map(str, layers))})\.{_TENSORS}=CPU"


def n_cpu_moe(layers: list[int]) -> int:
    """Return N of ``--n-cpu-moe`` that leaves these first MoE layers on the CPU.

    N counts blocks from 0, dense ones included.
    """
    return max(layers) + 1 if layers else 0


def llama_commands(plan: dict[str, Any]) -> list[str]:
    """Return llama-server commands: any set of layers by ``-ot``, the last ones by a number."""
    chosen, every = _engine_part(plan), list(plan["moe_layer_ids"])
    away = sorted(set(every) - set(chosen["gpu_layers"]))
    first = sorted(set(every) - set(chosen["last_gpu_layers"]))
    if first != every[: len(first)]:
        raise InputError(
            f"last_gpu_layers {chosen['last_gpu_layers']} -- must be the last of the MoE layers "
            f"{every[0]} to {every[-1]}: --n-cpu-moe counts from block 0 -- plan again"
        )
    head = "llama-server -m MODEL.gguf -ngl 99"
    named = f'{head} \\\n  -ot "{override_tensor(away)}"' if away else head
    return [named, f"{head} \\\n  --n-cpu-moe {n_cpu_moe(first)}"]


def _engine_part(plan: dict[str, Any]) -> dict[str, Any]:
    missing = [k for k in ("moe_layer_ids", "num_hidden_layers", "num_experts") if k not in plan]
    part = plan.get("offload", {}).get("engine") or {}
    wanted = ("gpu_experts", "gpu_layers", "last_gpu_layers", "step_time_s")
    missing += [f"offload.engine.{key}" for key in wanted if key not in part]
    if missing:
        raise InputError(
            f"the plan lacks {', '.join(missing)} -- this export needs a plan.json that `moeplan "
            "plan` wrote with plan.offload and a processor at the experts' home -- plan again"
        )
    return dict(part)


def _write_kt(plan: dict[str, Any], notes: list[str], out: Path) -> list[Path]:
    try:
        import torch
    except ImportError as error:
        raise InputError(
            "sglang-kt reads a .pt file, which needs torch to write -- install it with "
            "`pip install moeplan[torch]`"
        ) from error
    count = logical_count(plan)
    out.mkdir(parents=True, exist_ok=True)
    target = out / "gpu_experts.pt"
    torch.save({"logical_count": torch.from_numpy(count)}, target)
    mask = out / "gpu_experts.json"
    rows = dict(zip(plan["moe_layer_ids"], _engine_part(plan)["gpu_experts"], strict=True))
    mask.write_text(json.dumps(rows) + "\n", encoding="utf-8")
    command = (
        "python -m sglang.launch_server --model-path MODEL \\\n"
        "  --kt-weight-path CPU_WEIGHTS --kt-method METHOD \\\n"
        "  --kt-expert-placement-strategy frequency --init-expert-location gpu_experts.pt \\\n"
        f"  --kt-gpu-experts-ratio {gpu_experts_ratio(plan):.10f}"
    )
    flags = out / "flags.txt"
    flags.write_text(flags_page([command], notes), encoding="utf-8")
    return [target, mask, flags]


def _kt_notes(chosen: dict[str, Any]) -> list[str]:
    times = chosen["step_time_s"]
    return [
        "For the sglang-kt package (not upstream SGLang, which keeps experts 0 to N - 1 of every "
        "layer). METHOD and CPU_WEIGHTS are those of your CPU and checkpoint. Do not set "
        "--kt-enable-dynamic-expert-update: it would replace this choice while serving.",
        f"Predicted {times['gpu_experts'] * 1e3:.2f} ms per token with experts that stay where "
        f"they are, which is what this engine does; the plan's best rule takes "
        f"{times['plan'] * 1e3:.2f} ms.",
    ]


def _llama_notes(chosen: dict[str, Any]) -> list[str]:
    times = chosen["step_time_s"]
    exact, coarse, last = (times[k] for k in ("gpu_experts", "gpu_layers", "last_gpu_layers"))
    return [
        "Command 1 names the layers whose experts stay on the CPU; command 2 takes the first N "
        "blocks. llama.cpp keeps the experts of a layer in one tensor, so single experts cannot "
        "be chosen.",
        f"Predicted: {coarse * 1e3:.2f} ms per token with command 1, {last * 1e3:.2f} ms with "
        f"command 2; choosing experts one by one would take {exact * 1e3:.2f} ms: the grain of "
        f"whole layers costs {coarse / exact - 1:.0%}.",
    ]
