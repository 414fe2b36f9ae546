"""The least time per token that a measured run can have: its bytes at the peak of all its memories.

Every step reads the weights outside the experts, the experts that its tokens touch, and the cache
of the requests that decode. How many these are follows from the run itself by Little's law. A run
that is faster than this on all its GPUs together was not measured as it says. Seconds.
"""

from collections.abc import Iterable
from functools import cache

import numpy as np

from basis.dtypes import bytes_of
from hwmodels.cluster import load_cluster
from hwmodels.silicon.served_rows import ServedRow
from moeplan.served_models import CLUSTERS, jitter_of, model_of
from moeplan.served_routing import DRAWN, drawn_routing
from traces.model_spec import ModelSpec


def decoding(row: ServedRow) -> float:
    """Return how many requests decode on average, by Little's law.

    ``concurrency x (latency - TTFT) / latency``: the share of its stay that a request decodes.
    """
    return row.concurrency * (1 - row.ttft / row.latency)


def least_tpot(row: ServedRow) -> float:
    """Return the bytes of a step over the peak bandwidth of all GPUs, per token that it yields, s.

    Everything that is not certain is taken in the run's favour: requests at their shortest prompt
    and without their output so far, each rank's weights read once by all ranks together, every
    drafted token accepted, products and messages free.
    """
    model = model_of(row.family, row.precision, row.system)
    tokens = max(decoding(row), 1.0)
    experts = touched(model, tokens) * model.bytes_per_expert * model.num_moe_layers
    context = int(jitter_of(row) * row.inputs)
    moved = _outside(model) + experts + tokens * model.kv_bytes(context)
    return float(moved / (row.ranks.gpus * _bandwidth(row.system)) / (1 + row.drafts))


def impossible(rows: Iterable[ServedRow]) -> set[str]:
    """Return the names of runs whose TPOT is below `least_tpot`."""
    return {row.name for row in rows if row.tpot < least_tpot(row)}


def touched(model: ModelSpec, tokens: float) -> float:
    """Return the experts of a layer that so many tokens touch on average, of the drawn routing."""
    points = _touched(model)
    return float(np.interp(tokens, np.arange(1, len(points) + 1), points))


@cache
def _bandwidth(system: str) -> float:
    """Return the peak memory bandwidth of one GPU, bytes/s."""
    return load_cluster(CLUSTERS[system]).device.memory.bandwidth.value


@cache
def _touched(model: ModelSpec) -> np.ndarray:
    """Return mean distinct experts of 1, 2, ... tokens, until nearly all are touched."""
    ids = drawn_routing(model, seed=0).experts[:, 0]
    shares = np.bincount(ids.ravel(), minlength=model.num_experts) / len(ids)
    counts = np.arange(1, DRAWN + 1)[:, None]
    return np.asarray((1 - (1 - np.minimum(shares, 1.0)) ** counts).sum(axis=1))


def _outside(model: ModelSpec) -> float:
    """Bytes outside the experts that every step reads: all but the input embedding."""
    embedding = bytes_of(model.activation_dtype, model.vocab_size * model.hidden_size)
    return model.bytes_outside_experts - (0.0 if model.tie_embeddings else embedding)
