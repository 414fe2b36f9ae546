"""Room for the KV cache of served requests on each rank, in bytes.

The cache gets what weights, experts and the buffers of the largest step leave of the usable memory.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from basis.dtypes import bytes_of
from basis.errors import InfeasibleError
from basis.units import format_quantity
from hwmodels.cluster import Cluster
from simulator.batches import StepBatch
from simulator.deployment import Deployment
from simulator.layout import Layout
from simulator.memory import USABLE, memory_need
from traces.model_spec import ModelSpec


class Limits(Protocol):
    """What bounds a step on one rank."""

    @property
    def max_batch_tokens(self) -> int:
        """Tokens."""

    @property
    def max_running(self) -> int:
        """Requests."""


def sequence_bytes(
    model: ModelSpec, layout: Layout
) -> Callable[[NDArray[np.int64]], NDArray[np.float64]]:
    """Return the function from tokens of sequences to their cache bytes on one rank.

    Windows are respected; key/value heads are divided over the tp group, a latent is not.
    """
    windows = model.attention.windows
    elements = layout.attention(model).kv_elements_per_token
    per_layer = bytes_of(model.kv_dtype, elements)
    kinds = [(window, windows.count(window) * per_layer) for window in set(windows)]

    def size(tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        total = np.zeros(tokens.shape)
        for window, each in kinds:
            total += (tokens if window is None else np.minimum(tokens, window)) * each
        return total

    return size


def kv_room(model: ModelSpec, cluster: Cluster, deployment: Deployment, limits: Limits) -> float:
    """Bytes that a rank has for the cache.

    Raises
    ------
    InfeasibleError
        If nothing is left.
    """
    placement = deployment.placement_for(model, cluster)
    layout = deployment.layout_for(model, cluster)
    home = np.repeat(np.arange(layout.dp), limits.max_batch_tokens)
    last = np.arange(len(home)) % limits.max_batch_tokens < limits.max_running
    fullest = StepBatch(rows=np.zeros_like(home), context=np.ones_like(home), home=home, last=last)
    need = memory_need(model, placement, (fullest,), layout)
    fixed = need.total - need.kv_cache
    worst = int(fixed.argmax())
    limit = USABLE * cluster.device.memory.capacity.value
    if fixed[worst] < limit:
        return float(limit - fixed[worst])
    raise InfeasibleError(
        f"{model.name} leaves no room for a KV cache on {cluster.name}: weights "
        f"{_gb(need.weights.max())} + expert slots {_gb(need.experts.max())} + buffers "
        f"{_gb(float(need.buffers.max()))} of a step of {limits.max_batch_tokens} tokens per rank "
        f"-- at most {_gb(limit)} ({USABLE:.0%} of the memory of {cluster.device.name})",
        levers=(
            "a smaller max_batch_tokens",
            "more ranks of this device, or fewer redundant experts",
            f"a device with at least {_gb(fixed[worst] / USABLE)} of memory",
        ),
    )


def _gb(value: float) -> str:
    return format_quantity(float(value), "B")
