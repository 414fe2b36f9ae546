"""Plans as plan.json holds them, made from random loads, for the tests of what is shown of them."""

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from traces.routing_trace import RoutingTrace, write_trace
from traces.synth import synthetic_trace, zipf_shares

STAGES = {"attention": 0.9, "router": 0.05, "dispatch": 0.35, "combine": 0.35, "head": 0.06}
TOKENS = 256
Floats = NDArray[np.float64]


def _greedy(load: Floats, slots: int, ranks: int) -> NDArray[np.int64]:
    """Replicate the busiest experts, then fill the emptiest rank that has room and no copy."""
    copies = np.ones(len(load), dtype=int)
    for _ in range(slots - len(load)):
        copies[np.argmax(load / copies)] += 1
    room, total = np.full(ranks, slots // ranks), np.zeros(ranks)
    hosted: list[list[int]] = [[] for _ in range(ranks)]
    for expert in np.argsort(-load / copies):
        for _ in range(copies[expert]):
            free = [g for g in range(ranks) if room[g] and expert not in hosted[g]]
            rank = min(free or np.flatnonzero(room), key=lambda g: total[g])
            hosted[rank].append(int(expert))
            total[rank] += load[expert] / copies[expert]
            room[rank] -= 1
    return np.array([e for rank in hosted for e in rank])


def _rank_load(load: Floats, slots: Floats, ranks: int) -> Floats:
    copies = np.bincount(slots, minlength=len(load))
    per_slot = load[slots] / copies[slots]
    return per_slot.reshape(ranks, -1).sum(axis=1) * ranks / load.sum()


def _figures(load: Floats, mean_step: float, nodes: int, seed: int) -> dict[str, Any]:
    rng, tokens = np.random.default_rng(seed), TOKENS
    worst = float(load.max(axis=1).mean())
    step = mean_step * (0.75 + 0.25 * worst)
    speed = tokens / step
    return {
        "tokens_per_second": speed,
        "tokens_per_second_low": 0.86 * speed,
        "tokens_per_second_high": 1.11 * speed,
        "step_time_s": step,
        "step_time_s_p99": step * 1.06,
        "straggler": worst + 0.11,
        "sampling_floor": 1.108,
        "cross_node_sends": float(rng.uniform(0.9, 1.0)) if nodes > 1 else 0.0,
        "cross_rank_sends": float(rng.uniform(3.1, 3.4)),
        "memory_bytes_fullest_rank": 21.4e9,
    }


def _seconds(figures: dict[str, Any], load: Floats) -> dict[str, float]:
    step = figures["step_time_s"]
    other = sum(STAGES.values())
    causes = {name: 0.5 * step * part / other for name, part in STAGES.items()}
    worst = float(load.max(axis=1).mean())
    return causes | {
        "embed": 0.0,
        "experts": 0.5 * step / worst,
        "wait": 0.5 * step * (1 - 1 / worst),
    }


def _traffic(rng: np.random.Generator, ranks: int) -> Floats:
    traffic = rng.gamma(20, 5e4, (ranks, ranks))
    np.fill_diagonal(traffic, 0)
    return traffic


def build_plan(
    *,
    layers: int,
    experts: int,
    slots: int,
    ranks: int,
    per_node: int,
    dense: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Return a plan.json of the given size."""
    rng = np.random.default_rng(seed)
    loads = rng.lognormal(0, 0.8, (layers, experts))
    plan = np.stack([_greedy(row, slots, ranks) for row in loads])
    default = np.tile(np.arange(experts), (layers, 1))
    maps = {
        "plan": plan,
        "contiguous": default,
        "round_robin": np.argsort(np.arange(experts) % ranks, kind="stable")[default],
        "eplb": plan,
    }
    load = {
        n: np.stack([_rank_load(r, s, ranks) for r, s in zip(loads, m, strict=True)])
        for n, m in maps.items()
    }
    load["eplb"] = 1 + (load["eplb"] - 1) * 1.04
    nodes, mean_step = ranks // per_node, 4.1e-3 * layers / 24
    figures = {n: _figures(load[n], mean_step, nodes, i) for i, n in enumerate(maps)}
    other = {n: _figures(load[n] * 0.99, mean_step, nodes, i) for i, n in enumerate(maps)}
    mean = loads.sum(axis=1) / ranks
    objective = load["plan"].max(axis=1) * mean
    bound = np.minimum(objective * 0.9995, np.maximum(mean, objective * 0.995))
    gain = figures["plan"]["tokens_per_second"] / figures["contiguous"]["tokens_per_second"] - 1
    over_eplb = figures["plan"]["tokens_per_second"] / figures["eplb"]["tokens_per_second"] - 1
    ids = list(range(dense, dense + layers))
    return {
        "schema": "moeplan.plan/1",
        "moeplan_version": "0.1.0",
        "num_hidden_layers": dense + layers,
        "num_experts": experts,
        "model_family": "qwen3_moe",
        "scenario": {
            "name": "sample",
            "model": "sample-moe",
            "model_summary": f"{layers} MoE layers x {experts} experts, top-4, 20.9 B parameters",
            "trace": "sample.parquet",
            "trace_summary": "1,000 requests, 152,331 tokens, 14 domains",
            "trace_note": "routing of a small example model; not a production model",
            "cluster": "hgx-h100-8" + (f"x{nodes}" if nodes > 1 else ""),
            "cluster_summary": f"{nodes} node(s) of {per_node} H100 SXM 80 GB",
            "ranks_per_node": per_node,
            "workload": {"phase": "decode", "tokens_per_step": TOKENS},
            "redundant_experts": slots - experts,
            "objective": "throughput",
        },
        "moe_layer_ids": ids,
        "physical_to_logical_map": plan.tolist(),
        "dispatch": "even",
        "parallelism": {
            "attention": {"dp": ranks, "tp": 1, "pp": 1},
            "experts": {"ep": ranks, "tp": 1},
        },
        "certificate": {
            "problem": "Least expected load of the busiest rank, summed over layers, on the "
            "requests planned on, each expert's tokens divided evenly over its replicas.",
            "objective": float(objective.sum()),
            "bound": float(bound.sum()),
            "gap": float(1 - bound.sum() / objective.sum()),
            "status": "gap",
            "unit": "tokens on the busiest rank, summed over layers",
            "mean_bound": float(mean.sum()),
            "seconds": 12.34,
            "per_layer": {
                "objective": objective.tolist(),
                "bound": bound.tolist(),
                "mean": mean.tolist(),
            },
        },
        "second_stage": {
            "order": "Among placements within the tolerance: fewer cross-node sends, then fewer "
            "cross-rank sends, then a smaller straggler per step.",
            "tolerance": 0.01,
            "before": {"straggler": 1.182, "cross_node_sends": 1.041, "cross_rank_sends": 3.31},
            "after": {"straggler": 1.179, "cross_node_sends": 0.952, "cross_rank_sends": 3.12},
        },
        "split": "early_late",
        "predicted": figures["plan"],
        "baselines": {n: f for n, f in figures.items() if n != "plan"},
        "other_split": {
            "split": "interleaved",
            "predicted": other["plan"],
            "baselines": {n: f for n, f in other.items() if n != "plan"},
        },
        "details": {
            n: {
                "seconds_by_cause": _seconds(figures[n], load[n]),
                "rank_load": load[n].tolist(),
                "traffic": _traffic(rng, ranks).tolist(),
            }
            for n in maps
        },
        "verdict": {
            "answer": f"Deploy this placement: {100 * gain:.1f} % more tokens/s than the engine's "
            "default; EPLB is as good within noise.",
            "worth_it": True,
            "tie": False,
            "gain_over_default": gain,
            "gain_over_eplb": over_eplb,
            "noise": 0.006,
        },
        "alternatives": [
            {"name": "EPLB", "why": "0.3 % slower, within noise; 4 % more cross-node sends"},
            {"name": "16 redundant experts", "why": "no further gain, 1.9 GB more per rank"},
        ],
        "evidence": [
            {"what": "expert GEMM", "evidence": "fitted", "source": "8 % error", "share": 0.45},
            {
                "what": "all-to-all",
                "evidence": "assumed",
                "source": "80 % of the data sheet",
            },
            {
                "what": "HBM bandwidth",
                "evidence": "datasheet",
                "source": "H100 data sheet, p. 2",
            },
        ],
        "warnings": ["the trace has 152,331 tokens: standard error of a load 1.4 %"],
    }


SIZES = {
    "one_node": {"layers": 24, "experts": 32, "slots": 40, "ranks": 8, "per_node": 8},
    "two_nodes": {"layers": 24, "experts": 32, "slots": 32, "ranks": 16, "per_node": 8},
    "small": {"layers": 4, "experts": 8, "slots": 12, "ranks": 4, "per_node": 4, "dense": 3},
    "large": {"layers": 58, "experts": 256, "slots": 288, "ranks": 32, "per_node": 8, "dense": 3},
}


_build_once = functools.cache(lambda size: build_plan(**SIZES[size]))


@pytest.fixture
def sample_plan() -> Callable[[str], dict[str, Any]]:
    """Return a function that gives a plan of one of `SIZES`, to change at will."""
    return lambda size: copy.deepcopy(_build_once(size))


GEOMETRY = {
    "model_type": "mixtral",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 1000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "sliding_window": None,
}


@pytest.fixture(scope="session")
def tiny_trace() -> RoutingTrace:
    """Skewed routing of 4 layers x 8 experts, top-2; 1,200 tokens of 30 requests."""
    shares = zipf_shares(8, 0.5, layers=4, seed=3)
    return synthetic_trace(shares, tokens=1200, requests=30, top_k=2, seed=4)


@pytest.fixture(scope="session")
def write_scenario(tiny_trace: RoutingTrace) -> Callable[..., Path]:
    """Return a writer of a small scenario into a folder; keywords replace its keys."""

    def write(folder: Path, **changes: Any) -> Path:
        (folder / "tiny.json").write_text(json.dumps(GEOMETRY))
        write_trace(tiny_trace, folder / "tiny.parquet")
        content = {
            "model": "tiny.json",
            "trace": "tiny.parquet",
            "cluster": "hgx-h100-8",
            "gpus": 4,
            "workload": {"decode_batch": 32},
            "plan": {"redundant_experts": 4, "steps": 2, "seeds": 2, "time_limit": "5 s"},
        }
        path = folder / "scenario.yaml"
        path.write_text(yaml.safe_dump({**content, **changes}))
        return path

    return write


@pytest.fixture
def scenario(tmp_path: Path, write_scenario: Callable[..., Path]) -> Callable[..., Path]:
    """Return a writer of a small scenario in a folder of its own; keywords replace its keys."""
    return lambda **changes: write_scenario(tmp_path, **changes)
