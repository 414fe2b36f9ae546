"""Memory per rank against a hand-counted table, and levers that do what they say."""

import re
from collections.abc import Callable

import numpy as np
import pytest

from basis import InfeasibleError
from hwmodels import Cluster
from simulator import Placement, Workload
from simulator.batches import StepBatch, compose
from simulator.memory import USABLE, MemoryNeed, memory_need
from simulator.memory_fits import check_fits
from traces import Attention, ModelSpec, RoutingTrace

ModelOf = Callable[..., ModelSpec]
TraceOf = Callable[..., RoutingTrace]
PlacementOf = Callable[[ModelSpec, int], Placement]
ClusterOf = Callable[[int], Cluster]


def _capacity(cluster: Cluster, capacity: float) -> Cluster:
    """Change the memory of every device, bytes."""
    device = cluster.device
    name = device.processor.memory
    figure = device.memory.capacity
    memory = device.memory.model_copy(
        update={"capacity": figure.model_copy(update={"value": capacity})}
    )
    changed = device.model_copy(update={"memories": device.memories | {name: memory}})
    return cluster.model_copy(update={"device": changed})


def _need(model: ModelSpec, trace: RoutingTrace, placement: Placement, batch: int) -> MemoryNeed:
    steps = compose(trace, Workload(decode_batch=batch), placement.num_ranks, steps=1, seed=0)
    return memory_need(model, placement, steps.batches)


def test_terms_equal_a_hand_count(make_model: ModelOf, contiguous: PlacementOf) -> None:
    attention = Attention(
        kind="gqa", num_heads=8, num_kv_heads=2, head_dim=128, v_head_dim=128, windows=(4, None)
    )
    model = make_model(attention=attention)
    one = StepBatch(
        rows=np.arange(3),
        context=np.array([10, 3, 6]),
        home=np.array([0, 0, 1]),
        last=np.ones(3, dtype=np.bool_),
    )
    two = StepBatch(rows=one.rows, context=one.context + 1, home=one.home, last=one.last)
    need = memory_need(model, contiguous(model, 4), [one, two])
    assert need.weights.tolist() == [model.bytes_outside_experts] * 4
    experts = 2 * 2 * 3 * 1024 * 1536 * 2  # slots, layers, matrices, bf16
    assert need.experts.tolist() == [experts] * 4
    per_token = 2 * (128 + 128) * 2
    windowed, full = (4 + 4) + 4, (11 + 4) + 7
    assert need.kv_cache.tolist() == [
        per_token * ((4 + 4) + (11 + 4)),
        per_token * (4 + 7),
        0,
        0,
    ]
    assert need.kv_cache.sum() == per_token * (windowed + full)
    assert need.max_context == 11
    assert need.mean_context == pytest.approx((10 + 3 + 6 + 11 + 4 + 7) / 6)
    step = 3 * 2 * (2 * 1024 + 2 * (2 * 1024 + 2 * 1536))
    own = 2 * (3 * 1024 + 8 * 256 + 2 * 256) + 4 * 4096
    assert need.buffers.tolist() == [step + 2 * own, step + own, step, step]


def test_prefill_keeps_the_cache_of_whole_prompts(
    make_model: ModelOf, make_trace: TraceOf, contiguous: PlacementOf
) -> None:
    model = make_model()
    trace = make_trace(model, requests=4, length=16)
    steps = compose(trace, Workload(prefill_tokens=64), 2, steps=1, seed=0)
    need = memory_need(model, contiguous(model, 2), steps.batches)
    assert need.kv_cache.tolist() == [2 * 16 * model.kv_bytes_per_token] * 2


def test_the_limit_is_exact(
    make_model: ModelOf, make_trace: TraceOf, contiguous: PlacementOf, cluster_of: ClusterOf
) -> None:
    model, placement = make_model(), contiguous(make_model(), 4)
    need = _need(model, make_trace(model), placement, 8)
    enough = need.total.max() / USABLE
    check_fits(need, model, placement, _capacity(cluster_of(4), enough * 1.0001), 8)
    with pytest.raises(InfeasibleError) as error:
        check_fits(need, model, placement, _capacity(cluster_of(4), enough * 0.9999), 8)
    for part in ("weights outside experts", "2 expert slots x 2 layers", "KV cache", "buffers"):
        assert part in str(error.value)


def _levers(
    need: MemoryNeed, model: ModelSpec, placement: Placement, cluster: Cluster, batch: int
) -> dict[str, float]:
    with pytest.raises(InfeasibleError) as error:
        check_fits(need, model, placement, cluster, batch)
    patterns = {
        "redundant": r"at most (\d+) redundant experts",
        "ranks": r"at least (\d+) ranks",
        "batch": r"a batch of at most about (\d+) tokens",
        "device": r"a device with at least ([\d.e+]+ .?B)",
    }
    found = {}
    for name, pattern in patterns.items():
        match = re.search(pattern, "; ".join(error.value.levers))
        if match:
            found[name] = float(match[1].split()[0])
    return found


def test_fewer_redundant_experts_fit_as_the_lever_says(
    make_model: ModelOf, make_trace: TraceOf, cluster_of: ClusterOf
) -> None:
    model = make_model()
    trace = make_trace(model)

    def with_redundant(redundant: int) -> Placement:
        slots = np.tile(np.arange(8 + redundant) % 8, (2, 1))
        return Placement(slots=slots, num_experts=8, num_ranks=4)

    middle = _need(model, trace, with_redundant(8), 8).total.max()
    cluster = _capacity(cluster_of(4), middle / USABLE * 1.001)
    wide = with_redundant(16)
    levers = _levers(_need(model, trace, wide, 8), model, wide, cluster, 8)
    assert levers["redundant"] == 8
    fits = with_redundant(8)
    check_fits(_need(model, trace, fits, 8), model, fits, cluster, 8)


def test_more_ranks_fit_as_the_lever_says(
    make_model: ModelOf, make_trace: TraceOf, contiguous: PlacementOf, cluster_of: ClusterOf
) -> None:
    model = make_model()
    trace = make_trace(model)
    limit = _need(model, trace, contiguous(model, 4), 8).total.max() * 1.001
    two = contiguous(model, 2)
    cluster = _capacity(cluster_of(2), limit / USABLE)
    levers = _levers(_need(model, trace, two, 8), model, two, cluster, 8)
    assert levers["ranks"] == 4
    assert "redundant" not in levers


def test_a_smaller_batch_fits_as_the_lever_says(
    make_model: ModelOf, make_trace: TraceOf, contiguous: PlacementOf, cluster_of: ClusterOf
) -> None:
    model = make_model(expert_width=8)
    trace = make_trace(model, requests=400, length=64)
    placement = contiguous(model, 4)
    need = _need(model, trace, placement, 400)
    cluster = _capacity(cluster_of(4), need.total.max() * 0.8 / USABLE)
    batch = int(_levers(need, model, placement, cluster, 400)["batch"])
    assert 100 < batch < 400
    smaller = _need(model, trace, placement, round(batch * 0.95))  # contexts differ by request
    check_fits(smaller, model, placement, cluster, batch)


def test_weights_that_never_fit_leave_only_a_larger_device(
    make_model: ModelOf, make_trace: TraceOf, contiguous: PlacementOf, cluster_of: ClusterOf
) -> None:
    model, placement = make_model(), contiguous(make_model(), 4)
    cluster = _capacity(cluster_of(4), model.bytes_outside_experts / 2)
    levers = _levers(_need(model, make_trace(model), placement, 8), model, placement, cluster, 8)
    assert set(levers) == {"device"}
