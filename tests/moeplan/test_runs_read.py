"""Measured runs of other tools, read from small files in their formats; all values are made up."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from basis.errors import InputError
from moeplan.runs import COLUMNS, MeasuredRun
from moeplan.runs_read import read_runs

Save = Callable[[str], Path]

# vllm/benchmarks/serve.py, without --save-detailed
VLLM: dict[str, Any] = {
    "date": "20260103-101112",
    "endpoint_type": "vllm",
    "backend": "vllm",
    "label": "vllm",
    "model_id": "openai/gpt-oss-20b",
    "tokenizer_id": "openai/gpt-oss-20b",
    "num_prompts": 100,
    "request_rate": "inf",
    "burstiness": 1.0,
    "max_concurrency": 16,
    "duration": 25.0,
    "completed": 100,
    "failed": 0,
    "total_input_tokens": 51200,
    "total_output_tokens": 12800,
    "request_throughput": 4.0,
    "request_goodput": None,
    "output_throughput": 512.0,
    "total_token_throughput": 2560.0,
    "max_output_tokens_per_s": 700.0,
    "max_concurrent_requests": 16,
    "rtfx": 0.0,
    "mean_ttft_ms": 80.0,
    "median_ttft_ms": 75.0,
    "std_ttft_ms": 9.0,
    "p99_ttft_ms": 120.0,
    "mean_tpot_ms": 30.0,
    "median_tpot_ms": 29.0,
    "std_tpot_ms": 1.0,
    "p99_tpot_ms": 35.0,
    "mean_itl_ms": 31.0,
    "median_itl_ms": 28.0,
    "std_itl_ms": 4.0,
    "p99_itl_ms": 60.0,
}
# python/sglang/benchmark/serving.py
SGLANG: dict[str, Any] = {
    "tag": None,
    "backend": "sglang",
    "dataset_name": "random",
    "request_rate": 4.0,
    "max_concurrency": None,
    "sharegpt_output_len": None,
    "random_input_len": 1024,
    "random_output_len": 128,
    "random_range_ratio": 0.0,
    "server_info": {"model_path": "Qwen/Qwen3-30B-A3B", "version": "0.5.9"},
    "duration": 50.0,
    "completed": 200,
    "total_input_tokens": 102500,
    "total_input_text_tokens": 102500,
    "total_input_vision_tokens": 0,
    "total_output_tokens": 12900,
    "total_output_tokens_retokenized": 12800,
    "request_throughput": 4.0,
    "input_throughput": 2050.0,
    "output_throughput": 258.0,
    "total_throughput": 2308.0,
    "mean_e2e_latency_ms": 900.0,
    "median_e2e_latency_ms": 850.0,
    "std_e2e_latency_ms": 100.0,
    "p99_e2e_latency_ms": 1500.0,
    "mean_ttft_ms": 50.0,
    "median_ttft_ms": 45.0,
    "std_ttft_ms": 5.0,
    "p99_ttft_ms": 90.0,
    "mean_tpot_ms": 13.0,
    "median_tpot_ms": 12.0,
    "std_tpot_ms": 1.0,
    "p99_tpot_ms": 20.0,
    "mean_itl_ms": 13.5,
    "median_itl_ms": 11.0,
    "std_itl_ms": 3.0,
    "p95_itl_ms": 25.0,
    "p99_itl_ms": 40.0,
    "concurrency": 3.6,
    "accept_length": None,
}
# an early sglang.bench_serving: no concurrency limit, no mean TTFT
SGLANG_OLD = {
    "backend": "sglang",
    "request_rate": math.inf,
    "total_input_tokens": 4096,
    "total_output_tokens": 2048,
    "total_output_tokens_retokenized": 2040,
    "mean_e2e_latency_ms": 2000.0,
    "median_e2e_latency_ms": 1900.0,
    "median_ttft_ms": 300.0,
    "median_itl_ms": 20.0,
    "output_throughput": 512.0,
    "sharegpt_output_len": None,
    "random_input_len": None,
    "random_output_len": None,
    "random_range_ratio": None,
    "duration": 4.0,
    "completed": 8,
}
# tools/llama-bench/llama-bench.cpp (some fields of the setting left out)
LLAMA: dict[str, Any] = {
    "build_commit": "8cf427ff",
    "build_number": 5163,
    "cpu_info": "AMD Ryzen 7 7800X3D 8-Core Processor",
    "gpu_info": "NVIDIA GeForce RTX 4080",
    "backends": "CUDA",
    "model_filename": "models/gpt-oss-20b-mxfp4.gguf",
    "model_type": "gpt-oss 20B MXFP4 MoE",
    "model_size": 12109566560,
    "model_n_params": 20914757184,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_threads": 8,
    "type_k": "f16",
    "type_v": "f16",
    "n_gpu_layers": 99,
    "n_cpu_moe": 0,
    "no_kv_offload": False,
    "flash_attn": True,
    "n_prompt": 512,
    "n_gen": 0,
    "n_depth": 0,
    "test_time": "2026-01-03T10:11:12Z",
    "avg_ns": 70000000,
    "stddev_ns": 1400000,
    "avg_ts": 7314.3,
    "stddev_ts": 146.0,
    "samples_ns": [68600000, 70000000, 71400000],
    "samples_ts": [7463.6, 7314.3, 7170.9],
}


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Return a writer of a file whose name says nothing of its content."""

    def write(text: str) -> Path:
        path = tmp_path / "runs.txt"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def one(save: Save) -> Callable[[dict[str, Any]], MeasuredRun]:
    """Return a reader of a single JSON object."""

    def read(data: dict[str, Any]) -> MeasuredRun:
        (run,) = read_runs(save(json.dumps(data)))
        return run

    return read


