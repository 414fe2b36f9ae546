"""Request arrivals: when each request comes (seconds) and how many tokens it brings and asks for.

Read from published workload traces, or drawn: Poisson arrivals with given lengths. Arrival traces
carry no expert routing; `traces.request_source` joins the two.
"""

import csv
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_OURS = ("seconds", "input_tokens", "output_tokens")
_LISTED = 5  # bad lines that a message shows
_Row = tuple[float, int, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class Lengths:
    """Pairs of input and output tokens that requests are given, one pair or many.

    Raises
    ------
    InputError
        If there is no pair, or a number is not a whole one of at least 1.
    """

    inputs: Ints
    """Prompt tokens, [M]."""
    outputs: Ints
    """Generated tokens, [M]."""

    def __post_init__(self) -> None:
        _settle(self, "lengths", inputs=np.int64, outputs=np.int64)
        _refuse("lengths", _bad_tokens(self.inputs, self.outputs), "row")

    @classmethod
    def fixed(cls, inputs: int, outputs: int) -> Self:
        """Return the one pair that every request gets."""
        return cls(inputs=np.array([inputs]), outputs=np.array([outputs]))

    def __len__(self) -> int:
        return len(self.inputs)

    def draw(self, count: int, seed: int) -> "Lengths":
        """Draw ``count`` pairs with replacement; input and output of a pair stay together."""
        _check_count(count)
        chosen = np.random.default_rng(seed).integers(len(self), size=count)
        return Lengths(inputs=self.inputs[chosen], outputs=self.outputs[chosen])


@dataclass(frozen=True, kw_only=True, eq=False)
class Arrivals:
    """Requests in order of arrival.

    Raises
    ------
    InputError
        Lists the requests (bounded) whose time is not finite, negative or before the one ahead,
        or whose tokens are not at least 1.
    """

    seconds: Floats
    """When each request arrives, from the start of the simulation, [N], ascending."""
    inputs: Ints
    """Prompt tokens, [N]."""
    outputs: Ints
    """Generated tokens, [N]; the first of them comes out of the prefill."""
    source: str
    """Where times and lengths come from, in a few words."""

    def __post_init__(self) -> None:
        _settle(self, "arrivals", seconds=np.float64, inputs=np.int64, outputs=np.int64)
        with np.errstate(invalid="ignore"):
            wrong = ~(np.isfinite(self.seconds) & (self.seconds >= 0))
            early = np.concatenate(([False], np.diff(self.seconds) < 0))
        problems = [(int(i), f"arrives at {self.seconds[i]} s") for i in np.flatnonzero(wrong)]
        problems += [
            (int(i), f"arrives at {self.seconds[i]} s, before the one ahead")
            for i in np.flatnonzero(early & ~wrong)
        ]
        _refuse("arrivals", problems + _bad_tokens(self.inputs, self.outputs), "request")

    def __len__(self) -> int:
        return len(self.seconds)

    @property
    def lengths(self) -> Lengths:
        """The pairs of input and output tokens."""
        return Lengths(inputs=self.inputs, outputs=self.outputs)

    @property
    def rate(self) -> float:
        """Requests per second: N - 1 over the time from the first to the last.

        Raises
        ------
        InputError
            If all requests arrive at once.
        """
        span = float(self.seconds[-1] - self.seconds[0])
        if span <= 0:
            raise InputError(
                f"{len(self)} request(s) arrive at one time -- a rate needs two different times; "
                "draw times with poisson(rate, ...) instead"
            )
        return (len(self) - 1) / span

    def first(self, count: int) -> "Arrivals":
        """Return the first ``count`` requests.

        Raises
        ------
        InputError
            If there are fewer.
        """
        _check_count(count)
        if count > len(self):
            raise InputError(
                f"{count} requests asked for -- {self.source} has {len(self)}; ask for at most "
                "that many, or draw lengths from it with poisson(...)"
            )
        return replace(
            self,
            seconds=self.seconds[:count],
            inputs=self.inputs[:count],
            outputs=self.outputs[:count],
        )

    def scaled_to(self, rate: float) -> "Arrivals":
        """Rescale the times to ``rate`` requests per second; lengths and burstiness stay.

        Every time is multiplied by the same factor, so that `rate` becomes the wanted one
        exactly. Nothing is drawn anew.

        Raises
        ------
        InputError
            If ``rate`` is not positive or all requests arrive at once.
        """
        _check_rate(rate)
        factor = self.rate / rate
        return replace(
            self,
            seconds=self.seconds * factor,
            source=f"{self.source}, times rescaled to {rate:g} requests/s",
        )


def poisson(rate: float, count: int, lengths: Lengths, seed: int) -> Arrivals:
    """Draw arrivals with independent exponential gaps, and lengths with replacement.

    Parameters
    ----------
    rate : float
        Requests per second.
    count : int
        Number of requests.
    lengths : Lengths
        Pairs to draw from.
    seed : int
        Of ``numpy.random.default_rng``.
    """
    _check_rate(rate)
    drawn = lengths.draw(count, seed)
    gaps = np.random.default_rng([seed, 1]).exponential(1 / rate, count)
    return Arrivals(
        seconds=np.cumsum(gaps),
        inputs=drawn.inputs,
        outputs=drawn.outputs,
        source=f"Poisson, {rate:g} requests/s, lengths drawn from {len(lengths)} pair(s), "
        f"seed {seed}",
    )


def read_arrivals(path: Path) -> Arrivals:
    """Read a workload trace; times count from its first request, in order of arrival.

    Three formats are known by name and header: Azure 2023 CSV
    (``TIMESTAMP,ContextTokens,GeneratedTokens``, https://github.com/Azure/AzurePublicDataset),
    Mooncake JSONL (``timestamp`` in ms, ``input_length``, ``output_length``,
    https://github.com/kvcache-ai/Mooncake) and our own CSV (``seconds,input_tokens,
    output_tokens``).

    Parameters
    ----------
    path : Path
        File ending in .jsonl or .csv.

    Raises
    ------
    InputError
        If the file cannot be read or has no requests, or lists its bad lines (bounded).
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file -- give a .csv or .jsonl of request arrivals")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error}) -- give a .csv or .jsonl") from None
    if path.suffix == ".jsonl":
        return _collect(path, enumerate(text.splitlines(), 1), _mooncake)
    lines = list(csv.reader(text.splitlines()))
    header = tuple(lines[0]) if lines else ()
    readers: dict[tuple[str, ...], Callable[[Any], _Row]] = {_AZURE: _azure, _OURS: _own}
    if header not in readers:
        known = " or ".join(",".join(names) for names in readers)
        raise InputError(
            f"{path}: header {','.join(header)!r} -- known are {known}; or give Mooncake JSONL "
            "in a file ending in .jsonl"
        )
    return _collect(path, enumerate(lines[1:], 2), readers[header])


def _collect(
    path: Path, lines: Iterable[tuple[int, Any]], parse: Callable[[Any], _Row]
) -> Arrivals:
    rows: list[_Row] = []
    problems: list[tuple[int, str]] = []
    for number, line in lines:
        if not line:
            continue
        try:
            row = parse(line)
        except (ValueError, KeyError, TypeError) as error:
            problems.append((number, f"{_short(line)}: {_reason(error)}"))
            continue
        if min(row[1:]) < 1 or not np.isfinite(row[0]):
            problems.append((number, f"{_short(line)}: tokens must be at least 1, time finite"))
        rows.append(row)
    _refuse(str(path), problems, "line")
    if not rows:
        raise InputError(f"{path}: no requests in it -- give a trace with at least one line")
    rows.sort(key=lambda row: row[0])
    seconds = np.array([row[0] for row in rows])
    return Arrivals(
        seconds=seconds - seconds[0],
        inputs=np.array([row[1] for row in rows]),
        outputs=np.array([row[2] for row in rows]),
        source=path.name,
    )


def _azure(cells: list[str]) -> _Row:
    """Seconds since 1970; of the seven fractional digits the last (100 ns) is cut."""
    time, inputs, outputs = cells
    moment = datetime.fromisoformat(time)
    return (moment - datetime(1970, 1, 1)).total_seconds(), int(inputs), int(outputs)


def _own(cells: list[str]) -> _Row:
    time, inputs, outputs = cells
    return float(time), int(inputs), int(outputs)


def _mooncake(line: str) -> _Row:
    row = json.loads(line)
    inputs, outputs = row["input_length"], row["output_length"]
    if not (type(inputs) is type(outputs) is int):
        raise ValueError("input_length and output_length must be whole numbers")
    return float(row["timestamp"]) / 1e3, inputs, outputs


def _short(line: Any) -> str:
    text = ",".join(line) if isinstance(line, list) else str(line)
    return text if len(text) <= 60 else text[:57] + "..."


def _reason(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def _bad_tokens(inputs: Ints, outputs: Ints) -> list[tuple[int, str]]:
    bad = np.flatnonzero((inputs < 1) | (outputs < 1))
    return [(int(i), f"{inputs[i]} input and {outputs[i]} output tokens") for i in bad]


def _refuse(where: str, problems: list[tuple[int, str]], unit: str) -> None:
    """Raise one error that lists the first few problems and counts the rest."""
    if not problems:
        return
    problems = sorted(problems)
    listed = [f"{unit} {number}: {text}" for number, text in problems[:_LISTED]]
    more = len(problems) - len(listed)
    if more > 0:
        listed.append(f"and {more} more")
    raise InputError(
        "\n  ".join([f"{where}: {len(problems)} bad {unit}{'s' if len(problems) > 1 else ''}",
                     *listed])
        + "\n  -- times are finite and ascend from 0, tokens are whole numbers of at least 1; "
        f"correct or remove these {unit}s"
    )  # fmt: skip


def _settle(value: Any, what: str, **dtypes: type) -> None:
    """Turn the fields into arrays of one length, at least 1."""
    arrays = {name: np.asarray(getattr(value, name)) for name in dtypes}
    sizes = {array.shape for array in arrays.values()}
    if len(sizes) != 1 or len(next(iter(sizes))) != 1 or next(iter(sizes)) == (0,):
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        raise InputError(f"{what}: {shapes} -- one row of equal length, with at least one request")
    for name, dtype in dtypes.items():
        array = arrays[name]
        if dtype is np.int64 and not np.issubdtype(array.dtype, np.integer):
            raise InputError(f"{what}: {name} is {array.dtype} -- whole numbers are expected")
        object.__setattr__(value, name, array.astype(dtype))


def _check_count(count: int) -> None:
    if count < 1:
        raise InputError(f"{count} requests -- must be at least 1")


def _check_rate(rate: float) -> None:
    if not (rate > 0 and np.isfinite(rate)):
        raise InputError(f"rate {rate} requests/s -- must be positive and finite")
