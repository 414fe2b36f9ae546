"""Saved answers of an HTTP server: JSON (one answer, or a list) or JSONL, one after the other.

A line of JSONL holds one answer, or a list of answers; so only one line is in memory at a time.
Other JSON is read whole and must be smaller than 1 GiB.
"""

import base64
import binascii
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from basis.errors import InputError
from traces.importers.files import check_file
from traces.importers.rows import Sequence

MOST_BYTES = 2**30
"""Of one line of JSONL, or of one other JSON file."""
_MOST_FIRST = 2**26
Answer = dict[str, Any]
Parse = Callable[[str, Answer], Iterator[Sequence | None]]
"""Sequences of one answer, by where it was found; None where one carries no routing."""


def read_answers(path: Path) -> Iterator[tuple[str, Answer]]:
    """Read a file of saved answers.

    Yields
    ------
    where
        File, and line or place in the list, for messages.
    answer
        One answer of the server.

    Raises
    ------
    InputError
        If it is no JSON, cut off, too large, or an answer is not an object.
    """
    size = check_file(path)
    with path.open("rb") as file:
        first = _line(file, f"{path}: line 1")
        try:
            value: Any = json.loads(first)
        except (ValueError, RecursionError):
            if size > MOST_BYTES:
                raise InputError(
                    f"{path}: {size} bytes of JSON in several lines -- at most {MOST_BYTES} -- "
                    "save it as JSONL, one answer per line"
                ) from None
            yield from _answers(_parsed(first + file.read(), str(path)), str(path))
            return
        number = 1
        while True:
            yield from _answers(value, f"{path}: line {number}")
            number += 1
            where = f"{path}: line {number}"
            line = _line(file, where)
            if not line:
                return
            value = _parsed(line, where) if line.strip() else []


def _line(file: Any, where: str) -> bytes:
    line: bytes = file.readline(MOST_BYTES + 1)
    if len(line) > MOST_BYTES:
        raise InputError(f"{where}: longer than {MOST_BYTES} bytes -- one answer per line")
    return line


def _parsed(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: no complete JSON ({error}) -- cut off? save it again") from None


def _answers(value: Any, where: str) -> Iterator[tuple[str, Answer]]:
    many = value if isinstance(value, list) else [value]
    for place, answer in enumerate(many):
        here = f"{where}, answer {place}" if len(many) > 1 else where
        if not isinstance(answer, dict):
            raise InputError(f"{here}: a {type(answer).__name__} -- an answer is a JSON object")
        yield here, answer


def answer_sequences(path: Path, parse: Parse, notes: list[str]) -> Iterator[Sequence]:
    """Return the sequences of all answers; a note says how many carry no routing.

    Raises
    ------
    InputError
        As `read_answers`, or as ``parse`` does.
    """
    without = 0
    for where, answer in read_answers(path):
        for sequence in parse(where, answer):
            if sequence is None:
                without += 1
            else:
                yield sequence
    if without:
        notes.append(f"{without} answers carry no routing and are left out")


def first_answer(source: Path, head: bytes) -> Answer | None:
    """Return the first answer of what may be a file of answers, or None; reads 64 MiB at most."""
    if source.is_dir() or head.lstrip()[:1] not in (b"{", b"["):
        return None
    text, size = head, source.stat().st_size
    while True:
        value = _first_object(text)
        if value is not None or len(text) >= min(size, _MOST_FIRST):
            return value
        with source.open("rb") as file:
            text = file.read(min(16 * len(text), _MOST_FIRST))


def _first_object(data: bytes) -> Answer | None:
    text = data.decode("utf-8", "replace").lstrip()
    if text.startswith("["):
        text = text[1:].lstrip()
    try:
        value, _ = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def decoded(text: Any, where: str) -> bytes:
    """Return the bytes of a base64 text.

    Raises
    ------
    InputError
        If it is none, or cut off.
    """
    if not isinstance(text, str):
        raise InputError(f"{where}: a {type(text).__name__} -- base64 text, as the server sent it")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{where}: no base64 text ({error}) -- cut off? save it again") from None


def whole_number(value: Any, where: str) -> int:
    """Return a count that an answer states.

    Raises
    ------
    InputError
        If it is not a whole number of at least 0.
    """
    if type(value) is not int or value < 0:
        raise InputError(f"{where}: {value!r} -- a whole number of at least 0")
    return value