@pytest.fixture
def refused(save: Save) -> Callable[[str], str]:
    """Return a reader that must fail; it gives the message without the path."""

    def read(text: str) -> str:
        path = save(text)
        with pytest.raises(InputError) as caught:
            read_runs(path)
        assert str(caught.value).startswith(f"{path}: ")
        return str(caught.value).removeprefix(f"{path}: ")

    return read


def test_vllm(one: Callable[..., MeasuredRun]) -> None:
    run = one(VLLM)
    assert (run.tool, run.model, run.engine) == ("vllm bench serve", "openai/gpt-oss-20b", "vllm")
    assert (run.requests, run.concurrency, run.request_rate) == (100, 16, None)
    assert (run.input_tokens, run.output_tokens, run.duration) == (512, 128, 25)
    assert run.metrics == pytest.approx(
        {
            "ttft_mean": 0.080,
            "ttft_median": 0.075,
            "ttft_p99": 0.120,
            "tpot_mean": 0.030,
            "tpot_median": 0.029,
            "tpot_p99": 0.035,
            "itl_mean": 0.031,
            "itl_median": 0.028,
            "itl_p99": 0.060,
            "output_tokens_per_s": 512,
            "total_tokens_per_s": 2560,
        }
    )
    assert not run.remarks
    assert run.incomparable is None


def test_older_vllm_has_fewer_fields(one: Callable[..., MeasuredRun]) -> None:
    gone = ("label", "endpoint_type", "failed", "burstiness", "max_concurrency", "request_goodput")
    old = {k: v for k, v in VLLM.items() if k not in (*gone, "total_token_throughput")}
    run = one({**old, "request_rate": 5.0, "mean_e2el_ms": 4000.0, "p99_e2el_ms": 4500.0})
    assert (run.concurrency, run.request_rate) == (None, 5)
    assert run.e2e.mean == pytest.approx(4)
    assert run.e2e.p99 == pytest.approx(4.5)
    assert run.total_tokens_per_s == pytest.approx((51200 + 12800) / 25)


def test_appended_vllm_results_are_several_runs(save: Save) -> None:
    lines = [json.dumps({**VLLM, "max_concurrency": n}) for n in (1, 8)]
    runs = read_runs(save("\n".join(lines)))
    assert [run.concurrency for run in runs] == [1, 8]
    assert [run.source.rsplit(", ", 1)[1] for run in runs] == ["line 1", "line 2"]


