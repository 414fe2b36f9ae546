"""Which parallel layouts the engines' flags can say, for the exports of placements and layouts.

Both engines count all ranks of a stage as tensor-parallel ranks, and derive the experts' tensor
parallelism as these over the expert-parallel ones: blocks that each hold all experts cannot be
said. Counts of ranks only.
"""

from typing import Any

from basis.errors import InputError


def num_lanes(plan: dict[str, Any]) -> int:
    """Return the ranks of a pipeline stage."""
    attention = plan["parallelism"]["attention"]
    return int(attention["dp"] * attention.get("tp", 1))


def places_experts(plan: dict[str, Any]) -> bool:
    """Whether an engine reads the places of experts: not where ranks share all of them by width."""
    return int(plan["parallelism"]["experts"]["ep"]) > 1 or num_lanes(plan) == 1


def check_layout(plan: dict[str, Any], engine: str) -> None:
    """Check that an engine's flags can say the layout.

    Raises
    ------
    InputError
    """
    attention, experts = plan["parallelism"]["attention"], plan["parallelism"]["experts"]
    dp, tp = attention["dp"], attention.get("tp", 1)
    ep, etp = experts["ep"], experts.get("tp", 1)
    if ep * etp != num_lanes(plan):
        raise InputError(
            f"experts ep {ep} x tp {etp} on {num_lanes(plan)} ranks cannot be exported to {engine} "
            "-- the engine has one block of ranks with all experts: ep x tp must be all ranks -- "
            "plan.layouts dp_ep gives such a layout"
        )
    if engine == "trtllm" and dp > 1 and tp > 1:
        raise InputError(
            f"attention dp {dp} x tp {tp} cannot be exported to trtllm -- enable_attention_dp "
            "gives every rank its own requests, or none: dp or tp must be 1"
        )
    gathers = experts.get("exchange") == "all_gather"
    if engine == "sglang" and ep > 1 and etp > 1 and not gathers:
        raise InputError(
            f"experts ep {ep} x tp {etp} with an all-to-all cannot be exported to sglang -- its "
            "all-to-all back ends need ep = all ranks -- plan.layouts dp_ep gives such a layout"
        )


def layout_notes(plan: dict[str, Any], engine: str) -> list[str]:
    """Return what an engine decides by itself about the layout, one sentence each."""
    experts = plan["parallelism"]["experts"]
    if not places_experts(plan):
        return ["Every rank works on all experts: there is no placement to load."]
    if engine == "trtllm" and experts.get("exchange") == "all_gather":
        return [
            "The plan exchanges tokens by all-gather and reduce-scatter; TensorRT-LLM chooses "
            "between this and its all-to-all by itself."
        ]
    return []
