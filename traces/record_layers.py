"""The MoE layers of a torch model: where its experts and routers are, and whether they show.

Nothing here is per model: a layer is a module named ``...N...experts``, its router the module
``gate`` or ``router`` beside it.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from basis.errors import InputError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class MoeLayer:
    """One MoE layer of a model."""

    number: int
    """Index of the layer in the model: the first number in the path of the module."""
    experts: "nn.Module"
    router: "nn.Module | None"
    """The module named ``gate`` or ``router`` beside the experts."""


def moe_layers(model: "nn.Module") -> tuple[MoeLayer, ...]:
    """Return the MoE layers of a model, ascending.

    Raises
    ------
    InputError
        When there is none, two are in one layer, or the model runs in a way that hides the choice.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise InputError(
            "an encoder-decoder model (Switch, NLLB) -- only decoders can be recorded: its routers "
            "drop tokens beyond a capacity, and encoder and decoder count the same tokens twice"
        )
    compiled = any(getattr(m, "_compiled_call_impl", None) is not None for m in model.modules())
    if compiled or hasattr(model, "_orig_mod"):
        raise InputError(
            "the model is compiled (torch.compile) -- hooks do not run in compiled code -- record "
            "the model as it was before"
        )
    modules = dict(model.named_modules())
    found: dict[int, MoeLayer] = {}
    for name, module in modules.items():
        number = re.search(r"\.(\d+)\.", f".{name}.")
        if not f".{name}".endswith(".experts") or number is None:
            continue
        layer = int(number.group(1))
        if layer in found:
            raise InputError(
                f"two experts modules in layer {layer} ({name}) -- one per layer is allowed -- "
                "record a part of the model"
            )
        if getattr(module, "_is_expert_parallel", False):
            raise InputError(
                "the experts are spread over processes (expert parallelism) -- their ids are "
                "local there -- record on one process"
            )
        block = name.removesuffix("experts")
        router = modules.get(f"{block}gate") or modules.get(f"{block}router")
        found[layer] = MoeLayer(number=layer, experts=module, router=router)
    if not found:
        raise InputError(
            "the model has 0 modules named '....N....experts' -- the recorder needs at least one "
            "-- use an MoE model of a late Hugging Face transformers 5 (5.23 is tested), or name "
            "the experts modules so"
        )
    return tuple(found[number] for number in sorted(found))


def layer_experts(layers: tuple[MoeLayer, ...]) -> int:
    """Return how many experts each layer has, as the modules say."""
    counts = {
        # LongCat's total includes experts without computation, which its router chooses as well
        getattr(layer.experts, "num_experts", getattr(layer.experts, "total_experts", None))
        for layer in layers
    }
    count = counts.pop()
    if counts or not isinstance(count, int):
        raise InputError(
            f"the experts modules say {sorted(map(str, {count, *counts}))} as their number of "
            "experts -- one number for all layers is needed -- give num_experts"
        )
    return count