def test_sglang(one: Callable[..., MeasuredRun]) -> None:
    run = one(SGLANG)
    assert (run.tool, run.model) == ("sglang bench_serving", "Qwen/Qwen3-30B-A3B")
    assert run.engine == "sglang 0.5.9"
    assert (run.requests, run.concurrency, run.request_rate) == (200, None, 4)
    assert (run.input_tokens, run.output_tokens) == (512.5, 64.5)
    assert (run.e2e.mean, run.e2e.p99) == pytest.approx((0.9, 1.5))
    assert run.itl.median == pytest.approx(0.011)
    assert (run.output_tokens_per_s, run.total_tokens_per_s) == (258, 2308)


def test_older_sglang_sends_all_at_once(one: Callable[..., MeasuredRun]) -> None:
    run = one(SGLANG_OLD)
    assert (run.requests, run.concurrency, run.request_rate) == (8, 8, None)
    assert run.metrics == pytest.approx(
        {
            "ttft_median": 0.3,
            "itl_median": 0.02,
            "e2e_mean": 2.0,
            "e2e_median": 1.9,
            "output_tokens_per_s": 512,
            "total_tokens_per_s": 1536,
        }
    )
    assert "all requests come at once" in run.remarks[0]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({**VLLM, "request_rate": 4.0}, "sent at 4 requests/s, at most 16 at a time"),
        ({**VLLM, "ramp_up_strategy": "linear"}, "the request rate was ramped up"),
        ({**VLLM, "spec_decode_acceptance_length": 2.5}, "2.5 tokens a step"),
        ({**SGLANG, "request_rate": "trace"}, "replayed from a trace"),
        ({**SGLANG, "accept_length": 3.1}, "3.1 tokens a step"),
    ],
)
def test_runs_that_cannot_be_simulated_say_why(
    one: Callable[..., MeasuredRun], data: dict[str, Any], words: str
) -> None:
    assert words in str(one(data).incomparable)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({**VLLM, "completed": 97}, "3 of 100 requests were not answered"),
        (
            {**VLLM, "burstiness": 0.5, "request_rate": 3.0, "max_concurrency": None},
            "burstiness 0.5",
        ),
        (
            {**SGLANG, "cache_report": {"cache_hit_rate_pct": 40.0}},
            "40 % of the prompt tokens came from a cache",
        ),
    ],
)
def test_what_a_prediction_leaves_out_is_remarked(
    one: Callable[..., MeasuredRun], data: dict[str, Any], words: str
) -> None:
    run = one(data)
    assert run.incomparable is None
    assert words in run.remarks[0]


def test_llama_bench(save: Save) -> None:
    rows = [
        LLAMA,
        {**LLAMA, "n_prompt": 0, "n_gen": 128, "n_depth": 4096, "avg_ns": 640_000_000},
        {**LLAMA, "n_prompt": 512, "n_gen": 128, "avg_ns": 710_000_000},
    ]
    prompt, decode, both = read_runs(save(json.dumps(rows, indent=2)))
    assert prompt.engine == "llama.cpp 8cf427ff CUDA NVIDIA GeForce RTX 4080"
    assert prompt.model == "gpt-oss 20B MXFP4 MoE"
    assert (prompt.input_tokens, prompt.output_tokens, prompt.chunk_tokens) == (512, 1, 512)
    assert prompt.metrics == pytest.approx({"ttft_mean": 0.070})
    assert prompt.spread == pytest.approx(0.02)
    assert (decode.batch_size, decode.input_tokens, decode.output_tokens) == (1, 4096, 128)
    assert decode.metrics == pytest.approx({"step": 0.005})
    assert (both.input_tokens, both.output_tokens) == (512, 129)
    assert both.metrics == pytest.approx({"e2e_mean": 0.710})
    assert "n_gpu_layers 99" in prompt.remarks[1]


