"""How often each expert is chosen: tokens per (layer, expert), in all or step by step.

A load is a count of tokens. The sum over the experts of a layer is always tokens times top-k.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from traces.routing_trace import RoutingTrace

_CHUNK_CELLS = 2**22  # ids counted at a time: 32 MiB of int64 keys
_BLOCK_IDS = 2**18  # the same without groups: their keys stay in the cache of a core


def expert_counts(experts: NDArray[Any], num_experts: int) -> NDArray[np.int64]:
    """Count the tokens of each expert.

    Parameters
    ----------
    experts : integer array ``[..., L, K]``
        Expert ids of tokens; the leading axes are tokens.
    num_experts : int
        E.

    Returns
    -------
    int64 array ``[L, E]``

    Raises
    ------
    InputError
        If an id is not below ``num_experts``.
    """
    layers, top_k = experts.shape[-2:]
    cells = experts.reshape(-1, layers * top_k)
    if cells.size and int(cells.max()) >= num_experts:
        raise InputError(f"expert id {int(cells.max())} -- ids must be below {num_experts}")
    size = layers * num_experts
    kind = np.dtype(np.uint16 if size <= 2**16 else np.uint32)  # narrow keys are added faster
    offsets = np.repeat(np.arange(layers) * num_experts, top_k).astype(kind)
    counts = np.zeros(size, np.int64)
    rows = max(_BLOCK_IDS // (layers * top_k), 1)
    for start in range(0, len(cells), rows):
        keys = cells[start : start + rows].astype(kind, copy=False) + offsets
        counts += np.bincount(keys.reshape(-1), minlength=size)
    return counts.reshape(layers, num_experts)


def step_counts(
    trace: RoutingTrace, rows: NDArray[np.int64] | Sequence[NDArray[np.int64]]
) -> NDArray[np.int32]:
    """Count the tokens of each expert in each step.

    Parameters
    ----------
    trace : RoutingTrace
        With L layers and E experts.
    rows : int array ``[S, B]``, or S int arrays of any length
        Rows of the trace that make up each step.

    Returns
    -------
    int32 array ``[S, L, E]``
    """
    steps, layers = len(rows), trace.num_layers
    counts = np.empty((steps, layers, trace.meta.num_experts), np.int32)
    sizes = np.array([len(step) for step in rows])
    cells = np.maximum(sizes * layers * trace.meta.top_k, counts[0].size if steps else 1)
    for start, stop in _chunks(cells):
        picked = trace.experts[np.concatenate(list(rows[start:stop]))]
        step = np.repeat(np.arange(stop - start), sizes[start:stop])
        counts[start:stop] = _grouped(picked, step, stop - start, trace.meta.num_experts)
    return counts


def _chunks(cells: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Cut items of the given sizes into runs of about `_CHUNK_CELLS` or a single item."""
    block = np.cumsum(cells) // _CHUNK_CELLS
    edges = [0, *(np.flatnonzero(np.diff(block)) + 1).tolist(), len(cells)]
    return [(a, b) for a, b in pairwise(edges) if a < b]


def _grouped(
    experts: NDArray[Any], group: NDArray[np.int64], groups: int, num_experts: int
) -> NDArray[np.int64]:
    """Count ``experts [T, L, K]`` per group of tokens: ``[groups, L, E]``."""
    _, layers, top_k = experts.shape
    size = groups * layers * num_experts
    counts = np.zeros(size, np.int64)
    offsets = (np.arange(layers) * num_experts)[:, None]
    rows = max(_CHUNK_CELLS // (layers * top_k), 1)
    for start in range(0, len(experts), rows):
        chunk = experts[start : start + rows]
        if chunk.size and int(chunk.max()) >= num_experts:
            raise InputError(f"expert id {int(chunk.max())} -- ids must be below {num_experts}")
        base = group[start : start + rows, None, None] * (layers * num_experts)
        counts += np.bincount((chunk + (base + offsets)).reshape(-1), minlength=size)
    return counts.reshape(groups, layers, num_experts)
