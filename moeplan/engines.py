"""Every engine that a plan can be exported to, whatever kind of plan it is.

Placements and layouts go to the engines of `moeplan.exports`, plans with experts in several
memories to those of `moeplan.exports_offload`.
"""

from pathlib import Path
from typing import Any

from basis.errors import InputError
from moeplan import exports, exports_offload

ENGINES = (*exports.ENGINES, *exports_offload.OFFLOAD_ENGINES)
NAMES = {
    "sglang": "SGLang",
    "trtllm": "TensorRT-LLM",
    "sglang-kt": "SGLang with ktransformers",
    "llama.cpp": "llama.cpp",
}
"""Engines by their key, for people."""


def engines_for(plan: dict[str, Any]) -> tuple[str, ...]:
    """Return the engines that plans of this kind are for."""
    return exports_offload.OFFLOAD_ENGINES if "offload" in plan else exports.ENGINES


def export_plan(plan: dict[str, Any], engine: str, out: Path) -> list[Path]:
    """Write the files with which ``engine`` runs a plan; the main file first.

    Raises
    ------
    InputError
        If the engine is unknown, not for this kind of plan, or cannot express it.
    """
    _check(plan, engine)
    if "offload" in plan:
        return exports_offload.export_offload(plan, engine, out)
    return exports.export_plan(plan, engine, out)


def export_notes(plan: dict[str, Any], engine: str) -> list[str]:
    """Return what ``engine`` does otherwise than the plan assumes; errors as `export_plan`."""
    _check(plan, engine)
    if "offload" in plan:
        return exports_offload.export_offload_notes(plan, engine)
    return exports.export_notes(plan, engine)


def exports_for_people(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Return for each engine its name, whether it can run the plan, and the notes or the reason."""
    found = []
    for engine in engines_for(plan):
        try:
            notes, possible = export_notes(plan, engine), True
        except InputError as error:
            notes, possible = [str(error)], False
        found.append({"key": engine, "name": NAMES[engine], "notes": notes, "possible": possible})
    return found


def _check(plan: dict[str, Any], engine: str) -> None:
    fitting = engines_for(plan)
    if engine not in ENGINES:
        raise InputError(f"unknown engine {engine!r} -- known: {', '.join(ENGINES)}")
    if engine not in fitting:
        kind = "is of several memories" if "offload" in plan else "places experts on GPUs"
        raise InputError(f"export to {engine}: the plan {kind} -- export to {', '.join(fitting)}")