def test_lines_of_older_llama_bench(save: Save) -> None:
    gone = ("n_ubatch", "n_depth", "n_cpu_moe", "flash_attn", "type_v", "backends")
    old = {k: v for k, v in LLAMA.items() if k not in gone}
    runs = read_runs(save("".join(json.dumps({**old, "n_prompt": n}) + "\n" for n in (256, 512))))
    assert [run.input_tokens for run in runs] == [256, 512]
    assert [run.chunk_tokens for run in runs] == [2048, 2048]
    assert [run.cached_tokens for run in runs] == [0, 0]


def test_plain_csv(save: Save) -> None:
    text = (
        "model,concurrency,input_tokens,output_tokens,batch_size,step_ms,ttft_mean_ms,"
        "output_tokens_per_s\n"
        "mine,8,512,128,,,80.5,900\n"
        "\n"
        "mine,,,,32,12.5,,\n"
    )
    served, stepped = read_runs(save(text))
    assert (served.concurrency, served.input_tokens, served.output_tokens) == (8, 512, 128)
    assert served.metrics == pytest.approx({"ttft_mean": 0.0805, "output_tokens_per_s": 900})
    assert served.source.endswith("line 2")
    assert (stepped.batch_size, stepped.input_tokens) == (32, None)
    assert stepped.metrics == pytest.approx({"step": 0.0125})
    assert stepped.source.endswith("line 4")


def test_every_column_of_the_csv_is_read(save: Save) -> None:
    served = [c for c in COLUMNS if c not in ("batch_size", "step_ms", "request_rate_per_s")]
    cells = ["text" if c in ("model", "engine") else str(i) for i, c in enumerate(served, 1)]
    (run,) = read_runs(save(",".join(served) + "\n" + ",".join(cells) + "\n"))
    stored = run.model_dump(exclude_none=True, exclude={"source", "tool", "remarks"})
    flat = [v for value in stored.values() for v in (value if isinstance(value, dict) else [value])]
    assert len([value for value in flat if value != 0]) == len(served)  # cached_tokens is 0
    assert run.metrics["e2e_p99"] == pytest.approx(1e-3 * (served.index("e2e_p99_ms") + 1))


def test_the_guide_documents_every_column() -> None:
    guide = Path(__file__).resolve().parents[2] / "docs/guides/compare-with-your-runs.md"
    text = guide.read_text(encoding="utf-8")
    for column in COLUMNS:
        if not column.startswith(("tpot_", "itl_", "e2e_")):  # named by their pattern
            assert f"`{column}`" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty -- known are results of vllm bench serve"),
        ("[]", "no runs in it -- known are"),
        ('{"a": 1,\n  "b": }', "not JSON at line 2, column 8: Expecting value"),
        ('[\n  {"n_prompt": 512},\n', "not JSON at line 3, column 1"),
        ('{"a": 1}', "1 error\n  line 1: keys a -- known are results of vllm bench serve"),
        ("[1, 2]", "item 1 of the list in line 1: int, not an object"),
        ("[" * 200_000, "line 1: a number of thousands of digits, or brackets too deep"),
        ('{"a": ' + "9" * 5000 + "}", "line 1: a number of thousands of digits"),
    ],
)
def test_bad_json_is_one_message(refused: Callable[[str], str], text: str, message: str) -> None:
    assert refused(text).startswith(message)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({**VLLM, "completed": 0}, "completed 0 -- no request was answered"),
        ({**VLLM, "mean_ttft_ms": "80"}, "mean_ttft_ms '80' -- a finite number, 0 or above"),
        ({**VLLM, "mean_ttft_ms": math.nan}, "mean_ttft_ms nan -- a finite number"),
        ({**VLLM, "mean_ttft_ms": -1.0}, "mean_ttft_ms -1.0 -- a finite number"),
        ({**VLLM, "max_concurrency": 0}, "max_concurrency 0 -- a whole number of at least 1"),
        ({**VLLM, "max_concurrency": True}, "max_concurrency True -- a whole number"),
        ({**VLLM, "completed": 10**300}, "completed (huge) -- a whole number"),
        ({**VLLM, "request_rate": "fast"}, "request_rate 'fast' -- a finite number"),
        (
            {k: v for k, v in VLLM.items() if k != "total_output_tokens"},
            "total_output_tokens is missing -- give the file as the tool wrote it",
        ),
        ({**VLLM, "total_output_tokens": 0}, "only runs that generate text are compared"),
        ({**LLAMA, "n_prompt": 0}, "n_prompt and n_gen are both 0"),
        ({**LLAMA, "avg_ns": 0}, "avg_ns is missing or 0 -- a test takes time"),
        ({**LLAMA, "n_ubatch": 0}, "n_ubatch 0 -- a whole number of at least 1"),
    ],
)
def test_bad_values_are_named(
    refused: Callable[[str], str], data: dict[str, Any], message: str
) -> None:
    said = refused(json.dumps(data))
    assert said.startswith("1 error\n  line 1: ")
    assert message in said


