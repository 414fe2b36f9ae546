"""Writing arrivals as Mooncake JSONL, which the serving benchmarks of vLLM and SGLang replay.

A line is ``{"timestamp": ms, "input_length": .., "output_length": .., "hash_ids": [..]}``. Both
benchmarks make the prompt from ``hash_ids`` alone (vLLM 0.33 ``benchmarks/datasets/datasets.py``
``TimedTrace``; SGLang 0.5 ``benchmark/datasets/mooncake.py``): a line needs an id for every block
that its prompt begins, and equal ids become equal text. So requests of a source that tells nothing
of shared prompts get blocks of their own: no reuse is made up.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from basis.files import check_target, refuse_same, replacing
from traces.arrivals.read import find_format, read_arrivals
from traces.arrivals.requests import MOONCAKE_BLOCK, Arrivals, PrefixBlocks

Ints = NDArray[np.int64]
_MOST_MS = 2**53  # whole numbers that float64 tells apart
_NOISE_MS = 1e-6  # of whole milliseconds that went through seconds


@dataclass(frozen=True, kw_only=True)
class ConvertedWorkload:
    """What a conversion read and wrote."""

    format: str
    """Layout of the source."""
    requests: int
    """Requests written."""
    left_out: int
    """Requests of the source that failed and are not in the target."""
    block_size: int
    """Tokens of a block, for ``--timed-trace-chunk-hash-size``."""
    notes: tuple[str, ...]
    """What the target does not keep, and how to replay it."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return vars(self) | {"notes": list(self.notes)}


def convert_workload(source: Path, target: Path, format: str | None = None) -> ConvertedWorkload:
    """Read a workload trace and write it as Mooncake JSONL.

    Parameters
    ----------
    source : Path
        See `traces.arrivals.read_arrivals`.
    target : Path
        Ends in .jsonl.
    format : str, optional
        Layout of the source; default: the one that recognises it.

    Raises
    ------
    InputError
        If the source is bad or has no times, or the target is no .jsonl or the source itself.
    """
    source, target = Path(source), Path(target)
    name = format or find_format(source)
    if target.suffix != ".jsonl":
        raise InputError(f"{target}: workloads are written as Mooncake JSONL -- end it in .jsonl")
    check_target(target)
    refuse_same([target], [source])
    arrivals = read_arrivals(source, name)
    write_mooncake(arrivals, target)
    size = MOONCAKE_BLOCK if arrivals.blocks is None else arrivals.blocks.size
    return ConvertedWorkload(
        format=name,
        requests=len(arrivals),
        left_out=arrivals.left_out,
        block_size=size,
        notes=(*_lost(arrivals), *_replay(arrivals, target, size)),
    )


def write_mooncake(arrivals: Arrivals, path: Path) -> None:
    """Write arrivals as Mooncake JSONL; times are rounded to whole milliseconds.

    Block ids are the source's; without any, every request gets new ones. Where blocks are not of
    512 tokens every line says so (``block_size``; the benchmarks do not look at it).

    Parameters
    ----------
    arrivals : Arrivals
    path : Path
        File to write; it appears only when it is complete.

    Raises
    ------
    InputError
        If it cannot be written there, or a time is too large for whole milliseconds.
    """
    times = _milliseconds(arrivals)
    blocks = arrivals.blocks or PrefixBlocks.unshared(arrivals.inputs)
    stops = np.cumsum(blocks.counts).tolist()
    more = {} if blocks.size == MOONCAKE_BLOCK else {"block_size": blocks.size}
    with replacing(Path(path)) as file, file.open("w", encoding="utf-8") as out:
        start = 0
        for time, inputs, outputs, stop in zip(
            times.tolist(), arrivals.inputs.tolist(), arrivals.outputs.tolist(), stops,
            strict=True,
        ):  # fmt: skip
            line = {
                "timestamp": time,
                "input_length": inputs,
                "output_length": outputs,
                "hash_ids": blocks.ids[start:stop].tolist(),
            }
            out.write(json.dumps(line | more) + "\n")
            start = stop


def _milliseconds(arrivals: Arrivals) -> Ints:
    exact = arrivals.seconds * 1e3
    if exact[-1] > _MOST_MS:
        raise InputError(
            f"last request at {arrivals.seconds[-1]:g} s -- at most {_MOST_MS:g} ms can be written "
            "as whole milliseconds; rescale the times"
        )
    return np.rint(exact).astype(np.int64)


def _lost(arrivals: Arrivals) -> list[str]:
    times = _milliseconds(arrivals)
    shift = np.abs(times - arrivals.seconds * 1e3)
    said = []
    if shift.max() > _NOISE_MS:
        together = np.count_nonzero((np.diff(times) == 0) & (np.diff(arrivals.seconds) > 0))
        said.append(
            f"times are rounded to whole milliseconds: shifted by {shift.mean():.2g} ms on "
            f"average, {shift.max():.2g} ms at most; {together} request(s) now come with the one "
            "ahead"
        )
    if arrivals.blocks is None:
        said.append(
            "the source tells nothing of shared prompts: every request has blocks of its own, and "
            "a replay reuses no prefix"
        )
    return said


def _replay(arrivals: Arrivals, target: Path, size: int) -> list[str]:
    count = len(arrivals)
    return [
        f"vllm bench serve --dataset-name timed_trace --dataset-path {target} --self-timed "
        f"--timed-trace-sec-multiplier 0.001 --timed-trace-chunk-hash-size {size} "
        f"--num-prompts {count}",
        f"python -m sglang.bench_serving --backend sglang --dataset-name mooncake --dataset-path "
        f"{target} --mooncake-num-rounds 1 --num-prompts {count} (its prompts have about 128 words "
        "for each block, whatever input_length says)",
    ]
