"""Which layers of a model have routed experts, by the keys that its configuration has.

Engines and publishers say it in ten ways; the first that is present counts.
"""

from collections.abc import Callable, Iterable
from typing import Any

from traces.config_reader import Config

_SPARSE = ("sparse", "moe", "hash_moe")


def moe_layers(config: Config, layers: int, *, first_is_required: bool) -> tuple[int, ...]:
    """Return the indices (from 0) of the layers with routed experts, ascending.

    Parameters
    ----------
    config : Config
    layers : int
        Layers of the model.
    first_is_required : bool
        Whether a configuration without a layer rule must name ``first_k_dense_replace``.
    """
    rule = next((rule for key, rule in _RULES.items() if config.get(key) is not None), None)
    if rule is None and isinstance(config.get("moe_layer_freq"), list):
        rule = _flagged
    if rule is None:
        found = _by_steps(config, layers, first_is_required)
    else:
        found = tuple(i for i in rule(config, layers) if i < layers)
    if not found:
        config.problem(f"none of the {layers} layers has routed experts")
    return found


def _by_steps(config: Config, layers: int, first_is_required: bool) -> tuple[int, ...]:
    default = None if first_is_required else 0
    first = config.count("first_k_dense_replace", default=default, least=0)
    every = config.count("moe_layer_freq", default=1)
    step = config.count("decoder_sparse_step", default=1)
    dense = config.indices("mlp_only_layers", layers)
    return tuple(
        i
        for i in range(layers)
        if i >= first and i % every == 0 and (i + 1) % step == 0 and i not in dense
    )


def _named(config: Config, layers: int) -> Iterable[int]:
    kinds = config.per_layer("mlp_layer_types", layers) or []
    return [i for i, kind in enumerate(kinds) if kind in _SPARSE]


def _flagged(config: Config, layers: int) -> Iterable[int]:
    flags = config.per_layer("moe_layer_freq", layers) or []
    return [i for i, flag in enumerate(flags) if flag]


def _listed(config: Config, layers: int) -> Iterable[int]:
    text: Any = config.get("moe_layers_enum")  # "3,4,5" or a list
    items = text.split(",") if isinstance(text, str) else text
    try:
        return sorted({int(item) for item in items if str(item).strip()})
    except (TypeError, ValueError):
        config.problem(f"moe_layers_enum: {text!r} -- layer indices with commas between")
        return []


def _every(key: str) -> Callable[[Config, int], Iterable[int]]:
    def rule(config: Config, layers: int) -> Iterable[int]:
        step = config.count(key)
        return range(step - 1, layers, step)

    return rule


def _period(config: Config, layers: int) -> Iterable[int]:
    period, offset = (
        config.count("expert_layer_period"),
        config.count("expert_layer_offset", least=0),
    )
    return [i for i in range(layers) if i % period == offset]


def _after_dense(config: Config, layers: int) -> Iterable[int]:
    return range(config.count("num_dense_layers", least=0), layers)


def _from_to(config: Config, layers: int) -> Iterable[int]:
    first = config.count("moe_layer_start_index", least=0)
    last = config.count("moe_layer_end_index", default=-1, least=-1)
    step = config.count("moe_layer_interval", default=1)
    end = layers if last == -1 else min(last + 1, layers)
    return [i for i in range(first, end) if (i + 1) % step == 0]


_RULES: dict[str, Callable[[Config, int], Iterable[int]]] = {
    "mlp_layer_types": _named,
    "moe_layers": lambda config, layers: sorted(config.indices("moe_layers", layers)),
    "moe_layers_enum": _listed,
    "interleave_moe_layer_step": _every("interleave_moe_layer_step"),
    "expert_layer_period": _period,
    "num_dense_layers": _after_dense,
    "moe_layer_start_index": _from_to,
}
