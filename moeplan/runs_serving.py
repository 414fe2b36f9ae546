"""Results of the serving benchmarks of vLLM and SGLang: latencies and throughput of requests.

Fields of vLLM as ``vllm bench serve --save-result`` writes them (vllm/benchmarks/serve.py of
vllm-project/vllm, earlier benchmarks/benchmark_serving.py), of SGLang as ``bench_serving
--output-file`` does (python/sglang/benchmark/serving.py of sgl-project/sglang, earlier
python/sglang/bench_serving.py). Both start a request's clock when the client sends it, after any
wait for a free place; a 0 stands for what was not measured.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moeplan.runs import MeasuredRun, Times
from moeplan.runs_fields import Record

_MS = 1e-3


def is_vllm(data: Mapping[str, Any]) -> bool:
    """Say whether a JSON object is a result of vLLM's serving benchmark."""
    return {"model_id", "num_prompts", "duration", "completed"} <= data.keys()


def is_sglang(data: Mapping[str, Any]) -> bool:
    """Say whether a JSON object is a result of SGLang's; all versions count tokens twice."""
    return {"total_output_tokens_retokenized", "duration", "completed"} <= data.keys()


def vllm_run(record: Record, source: str) -> MeasuredRun | None:
    """Return the run of a result of vLLM; None if something is wrong with it."""
    data, remarks = record.data, []
    asked, answered = record.count("num_prompts"), record.count("completed")
    if asked and answered and answered < asked:
        remarks.append(f"{asked - answered} of {asked} requests were not answered and are left out")
    burstiness = record.number("burstiness")
    if burstiness is not None and burstiness != 1 and _paced(data):
        remarks.append(f"arrivals of burstiness {burstiness:g}: simulated as Poisson (1)")
    reason = _speculated(record.number("spec_decode_acceptance_length"))
    if data.get("ramp_up_strategy") is not None:
        reason = "the request rate was ramped up -- measure at one rate"
    return _run(
        record,
        source,
        _Dialect(
            tool="vllm bench serve",
            model=record.text("model_id"),
            engine=record.text("backend"),
            e2e="e2el",
            total="total_token_throughput",
            remarks=remarks,
            incomparable=reason,
        ),
    )


def sglang_run(record: Record, source: str) -> MeasuredRun | None:
    """Return the run of a result of SGLang; None if something is wrong with it."""
    info = record.data.get("server_info")
    server = Record(info if isinstance(info, dict) else {}, record.where, record.problems)
    version = server.text("version")
    remarks, reason = [], _speculated(record.number("accept_length"))
    if record.data.get("request_rate") == "trace":
        reason = "arrivals were replayed from a trace that the file does not hold"
    cache = record.data.get("cache_report")
    hits = Record(cache if isinstance(cache, dict) else {}, record.where, record.problems)
    rate = hits.number("cache_hit_rate_pct")
    if rate is not None:
        remarks.append(f"{rate:g} % of the prompt tokens came from a cache: simulated without it")
    return _run(
        record,
        source,
        _Dialect(
            tool="sglang bench_serving",
            model=server.text("model_path"),
            engine=" ".join(t for t in (record.text("backend"), version) if t) or None,
            e2e="e2e_latency",
            total="total_throughput",
            remarks=remarks,
            incomparable=reason,
        ),
    )


def _speculated(tokens: float | None) -> str | None:
    """Say that a step made more than one token for each request, if so."""
    if tokens is None or tokens <= 1:
        return None
    return f"speculative decoding, {tokens:g} tokens a step -- measure without it"


@dataclass(frozen=True, kw_only=True)
class _Dialect:
    """How one tool names things, and what was found that only it writes."""

    tool: str
    model: str | None
    engine: str | None
    e2e: str
    total: str
    remarks: list[str]
    incomparable: str | None


def _run(record: Record, source: str, dialect: _Dialect) -> MeasuredRun | None:
    known = len(record.problems)
    requests = record.count("completed", needed=True)
    inputs = record.count("total_input_tokens", needed=True)
    outputs = record.count("total_output_tokens", needed=True)
    duration = record.number("duration")
    load = _load(record, requests, dialect)
    if requests == 0:
        record.complain("completed 0 -- no request was answered; leave this result out")
        return None
    if outputs == 0:
        record.complain("total_output_tokens 0 -- only runs that generate text are compared")
    if len(record.problems) > known or not (requests and inputs is not None and outputs):
        return None
    total = record.number(dialect.total)
    if total is None and duration is not None:  # older versions wrote only its parts
        total = (inputs + outputs) / duration
    fields: dict[str, Any] = {
        "requests": requests,
        "input_tokens": inputs / requests,
        "output_tokens": outputs / requests,
        "duration": duration,
        "ttft": _times(record, "ttft"),
        "tpot": _times(record, "tpot"),
        "itl": _times(record, "itl"),
        "e2e": _times(record, dialect.e2e),
        "output_tokens_per_s": record.number("output_throughput"),
        "total_tokens_per_s": total,
    }
    if len(record.problems) > known:
        return None
    return MeasuredRun(
        source=source,
        tool=dialect.tool,
        model=dialect.model,
        engine=dialect.engine,
        **fields,
        **load,
    )


def _times(record: Record, name: str) -> Times:
    return Times(
        mean=record.number(f"mean_{name}_ms", _MS),
        median=record.number(f"median_{name}_ms", _MS),
        p99=record.number(f"p99_{name}_ms", _MS),
    )


def _paced(data: Mapping[str, Any]) -> bool:
    """Whether requests were sent at a finite rate; ``inf`` is a text in vLLM's files."""
    rate = data.get("request_rate")
    return rate is not None and rate != "inf" and rate != math.inf


def _load(record: Record, requests: int | None, dialect: _Dialect) -> dict[str, Any]:
    """Return concurrency or rate, and what is to be said of them."""
    cap = record.count("max_concurrency", least=1)
    paced = _paced(record.data) and dialect.incomparable is None
    rate = record.number("request_rate") if paced else None
    remarks, reason = list(dialect.remarks), dialect.incomparable
    if rate is not None and cap is not None:
        reason = (
            f"sent at {rate:g} requests/s, at most {cap} at a time -- measure with one of the two"
        )
    elif cap is None and not paced and reason is None:
        cap = requests or None
        remarks.append("neither rate nor concurrency was limited: all requests come at once")
    return {
        "concurrency": cap,
        "request_rate": rate,
        "remarks": tuple(remarks),
        "incomparable": reason,
    }
