"""What a routing trace says about itself: the model's routing geometry, origin and licence.

Two encodings in a Parquet file are understood: the project's own (one JSON document under the
key ``moeplan.trace``) and the transport files' separate ``moe.*`` keys.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from basis.errors import InputError

SCHEMA = "moeplan.trace/1"
META_KEY = b"moeplan.trace"
MISSING = 65535
"""Expert id that recorders write where a (token, layer) cell was lost."""


@dataclass(frozen=True, kw_only=True)
class TraceMeta:
    """Description of a trace.

    Raises
    ------
    InputError
        If a value is impossible, or the schema version is not this one.
    """

    model: str
    num_experts: int
    """Logical experts of each MoE layer."""
    top_k: int
    moe_layer_ids: tuple[int, ...]
    """The model's layer index of each recorded layer, ascending."""
    source: str = ""
    """Where and how it was recorded."""
    licence: str = "not stated"
    synthetic: bool = False
    """True where no real model made these choices."""
    note: str = ""
    num_candidates: int = 0
    """Best candidates M recorded of each token and layer, with scores; 0 where none are."""
    schema: str = SCHEMA

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise InputError("trace metadata: " + "; ".join(problems))

    def _problems(self) -> list[str]:
        if self.schema != SCHEMA:
            return [f"schema {self.schema!r} -- this version reads {SCHEMA!r}"]
        if not (_is_count(self.num_experts) and _is_count(self.top_k)):
            return [
                f"num_experts {self.num_experts!r} and top_k {self.top_k!r} "
                "-- whole numbers of at least 1"
            ]
        texts = (self.model, self.source, self.licence, self.note)
        found = []
        if not all(isinstance(text, str) for text in texts) or type(self.synthetic) is not bool:
            found.append("model, source, licence and note are texts, synthetic is true or false")
        if self.num_experts >= MISSING:
            found.append(f"num_experts {self.num_experts} -- at most {MISSING - 1}")
        if self.top_k > self.num_experts:
            found.append(f"top_k {self.top_k} -- at most num_experts {self.num_experts}")
        if self.num_candidates != 0 and not (
            _is_count(self.num_candidates) and self.top_k < self.num_candidates <= self.num_experts
        ):
            found.append(
                f"num_candidates {self.num_candidates!r} -- 0, or more than top_k {self.top_k} and "
                f"at most num_experts {self.num_experts}"
            )
        ids = self.moe_layer_ids
        if not ids or any(not _is_count(i + 1) for i in ids) or list(ids) != sorted(set(ids)):
            found.append(f"moe_layer_ids {list(ids)} -- layer indices from 0, ascending")
        return found

    @property
    def num_layers(self) -> int:
        """Recorded MoE layers."""
        return len(self.moe_layer_ids)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def encode(meta: TraceMeta, domains: tuple[str, ...]) -> str:
    """Return the JSON document of the own schema."""
    data = asdict(meta)
    if not meta.num_candidates:
        del data["num_candidates"]  # as it was before candidates could be recorded
    return json.dumps(data | {"domains": list(domains)})


def decode(text: str | bytes) -> tuple[TraceMeta, tuple[str, ...]]:
    """Read the JSON document of the own schema.

    Raises
    ------
    InputError
        If it is not JSON, or keys are missing, unknown or impossible.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"trace metadata: not valid JSON -- {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"trace metadata: expected a mapping, got {type(data).__name__}")
    domains = data.pop("domains", [])
    known = {f.name for f in fields(TraceMeta)}
    missing = {"model", "num_experts", "top_k", "moe_layer_ids", "schema"} - data.keys()
    if missing or data.keys() - known:
        raise InputError(
            f"trace metadata: missing {sorted(missing)}, unknown {sorted(data.keys() - known)} "
            f"-- {SCHEMA} has {sorted(known)}"
        )
    if not _are_ints(data["moe_layer_ids"]) or not _are_texts(domains):
        raise InputError("trace metadata: moe_layer_ids must list integers, domains texts")
    data["moe_layer_ids"] = tuple(data["moe_layer_ids"])
    return TraceMeta(**data), tuple(domains)


def decode_transport(metadata: Mapping[bytes, bytes]) -> TraceMeta:
    """Read the separate ``moe.*`` keys of a transport file.

    Raises
    ------
    InputError
        If required keys are missing or not readable.
    """
    required = ("model", "num_experts", "top_k", "moe_layer_ids")
    missing = [f"moe.{key}" for key in required if f"moe.{key}".encode() not in metadata]
    if missing:
        raise InputError(
            f"trace metadata: missing {', '.join(missing)} -- a trace is a Parquet file with the "
            f"metadata key {META_KEY.decode()} ({SCHEMA}) or the moe.* keys; was it converted by "
            "another tool that drops the metadata?"
        )

    def text(key: str, default: str = "") -> str:
        return metadata.get(f"moe.{key}".encode(), default.encode()).decode("utf-8", "replace")

    try:
        num_experts, top_k = int(text("num_experts")), int(text("top_k"))
        layer_ids: Any = json.loads(text("moe_layer_ids"))
        num_layers = int(text("num_layers", str(len(layer_ids))))
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"trace metadata: a moe.* key is not readable -- {error}") from error
    if not _are_ints(layer_ids) or num_layers != len(layer_ids):
        raise InputError(
            f"trace metadata: moe.num_layers {num_layers}, but moe.moe_layer_ids {layer_ids}"
        )
    source = "; ".join(filter(None, (text("source_repo"), text("capture"), text("dataset"))))
    return TraceMeta(
        model=text("model"), num_experts=num_experts, top_k=top_k, moe_layer_ids=tuple(layer_ids),
        source=source, licence=text("license", "not stated"), note=text("note"),
    )  # fmt: skip


def _are_ints(values: object) -> bool:
    return isinstance(values, list) and all(type(v) is int for v in values)


def _are_texts(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(v, str) for v in values)
