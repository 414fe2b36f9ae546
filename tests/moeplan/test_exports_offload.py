import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from basis.errors import InputError
from moeplan.exports_offload import (
    export_offload,
    gpu_experts_ratio,
    llama_commands,
    logical_count,
    n_cpu_moe,
    override_tensor,
)

HIDDEN, EXPERTS, MOE = 7, 5, [1, 2, 4, 5, 6]  # layers 0 and 3 are dense


def _plan(kept: list[list[int]] | None = None, **engine: Any) -> dict[str, Any]:
    part = {
        "gpu_experts": kept if kept is not None else [[0, 3], [], [1], [0, 1, 2, 3, 4], [4]],
        "gpu_layers": [2, 5],
        "last_gpu_layers": [5, 6],
        "step_time_s": {
            "plan": 0.01,
            "gpu_experts": 0.012,
            "gpu_layers": 0.018,
            "last_gpu_layers": 0.02,
        },
    }
    return {
        "moe_layer_ids": MOE,
        "num_hidden_layers": HIDDEN,
        "num_experts": EXPERTS,
        "offload": {"engine": part | engine},
    }


def _kt_frequency(counts: np.ndarray, ratio: float, moe_layers: int) -> np.ndarray:
    """The engine's rule, written here by itself: the global top-K of the summed counts."""
    summed = counts.sum(axis=0)
    keep = int(ratio * moe_layers * summed.shape[1])
    mask = np.zeros(summed.size, dtype=bool)
    mask[np.argsort(-summed.ravel(), kind="stable")[:keep]] = True
    return mask.reshape(summed.shape)


KEPT = st.lists(
    st.sets(st.integers(0, EXPERTS - 1)).map(sorted), min_size=len(MOE), max_size=len(MOE)
)


@given(KEPT)
def test_frequency_strategy_keeps_exactly_the_plans_experts(kept: list[list[int]]) -> None:
    plan = _plan(kept)
    mask = _kt_frequency(logical_count(plan), gpu_experts_ratio(plan), len(MOE))
    wanted = np.zeros((HIDDEN, EXPERTS), dtype=bool)
    for layer, experts in zip(MOE, kept, strict=True):
        wanted[layer, experts] = True
    np.testing.assert_array_equal(mask, wanted)


def test_the_file_is_what_the_engine_loads(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    target, mask, flags = export_offload(_plan(), "sglang-kt", tmp_path / "kt")
    loaded = torch.load(target, weights_only=True)
    assert set(loaded) == {"logical_count"}
    assert loaded["logical_count"].shape == (1, HIDDEN, EXPERTS)
    assert not loaded["logical_count"][:, [0, 3]].any()
    np.testing.assert_array_equal(loaded["logical_count"].numpy(), logical_count(_plan()))
    assert json.loads(mask.read_text())["5"] == [0, 1, 2, 3, 4]
    text = flags.read_text()
    assert "--kt-expert-placement-strategy frequency" in text
    ratio = float(re.search(r"--kt-gpu-experts-ratio ([\d.]+)", text)[1])  # type: ignore[index]
    assert int(ratio * len(MOE) * EXPERTS) == 9


def test_without_torch_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"moeplan\[torch\]"):
        export_offload(_plan(), "sglang-kt", tmp_path)


def _tensors() -> list[str]:
    names = []
    for block in [*range(HIDDEN), 12, 21]:
        names += [f"blk.{block}.ffn_{part}_exps.weight" for part in ("up", "down", "gate")]
        names += [f"blk.{block}.ffn_gate_up_exps.weight", f"blk.{block}.ffn_down_chexps.weight"]
        names += [f"blk.{block}.ffn_gate_inp.weight", f"blk.{block}.attn_q.weight"]
        names += [f"blk.{block}.ffn_up_shexp.weight", f"blk.{block}.ffn_norm.weight"]
    return names


def _placed(value: str, tensor: str) -> str:
    """llama.cpp's rule: split on commas, then at the first '=', first match wins."""
    for item in value.split(","):
        pattern, _, buffer = item.partition("=")
        if re.search(pattern, tensor):
            return buffer
    return "GPU"


def test_override_names_the_experts_of_these_layers_and_nothing_else() -> None:
    value = override_tensor([1, 2, 4])
    assert "," not in value
    assert value.count("=") == 1
    for tensor in _tensors():
        block = int(tensor.split(".")[1])
        expert = "_exps" in tensor or "_chexps" in tensor
        assert (_placed(value, tensor) == "CPU") == (expert and block in {1, 2, 4}), tensor


def test_number_of_blocks_counts_dense_ones() -> None:
    assert n_cpu_moe([]) == 0
    assert n_cpu_moe([1, 2, 4]) == 5  # blocks 0 to 4, of which 0 and 3 are dense


def test_commands_leave_the_other_layers_on_the_cpu() -> None:
    named, counted = llama_commands(_plan())
    value = re.search(r'-ot "(.*)"', named)[1]  # type: ignore[index]
    away = {t for t in _tensors() if _placed(value, t) == "CPU"}
    assert {int(t.split(".")[1]) for t in away} == {1, 4, 6}
    assert "--n-cpu-moe 5" in counted


def test_everything_on_the_gpu_needs_no_override() -> None:
    named, counted = llama_commands(_plan(gpu_layers=MOE, last_gpu_layers=MOE))
    assert "-ot" not in named
    assert "--n-cpu-moe 0" in counted


def test_llama_flags_say_what_the_grain_costs(tmp_path: Path) -> None:
    (flags,) = export_offload(_plan(), "llama.cpp", tmp_path / "new" / "folder")
    text = " ".join(flags.read_text().replace("#", "").split())
    assert "the grain of whole layers costs 50%" in text
    assert "18.00 ms" in text


@pytest.mark.parametrize(
    ("plan", "engine", "message"),
    [
        (_plan(), "vllm", "unknown engine 'vllm' -- known: sglang-kt, llama.cpp"),
        ({"moe_layer_ids": MOE}, "llama.cpp", "lacks num_hidden_layers, num_experts, offload"),
        (_plan(last_gpu_layers=[1, 2]), "llama.cpp", "must be the last"),
    ],
)
def test_bad_plans_are_refused(
    plan: dict[str, Any], engine: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        export_offload(plan, engine, tmp_path)
    assert not list(tmp_path.iterdir())
