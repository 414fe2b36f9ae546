"""JSON lines, one object a line, read block by block into Arrow columns.

A block holds whole lines; a line longer than 64 MiB is refused, so memory does not grow with the
file. Records are counted from 1; blank lines are none.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
from numpy.typing import NDArray

from basis.errors import InputError

_BLOCK_BYTES = 2**22
_MOST_LINE_BYTES = 2**26


def tables(path: Path, schema: Any) -> Iterator[tuple[int, Any]]:
    """Read the columns of a schema; other keys are passed over, absent ones are null.

    Parameters
    ----------
    path : Path
        A file of JSON lines.
    schema : pyarrow.Schema
        Keys to read and their types.

    Yields
    ------
    tuple of int and pyarrow.Table
        Number of the first record, and the records of a block.

    Raises
    ------
    InputError
        If a line is not JSON, longer than 64 MiB, or a value has another type.
    """
    record = 1
    for line, block in blocks(path):
        if block.strip():
            table = _parse(path, line, block, schema)
            yield record, table
            record += table.num_rows


def blocks(path: Path) -> Iterator[tuple[int, bytes]]:
    """Read whole lines, about 4 MiB at a time, with the number of the first of them.

    Raises
    ------
    InputError
        If a line is longer than 64 MiB.
    """
    line, rest = 1, b""
    with path.open("rb") as file:
        while part := file.read(_BLOCK_BYTES):
            part = rest + part
            end = part.rfind(b"\n") + 1
            if end:
                yield line, part[:end]
                line += part.count(b"\n", 0, end)
            rest = part[end:]
            if len(rest) > _MOST_LINE_BYTES:
                raise InputError(
                    f"{path}: line {line} is longer than {_MOST_LINE_BYTES // 2**20} MiB -- one "
                    "record a line; is it another format?"
                )
    if rest:
        yield line, rest


def first_object(head: bytes) -> dict[str, Any]:
    """Return the object of the first line; an empty one where that is no JSON object."""
    try:
        found = json.loads(head.lstrip().split(b"\n", 1)[0])
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def rows_of_lists(column: Any, width: int, what: str) -> NDArray[Any]:
    """Return ``[N, width]`` from N lists that all have that length.

    Raises
    ------
    InputError
        If a list is absent, shorter, longer, or has nulls.
    """
    lists = column.combine_chunks()
    lengths = np.asarray(pc.fill_null(pc.list_value_length(lists), -1))
    wrong = np.flatnonzero(lengths != width)
    if len(wrong):
        found = max(int(lengths[wrong[0]]), 0)
        raise InputError(f"{what} has {found} values, {width} are right")
    values = lists.flatten()
    if values.null_count:
        raise InputError(f"{what} has nulls")
    return np.asarray(values).reshape(-1, width)


def _parse(path: Path, line: int, block: bytes, schema: Any) -> Any:
    read = pa.json.ReadOptions(use_threads=False, block_size=len(block) + 1)
    parse = pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    try:
        table = pa.json.read_json(pa.BufferReader(block), read, parse)
        table.validate(full=True)  # texts are UTF-8
        return table
    except (pa.ArrowException, ValueError) as error:
        said = str(error).splitlines()[0]
    for number, text in enumerate(block.split(b"\n"), line):
        try:
            found = json.loads(text) if text.strip() else {}
        except (ValueError, RecursionError) as bad:
            raise InputError(
                f"{path}: line {number} is not JSON ({bad}) -- was the file cut off?"
            ) from None
        if not isinstance(found, dict):
            raise InputError(f"{path}: line {number} is no object -- one object a line")
    last = line + block.rstrip().count(b"\n")
    raise InputError(
        f"{path}: lines {line} to {last}: {said} -- one object a line, a key "
        "has the same type in all of them"
    )
