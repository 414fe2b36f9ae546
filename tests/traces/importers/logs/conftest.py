"""A small model, a trace of it, and writers of that trace in the layouts of others.

The writers follow the documented layouts with plain loops and share nothing with the readers.
"""

import csv
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from traces.importers.base import Asked
from traces.importers.imatrix import FORMATS_IMATRIX
from traces.importers.log_counts import FORMATS_COUNTS
from traces.importers.log_dispatch import FORMATS_DISPATCH
from traces.importers.log_lines import FORMATS_LINES
from traces.importers.log_npz import FORMATS_NPZ
from traces.importers.log_prompt_csv import FORMATS_PROMPT_CSV
from traces.importers.log_router_json import FORMATS_ROUTER_JSON
from traces.importers.log_score_csv import FORMATS_SCORE_CSV
from traces.meta import TraceMeta
from traces.model_spec import ModelSpec, load_model
from traces.routing_trace import RoutingTrace

Write = Callable[[RoutingTrace, Path], Path]
CONFIG = {
    "model_type": "deepseek_v2", "hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 100,
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "intermediate_size": 32,
    "moe_intermediate_size": 16, "n_routed_experts": 8, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "moe_layer_freq": 1, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
LAYERS = (1, 2, 3)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """Four layers, of which 1, 2 and 3 are MoE; 8 experts, top-2."""
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(CONFIG))
    return load_model(path)


@pytest.fixture
def asked(model: ModelSpec) -> Asked:
    return Asked(model=model, domain="prose", licence="CC-BY-4.0")


@pytest.fixture(scope="session")
def own_formats() -> tuple[Any, ...]:
    return (
        *FORMATS_LINES, *FORMATS_ROUTER_JSON, *FORMATS_PROMPT_CSV, *FORMATS_SCORE_CSV,
        *FORMATS_NPZ, *FORMATS_DISPATCH, *FORMATS_COUNTS, *FORMATS_IMATRIX,
    )  # fmt: skip


def make(
    prompts: tuple[int, ...] = (5, 3, 4), answers: tuple[int, ...] = (3, 4, 1)
) -> RoutingTrace:
    """Return requests one after the other; weights are multiples of 1/1024 that descend."""
    rng = np.random.default_rng(7)
    rows, step = [], 0
    for request, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        for position in range(prompt + answer):
            step += position >= prompt
            rows.append((request, position, position >= prompt, step))
        step += 1
    request, position, decode, steps = map(np.array, zip(*rows, strict=True))
    shape = (len(rows), len(LAYERS))
    experts = rng.random((*shape, 8)).argsort(axis=-1)[..., :2]
    weights = np.sort(rng.random((*shape, 1000)).argsort(axis=-1)[..., :2] + 1)[..., ::-1] / 1024
    return RoutingTrace(
        meta=TraceMeta(model="tiny", num_experts=8, top_k=2, moe_layer_ids=LAYERS),
        request_id=request.astype(np.int32),
        position=position.astype(np.int32),
        decode=decode.astype(bool),
        step=steps.astype(np.int32),
        domain=np.zeros(len(rows), np.int16),
        domains=("prose",),
        experts=experts.astype(np.uint16),
        weights=weights.astype(np.float16),
    )


@pytest.fixture
def trace() -> RoutingTrace:
    return make()


@pytest.fixture(scope="session")
def make_requests() -> Callable[..., RoutingTrace]:
    return make


def ids(trace: RoutingTrace, row: int, layer: int) -> list[int]:
    return [int(i) for i in trace.experts[row, layer]]


def gates(trace: RoutingTrace, row: int, layer: int) -> list[float]:
    assert trace.weights is not None
    return [float(w) for w in trace.weights[row, layer]]


def steps_of(trace: RoutingTrace) -> list[list[int]]:
    """Return the rows of each step."""
    return [
        np.flatnonzero(trace.step == step).tolist() for step in sorted(set(trace.step.tolist()))
    ]


def jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def vllm_logger(trace: RoutingTrace, folder: Path) -> Path:
    """All tokens under one id, token_idx from 0 in every step; 40 dummy tokens first."""
    meta = {"type": "meta", "model_id": "org/tiny", "layers_logged": list(LAYERS), "top_k": 2}
    records: list[dict[str, Any]] = [meta]
    for layer in LAYERS:
        for token in range(40):
            records.append(_route(token, layer, [4, 1], [0.5, 0.5]))
    for rows in steps_of(trace):
        for place, layer in enumerate(LAYERS):
            for token, row in enumerate(rows):
                records.append(
                    _route(token, layer, ids(trace, row, place), gates(trace, row, place))
                )
    return jsonl(folder / "moe_routes.jsonl", records)


