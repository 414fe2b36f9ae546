"""Which experts the tokens of a call chose, read from what the experts module was called with.

In transformers 5 this is ``experts(hidden_states, top_k_index, top_k_weights)``. Where the experts
get every token instead (Llama 4), the router's output tells; every other way of calling is refused.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from traces.record_layers import MoeLayer

if TYPE_CHECKING:
    from torch import Tensor

Ints = NDArray[np.integer[Any]]
Floats = NDArray[np.floating[Any]]


def choice(
    layer: MoeLayer, args: tuple[Any, ...], kwargs: dict[str, Any], routed: Any
) -> "tuple[Tensor, Tensor]":
    """Return ids and weights ``[T, K]`` of a call of the experts."""
    named = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False))
    call = named | kwargs
    if call.keys() == {"hidden_states"} and isinstance(routed, tuple):
        return _dense_choice(layer, routed)
    if "top_k_index" not in call or "top_k_weights" not in call:
        raise InputError(
            f"the experts of layer {layer.number} were called without top_k_index and "
            "top_k_weights -- the recorder reads those two -- use a late transformers 5 (5.23 is "
            "tested)"
        )
    ids, weights = call["top_k_index"], call["top_k_weights"]
    if ids.ndim != 2 or ids.is_floating_point() or weights.shape != ids.shape:
        raise InputError(
            f"top_k_index is {ids.dtype} of shape {tuple(ids.shape)} with weights "
            f"{tuple(weights.shape)} -- allowed are whole numbers [tokens, top_k] and a weight "
            "each -- this model's experts are called in another way"
        )
    return ids, weights


def _dense_choice(layer: MoeLayer, routed: "tuple[Tensor, ...]") -> "tuple[Tensor, Tensor]":
    """Return ids and weights where the experts get every token, scaled by its score (Llama 4).

    The router then gives scores ``[T, E]``, 0 for what it did not choose, and its logits.
    """
    top_k = getattr(layer.router, "top_k", None)
    if isinstance(top_k, int) and len(routed) == 2 and routed[0].shape == routed[1].shape:
        scores, logits = routed
        ids = logits.topk(top_k, dim=-1).indices
        weights = scores.gather(-1, ids)
        if bool((weights > 0).all()) and int((scores != 0).sum()) == ids.numel():
            return ids, weights
    raise InputError(
        f"the experts of layer {layer.number} get every token, and the router's output does not "
        "say which it chose -- allowed are scores that are 0 elsewhere, and logits -- this model "
        "cannot be recorded"
    )


def to_numpy(tensor: "Tensor") -> NDArray[Any]:
    """Copy to the host; bfloat16, which numpy lacks, becomes float32."""
    plain = tensor.detach().cpu()
    array: NDArray[Any] = (plain.float() if plain.is_floating_point() else plain).numpy()
    return array.copy()  # the model may reuse its buffer


def check_choice(ids: Ints, weights: Floats, num_experts: int) -> None:
    """Check the choice of T real tokens, ``[T, L, K]`` each."""
    if not ids.size:
        return
    if ids.min() < 0 or ids.max() >= num_experts:
        raise InputError(
            f"expert ids {ids.min()} to {ids.max()} -- allowed are 0 to {num_experts - 1} -- "
            "give the model's own num_experts"
        )
    ordered = np.sort(ids, axis=-1)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        raise InputError(
            "a token was given the same expert twice -- a choice is distinct ids -- this model's "
            "experts are called in another way, or their ids are local to a process"
        )
    if (weights == 0).any():
        raise InputError(
            "an expert was chosen with weight 0 -- chosen experts weigh something -- the router "
            "skips experts or drops tokens, which a trace cannot say; or run in bfloat16 or float32"
        )
