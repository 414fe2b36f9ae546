"""A run that somebody measured on a server or an engine, and our plain CSV of such runs.

A run is either requests (a number of users in a closed loop, or a rate, with prompt and output
lengths) or decode steps of a fixed batch. Times in seconds, lengths in tokens; what a file does not
say is None.
"""

import csv
import difflib
import io
import math
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from basis.errors import InputError
from basis.schema import Strict

Tool = Literal["vllm bench serve", "sglang bench_serving", "llama-bench", "csv"]
_LATENCIES = ("ttft", "tpot", "itl", "e2e")
_STATISTICS = ("mean", "median", "p99")
_LISTED = 20  # problems that a message shows


class Times(Strict):
    """One latency over the requests of a run, seconds."""

    mean: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Arithmetic mean."""
    median: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """50th percentile."""
    p99: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """99th percentile."""


class MeasuredRun(Strict):
    """What one measured run was asked and what came out."""

    source: str
    """File, and line or object in it."""
    tool: Tool
    """Who wrote the file."""
    model: str | None = None
    """Model as the file names it."""
    engine: str | None = None
    """Engine or backend, and its version where stated."""
    requests: int | None = Field(default=None, ge=1)
    """Requests that were answered."""
    concurrency: int | None = Field(default=None, ge=1)
    """Requests at one time, at most: the users of a closed loop unless there is a rate."""
    request_rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Requests per second; None where the client did not pace them."""
    input_tokens: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Prompt tokens of a request, mean; for decode steps, tokens in the cache before the first."""
    output_tokens: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Generated tokens of a request, mean, the one that the prompt yields included; for decode
    steps, their number."""
    cached_tokens: int = Field(default=0, ge=0)
    """Tokens already in the cache when a lone prompt came."""
    chunk_tokens: int | None = Field(default=None, ge=1)
    """Tokens of a lone prompt in one step, at most; None: as the server of the scenario."""
    batch_size: int | None = Field(default=None, ge=1)
    """Requests in each decode step; None for a run of requests."""
    duration: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Seconds from the first request to the last answer."""
    ttft: Times = Times()
    """Time to first token."""
    tpot: Times = Times()
    """(last - first token) / (output tokens - 1)."""
    itl: Times = Times()
    """Time between successive tokens."""
    e2e: Times = Times()
    """Sending a request to its last token."""
    output_tokens_per_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Generated tokens of all requests over the duration."""
    total_tokens_per_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """The same with prompt tokens."""
    step: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """A decode step, mean seconds."""
    spread: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Standard deviation over repeats, relative to the mean; None where nothing was repeated."""
    remarks: tuple[str, ...] = ()
    """What the file says and a prediction leaves out."""
    incomparable: str | None = None
    """Why the run cannot be predicted, if so."""

    @property
    def metrics(self) -> dict[str, float]:
        """What was measured, by name: seconds, or tokens per second where the name says so."""
        found = {
            f"{latency}_{statistic}": getattr(getattr(self, latency), statistic)
            for latency in _LATENCIES
            for statistic in _STATISTICS
        }
        for name in ("step", "output_tokens_per_s", "total_tokens_per_s"):
            found[name] = getattr(self, name)
        return {name: value for name, value in found.items() if value is not None}


_TEXTS = ("model", "engine")
_COUNTS = ("requests", "concurrency", "batch_size")
_NUMBERS = {
    "request_rate_per_s": ("request_rate", 1.0),
    "input_tokens": ("input_tokens", 1.0),
    "output_tokens": ("output_tokens", 1.0),
    "duration_s": ("duration", 1.0),
    "output_tokens_per_s": ("output_tokens_per_s", 1.0),
    "total_tokens_per_s": ("total_tokens_per_s", 1.0),
    "step_ms": ("step", 1e-3),
}
_TIMES = {f"{name}_{stat}_ms": (name, stat) for name in _LATENCIES for stat in _STATISTICS}
COLUMNS = (*_TEXTS, *_COUNTS, *_NUMBERS, *_TIMES)
"""Columns of the plain CSV, in any order and any selection."""


def read_csv(text: str, where: str) -> list[MeasuredRun]:
    """Read the plain CSV: one run a line, one metric a column, an empty cell is missing.

    Parameters
    ----------
    text : str
        The file's content; its first line names columns of `COLUMNS`.
    where : str
        Name of the file for messages.

    Raises
    ------
    InputError
        Lists every bad column and cell with its line, and the nearest valid column.
    """
    problems: list[str] = []
    runs: list[MeasuredRun] = []
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        _check_header(header, problems)
        for cells in reader:
            line = f"line {reader.line_num}"
            found = _cells(header, cells, line, problems)
            run = _run(found, f"{where}, {line}", line, problems) if found else None
            if run is not None:
                runs.append(run)
    except csv.Error as error:
        problems.append(f"line {reader.line_num}: {error} -- write plain comma-separated values")
    refuse(where, problems)
    if not runs:
        raise InputError(f"{where}: no runs in it -- give a header and at least one line")
    return runs


def refuse(where: str, problems: Sequence[str]) -> None:
    """Raise one error that lists the problems of a file, if there are any.

    Raises
    ------
    InputError
        With the first 20 of them, and how many more there are.
    """
    if not problems:
        return
    more = len(problems) - _LISTED
    listed = [*problems[:_LISTED], *([f"and {more} more"] if more > 0 else [])]
    head = f"{where}: {len(problems)} error{'s' if len(problems) > 1 else ''}"
    raise InputError("\n  ".join([head, *listed]))


def _check_header(header: list[str], problems: list[str]) -> None:
    if {"build_commit", "n_prompt", "avg_ns"} <= set(header):
        problems.append("line 1: CSV of llama-bench -- write it with -o json or -o jsonl")
        return
    for column in header:
        if column not in COLUMNS:
            near = difflib.get_close_matches(column, COLUMNS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known columns: {', '.join(COLUMNS)}"
            problems.append(f"line 1: unknown column {column!r} -- {hint}")
    for column in sorted({name for name in header if header.count(name) > 1}):
        problems.append(f"line 1: column {column!r} stands twice -- keep one of them")


def _cells(
    header: list[str], cells: list[str], line: str, problems: list[str]
) -> dict[str, str] | None:
    """Return the cells of a line that are not empty, by column; None if it is empty or wrong."""
    if not any(cell.strip() for cell in cells):
        return None
    if len(cells) != len(header):
        problems.append(
            f"{line}: {len(cells)} cells, the header has {len(header)} -- leave a cell empty where "
            "a value is missing"
        )
        return None
    return {c: cell.strip() for c, cell in zip(header, cells, strict=True) if cell.strip()}


def _run(given: dict[str, str], source: str, line: str, problems: list[str]) -> MeasuredRun | None:
    """Return the run of a line; None if something is wrong with it, which joins ``problems``."""
    known = len(problems)
    fields: dict[str, Any] = {name: given[name] for name in _TEXTS if name in given}
    for column, cell in given.items():
        where = f"{line}: {column}"
        if column in _COUNTS:
            fields[column] = _whole(cell, where, problems)
        elif column in _NUMBERS:
            name, scale = _NUMBERS[column]
            fields[name] = scale * _positive(cell, where, problems)
        elif column in _TIMES:
            name, statistic = _TIMES[column]
            fields.setdefault(name, {})[statistic] = 1e-3 * _positive(cell, where, problems)
    problems.extend(f"{line}: {text}" for text in _unclear(given))
    return MeasuredRun(source=source, tool="csv", **fields) if len(problems) == known else None


def _unclear(given: dict[str, str]) -> list[str]:
    """Say what a line lacks to be a run."""
    if "batch_size" in given:
        strays = [name for name in ("concurrency", "request_rate_per_s") if name in given]
        found = [
            f"{name} beside batch_size -- a line is decode steps or requests" for name in strays
        ]
        if "step_ms" not in given:
            found.append("step_ms is missing -- with batch_size give the time of a decode step")
        return found
    found = [
        f"{name} is missing -- requests need their lengths (decode steps: batch_size, step_ms)"
        for name in ("input_tokens", "output_tokens")
        if name not in given
    ]
    loads = [name for name in ("concurrency", "request_rate_per_s") if name in given]
    if len(loads) != 1:
        found.append(
            f"{' and '.join(loads) or 'no load'} given -- requests need concurrency or "
            "request_rate_per_s, one of the two"
        )
    if not any(name in _TIMES or name.endswith("tokens_per_s") for name in given):
        found.append("nothing measured -- give at least one latency or throughput")
    return found


def _positive(cell: str, where: str, problems: list[str]) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        problems.append(f"{where} {cell!r} -- a finite number above 0; leave it empty if missing")
    return value


def _whole(cell: str, where: str, problems: list[str]) -> int | None:
    if cell.isascii() and cell.isdigit() and len(cell) < 19 and int(cell) > 0:
        return int(cell)
    problems.append(f"{where} {cell!r} -- a whole number of at least 1; leave it empty if missing")
    return None
