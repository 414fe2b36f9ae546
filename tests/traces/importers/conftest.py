"""A small model with dense layers, a trace of it, and that trace in the layouts of the engines.

The writers follow the documented layouts with plain loops and share nothing with the importers.
"""

import base64
import io
import json
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from traces.importers.base import Asked
from traces.model_spec import ModelSpec
from traces.routing_trace import RoutingTrace, TraceMeta

LAYERS, MOE, EXPERTS, TOP_K = 6, (1, 2, 4), 12, 2
STEPS = 5


def small_model(**changes: Any) -> ModelSpec:
    """Six layers, three of them MoE."""
    fields = {
        "name": "small", "family": "mixtral", "num_layers": LAYERS, "hidden_size": 8,
        "vocab_size": 16, "tie_embeddings": False, "moe_layer_ids": MOE, "num_experts": EXPERTS,
        "top_k": TOP_K, "expert_width": 4, "dense_width": 16,
        "attention": {"kind": "gqa", "num_heads": 2, "num_kv_heads": 1, "head_dim": 4,
                      "v_head_dim": 4},
        "weight_dtype": "bf16", "expert_dtype": "bf16", "activation_dtype": "bf16",
        "kv_dtype": "bf16", "comm_size": 8,
    } | changes  # fmt: skip
    return ModelSpec.model_validate(fields)


@dataclass(frozen=True)
class Source:
    """A trace as a source of some format."""

    trace: RoutingTrace
    prompts: tuple[int, ...]
    outputs: tuple[int, ...]
    """Generated tokens; the last of each request has no row."""

    def rows(self, request: int) -> np.ndarray:
        """``[rows, all layers, K]`` of a request, 0 in dense layers."""
        mine = self.trace.experts[self.trace.request_id == request]
        every = np.zeros((len(mine), LAYERS, TOP_K), np.int64)
        for place, layer in enumerate(MOE):
            every[:, layer] = mine[:, place]
        return every

    def counts(self) -> np.ndarray:
        """``[STEPS, all layers, E]``: rows dealt to steps in turn."""
        counts = np.zeros((STEPS, LAYERS, EXPERTS), np.int64)
        for row, cells in enumerate(self.trace.experts):
            for place, layer in enumerate(MOE):
                for expert in cells[place]:
                    counts[row % STEPS, layer, expert] += 1
        return counts


def make_source(
    prompts: tuple[int, ...] = (5, 3, 8), outputs: tuple[int, ...] = (4, 1, 6), seed: int = 0
) -> Source:
    """Draw a trace: requests one after the other, every token but the last of each."""
    rng = np.random.default_rng(seed)
    request, position, decode, step = [], [], [], []
    for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        for place in range(prompt + output - 1):
            request.append(number)
            position.append(place)
            decode.append(place >= prompt)
            step.append(max(place - prompt + 1, 0))
    chosen = rng.random((len(request), len(MOE), EXPERTS)).argsort(axis=-1)[..., :TOP_K]
    trace = RoutingTrace(
        meta=TraceMeta(model="small", num_experts=EXPERTS, top_k=TOP_K, moe_layer_ids=MOE),
        request_id=np.array(request, np.int32),
        position=np.array(position, np.int32),
        decode=np.array(decode, np.bool_),
        step=np.array(step, np.int32),
        domain=np.zeros(len(request), np.int16),
        domains=("imported",),
        experts=chosen.astype(np.uint16),
    )
    return Source(trace, prompts, outputs)


def npy_text(array: np.ndarray) -> str:
    """Return an array as base64 of npy."""
    out = io.BytesIO()
    np.save(out, array)
    return base64.b64encode(out.getvalue()).decode()


def write_lines(path: Path, values: list[Any]) -> Path:
    """Write JSONL."""
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def usage(source: Source, request: int) -> dict[str, int]:
    """What a server says of the lengths."""
    prompt, output = source.prompts[request], source.outputs[request]
    return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}


def vllm_014(source: Source, folder: Path) -> Path:
    """Outputs of the offline API, field by field."""
    lines = [
        {
            "request_id": str(number),
            "prompt_token_ids": list(range(prompt)),
            "outputs": [{"index": 0, "token_ids": list(range(output)),
                         "routed_experts": source.rows(number).tolist()}],
        }
        for number, (prompt, output) in enumerate(zip(source.prompts, source.outputs, strict=True))
    ]  # fmt: skip
    return write_lines(folder / "outputs.jsonl", lines)


