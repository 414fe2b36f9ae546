"""Memory and speed of writing, reading and counting large traces.

A trace of 58 MoE layers, 256 experts, top-8 (Zipf loads, independent tokens), made of a
20,000-token block that repeats, is written as Parquet and read back from it with full load
statistics. Each run is a process of its own on one core, with one thread in every library; its
peak memory is what the operating system says of it. Run from the repository root:

    python benchmarks/trace_scale.py --tokens 1000000 10000000

The files go to a temporary folder (``TMPDIR``; about 0.5 GB per million tokens) and are deleted.
The tables go to the screen and to benchmarks/results/trace_scale.md.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow as pa

import traces.routing_trace
from traces.measures.drift import Drift
from traces.measures.flow import Flow
from traces.measures.load import Load
from traces.measures.reuse import Reuse
from traces.measures.run import statistics
from traces.measures.support import Support
from traces.routing_trace import RoutingTrace, TraceWriter
from traces.synth import synthetic_trace, zipf_shares
from traces.trace_set import open_traces

LAYERS, EXPERTS, TOP_K, BLOCK, REQUEST = 58, 256, 8, 20_000, 500
ZIPF, SEED = 0.45, 0  # busiest expert about 7 times the mean, as DeepSeek-V3 on average
RESULT = Path(__file__).parent / "results" / "trace_scale.md"
LEVELS = (1, 3, 9)
LEVEL_TOKENS = 200_000
ASKED: dict[str, list[Any]] = {
    "none": [],
    "load": [Load],
    "loads": [Load, Drift, Support],
    "all": [Load, Drift, Support, Flow, Reuse],
}
NAMES = {
    "none": "read and checked, nothing counted",
    "load": "load statistics: all, by phase, by domain",
    "loads": "these, drift, standard errors",
    "all": "these, layer-to-layer flow, reuse at 5 lags",
}
ALL_UP_TO = 1_000_000  # tokens up to which everything is counted as well
HEADER = (
    "| tokens | file, GB | what is done | time, s | core time, s | tokens per s of core time "
    "| peak memory, MB |\n|---|---|---|---|---|---|---|"
)


def block() -> RoutingTrace:
    """Return the block that repeats, 40 requests of 500 tokens."""
    shares = zipf_shares(EXPERTS, ZIPF, LAYERS, SEED)
    return synthetic_trace(shares, tokens=BLOCK, requests=BLOCK // REQUEST, top_k=TOP_K, seed=SEED)


def write(path: Path, tokens: int, level: int | None) -> dict[str, Any]:
    """Write the block as often as needed, requests numbered on."""
    part = block()
    if level is not None:
        traces.routing_trace._ZSTD_LEVEL = level
    begin = clocks()
    with TraceWriter(path, part.meta, part.domains, weights=False) as out:
        for start in range(0, tokens, BLOCK):
            request = part.request_id + start // REQUEST
            out.write(replace(part, request_id=request.astype(np.int32)))
    return since(begin) | {"bytes": path.stat().st_size}


def read(path: Path, what: str) -> dict[str, Any]:
    """Open, read, check and count."""
    begin = clocks()
    found = open_traces(path)
    results = statistics(found, ASKED[what])
    took = since(begin)
    if results:
        assert results[0].loads.counts.sum() == found.num_tokens * LAYERS * TOP_K
    return took


def clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def since(begin: tuple[float, float]) -> dict[str, Any]:
    """Return seconds that passed, and those that this process had the core."""
    return dict(zip(("seconds", "core"), np.subtract(clocks(), begin).tolist(), strict=True))


def child(options: argparse.Namespace) -> None:
    """Do one run on one core and print what it took."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    path = Path(options.path)
    if options.child == "write":
        answer = write(path, options.tokens[0], options.level)
    else:
        answer = read(path, options.child)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(answer | {"peak_bytes": peak}))


def run(kind: str, path: Path, tokens: int, level: int | None = None) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", kind, "--path", str(path)]
    command += ["--tokens", str(tokens)] + (["--level", str(level)] if level is not None else [])
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=os.environ | threads, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def rows_of(folder: Path, tokens: int) -> list[str]:
    """Write one size, read it, and return the rows of the table."""
    path = folder / "trace.parquet"
    found = run("write", path, tokens)
    size = found["bytes"]
    rows = [row(tokens, size, "written", found)]
    for what, name in NAMES.items():
        if what != "all" or tokens <= ALL_UP_TO:
            rows.append(row(tokens, size, name, run(what, path, tokens)))
    path.unlink()
    return rows


def row(tokens: int, size: int, what: str, found: dict[str, Any]) -> str:
    line = (
        f"| {tokens:,} | {size / 1e9:.2f} | {what} | {found['seconds']:.1f} | {found['core']:.1f} "
        f"| {tokens / found['core']:,.0f} | {found['peak_bytes'] / 1e6:,.0f} |"
    )
    print(line, file=sys.stderr, flush=True)
    return line


def levels(folder: Path) -> list[str]:
    """Return a table of zstd levels: size and speed of writing and of reading with loads."""
    lines = [
        "| zstd level | bytes per token | written, tokens/s | read with loads, tokens/s |",
        "|---|---|---|---|",
    ]
    for level in LEVELS:
        path = folder / "level.parquet"
        wrote = run("write", path, LEVEL_TOKENS, level)
        took = run("load", path, LEVEL_TOKENS)
        lines.append(
            f"| {level} | {wrote['bytes'] / LEVEL_TOKENS:.0f} "
            f"| {LEVEL_TOKENS / wrote['core']:,.0f} | {LEVEL_TOKENS / took['core']:,.0f} |"
        )
        print(lines[-1], file=sys.stderr, flush=True)
        path.unlink()
    return lines


def page(folder: Path, sizes: Sequence[int]) -> str:
    rows = [line for tokens in sizes for line in rows_of(folder, tokens)]
    return "\n".join(
        [
            "# Large traces: memory and speed",
            "",
            f"Made by `python benchmarks/trace_scale.py --tokens {' '.join(map(str, sizes))}`.",
            "",
            f"{LAYERS} layers, {EXPERTS} experts, top-{TOP_K}: {LAYERS * TOP_K * 2} bytes of ids "
            f"per token before compression. A block of {BLOCK:,} tokens in requests of "
            f"{REQUEST} repeats (Zipf loads of exponent {ZIPF}, requests numbered on). One core of "
            f"{platform.processor() or platform.machine()}, one thread; Python "
            f"{platform.python_version()}, numpy {np.__version__}, pyarrow {pa.__version__}. Time "
            "from opening the file to the figures, checksums and checks of every expert id "
            "included; the start of Python is not. Core time is what the process had of the core; "
            f"others used the machine as well (load average {os.getloadavg()[0]:.1f} on "
            f"{os.cpu_count()} cores at the end).",
            "",
            HEADER,
            *rows,
            "",
            f"Compression of {LEVEL_TOKENS:,} tokens, per second of core time:",
            "",
            *levels(folder),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--child", choices=["write", *ASKED], help=argparse.SUPPRESS)
    parser.add_argument("--path", help=argparse.SUPPRESS)
    parser.add_argument("--level", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        text = page(Path(folder), options.tokens)
    RESULT.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
