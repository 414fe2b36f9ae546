"""The layouts of workload traces: by which names they are known, and what a line of them says.

Every layout is read by the names of its columns or keys, never by their order. Times are turned
into seconds from the layout's own zero, lengths are tokens.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

from traces.arrivals.checks import MOST_TOKENS
from traces.arrivals.requests import MOONCAKE_BLOCK

CountTokens = Callable[[str], int]
_QWEN_BLOCK = 16
_MOST_ID = 2**63 - 1
_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_BURST = ("Timestamp", "Model", "Request tokens", "Response tokens", "Total tokens", "Log Type")
_OURS = ("seconds", "input_tokens", "output_tokens")
_PROMPT_LENGTHS = ("prompt_len", "input_len")


class Row(NamedTuple):
    """One request."""

    seconds: float
    """Time of arrival; 0 in a layout without times."""
    inputs: int
    outputs: int
    ids: Sequence[int] = ()
    """Ids of the prompt's blocks, if the line has them."""
    size: int = 0
    """Tokens of a block; 0 without blocks."""


@dataclass(frozen=True, kw_only=True)
class WorkloadFormat:
    """One layout."""

    name: str
    layout: str
    """Header or keys, for messages."""
    kind: Literal["csv", "jsonl"]
    recognises: Callable[[frozenset[str]], bool]
    """Whether a file with these columns, or these keys in its first line, is of this layout."""
    row: Callable[[Mapping[str, Any]], Row | None]
    """Reads a line; None: the request failed. Raises ValueError, KeyError or TypeError."""
    timed: bool = True
    """Whether lines say when requests come."""


def workload_formats(count_tokens: CountTokens | None = None) -> tuple[WorkloadFormat, ...]:
    """Return all layouts; at most one recognises a file.

    Parameters
    ----------
    count_tokens
        Counts the tokens of a text, for layouts that have prompts and no lengths.
    """
    return (
        WorkloadFormat(
            name="azure",
            layout=",".join(_AZURE),
            kind="csv",
            recognises=lambda names: names == {*_AZURE},
            row=_azure,
        ),
        WorkloadFormat(
            name="burstgpt",
            layout=",".join(_BURST) + " (and Session ID,Elapsed time)",
            kind="csv",
            recognises=lambda names: names - {"Session ID", "Elapsed time"} == {*_BURST},
            row=_burst,
        ),
        WorkloadFormat(
            name="moeplan",
            layout=",".join(_OURS),
            kind="csv",
            recognises=lambda names: names == {*_OURS},
            row=_own,
        ),
        WorkloadFormat(
            name="mooncake",
            layout="timestamp (ms), input_length, output_length, hash_ids",
            kind="jsonl",
            recognises=lambda names: (
                "chat_id" not in names and {"timestamp", "input_length"} <= names
            ),
            row=_mooncake,
        ),
        WorkloadFormat(
            name="qwen",
            layout="chat_id, timestamp (s), input_length, output_length, hash_ids",
            kind="jsonl",
            recognises=lambda names: {"chat_id", "timestamp", "input_length"} <= names,
            row=_qwen,
        ),
        WorkloadFormat(
            name="vllm-custom",
            layout="prompt or prompt_len, output_tokens",
            kind="jsonl",
            recognises=lambda names: (
                "output_tokens" in names and not names.isdisjoint({"prompt", *_PROMPT_LENGTHS})
            ),
            row=lambda fields: _custom(fields, count_tokens),
            timed=False,
        ),
    )


def _azure(fields: Mapping[str, str]) -> Row:
    """Seconds since 1970 (UTC where no zone is given); of seven digits the last (100 ns) is cut."""
    time = datetime.fromisoformat(fields["TIMESTAMP"])
    if time.tzinfo is None:
        time = time.replace(tzinfo=UTC)
    return Row(time.timestamp(), _cell(fields, "ContextTokens"), _cell(fields, "GeneratedTokens"))


def _burst(fields: Mapping[str, str]) -> Row | None:
    """No response tokens is how BurstGPT writes a failed request."""
    if fields["Response tokens"].strip() == "0":
        return None
    return Row(
        _finite(float(fields["Timestamp"]), "Timestamp"),
        _cell(fields, "Request tokens"),
        _cell(fields, "Response tokens"),
    )


def _own(fields: Mapping[str, str]) -> Row:
    seconds = _finite(float(fields["seconds"]), "seconds")
    return Row(seconds, _cell(fields, "input_tokens"), _cell(fields, "output_tokens"))


def _mooncake(fields: Mapping[str, Any]) -> Row:
    """Milliseconds; ``block_size`` is our addition where blocks are not of 512 tokens."""
    time = _time(fields)
    if not time.is_integer():
        raise ValueError(
            f"timestamp {time} -- Mooncake's are whole milliseconds; if these are seconds and "
            "blocks of 16 tokens, name the format qwen"
        )
    size = fields.get("block_size", MOONCAKE_BLOCK)
    return _row(time / 1e3, fields, _tokens(size, "block_size"))


def _qwen(fields: Mapping[str, Any]) -> Row:
    """Seconds, and blocks of 16 tokens (qwen-bailian-usagetraces-anon, README)."""
    return _row(_time(fields), fields, _QWEN_BLOCK)


def _row(seconds: float, fields: Mapping[str, Any], size: int) -> Row:
    inputs = _tokens(fields["input_length"], "input_length")
    outputs = _tokens(fields["output_length"], "output_length")
    ids = fields.get("hash_ids")
    if ids is None or ids == []:
        return Row(seconds, inputs, outputs)
    wanted = -(-inputs // size)
    if not isinstance(ids, list) or len(ids) != wanted:
        had = len(ids) if isinstance(ids, list) else ids
        raise ValueError(
            f"hash_ids {had} for {inputs} tokens: {wanted} blocks of {size} wanted (Mooncake has "
            "blocks of 512 and milliseconds; format qwen is 16 and seconds)"
        )
    if not all(type(i) is int and 0 <= i <= _MOST_ID for i in ids):
        raise ValueError(f"hash_ids must be whole numbers from 0 to {_MOST_ID}")
    return Row(seconds, inputs, outputs, ids, size)


def _custom(fields: Mapping[str, Any], count_tokens: CountTokens | None) -> Row:
    outputs = _tokens(fields["output_tokens"], "output_tokens")
    for name in _PROMPT_LENGTHS:
        if name in fields:
            return Row(0.0, _tokens(fields[name], name), outputs)
    prompt = fields["prompt"]
    if not isinstance(prompt, str):
        raise ValueError("prompt must be a text")
    if count_tokens is None:
        raise ValueError("no prompt_len: write it in every line, or give count_tokens (Python)")
    return Row(0.0, _tokens(count_tokens(prompt), "tokens of the prompt"), outputs)


def _cell(fields: Mapping[str, str], name: str) -> int:
    return _tokens(int(fields[name]), name)


def _tokens(value: Any, name: str) -> int:
    if type(value) is not int or not 1 <= value <= MOST_TOKENS:
        raise ValueError(f"{name} {value!r} must be a whole number from 1 to {MOST_TOKENS}")
    return value


def _time(fields: Mapping[str, Any]) -> float:
    value = fields["timestamp"]
    if type(value) not in (int, float):
        raise ValueError(f"timestamp {value!r} must be a number")
    return _finite(float(value), "timestamp")


def _finite(value: float, name: str) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{name} {value} must be finite")
    return value