def vllm_014_npz(source: Source, folder: Path) -> Path:
    """One npz per request."""
    inside = folder / "arrays"
    inside.mkdir()
    for number, (prompt, output) in enumerate(zip(source.prompts, source.outputs, strict=True)):
        np.savez(
            inside / f"{number:03}.npz",
            routed_experts=source.rows(number).astype(np.int32),
            prompt_token_ids=np.arange(prompt),
            output_token_ids=np.arange(output),
        )
    return inside


def vllm_014_npy(source: Source, folder: Path) -> Path:
    """The array of one request alone."""
    np.save(folder / "request.npy", source.rows(0).astype(np.int32))
    return folder / "request.npy"


def vllm_021(source: Source, folder: Path) -> Path:
    """Nested lists of the MoE layers, the prompt's apart."""
    lines = []
    for number, prompt in enumerate(source.prompts):
        rows = source.rows(number)[:, list(MOE)].tolist()
        choice = {"index": 0, "message": {"content": "x"}, "routed_experts": rows[prompt:]}
        lines.append(
            {"id": f"cmpl-{number}", "choices": [choice], "usage": usage(source, number),
             "prompt_routed_experts": rows[:prompt]}
        )  # fmt: skip
    return write_lines(folder / "vllm021.jsonl", lines)


def vllm_033(source: Source, folder: Path, start: int = 0) -> Path:
    """Base64 of npy, of all layers; a pretty-printed list, as a script would save it."""
    answers: list[dict[str, Any]] = []
    for number in range(len(source.prompts)):
        rows = source.rows(number)[start:].astype(np.uint8)
        choice = {"index": 0, "text": "x", "routed_experts": npy_text(rows)}
        answers.append(
            {"id": f"cmpl-{number}", "choices": [choice], "usage": usage(source, number)}
        )
        if start:
            answers[-1]["routed_experts_prompt_start"] = start
    path = folder / "vllm033.json"
    path.write_text(json.dumps(answers, indent=1))
    return path


def sglang_r3(source: Source, folder: Path, openai: bool = False) -> Path:
    """Base64 of raw int32, of all layers."""
    lines = []
    for number in range(len(source.prompts)):
        text = base64.b64encode(source.rows(number).astype("<i4").tobytes()).decode()
        if openai:
            line = {"id": str(number), "choices": [{"text": "x"}], "usage": usage(source, number),
                    "sglext": {"routed_experts": text}}  # fmt: skip
        else:
            line = {"text": "x", "meta_info": {"id": str(number), **usage(source, number),
                                               "routed_experts": text}}  # fmt: skip
        lines.append(line)
    return write_lines(folder / "sglang.jsonl", lines)


SLOTS = EXPERTS + 4