def _route(token: int, layer: int, chosen: list[int], weights: list[float]) -> dict[str, Any]:
    return {
        "type": "route", "req_id": "batch", "token_idx": token, "layer": layer,
        "topk_ids": chosen, "topk_weights": weights,
    }  # fmt: skip


def hook_jsonl(trace: RoutingTrace, folder: Path) -> Path:
    records = []
    for rows in steps_of(trace):
        for place, layer in enumerate(LAYERS):
            for row in rows:
                records.append(
                    {
                        "dataset": "prose", "problem_id": int(trace.request_id[row]),
                        "layer": layer, "experts": ids(trace, row, place),
                        "gating_probs": gates(trace, row, place),
                        "token_idx": int(trace.position[row]),
                    }
                )  # fmt: skip
    return jsonl(folder / "routing.jsonl", records)


def hook_steps(trace: RoutingTrace, folder: Path) -> Path:
    """Write token_pos, from 0 in every step."""
    records = [json.loads(line) for line in hook_jsonl(trace, folder).read_text().splitlines()]
    for record in records:
        token = record.pop("token_idx")
        request = trace.request_id == record["problem_id"]
        prompt = int((~trace.decode[request]).sum())
        record["token_pos"] = token if token < prompt else 0
    return jsonl(folder / "routing.jsonl", records)


def dispatch_jsonl(trace: RoutingTrace, folder: Path) -> Path:
    provenance = {
        "model_id": "tiny", "expert_count": 8, "top_k": 2, "moe_layer_indices": list(LAYERS),
    }  # fmt: skip
    records: list[dict[str, Any]] = [{"row_type": "header", "provenance": provenance}]
    counts = {"prefill": 0, "decode": 0}
    for request in sorted(set(trace.request_id.tolist())):
        rows = np.flatnonzero(trace.request_id == request).tolist()
        prompt = sum(not trace.decode[row] for row in rows)
        name = f"p{request}"
        records.append(
            {"row_type": "request", "request_id": name, "input_token_ids": list(range(prompt))}
        )
        for row in rows:
            phase = "decode" if trace.decode[row] else "prefill"
            counts[phase] += 1
            routing = [
                {
                    "layer_index": layer,
                    "expert_ids": ids(trace, row, place),
                    "gate_weights": gates(trace, row, place),
                }
                for place, layer in enumerate(LAYERS)
            ]
            index = int(trace.position[row]) - (prompt if phase == "decode" else 0)
            records.append(
                {
                    "row_type": "forward-token", "request_id": name, "phase": phase,
                    "token_index": index, "token_id": 7, "routing": routing,
                }
            )  # fmt: skip
    records.append(
        {
            "row_type": "footer", "request_count": len(set(trace.request_id.tolist())),
            "prefill_forward_token_count": counts["prefill"],
            "decode_forward_token_count": counts["decode"],
        }
    )  # fmt: skip
    return jsonl(folder / "dispatch.jsonl", records)


def requests_of(trace: RoutingTrace) -> list[list[list[int]]]:
    """Return the rows of each step of each request."""
    found: dict[int, list[list[int]]] = {}
    for rows in steps_of(trace):
        found.setdefault(int(trace.request_id[rows[0]]), []).append(rows)
    return list(found.values())


def router_json(trace: RoutingTrace, folder: Path) -> Path:
    target = folder / "requests-json"
    target.mkdir()
    for number, steps in enumerate(requests_of(trace)):
        entries = []
        for rows in steps:
            entry = {}
            for row in rows:
                layers = {}
                for place, layer in enumerate(LAYERS):
                    layers[f"layer_{layer}"] = {
                        "selected_experts": ids(trace, row, place),
                        "selected_probs": gates(trace, row, place),
                    }
                entry[f"token_{int(trace.position[row])}"] = layers
            entries.append(entry)
        (target / f"{number}.json").write_text(json.dumps({"router_data": entries}))
    return target


def prompt_csv(trace: RoutingTrace, folder: Path) -> Path:
    target = folder / "prompts"
    target.mkdir()
    for number, steps in enumerate(requests_of(trace)):
        with (target / f"{number}.csv").open("w", newline="", encoding="utf-8") as file:
            out = csv.writer(file)
            out.writerow(["Layer ID", "Batch Number", "Token", "Activated Expert IDs"])
            for place, layer in enumerate(LAYERS):
                for batch, rows in enumerate(steps):
                    for row in rows:
                        text = ["<|begin|>", "a,b", 'say "x"', "line\nbreak", "naïve"][row % 5]
                        out.writerow([layer, batch, text,
                                      str(ids(trace, row, place))])  # fmt: skip
    return target


