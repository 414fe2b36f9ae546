"""A model made small for pricing: a few layers of each kind, experts in order, drawn routing.

No published run says how its tokens were routed. Experts' popularity is drawn with the skew of
measured loads, each token's distinct experts by it; engines start with experts in order.
"""

import numpy as np

from simulator.deployment import Deployment
from simulator.parallelism import Parallelism
from simulator.placement import Placement
from traces.model_spec import ModelSpec
from traces.routing_trace import RoutingTrace, TraceMeta

SKEW = 0.8
"""Standard deviation of the log of experts' popularity, assumed for every model. The measured
loads of DeepSeek-V3/R1 have 0.9 and touch 92 of 256 experts with 16 tokens and 191 with 64; this
touches 90 and 188, uniform routing 102 and 222."""
DRAWN = 2048
"""Tokens whose routing is drawn; larger batches repeat them."""
_LAYERS = 3  # layers of a kind with experts that are priced, each with a routing of its own


def shortened(model: ModelSpec) -> tuple[ModelSpec, dict[int, float]]:
    """Return the model with a few layers of each kind, and how many layers each stands for.

    A kind is a window, with experts or without; -1 and the number of layers are the two ends.
    """
    moe = set(model.moe_layer_ids)
    kinds: dict[tuple[bool, int | None], int] = {}
    for layer, window in enumerate(model.attention.windows):
        kind = (layer in moe, window)
        kinds[kind] = kinds.get(kind, 0) + 1
    layers = [(kind, min(count, _LAYERS if kind[0] else 1)) for kind, count in kinds.items()]
    kept = [kind for kind, number in layers for _ in range(number)]
    times = {
        at: kinds[kind] / number
        for at, (kind, number) in enumerate((k, n) for k, n in layers for _ in range(n))
    }
    short = model.model_copy(
        update={
            "num_layers": len(kept),
            "moe_layer_ids": tuple(at for at, kind in enumerate(kept) if kind[0]),
            "attention": model.attention.model_copy(
                update={"windows": tuple(window for _, window in kept)}
            ),
        }
    )
    return short, times | {-1: 1.0, len(kept): 1.0}


def in_order(model: ModelSpec, parallelism: Parallelism) -> Deployment:
    """Return the deployment with experts in order and without replicas, as engines start."""
    slots = np.tile(np.arange(model.num_experts, dtype=np.int32), (model.num_moe_layers, 1))
    placement = Placement(
        slots=slots, num_experts=model.num_experts, num_ranks=parallelism.experts.ep
    )
    return Deployment.of(placement, parallelism=parallelism)


def drawn_routing(model: ModelSpec, seed: int) -> RoutingTrace:
    """Draw the distinct experts of independent tokens, popularity log-normal with `SKEW`."""
    rng = np.random.default_rng(seed)
    shape = (DRAWN, model.num_moe_layers, model.num_experts)
    popular = SKEW * rng.standard_normal(shape[1:])
    scores = popular + rng.gumbel(size=shape)
    experts = np.argpartition(-scores, model.top_k - 1, axis=2)[..., : model.top_k]
    count = np.arange(DRAWN)
    return RoutingTrace(
        meta=TraceMeta(
            model=model.name,
            synthetic=True,
            num_experts=model.num_experts,
            top_k=model.top_k,
            moe_layer_ids=model.moe_layer_ids,
        ),
        request_id=count.astype(np.int32),
        position=np.zeros(DRAWN, dtype=np.int32),
        decode=np.ones(DRAWN, dtype=np.bool_),
        step=np.zeros(DRAWN, dtype=np.int32),
        domain=np.zeros(DRAWN, dtype=np.int16),
        domains=("drawn",),
        experts=experts.astype(np.uint16),
    )