def slot_map(seed: int = 1) -> np.ndarray:
    """``[layers, slots]`` the expert of each slot, every expert at least once, shuffled."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(LAYERS):
        row = np.concatenate([np.arange(EXPERTS), rng.integers(0, EXPERTS, SLOTS - EXPERTS)])
        rows.append(rng.permutation(row))
    return np.stack(rows)


def token_passes(
    source: Source, chunk: int = 6, padding: int = 2, mixed: bool = False
) -> list[dict[str, Any]]:
    """Serve the requests as SGLang does and record the passes, with numpy arrays for tensors.

    The prompt of one request at a time may be cut; a prefill pass goes before decoding, unless the
    two are mixed; running requests keep their order and new ones join at the end.
    """
    slots, rng = slot_map(), np.random.default_rng(2)
    waiting = list(range(len(source.prompts)))
    done = [0] * len(waiting)  # tokens that went through the model
    running: list[int] = []
    passes: list[dict[str, Any]] = []
    while waiting or running:
        room, segments, decoded = chunk, [], []
        while waiting and room:
            request = waiting[0]
            rows = min(source.prompts[request] - done[request], room)
            segments.append((request, rows))
            room -= rows
            if done[request] + rows == source.prompts[request]:
                waiting.pop(0)
            else:
                break
        if not segments or mixed:
            decoded = list(running)
        rows_of = [*segments, *((request, 1) for request in decoded)]
        lengths = [rows for _, rows in rows_of]
        position: list[int] = []
        ids = np.full((LAYERS, sum(lengths) + padding, 8), -1, np.int32)
        for request, rows in rows_of:
            for _ in range(rows):
                cells = source.rows(request)[done[request]]
                for layer in MOE:
                    for place, expert in enumerate(cells[layer]):
                        replicas = np.flatnonzero(slots[layer] == expert)
                        ids[layer, len(position), place] = rng.choice(replicas)
                position.append(done[request])
                done[request] += 1
        new = [r for r, _ in segments if done[r] >= source.prompts[r]]
        running = new + running if mixed and segments else running + new
        running = [r for r in running if done[r] < source.prompts[r] + source.outputs[r] - 1]
        mode = 2 if not segments else 3 if decoded else 1
        passes.append(
            {
                "forward_pass_id": 100 + len(passes), "rank": 0, "gatherer_key": "primary",
                "input_ids": [7] * (len(position) + padding),
                "positions": position + [0] * padding,
                "extend_seq_lens": lengths if mode != 2 else None, "forward_mode": mode,
                "topk_ids_of_layer": ids, "misc_objects": [],
                "global_physical_count": np.zeros((LAYERS, SLOTS), np.int32),
            }
        )  # fmt: skip
    return passes


def save_torch(data: Any, path: Path) -> Path:
    """Save with torch, arrays as tensors."""
    torch = pytest.importorskip("torch")

    def tensors(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return torch.from_numpy(np.ascontiguousarray(value))
        if isinstance(value, dict):
            return {name: tensors(each) for name, each in value.items()}
        return [tensors(each) for each in value] if isinstance(value, list) else value

    torch.save(tensors(data), path)
    return path


def sglang_per_token(source: Source, folder: Path, **how: Any) -> Path:
    """Records of passes with ids of slots."""
    data = {"records": token_passes(source, **how), "last_physical_to_logical_map": slot_map()}
    return save_torch(data, folder / "expert_distribution_recorder_1.5_0.pt")


def sglang_per_pass(source: Source, folder: Path) -> Path:
    """Counts of slots: two ranks, each with about half of every count."""
    inside, slots, rng = folder / "passes", slot_map(), np.random.default_rng(3)
    inside.mkdir()
    for rank in range(2):
        records = []
        for step, counts in enumerate(source.counts()):
            physical = np.zeros((LAYERS, SLOTS), np.int32)
            for layer in range(LAYERS):
                for expert in range(EXPERTS):
                    slot = rng.choice(np.flatnonzero(slots[layer] == expert))
                    half = counts[layer, expert] // 2
                    physical[layer, slot] = half if rank else counts[layer, expert] - half
            each = {"forward_pass_id": 100 + step, "rank": rank, "gatherer_key": "primary"}
            records.append(each | {"global_physical_count": physical})
        data = {"records": records, "last_physical_to_logical_map": slots}
        save_torch(data, inside / f"expert_distribution_recorder_1.5_{rank}.pt")
    return inside


def sglang_stat(source: Source, folder: Path) -> Path:
    """A buffer of logical counts, three steps of it never filled."""
    buffer = np.concatenate([source.counts(), np.zeros((3, LAYERS, EXPERTS), np.int64)])
    data = {"rank": 0, "logical_count": buffer.astype(np.int32),
            "average_utilization_rate_over_window": None}  # fmt: skip
    return save_torch(data, folder / "expert_distribution_recorder_1.5.pt")


def trtllm(source: Source, folder: Path, raw: bool) -> Path:
    """Counts, or ids, of two ranks."""
    save_file = pytest.importorskip("safetensors.numpy").save_file
    inside = folder / "statistic"
    inside.mkdir()
    about = {"num_experts": EXPERTS, "num_experts_per_token": TOP_K}
    (inside / "meta_info.json").write_text(json.dumps(about))
    for rank in range(2):
        tensors = {}
        for step in range(STEPS):
            mine = source.trace.experts[step::STEPS][rank::2].astype(np.int64)
            for place, layer in enumerate(MOE):
                ids = np.ascontiguousarray(mine[:, place])
                counts = np.bincount(ids.reshape(-1), minlength=EXPERTS)
                tensors[f"{100 + step}_{layer}"] = ids if raw else counts
        save_file(tensors, inside / f"rank{rank}{'_raw' * raw}.safetensors")
    return inside


def megatron_replay(source: Source, folder: Path) -> Path:
    """A list of one tensor per MoE layer."""
    layers = [source.trace.experts[:, place].astype(np.int64) for place in range(len(MOE))]
    return save_torch(layers, folder / "replay.pt")


def moe_infinity(source: Source, folder: Path) -> Path:
    """Counts of sequences, two places of the collection empty."""
    places = np.zeros((len(source.prompts) + 2, LAYERS, EXPERTS), np.float32)
    for number in range(len(source.prompts)):
        for cells in source.rows(number):
            for layer in MOE:
                for expert in cells[layer]:
                    places[number, layer, expert] += 1
    np.save(folder / "trace.npy", places)
    return folder / "trace.npy"


Writer = Callable[[Source, Path], Path]
ENGINE_LAYOUTS: dict[str, tuple[str, Writer]] = {
    "vllm-0.14 outputs": ("vllm-0.14", vllm_014),
    "vllm-0.14 npz": ("vllm-0.14", vllm_014_npz),
    "vllm-0.14 npy": ("vllm-0.14", vllm_014_npy),
    "vllm-0.21": ("vllm-0.21", vllm_021),
    "vllm-0.33": ("vllm-0.33", vllm_033),
    "sglang-r3 generate": ("sglang-r3", sglang_r3),
    "sglang-r3 openai": ("sglang-r3", lambda source, at: sglang_r3(source, at, openai=True)),
    "sglang-per-token": ("sglang-per-token", sglang_per_token),
    "sglang-per-pass": ("sglang-per-pass", sglang_per_pass),
    "sglang-stat": ("sglang-stat", sglang_stat),
    "trtllm-counts": ("trtllm-counts", lambda source, at: trtllm(source, at, raw=False)),
    "trtllm-raw": ("trtllm-raw", lambda source, at: trtllm(source, at, raw=True)),
    "megatron-replay": ("megatron-replay", megatron_replay),
    "moe-infinity": ("moe-infinity", moe_infinity),
}
"""A format's name and a writer of its layout, by what is written."""


