"""Small models, traces and clusters for the simulator's tests."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from hwmodels import Cluster, load_cluster
from simulator.placement import Placement
from traces import Attention, ModelSpec, RoutingTrace, TraceMeta


def _model(**changes: object) -> ModelSpec:
    """Two MoE layers of eight experts, top-2, wide enough that bytes matter."""
    layers = int(changes.get("num_layers", 2))  # type: ignore[call-overload]
    fields: dict[str, object] = {
        "name": "tiny",
        "family": "test",
        "num_layers": layers,
        "hidden_size": 1024,
        "vocab_size": 4096,
        "tie_embeddings": False,
        "moe_layer_ids": tuple(range(layers)),
        "num_experts": 8,
        "top_k": 2,
        "expert_width": 1536,
        "weight_dtype": "bf16",
        "expert_dtype": "bf16",
        "activation_dtype": "bf16",
        "kv_dtype": "bf16",
        "comm_size": 1024,
        "attention": Attention(
            kind="gqa",
            num_heads=8,
            num_kv_heads=2,
            head_dim=128,
            v_head_dim=128,
            windows=(None,) * layers,
        ),
    }
    return ModelSpec.model_validate(fields | changes)


def _trace(
    model: ModelSpec,
    experts: NDArray[np.integer] | None = None,
    *,
    requests: int = 8,
    length: int = 16,
) -> RoutingTrace:
    """Requests of equal length; experts [requests * length, L, K], random without them."""
    tokens = requests * length
    if experts is None:
        noise = np.random.default_rng(1).random((tokens, model.num_moe_layers, model.num_experts))
        skewed = noise * np.linspace(1, 2, model.num_experts)
        experts = np.argsort(-skewed, axis=-1)[..., : model.top_k]
    return RoutingTrace(
        meta=TraceMeta(
            model=model.name,
            num_experts=model.num_experts,
            top_k=model.top_k,
            moe_layer_ids=model.moe_layer_ids,
            synthetic=True,
        ),
        request_id=np.repeat(np.arange(requests), length).astype(np.int32),
        position=np.tile(np.arange(length), requests).astype(np.int32),
        decode=np.ones(tokens, dtype=np.bool_),
        step=np.tile(np.arange(length), requests).astype(np.int32),
        domain=np.zeros(tokens, dtype=np.int16),
        domains=("test",),
        experts=experts.astype(np.uint16),
    )


def _contiguous(model: ModelSpec, ranks: int) -> Placement:
    slots = np.tile(np.arange(model.num_experts), (model.num_moe_layers, 1))
    return Placement(slots=slots, num_experts=model.num_experts, num_ranks=ranks)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., ModelSpec]:
    return _model


@pytest.fixture(scope="session")
def make_trace() -> Callable[..., RoutingTrace]:
    return _trace


@pytest.fixture(scope="session")
def contiguous() -> Callable[[ModelSpec, int], Placement]:
    return _contiguous


@pytest.fixture(scope="session")
def cluster_of() -> Callable[[int], Cluster]:
    """The first so many GPUs of a node of eight."""
    return lambda gpus: load_cluster("hgx-h100-8", gpus=gpus)
