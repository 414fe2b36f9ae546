"""Measured tables of a kernel that only streams: the static cast of bf16 activations to fp8.

It stands for the elementwise kernels of a step (norms, additions, activations), which no table
times: as they do it reads and writes each element once, on data that its buffer's last use left
in the cache. TensorRT-LLM's and vLLM's casts are one kernel; SGLang's rows are separate torch
calls, and vLLM's rows of narrow matrices take a thread block each.
"""

from collections.abc import Sequence

import numpy as np

from hwmodels.cluster import load_device
from hwmodels.ops import Elementwise
from hwmodels.silicon.table import Dropped, Table
from hwmodels.silicon.wheel import ENGINES, newest, read, source

FUSED = ("trtllm", "vllm")
"""Engines whose cast is one kernel."""
BYTES = 3
"""Bytes of one element, bf16 read and fp8 written."""


def stream_tables(device: str, engines: Sequence[str] = ENGINES) -> list[Table]:
    """Return the measured rows of static casts to fp8.

    Parameters
    ----------
    device : str
        Catalog name of a GPU with tables.
    engines : sequence of str
        Engines that are read; those without tables or without one fused kernel are passed over.

    Returns
    -------
    list of Table
        At most one per engine, op ``stream``, format bf16. A shape is a width k, swept are the
        rows m; the operations are elementwise.

    Raises
    ------
    InputError
        If the wheel is not installed or the device has no tables or no catalog entry.
    """
    tables = []
    for engine in engines:
        path = newest(device, "quantize", engine, "scale_matrix_perf")
        if path is None or engine not in FUSED:
            continue
        rows = read(path)
        frame = rows.groupby(["k", "m"], as_index=False)[["latency"]].median()
        frame["seconds"] = frame["latency"] * 1e-3
        moved = BYTES * frame["m"].to_numpy() * frame["k"].to_numpy()
        limits = load_device(device).limits("bf16")
        seconds = frame["seconds"].to_numpy()
        beats = (moved > 2 * limits.cache) & (seconds < moved / limits.bandwidth)
        slow = seconds > 10 * (moved / limits.bandwidth + 10e-6)
        keep = ~beats & ~slow & (seconds > 0)
        rules = {
            "faster than memory, beyond twice the cache": beats,
            "over ten times its bound": slow,
            "not positive": seconds <= 0,
        }
        tables.append(
            Table(
                source=source(device, engine, path), op="stream", dtype="bf16",
                kernel=str(rows["kernel_source"].iloc[0]),
                parts=[Elementwise(bytes=moved[keep])], frame=frame[keep].reset_index(drop=True),
                shape=("k",), swept=("m",),
                dropped=tuple(
                    Dropped(rule=rule, rows=int(np.count_nonzero(out)))
                    for rule, out in rules.items() if out.any()
                ),
            )
        )  # fmt: skip
    return tables
