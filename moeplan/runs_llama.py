"""Results of llama.cpp's llama-bench, written with ``-o json`` or ``-o jsonl``.

Each row is one test: prompt processing (``n_prompt``), generation of one sequence (``n_gen``), or
both, after ``n_depth`` tokens that are already in the cache. Fields as in
tools/llama-bench/llama-bench.cpp of ggml-org/llama.cpp (``test::get_fields``, ``json_printer``),
earlier examples/llama-bench/llama-bench.cpp; old versions have no ``n_depth`` or ``n_ubatch``.
"""

from collections.abc import Mapping
from typing import Any

from moeplan.runs import MeasuredRun, Times
from moeplan.runs_fields import Record

_SETTINGS = ("n_gpu_layers", "n_cpu_moe", "n_threads", "type_k", "type_v", "flash_attn")


def is_llama_bench(data: Mapping[str, Any]) -> bool:
    """Say whether a JSON object is a row of llama-bench."""
    return {"n_prompt", "n_gen", "avg_ns"} <= data.keys()


def llama_bench_run(record: Record, source: str) -> MeasuredRun | None:
    """Return the run of one row; None if something is wrong with it, which the record then holds.

    A row of ``n_gen`` tokens is that many decode steps of batch 1; one of ``n_prompt`` tokens is a
    request whose time to first token is ``avg_ns``, in steps of at most ``n_ubatch`` tokens; one of
    both is a request, with one token more than ``n_gen``: the one that the prompt yields.
    """
    prompt, generated = record.count("n_prompt", needed=True), record.count("n_gen", needed=True)
    seconds, deviation = record.number("avg_ns", 1e-9), record.number("stddev_ns", 1e-9)
    depth = record.count("n_depth") or 0
    if prompt is None or generated is None:
        return None
    if not prompt and not generated:
        record.complain("n_prompt and n_gen are both 0 -- at least one token is processed")
        return None
    if seconds is None:
        record.complain("avg_ns is missing or 0 -- a test takes time; give a finished run")
        return None
    shared: dict[str, Any] = {
        "source": source,
        "tool": "llama-bench",
        "model": record.text("model_type") or record.text("model_filename"),
        "engine": _engine(record),
        "spread": None if deviation is None else deviation / seconds,
        "remarks": tuple(_remarks(record)),
    }
    if not prompt:
        return MeasuredRun(
            **shared,
            batch_size=1,
            input_tokens=depth,
            output_tokens=generated,
            step=seconds / generated,
        )
    times = Times(mean=seconds)
    return MeasuredRun(
        **shared,
        requests=1,
        concurrency=1,
        input_tokens=prompt,
        output_tokens=generated + 1,
        cached_tokens=depth,
        chunk_tokens=_chunk(record),
        **({"e2e": times} if generated else {"ttft": times}),
    )


def _chunk(record: Record) -> int | None:
    """Tokens of one graph evaluation: a batch is cut into micro-batches."""
    sizes = [record.count("n_batch", least=1), record.count("n_ubatch", least=1)]
    return min((size for size in sizes if size is not None), default=None)


def _engine(record: Record) -> str:
    commit = record.text("build_commit")
    parts = ["llama.cpp", commit, record.text("backends"), record.text("gpu_info")]
    return " ".join(part for part in parts if part)


def _remarks(record: Record) -> list[str]:
    ran = [f"{key} {record.data[key]}" for key in _SETTINGS if key in record.data]
    remarks = ["llama-bench feeds random tokens: their experts are not those of the trace"]
    if ran:
        remarks.append(f"ran with {', '.join(ran)}: the deployment must say the same")
    return remarks
