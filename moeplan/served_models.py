"""A measured run in our nouns: model, cluster, layout, number formats and scheduling policy.

Geometry comes from the ``config.json`` files of the wheel that has the runs; formats, prefill
budgets and request lengths from the published recipes of the benchmark (InferenceX, formerly
InferenceMAX) and the engines' defaults. Nothing here is fitted.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from basis import validate
from hwmodels.cluster import Cluster, load_cluster
from hwmodels.engines import PriceMode, engines_of, priced_by
from hwmodels.silicon.served_rows import ServedRow
from hwmodels.silicon.wheel import root
from simulator.parallelism import AttentionLayout, ExpertLayout, Parallelism
from traces.config_families import geometry
from traces.model_spec import ModelSpec

CONFIGS = {
    "deepseek": "deepseek-ai--DeepSeek-V3",
    "glm": "zai-org--GLM-5-FP8",
    "gpt-oss": "openai--gpt-oss-120b",
    "kimi": "moonshotai--Kimi-K2.5",
    "minimax": "MiniMaxAI--MiniMax-M2.5",
    "qwen3-235b": "Qwen--Qwen3-235B-A22B-FP8",
}
"""File of each family in the wheel's ``model_configs`` (R1 and V3 share their geometry)."""
CLUSTERS = {
    "h100_sxm": "hgx-h100-8",
    "h200_sxm": "hgx-h200-8",
    "b200_sxm": "hgx-b200-8",
    "b300_sxm": "hgx-b300-8",
    "gb200": "gb200-nvl72",
}
"""Catalog cluster of each system."""
BLACKWELL = ("b200_sxm", "b300_sxm", "gb200")


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How an engine composes steps."""

    budget: int
    """Tokens of a step on an attention data-parallel rank, at most."""
    mixed: bool
    """Whether a step may hold decode tokens and prompts together; else prompts go first, alone."""
    chunked: bool
    """Whether prompts are cut to fill the budget; else only whole ones join a step."""
    overlapped: bool = True
    """Whether the next step is composed while one runs, so that who comes at its end misses one."""
    patience: int = 0
    """Steps that prompts wait, at most, until every attention data-parallel rank has one."""


def policy_of(row: ServedRow) -> Policy:
    """Return how a run's steps are composed, from recipes and defaults.

    vLLM's server takes 8192 tokens a step on GPUs above 70 GB; SGLang prefills first, in chunks of
    16384 tokens on large GPUs. The recipes of TensorRT-LLM leave chunked context off and give
    ``max_num_tokens`` room for a prompt beside all decodes, at least 8192; with attention data
    parallelism they balance prompts over the ranks (``enable_balance``, ``timeout_iters`` 60). All
    three compose the next step while one runs.
    """
    if row.engine == "vllm":
        return Policy(budget=8192, mixed=True, chunked=True)
    if row.engine == "sglang":
        return Policy(budget=16384, mixed=False, chunked=True)
    room = -(-(row.concurrency + row.inputs + 64) // 64) * 64
    patience = 60 if row.ranks.dp > 1 else 0
    return Policy(budget=max(room, 8192), mixed=True, chunked=False, patience=patience)


def cache_of(engine: str, capacity: float, fixed: float) -> float:
    """Return the bytes that an engine gives to its cache, inf where our bounds leave nothing.

    TensorRT-LLM takes 80 % of what weights and buffers leave (``free_gpu_memory_fraction`` of the
    recipes), the others what these leave of 90 % of the memory.
    """
    room = 0.8 * (capacity - fixed) if engine == "trtllm" else 0.9 * capacity - fixed
    return room if room > 0 else float("inf")


@dataclass(frozen=True)
class Setup:
    """What a run was made with: runs of one setup share all prices."""

    family: str
    precision: str
    system: str
    engine: str
    parallelism: Parallelism

    @classmethod
    def of(cls, row: ServedRow) -> "Setup":
        """Return the setup of a run."""
        return cls(row.family, row.precision, row.system, row.engine, layout_of(row))


def layout_of(row: ServedRow) -> Parallelism:
    """Return a run's layout.

    Without attention data parallelism all ranks see all tokens, and expert parallelism is fused
    with tensor parallelism: two all-reduces a layer. With it, tokens are exchanged.
    """
    tp, dp, moe_tp, moe_ep = row.ranks
    return Parallelism(
        attention=AttentionLayout(dp=dp, tp=tp),
        experts=ExpertLayout(
            ep=moe_ep, tp=moe_tp, exchange="all_gather" if dp == 1 else "all_to_all"
        ),
    )


@cache
def model_of(family: str, precision: str, system: str) -> ModelSpec:
    """Return the model with its formats on this system."""
    path = root().parent / "model_configs" / f"{CONFIGS[family]}_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config = _as_known(config.get("text_config", config))
    config.pop("quantization_config", None)  # the formats are the run's
    return validate(
        {"name": family, **geometry(config, str(path)), **formats_of(family, precision, system)},
        ModelSpec,
        str(path),
    )


def _as_known(config: dict[str, Any]) -> dict[str, Any]:
    """Write a configuration in the keys of a family that has the same geometry."""
    match config["model_type"]:
        case "kimi_k2":
            return config | {"model_type": "deepseek_v3"}
        case "glm_moe_dsa":  # sparse attention: each token attends to the indexer's best
            window = {"sliding_window": config["index_topk"], "use_sliding_window": True}
            return config | window | {"model_type": "deepseek_v3"}
        case "minimax_m2":
            width = {"moe_intermediate_size": config["intermediate_size"]}
            return config | width | {"model_type": "qwen3_moe"}
    return config


def formats_of(family: str, precision: str, system: str) -> dict[str, str]:
    """Return the formats of a checkpoint, and of the KV cache as the recipes set it.

    FP8 checkpoints are block-FP8; FP4 and INT4 ones keep attention in bf16; gpt-oss has mxfp4
    experts, multiplied with mxfp8 activations on Blackwell.
    """
    new = system in BLACKWELL
    experts = {"fp8": "fp8_block", "fp4": "nvfp4", "int4": "int4"}[precision]
    if family == "gpt-oss":
        experts = "mxfp4_mxfp8" if new else "mxfp4"
    return {
        "expert_dtype": experts,
        "weight_dtype": "fp8_block" if experts == "fp8_block" else "bf16",
        "activation_dtype": "bf16",
        "kv_dtype": "fp8" if new else "bf16",
    }


def kept_in(family: str, precision: str) -> dict[str, str]:
    """Return the formats of single kernels that differ from the rest outside the experts.

    The NVFP4 checkpoints of DeepSeek keep the projections into the latents in bf16; the output
    projection, shared experts and dense layers are nvfp4.
    """
    if (family, precision) != ("deepseek", "fp4"):
        return {}
    names = ("o", "shared experts up", "shared experts down", "ffn up", "ffn down")
    return dict.fromkeys(names, "nvfp4")


Clusters = Callable[[Setup, int], tuple[Cluster, str]]
"""From a setup and its GPUs to the priced cluster, and a remark on what stands in."""


def prices_of(mode: PriceMode | None = None) -> Clusters:
    """Return where clusters come from: the catalog, priced by the run's engine in this mode.

    Without a mode an engine's fits where there are some, else the engine-neutral parameters.
    """

    @cache
    def clusters(system: str, engine: str, gpus: int, generated: bool) -> tuple[Cluster, str]:
        neutral = load_cluster(CLUSTERS[system], gpus=gpus)
        if mode is None and engine not in engines_of(neutral.device.name):
            return neutral, "engine-neutral kernels"
        cluster = priced_by(neutral, engine, mode or "fitted")
        if not generated:
            return cluster, ""
        return _with_experts(cluster, neutral), "DeepSeek's experts without DP: engine-neutral"

    def of_setup(setup: Setup, gpus: int) -> tuple[Cluster, str]:
        return clusters(setup.system, setup.engine, gpus, _generated(setup))

    return of_setup


def _generated(setup: Setup) -> bool:
    """Whether the recipe runs the experts on kernels whose rows no engine table holds.

    DeepSeek on TensorRT-LLM: without attention data parallelism the generated low-latency kernels
    (``moe_config.backend: TRTLLM``); of these the tables have only rows whose loads are not known.
    With it CUTLASS or DeepGEMM, which the tables have.
    """
    alone = setup.parallelism.attention.dp == 1
    return (setup.engine, setup.family) == ("trtllm", "deepseek") and alone


def _with_experts(cluster: Cluster, other: Cluster) -> Cluster:
    """Return the cluster with another's kernels for experts, their permutation included."""
    first, *rest = cluster.device.processors.items()
    theirs = other.device.processor.kernels
    kernels = first[1].kernels | {name: theirs[name] for name in ("grouped_gemm", "permute")}
    processors = {first[0]: first[1].model_copy(update={"kernels": kernels}), **dict(rest)}
    device = cluster.device.model_copy(update={"processors": processors})
    return cluster.model_copy(update={"device": device})


def jitter_of(row: ServedRow) -> float:
    """Return the shortest request's share of the stated lengths.

    InferenceX (lengths of 1024 and 8192) draws both lengths uniformly from 80 to 100 % of the
    stated; the other campaigns state round decimal lengths and are taken as they say.
    """
    return 0.8 if row.inputs % 1024 == 0 and row.outputs % 1024 == 0 else 1.0