@dataclass(frozen=True)
class Engines:
    """What the tests of the engines' importers need; a fixture, since tests import no tests."""

    layouts = ENGINE_LAYOUTS
    moe, experts, top_k, layers = MOE, EXPERTS, TOP_K, LAYERS
    model = staticmethod(small_model)
    source = staticmethod(make_source)
    npy_text = staticmethod(npy_text)
    save_torch = staticmethod(save_torch)
    slot_map = staticmethod(slot_map)
    token_passes = staticmethod(token_passes)
    per_token = staticmethod(sglang_per_token)
    vllm_033 = staticmethod(vllm_033)
    lines = staticmethod(write_lines)

    def asked(self, **changes: Any) -> Asked:
        """Return what a user says who has the model's configuration."""
        return Asked(model=small_model(**changes))

    def write(self, layout: str, folder: Path, source: Source | None = None) -> Path:
        """Write a trace in a layout."""
        return self.layouts[layout][1](source or make_source(), folder)


@pytest.fixture(scope="session")
def engines() -> Engines:
    """Return the layouts and what goes with them."""
    return Engines()


@pytest.fixture
def joined() -> Callable[[Any], RoutingTrace]:
    """Return a joiner of the chunks of an import."""

    def join(tokens: Any) -> RoutingTrace:
        chunks = list(tokens.chunks)
        columns = {
            name: np.concatenate([chunk.columns[name] for chunk in chunks])
            for name in chunks[0].columns
        }
        return RoutingTrace(meta=tokens.meta, domains=tokens.domains, **columns)

    return join


@pytest.fixture
def memory() -> Callable[[Callable[[], Any]], int]:
    """Return a measure of the most bytes that a call holds at a time (numpy's included)."""

    def measure(call: Callable[[], Any]) -> int:
        tracemalloc.start()
        try:
            call()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    return measure
