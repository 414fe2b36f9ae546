"""Text files with one request a line, CSV or JSON Lines: their names, then line after line.

A file may be larger than memory and may be anything: a line has a largest size.
"""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TextIO

from basis.errors import InputError

_LONGEST = 2**26  # characters of a line
_LFS = "version https://git-lfs.github.com/spec/"


@dataclass(frozen=True, kw_only=True)
class Text:
    """An open file: its names, and its lines."""

    kind: Literal["csv", "jsonl"]
    names: tuple[str, ...]
    """Columns of the header, or keys of the first line."""
    lines: Iterator[tuple[int, Any]]
    """Line numbers and lines that hold requests."""
    fields: Callable[[Any], Mapping[str, Any]]
    """From a line to its values by name."""


@contextmanager
def opened(path: Path) -> Iterator[Text]:
    """Open a file for reading; JSON Lines if it ends in .jsonl, else CSV.

    Raises
    ------
    InputError
        If it is missing, no text, a Git LFS pointer, or its first line is bad.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file -- give a .csv or .jsonl of request arrivals")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if file.read(len(_LFS)) == _LFS:
                raise InputError(
                    f"{path}: a Git LFS pointer, not the data -- fetch it with git lfs pull"
                )
            file.seek(0)
            lines = _bounded(path, file)
            yield _jsonl(path, lines) if path.suffix == ".jsonl" else _csv(lines)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error}) -- give a .csv or .jsonl") from None
    except csv.Error as error:
        raise InputError(f"{path}: not readable as CSV ({error}) -- something else?") from None


def _bounded(path: Path, file: TextIO) -> Iterator[str]:
    while line := file.readline(_LONGEST + 1):
        if len(line) > _LONGEST:
            raise InputError(
                f"{path}: a line of more than {_LONGEST} characters -- is it a text file of one "
                "request a line?"
            )
        yield line


def _csv(lines: Iterator[str]) -> Text:
    reader = csv.reader(lines)
    names = tuple(next(reader, []))

    def fields(cells: list[str]) -> Mapping[str, str]:
        if len(cells) != len(names):
            raise ValueError(f"{len(cells)} columns, the header has {len(names)}")
        return dict(zip(names, cells, strict=True))

    numbered = ((reader.line_num, cells) for cells in reader if cells)
    return Text(kind="csv", names=names, lines=numbered, fields=fields)


def _jsonl(path: Path, lines: Iterator[str]) -> Text:
    numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    first = next(numbered, None)
    if first is None:
        raise InputError(f"{path}: no requests in it -- give a trace with at least one line")
    try:
        names = tuple(_object(first[1]))
    except (ValueError, RecursionError) as error:
        said = f"{path}: line {first[0]}: {shortened(first[1])}: {reason_of(error)}"
        raise InputError(f"{said} -- one JSON object a line") from None
    return Text(kind="jsonl", names=names, lines=chain([first], numbered), fields=_object)


def _object(line: str) -> Mapping[str, Any]:
    value = json.loads(line)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def shortened(line: Any) -> str:
    """Return the beginning of a line, or of its cells, for a message."""
    text = line.strip() if isinstance(line, str) else ",".join(line)
    return text if len(text) <= 60 else text[:57] + "..."


def reason_of(error: Exception) -> str:
    """Return what was wrong with a line."""
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)
