"""Number formats of a checkpoint: what ``quantization_config`` makes of each kind of matrix.

Quantisers name modules to leave out, or give modules formats of their own. Such names are held
against the names that a model's matrices have, so that experts, attention, shared experts and
dense networks each get the format that is stored. Sources: the published configurations of
DeepSeek, Kimi, gpt-oss, nvidia (modelopt) and the formats of compressed-tensors.
"""

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from basis.dtypes import DTYPES
from traces.config_reader import Config, Fields

_BASE = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_MODELOPT = {"NVFP4": "nvfp4", "W4A16_NVFP4": "nvfp4_w4a16", "FP8": "fp8", "MXFP8": "mxfp8"}
_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.",
             "backbone.")  # fmt: skip
_EXPERTS = tuple(
    f"{where}.experts{matrix}"
    for where in ("mlp", "block_sparse_moe", "ffn", "feed_forward", "mixer", "moe")
    for matrix in ("", ".0", ".0.up_proj", ".0.w3")
)
_EXPERTS_BESIDE = ("experts", "experts.0", "experts.0.up_proj", "moe.experts.0.up_proj")
_SHARED = tuple(
    f"{where}.{name}.{matrix}"
    for where in ("mlp", "block_sparse_moe", "ffn", "feed_forward", "mixer")
    for name in ("shared_experts", "shared_expert", "share_expert")
    for matrix in ("up_proj", "w3")
)
_DENSE = ("mlp.up_proj", "ffn.w3", "feed_forward.up_proj", "mixer.up_proj")
_MIXERS = tuple(
    f"{where}.{name}"
    for where in ("linear_attn", "mixer", "mamba", "self_attn", "conv")
    for name in ("in_proj", "in_proj_qkv", "out_proj", "q_proj", "o_proj")
)
_ATTENTION = {
    "gqa": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mla": ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    "shared_kv": ("wq_a", "wq_b", "wkv", "wo_a", "wo_b"),
}

Choose = Callable[[Sequence[str]], str | None]
"""Names that one matrix may have inside the model, to its format; None = not quantised."""


def formats(
    config: Config, fields: Fields, beside: object = None, *, dense_beside: bool = False
) -> Fields:
    """Return the number formats; without a statement bf16, as all these families are.

    Parameters
    ----------
    config : Config
    fields : dict
        Of the `ModelSpec`: its layers.
    beside : object
        Content of a ``hf_quant_config.json`` beside the configuration, which counts where the
        configuration itself says nothing.
    dense_beside : bool
        Whether the layer has a dense network under its usual name, and the experts beside it.
    """
    stated = config.get("torch_dtype", "dtype") or "bfloat16"
    base = _BASE.get(str(stated).removeprefix("torch."))
    if base is None:
        config.problem(f"torch_dtype: {stated!r} -- one of {', '.join(_BASE)}")
        base = "bf16"
    given = config.get("quantization_config")
    if given is None and isinstance(beside, Mapping):
        inner = beside.get("quantization")
        given = {"quant_method": "modelopt", **(inner if isinstance(inner, Mapping) else {})}
    chosen: Fields = dict.fromkeys(("weight_dtype", "expert_dtype", "activation_dtype"), base)
    if given is None:
        return chosen | {"kv_dtype": base}
    if not isinstance(given, Mapping):
        config.problem(_unknown(None))
        return chosen | {"kv_dtype": base}
    if given.get("quant_method") == "mxfp4":
        return chosen | {"kv_dtype": base, "expert_dtype": "mxfp4"}
    choose = _chooser(config, given)
    return chosen | {
        "kv_dtype": _kv(given, beside, base),
        **_by_kind(config, fields, choose, base, dense_beside),
    }


