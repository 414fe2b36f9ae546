"""Routing that SGLang returns with its answers (``--enable-return-routed-experts``): sglang-r3.

A source is a JSON or JSONL file of saved answers: of ``/generate`` (``meta_info.routed_experts``,
with prompt_tokens and completion_tokens beside it), or of the OpenAI endpoints
(``sglext.routed_experts``, with ``usage``; one choice per answer). The text is base64 of raw int32
``[T - 1 - start, all layers, K]`` without a header, so that the model gives the shape; dense layers
are 0, shared experts not part of it. A start (``routed_experts_start_len`` of the request) other
than 0 must be saved in the answer under that name, at the top or beside routed_experts. Rows of
zeros in all layers were never captured and are dropped.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from basis.errors import InputError
from traces.importers.base import Asked, Format, Tokens
from traces.importers.layers import Routing, asked_routing
from traces.importers.responses import (
    Answer,
    answer_sequences,
    decoded,
    first_answer,
    whole_number,
)
from traces.importers.rows import Sequence, sequence_tokens


class SglangR3:
    """All hidden layers, base64 of raw int32."""

    name = "sglang-r3"
    title = "SGLang answers: meta_info.routed_experts or sglext.routed_experts, JSON(L)"

    def matches(self, source: Path, head: bytes) -> bool:
        """Whether the first answer has routing where SGLang puts it."""
        answer = first_answer(source, head)
        return answer is not None and "routed_experts" in _about(answer)

    def read(self, source: Path, asked: Asked) -> Tokens:
        """Read the saved answers."""
        routing = asked_routing(asked, source)

        def parse(where: str, answer: Answer) -> Iterator[Sequence | None]:
            yield _sequence(where, answer, routing)

        notes: list[str] = []
        sequences = answer_sequences(source, parse, notes)
        return sequence_tokens(sequences, source, asked, "all", self.name, notes)


FORMATS_SGLANG: tuple[Format, ...] = (SglangR3(),)


def _about(answer: Answer) -> dict[str, Any]:
    """Return the part of an answer that has the routing."""
    for name in ("meta_info", "sglext"):
        part = answer.get(name)
        if isinstance(part, dict) and "routed_experts" in part:
            return part
    return {}


def _sequence(where: str, answer: Answer, routing: Routing) -> Sequence | None:
    about = _about(answer)
    text = about.get("routed_experts")
    if text is None:
        return None
    if isinstance(text, list):
        if len(text) != 1:
            raise InputError(f"{where}: {len(text)} choices in an answer -- request one at a time")
        text = text[0]
    used = answer.get("usage") if "prompt_tokens" not in about else about
    lengths = used if isinstance(used, dict) else {}
    name = "routed_experts_start_len"
    start = about.get(name, answer.get(name, 0))
    return Sequence(
        where=where,
        ids=_shaped(decoded(text, f"{where}: routed_experts"), routing, where),
        start=whole_number(start, f"{where}: {name}"),
        prompt=_length(lengths, "prompt_tokens", where),
        output=_length(lengths, "completion_tokens", where),
    )


def _length(lengths: dict[str, Any], name: str, where: str) -> int | None:
    value = lengths.get(name)
    return None if value is None else whole_number(value, f"{where}: {name}")


def _shaped(data: bytes, routing: Routing, where: str) -> Any:
    row = routing.num_layers * routing.top_k
    if len(data) % (4 * row):
        raise InputError(
            f"{where}: {len(data)} bytes of routing are no whole rows of {routing.num_layers} "
            f"layers x top-{routing.top_k} int32 of {routing.name} -- was it cut off? give the "
            "config.json of the model that was recorded"
        )
    return np.frombuffer(data, "<i4").reshape(-1, routing.num_layers, routing.top_k)