def score_csv(trace: RoutingTrace, folder: Path) -> Path:
    target = folder / "scores"
    for number, steps in enumerate(requests_of(trace)):
        for place, layer in enumerate(LAYERS):
            path = target / f"prompt{number}" / f"Layer_{layer}" / "scores.csv"
            path.parent.mkdir(parents=True)
            with path.open("w", newline="", encoding="utf-8") as file:
                out = csv.writer(file)
                out.writerow(["layer_id", "token_id", *(f"expert_{i}" for i in range(8))])
                for token, row in enumerate(row for rows in steps for row in rows):
                    scores = ["0.000000"] * 8
                    for expert, weight in zip(
                        ids(trace, row, place), gates(trace, row, place), strict=True
                    ):
                        scores[expert] = repr(weight)
                    out.writerow([0, token, *scores])
    return target


def request_npz(trace: RoutingTrace, folder: Path) -> Path:
    """All four layers, the dense one zero."""
    target = folder / "requests-npz"
    target.mkdir()
    for number in sorted(set(trace.request_id.tolist())):
        rows = trace.request_id == number
        every = np.zeros((int(rows.sum()), 4, 2), np.int32)
        every[:, list(LAYERS)] = trace.experts[rows]
        prompt = int((~trace.decode[rows]).sum())
        np.savez_compressed(
            target / f"{number}.npz",
            request_id=np.array(f"r{number}"),
            prompt_token_ids=np.arange(prompt),
            output_token_ids=np.arange(int(rows.sum()) - prompt + 1),
            routed_experts=every,
        )
    return target


def counts(trace: RoutingTrace) -> dict[int, list[int]]:
    """Return each layer's counts, by a plain loop."""
    found = {layer: [0] * 8 for layer in LAYERS}
    for row in range(trace.num_tokens):
        for place, layer in enumerate(LAYERS):
            for expert in ids(trace, row, place):
                found[layer][expert] += 1
    return found


def counts_csv(trace: RoutingTrace, folder: Path) -> Path:
    path = folder / "counts.csv"
    lines = ["layer,expert,count"]
    for layer, per_expert in counts(trace).items():
        lines += [f"{layer},{expert},{count}" for expert, count in enumerate(per_expert)]
    path.write_text("\n".join(lines) + "\n")
    return path


def counts_json(trace: RoutingTrace, folder: Path) -> Path:
    path = folder / "counts.json"
    found = {layer: {e: n for e, n in enumerate(c) if n} for layer, c in counts(trace).items()}
    path.write_text(json.dumps(found))
    return path


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf(tensors: dict[str, list[float]], kind: str = "imatrix", chunks: int = 0) -> bytes:
    """Return a GGUF file of version 3 with f32 tensors ``[E, 1]``."""
    keys = [
        text("general.type") + struct.pack("<I", 8) + text(kind),
        text("imatrix.datasets") + struct.pack("<IIQ", 9, 8, 2) + text("a.txt") + text("b.txt"),
        text("imatrix.chunk_count") + struct.pack("<II", 4, chunks),
        text("imatrix.chunk_size") + struct.pack("<II", 4, 4),
    ]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(keys)
    data = b""
    for name, values in tensors.items():
        head += text(name) + struct.pack("<IQQIQ", 2, 1, len(values), 0, len(data))
        data += np.array(values, "<f4").tobytes()
        data += bytes(-len(data) % 32)
    return head + bytes(-len(head) % 32) + data


def imatrix_tensors(trace: RoutingTrace) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for layer, per_expert in counts(trace).items():
        for part in ("down", "gate", "up"):
            found[f"blk.{layer}.ffn_{part}_exps.weight.in_sum2"] = [0.5] * 16
            found[f"blk.{layer}.ffn_{part}_exps.weight.counts"] = list(map(float, per_expert))
    found["blk.0.ffn_gate.weight.counts"] = [20.0]
    return found


def imatrix(trace: RoutingTrace, folder: Path) -> Path:
    path = folder / "imatrix.gguf"
    path.write_bytes(gguf(imatrix_tensors(trace), chunks=trace.num_tokens // 4))
    return path


WRITERS: dict[str, Write] = {
    "vllm-logger": vllm_logger,
    "hook-jsonl": hook_jsonl,
    "hook-jsonl-steps": hook_steps,
    "dispatch-jsonl": dispatch_jsonl,
    "router-json": router_json,
    "prompt-csv": prompt_csv,
    "score-csv": score_csv,
    "request-npz": request_npz,
    "counts-csv": counts_csv,
    "counts-json": counts_json,
    "imatrix": imatrix,
}


@pytest.fixture(scope="session")
def writers() -> dict[str, Write]:
    """Writers by the name of the format that should recognise what they write."""
    return WRITERS


@pytest.fixture(scope="session")
def gguf_bytes() -> Callable[..., bytes]:
    return gguf


@pytest.fixture(scope="session")
def plain_counts() -> Callable[[RoutingTrace], dict[int, list[int]]]:
    return counts