def _by_kind(
    config: Config, fields: Fields, choose: Choose, base: str, dense_beside: bool
) -> Fields:
    """Return the formats of experts and of everything else, each matrix looked up by its names.

    What is outside the experts has one format in a `ModelSpec`: the widest that is stored.
    """
    moe = fields["moe_layer_ids"]
    names = _EXPERTS_BESIDE if dense_beside else _EXPERTS
    experts = {_at(choose, i, names) or base for i in moe}
    if len(experts) > 1:
        config.problem(
            f"quantization_config: experts are stored as {', '.join(sorted(experts))} -- only one "
            "format for all layers is supported"
        )
    dense = fields.get("dense_layer_ids")
    if dense is None:
        dense = [i for i in range(fields["num_layers"]) if i not in set(moe)]
    taken = fields.get("attention_layers")
    parts = [one for one in fields.get("parts", ()) if one["matrix_params"]]
    wanted = [
        (moe if fields.get("shared_expert_width") else (), _DENSE if dense_beside else _SHARED),
        (dense, _DENSE),
        *(
            (
                range(fields["num_layers"]) if taken is None else taken,
                tuple(f"{where}.{name}" for where in ("self_attn", "attn", "mixer")),
            )
            for name in _ATTENTION[fields["attention"]["kind"]]
        ),
        *((set(one["layers"]) - set(taken or ()), _MIXERS) for one in parts if taken is not None),
    ]
    others = {_at(choose, i, names) or base for layers, names in wanted for i in layers}
    widest = max(others, key=lambda name: DTYPES[name].bits, default=base)
    return {
        "expert_dtype": min(experts, default=base),
        "weight_dtype": widest,
        "mixed_weights": tuple(sorted(others - {widest})),
    }


def _at(choose: Choose, layer: int, names: Iterable[str]) -> str | None:
    return choose([f"layers.{layer}.{name}" for name in names])


def _chooser(config: Config, given: Mapping[str, Any]) -> Choose:
    """Return what says in which format a matrix is stored, None where it is not quantised."""
    keys = ("ignore", "exclude_modules", "modules_to_not_convert")
    lists = [given[key] for key in keys if isinstance(given.get(key), list)]
    left_out = _matcher(config, [str(name) for names in lists for name in names])
    uniform = _uniform(config, given)
    own = given.get("quantized_layers")
    if not isinstance(own, Mapping):
        expert = _fp4_experts(config, given)
        if expert is None:
            return lambda names: None if left_out(names) else uniform
        wanted = _matcher(config, ["*.experts", "*.experts.*"])
        return lambda names: None if left_out(names) else expert if wanted(names) else uniform
    named = {
        _bare(name): _modelopt(
            config, value.get("quant_algo") if isinstance(value, Mapping) else value
        )
        for name, value in own.items()
    }

    def choose(names: Sequence[str]) -> str | None:
        # what is left out is left out of these formats, and has the uniform one, if there is any
        return next((named[name] for name in names if name in named), uniform)

    return choose


def _uniform(config: Config, given: Mapping[str, Any]) -> str | None:
    """Return the format of all matrices that nothing is said about."""
    method, algorithm = given.get("quant_method"), given.get("quant_algo")
    if method == "modelopt" or (method is None and algorithm):
        if algorithm != "MIXED_PRECISION":
            return _modelopt(config, algorithm)
        if not isinstance(given.get("quantized_layers"), Mapping):
            config.problem("quantized_layers: missing -- required by MIXED_PRECISION")
        return None
    if method == "fp8":
        block = given.get("weight_block_size")
        if block in (None, [128, 128]):
            return "fp8" if block is None else "fp8_block"
        config.problem(f"weight_block_size: {block!r} -- only [128, 128] is known")
        return None
    if method in ("gptq", "awq"):
        return _integers(config, given.get("bits"), given.get("group_size"), "bits, group_size")
    if method == "compressed-tensors":
        return _compressed(config, given)
    config.problem(_unknown(method))
    return None


def _modelopt(config: Config, algorithm: object) -> str | None:
    if str(algorithm) not in _MODELOPT:
        config.problem(f"quant_algo: {algorithm!r} -- known are {', '.join(_MODELOPT)}")
    return _MODELOPT.get(str(algorithm))


