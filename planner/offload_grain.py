"""The residency problem again at the grain of whole layers, as llama.cpp places experts.

A layer's experts are one tensor there, so a layer is kept whole or not at all. Layers then add up
independently and have one size: the best set is the layers that gain most, exactly. Seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planner.offload_layer import Bools, Layer


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerGrain:
    """Whole layers in the fast memory."""

    best: Bools
    """Layers to keep if any set may be named (``-ot``), [L]."""
    last: Bools
    """Layers to keep if the first ones must be the others (``--n-cpu-moe``), [L]."""


def layer_grain(layers: Sequence[Layer], slots: int) -> LayerGrain:
    """Choose the layers to keep.

    Parameters
    ----------
    layers : sequence of Layer
        Of equal numbers of experts.
    slots : int
        Experts that fit.
    """
    gains = np.array([_gain(layer) for layer in layers])
    room = min(slots // layers[0].num_experts, len(layers))
    best = np.zeros(len(layers), dtype=np.bool_)
    order = np.argsort(-gains, kind="stable")[:room]
    best[order[gains[order] > 0]] = True
    tails = np.array([gains[len(gains) - kept :].sum() for kept in range(room + 1)])
    last = np.arange(len(layers)) >= len(layers) - int(tails.argmax())
    return LayerGrain(best=best, last=last)


def _gain(layer: Layer) -> float:
    """Mean seconds per step that keeping all of a layer saves."""
    every = np.ones((1, layer.num_experts), dtype=np.bool_)
    none = ~every
    away = layer.mean(none, none if layer.times.side is not None else every)
    return float(away[0] - layer.mean(every, none)[0])
