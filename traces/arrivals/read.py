"""Reading workload traces, line by line: the layout is recognised, bad lines are counted and told.

Times are seconds from the first request, requests are in order of arrival. Nothing of a file with a
bad line is used.
"""

from array import array
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from basis.errors import InputError
from traces.arrivals.checks import Problems
from traces.arrivals.formats import CountTokens, Row, WorkloadFormat, workload_formats
from traces.arrivals.requests import Arrivals, Lengths, PrefixBlocks
from traces.arrivals.text import Text, opened, reason_of, shortened


def read_arrivals(path: Path, format: str | None = None) -> Arrivals:
    """Read a workload trace; times count from its first request, in order of arrival.

    Known by their columns or keys: Azure CSV (https://github.com/Azure/AzurePublicDataset),
    BurstGPT CSV (https://github.com/HPMLL/BurstGPT; failed requests are left out and counted),
    our own CSV (``seconds,input_tokens,output_tokens``), Mooncake JSONL (times in ms, blocks of 512
    tokens, https://github.com/kvcache-ai/Mooncake) and Qwen JSONL (times in seconds, blocks of 16,
    https://github.com/alibaba-edu/qwen-bailian-usagetraces-anon).

    Parameters
    ----------
    path : Path
        JSON Lines if it ends in .jsonl, else CSV.
    format : str, optional
        ``azure``, ``burstgpt``, ``moeplan``, ``mooncake`` or ``qwen``; default: the one that
        recognises the file.

    Raises
    ------
    InputError
        If the file cannot be read, no format recognises it, it has no times or no requests, or
        lists its bad lines (bounded).
    """
    path = Path(path)
    found = _read(path, format, timed=True)
    seconds = np.array(found.seconds)
    order = np.argsort(seconds, kind="stable")
    inputs = np.array(found.inputs)
    blocks = None
    if found.block:
        counts = -(-inputs // found.block)
        blocks = PrefixBlocks(size=found.block, ids=np.array(found.ids), counts=counts)
        blocks = blocks.select(order)
    return Arrivals(
        seconds=seconds[order] - seconds[order[0]],
        inputs=inputs[order],
        outputs=np.array(found.outputs)[order],
        source=found.source(path),
        blocks=blocks,
        left_out=found.left_out,
    )


def read_lengths(
    path: Path, format: str | None = None, count_tokens: CountTokens | None = None
) -> Lengths:
    """Read the input and output tokens of a workload trace, in the order of the file.

    Besides what `read_arrivals` reads: the custom JSONL of ``vllm bench serve``, which has no times
    (``{"prompt": "..", "output_tokens": 10}``, maybe with ``prompt_len`` or ``input_len``).

    Parameters
    ----------
    path, format
        As for `read_arrivals`; also ``vllm-custom``.
    count_tokens : callable, optional
        Counts the tokens of a prompt whose line does not say, such as
        ``lambda text: len(tokenizer(text).input_ids)``. vLLM's bench adds the chat template first.

    Raises
    ------
    InputError
        As for `read_arrivals`, or if there are prompts and nothing to count their tokens with.
    """
    path = Path(path)
    found = _read(path, format, count_tokens, timed=False)
    return Lengths(
        inputs=np.array(found.inputs), outputs=np.array(found.outputs), source=found.source(path)
    )


def find_format(path: Path) -> str:
    """Return the name of the format that recognises a workload trace.

    Raises
    ------
    InputError
        If none does, or the file cannot be read.
    """
    path = Path(path)
    with opened(path) as text:
        return _format_of(path, text, None, workload_formats()).name


def is_workload(path: Path) -> bool:
    """Whether a file is a workload trace, by its first line."""
    try:
        find_format(path)
    except InputError:
        return False
    return True


@dataclass(kw_only=True)
class _Columns:
    """What was read, one entry per request (ids: per block)."""

    seconds: "array[float]" = field(default_factory=lambda: array("d"))
    inputs: "array[int]" = field(default_factory=lambda: array("q"))
    outputs: "array[int]" = field(default_factory=lambda: array("q"))
    ids: "array[int]" = field(default_factory=lambda: array("q"))
    block: int = 0
    """Tokens of a block; 0 without blocks."""
    left_out: int = 0

    def add(self, row: Row | None) -> None:
        """Take a request in; None is one that failed."""
        if row is None:
            self.left_out += 1
            return
        if not self.inputs:
            self.block = row.size
        if row.size != self.block:
            raise ValueError(f"{_blocks(row.size)}, but {_blocks(self.block)} in the lines before")
        self.seconds.append(row.seconds)
        self.inputs.append(row.inputs)
        self.outputs.append(row.outputs)
        self.ids.extend(row.ids)

    def source(self, path: Path) -> str:
        """Name the file, and how many of its requests are not used."""
        if not self.left_out:
            return path.name
        every = self.left_out + len(self.inputs)
        return f"{path.name} without {self.left_out} of its {every} requests, which failed"


def _read(
    path: Path, name: str | None, count_tokens: CountTokens | None = None, *, timed: bool
) -> _Columns:
    found, problems = _Columns(), Problems(where=str(path), unit="line")
    with opened(path) as text:
        layout = _format_of(path, text, name, workload_formats(count_tokens))
        if timed and not layout.timed:
            raise InputError(
                f"{path}: requests without times ({layout.name}) -- arrivals need them; take the "
                "lengths from it and draw times: workload lengths and rate, or read_lengths(...)"
            )
        for number, line in text.lines:
            try:
                found.add(layout.row(text.fields(line)))
            except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
                problems.add(number, f"{shortened(line)}: {reason_of(error)}")
    problems.refuse()
    if not found.inputs:
        raise InputError(f"{path}: no requests in it -- give a trace with at least one line")
    return found


def _format_of(
    path: Path, text: Text, name: str | None, formats: tuple[WorkloadFormat, ...]
) -> WorkloadFormat:
    """Return the named format, or the one that recognises the text."""
    of_kind = [each for each in formats if each.kind == text.kind]
    if name is not None:
        named = [each for each in of_kind if each.name == name]
        if not named:
            raise InputError(
                f"{path}: no format {name!r} for {text.kind} files -- one of "
                f"{', '.join(each.name for each in of_kind)}"
            )
        return named[0]
    found = [each for each in of_kind if each.recognises(frozenset(text.names))]
    if len(found) != 1:
        known = "".join(f"\n  {each.name}: {each.layout}" for each in of_kind)
        what = "header" if text.kind == "csv" else "first line with the keys"
        raise InputError(
            f"{path}: {what} {shortened(text.names)!r} -- known are{known}\n  -- JSON Lines end in "
            ".jsonl, all else is read as CSV"
        )
    return found[0]


def _blocks(size: int) -> str:
    return f"blocks of {size}" if size else "no hash_ids"