def test_all_errors_of_a_file_come_at_once(refused: Callable[[str], str]) -> None:
    bad = [{**VLLM, "completed": 0}, {"x": 1}, {**SGLANG, "duration": "50"}]
    lines = refused("\n".join(json.dumps(data) for data in bad)).splitlines()
    assert lines[0] == "3 errors"
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["line 1", "line 2", "line 3"]


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        (
            "concurrency,input_tokens,output_tokens,ttft_ms\n1,2,3,4\n",
            ["line 1: unknown column 'ttft_ms' -- did you mean 'ttft_p99_ms'?"],
        ),
        (
            "batch_size,step_ms,step_ms\n1,2,3\n",
            ["line 1: column 'step_ms' stands twice -- keep one of them"],
        ),
        (
            "batch_size,step_ms\n8,fast\n0,1\n8\n8,-2\n",
            [
                "line 2: step_ms 'fast' -- a finite number above 0",
                "line 3: batch_size '0' -- a whole number of at least 1",
                "line 4: 1 cells, the header has 2 -- leave a cell empty",
                "line 5: step_ms '-2' -- a finite number above 0",
            ],
        ),
        (
            "concurrency,request_rate_per_s,input_tokens,output_tokens,ttft_mean_ms,batch_size\n"
            "1,2,3,4,5,\n,,3,,5,\n1,,3,4,,\n,,,,,8\n1,,,,,8\n",
            [
                "line 2: concurrency and request_rate_per_s given -- requests need concurrency or",
                "line 3: output_tokens is missing -- requests need their lengths",
                "line 3: no load given -- requests need concurrency or request_rate_per_s",
                "line 4: nothing measured -- give at least one latency or throughput",
                "line 5: step_ms is missing -- with batch_size give the time of a decode step",
                "line 6: concurrency beside batch_size -- a line is decode steps or requests",
            ],
        ),
        ("batch_size,step_ms\n", ["no runs in it -- give a header and at least one line"]),
        (
            "build_commit,n_prompt,n_gen,avg_ns\n",
            ["line 1: CSV of llama-bench -- write it with -o json or -o jsonl"],
        ),
        ('batch_size,step_ms\n"8,1\n', ["-- write plain comma-separated values"]),
    ],
)
def test_bad_csv_is_explained_line_by_line(
    refused: Callable[[str], str], text: str, messages: list[str]
) -> None:
    said = refused(text)
    for message in messages:
        assert message in said


def test_a_long_list_of_errors_is_cut(refused: Callable[[str], str]) -> None:
    said = refused("batch_size,step_ms\n" + "x,1\n" * 50)
    assert said.startswith("50 errors")
    assert said.endswith("and 30 more")


def test_files_that_are_no_text_or_too_large(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file -- give a file of measured runs"):
        read_runs(tmp_path / "none.json")
    binary = tmp_path / "runs.json"
    binary.write_bytes('{"a": 1}'.encode("utf-16"))
    with pytest.raises(InputError, match="byte 0 is not UTF-8 -- save the file as UTF-8"):
        read_runs(binary)
    with binary.open("wb") as file:
        file.truncate(64 * 2**20 + 1)  # sparse: takes no room
    with pytest.raises(InputError, match="67108865 bytes -- at most 67108864"):
        read_runs(binary)
