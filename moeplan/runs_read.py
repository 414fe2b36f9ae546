"""Read measured runs from whatever file somebody has; what it is, its content tells.

Known are results of vLLM's and SGLang's serving benchmarks and of llama-bench (JSON, or one JSON
object a line), and our plain CSV. Files are not trusted: bounded in size, JSON and CSV only.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from basis.errors import InputError
from moeplan.runs import MeasuredRun, read_csv, refuse
from moeplan.runs_fields import Record
from moeplan.runs_llama import is_llama_bench, llama_bench_run
from moeplan.runs_serving import is_sglang, is_vllm, sglang_run, vllm_run

_MAX_BYTES = 64 * 2**20
_SPACE = re.compile(r"\s*")
_Recognise = Callable[[Any], bool]
_Read = Callable[[Record, str], MeasuredRun | None]
_FORMATS: tuple[tuple[_Recognise, _Read], ...] = (
    (is_llama_bench, llama_bench_run),
    (is_sglang, sglang_run),
    (is_vllm, vllm_run),
)
_KNOWN = (
    "known are results of vllm bench serve, sglang bench_serving and llama-bench, and the plain CSV"
)


def read_runs(path: Path) -> list[MeasuredRun]:
    """Read the measured runs of a file.

    Parameters
    ----------
    path : Path
        JSON, JSON lines or CSV, of at most 64 MiB; the name does not matter.

    Raises
    ------
    InputError
        If there is no such file, it is too large, not text or not JSON (with line and column), of
        no known kind, or has bad values (all of them at once).
    """
    text = _read_text(path)
    if text.lstrip()[:1] not in ("{", "["):
        return read_csv(text, str(path))
    problems: list[str] = []
    runs: list[MeasuredRun] = []
    for where, data in _objects(path, text):
        record = Record(data, where, problems)
        reader = next((read for fits, read in _FORMATS if fits(data)), None)
        if reader is None:
            record.complain(f"keys {_keys(data)} -- {_KNOWN}")
            continue
        run = reader(record, f"{path}, {where}")
        if run is not None:
            runs.append(run)
    refuse(str(path), problems)
    if not runs:
        raise InputError(f"{path}: no runs in it -- {_KNOWN}")
    return runs


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"{path}: no such file -- give a file of measured runs")
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise InputError(
            f"{path}: {size} bytes -- at most {_MAX_BYTES}; write results without the details of "
            "every request"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: byte {error.start} is not UTF-8 -- save the file as UTF-8 text"
        ) from None
    if not text.strip():
        raise InputError(f"{path}: empty -- {_KNOWN}")
    return text


def _objects(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every JSON object of a file with its place.

    Lists are opened; values may follow one another, as in JSON lines.
    """
    for line, value in _values(path, text):
        items = value if isinstance(value, list) else [value]
        for number, item in enumerate(items, 1):
            where = f"line {line}" if item is value else f"item {number} of the list in line {line}"
            if not isinstance(item, dict):
                kind = type(item).__name__
                raise InputError(f"{path}: {where}: {kind}, not an object -- {_KNOWN}")
            yield where, item


def _values(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Yield one JSON value after the other with the line on which it begins."""
    decoder, line, counted = json.JSONDecoder(), 1, 0
    place = _skip_space(text, 0)
    while place < len(text):
        line, counted = line + text.count("\n", counted, place), place
        try:
            value, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}: not JSON at line {error.lineno}, column {error.colno}: {error.msg} -- "
                "give the whole file as the tool wrote it"
            ) from None
        except (ValueError, RecursionError):
            raise InputError(
                f"{path}: line {line}: a number of thousands of digits, or brackets too deep -- "
                "give the file as the tool wrote it"
            ) from None
        yield line, value
        place = _skip_space(text, place)


def _skip_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    return found.end() if found else place


def _keys(data: dict[str, Any]) -> str:
    names = sorted(data)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(name[:40] for name in names[:5]) or "(none)") + more