def _compressed(config: Config, given: Mapping[str, Any]) -> str | None:
    groups = given.get("config_groups")
    group = list(groups.values()) if isinstance(groups, Mapping) else []
    weights = group[0].get("weights") if len(group) == 1 and isinstance(group[0], Mapping) else None
    if not isinstance(weights, Mapping):
        config.problem("config_groups: not one group -- only one format for all modules is known")
        return None
    kind, bits = weights.get("type"), weights.get("num_bits")
    size = weights.get("group_size")
    if kind == "int":
        return _integers(config, bits, size, "num_bits, group_size")
    floats = (((4, 32), "mxfp4"), ((4, 16), "nvfp4"), ((8, None), "fp8"))
    for stored, name in floats:
        if kind == "float" and stored == (bits, size):
            return name
    config.problem(f"config_groups: {kind} with {bits} bits in groups of {size} -- not known")
    return None


def _integers(config: Config, bits: object, group: object, keys: str) -> str | None:
    for stored, name in (((4, 128), "int4"), ((4, 32), "int4_g32")):
        if stored == (bits, group):
            return name
    config.problem(f"{keys}: {(bits, group)} -- only 4 bits in groups of 128 or 32")
    return None


def _fp4_experts(config: Config, given: Mapping[str, Any]) -> str | None:
    """Return the format of experts stored in 4 bits beside fp8 (DeepSeek-V4), one scale per 32."""
    stated = given.get("expert_dtype") or config.get("expert_dtype")
    if stated in (None, "fp8"):
        return None
    if stated != "fp4":
        config.problem(f"expert_dtype: {stated!r} -- fp4 or fp8")
    return "mxfp4_mxfp8"


def _kv(given: Mapping[str, Any], beside: object, base: str) -> str:
    """Return the format of the cache; the file beside counts where nothing is said of it."""
    inner = beside.get("quantization") if isinstance(beside, Mapping) else None
    if not {"kv_cache_scheme", "kv_cache_quant_algo"} & set(given) and isinstance(inner, Mapping):
        given = inner
    scheme = given.get("kv_cache_scheme")
    eight = isinstance(scheme, Mapping) and scheme.get("num_bits") == 8
    return "fp8" if eight or given.get("kv_cache_quant_algo") == "FP8" else base


def _matcher(config: Config, patterns: Sequence[str]) -> Callable[[Sequence[str]], bool]:
    """Return what tells whether any of some names is meant by the patterns.

    ``re:`` starts a regular expression, ``*`` stands for anything; a plain name means itself, all
    that is inside it, and every module whose path has these components.
    """
    plain = {_bare(p) for p in patterns if "*" not in p and not p.startswith("re:")}
    globs = [fnmatch.translate(_bare(p)) for p in patterns if "*" in p and p[:3] != "re:"]
    given = []
    for pattern in (p[3:] for p in patterns if p.startswith("re:")):
        try:
            given.append(re.compile(pattern))
        except re.error as error:
            config.problem(f"quantization_config: {pattern!r} -- not a pattern ({error})")
    inside = [re.compile("|".join(globs[at : at + 200])) for at in range(0, len(globs), 200)]

    def meant(name: str) -> bool:
        return (
            not plain.isdisjoint(_runs(name))
            or any(glob.match(name) for glob in inside)
            or any(own.match(prefix + name) for own in given for prefix in ("", *_PREFIXES))
        )

    return lambda names: any(map(meant, names))


def _bare(name: str) -> str:
    """Return a module's name inside the model, without what the checkpoint puts before it."""
    prefix = next((p for p in _PREFIXES if name.startswith(p)), "")
    return name.removeprefix(prefix)


def _runs(name: str) -> Iterator[str]:
    """Yield all runs of components of a dotted name."""
    parts = name.split(".")
    for first in range(len(parts)):
        for last in range(first, len(parts)):
            yield ".".join(parts[first : last + 1])


def _unknown(method: object) -> str:
    return (
        f"quantization_config: quant_method {method!r} is not supported -- supported are fp8, "
        "mxfp4, gptq, awq, compressed-tensors and modelopt; give the config of the unquantised or "
        "FP8 checkpoint"
    )
