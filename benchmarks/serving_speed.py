"""How fast the request level simulates: 300 and 3,000 requests, 48 layers, 128 experts, top-8.

Lengths and bursts of the first requests of the Azure 2023 conversation trace (CC-BY 4.0), rescaled
to 10 requests/s, on Qwen3-30B-A3B's geometry and 8 H100; the routing trace is synthetic. Run from
the repository root, on one core:

    OMP_NUM_THREADS=1 MOEPLAN_DATA=<folder with workloads/> python benchmarks/serving_speed.py

The table goes to the screen and to benchmarks/results/serving_speed.md.
"""

import argparse
import os
import platform
import sys
import time
from importlib.resources import files
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from hwmodels import load_cluster
from simulator.deployment import Deployment
from simulator.placement import Placement
from simulator.serving import ServingOptions, serve
from simulator.serving_metrics import ServingResult
from traces import ModelSpec, RoutingTrace, load_model
from traces.arrivals import Arrivals, read_arrivals
from traces.synth import synthetic_trace, zipf_shares

CONFIG = "model_configs/Qwen--Qwen3-30B-A3B_config.json"
CLUSTER, RATE, REQUESTS = "hgx-h100-8", 10.0, (300, 3000)
TOKENS, RECORDED, EXPONENT, SEED = 20_000, 100, 0.6, 0
RESULT = Path(__file__).parent / "results" / "serving_speed.md"
SPEED = (
    "| requests | wall, s | CPU, s | steps | steps/s | events | events/s | CPU ms per request |\n"
    "|---|---|---|---|---|---|---|---|"
)
SERVED = (
    "| requests | output tokens/s | TTFT p50, ms | TTFT p99, ms | TPOT p50, ms | TPOT p99, ms "
    "| running | tokens per step |\n|---|---|---|---|---|---|---|---|"
)


def workload() -> Arrivals:
    folder = os.environ.get("MOEPLAN_DATA")
    if not folder:
        raise SystemExit("set MOEPLAN_DATA to the folder with workloads/azure-2023-conv.csv")
    return read_arrivals(Path(folder) / "workloads" / "azure-2023-conv.csv")


def synthetic(model: ModelSpec) -> RoutingTrace:
    shares = zipf_shares(model.num_experts, EXPONENT, model.num_moe_layers, SEED)
    return synthetic_trace(
        shares, tokens=TOKENS, requests=RECORDED, top_k=model.top_k, seed=SEED, model=model.name
    )


def contiguous(model: ModelSpec, ranks: int) -> Deployment:
    slots = np.tile(np.arange(model.num_experts, dtype=np.int32), (model.num_moe_layers, 1))
    return Deployment.of(Placement(slots=slots, num_experts=model.num_experts, num_ranks=ranks))


def row(count: int, wall: float, cpu: float, result: ServingResult) -> str:
    steps, events = len(result.steps), result.events
    return (
        f"| {count:,} | {wall:.2f} | {cpu:.2f} | {steps:,} | {steps / cpu:,.0f} | {events:,} "
        f"| {events / cpu:,.0f} | {1e3 * cpu / count:.2f} |"
    )


def served(count: int, result: ServingResult) -> str:
    s = {k: v for k, v in result.summary().items() if isinstance(v, float)}
    times = [
        f"{1e3 * s[name]:.2f}" for name in ("ttft_s_p50", "ttft_s_p99", "tpot_s_p50", "tpot_s_p99")
    ]
    return (
        f"| {count:,} | {s['output_tokens_per_second']:,.0f} | {' | '.join(times)} "
        f"| {s['running']:.1f} | {s['tokens_per_step']:.0f} |"
    )


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    model = load_model(Path(str(files("aiconfigurator_core").joinpath(CONFIG))))
    cluster = load_cluster(CLUSTER)
    trace, arrivals = synthetic(model), workload()
    deployment = contiguous(model, cluster.num_ranks)
    speed, outcome, per_request, said = [], [], [], ""
    print(SPEED, flush=True)
    for count in REQUESTS:
        some = arrivals.first(count).scaled_to(RATE)
        wall, cpu = time.perf_counter(), time.process_time()
        result = serve(model, trace, cluster, deployment, some, ServingOptions(), seed=SEED)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        speed.append(row(count, wall, cpu, result))
        outcome.append(served(count, result))
        per_request.append(cpu / count)
        said = "; ".join(result.statements)
        print(speed[-1], flush=True)
    text = (
        "# Speed of the request level\n\n"
        f"{model.name} geometry ({model.num_layers} layers, {model.num_experts} experts, "
        f"top-{model.top_k}) on {cluster.name}, attention DP8, experts EP8, contiguous placement; "
        f"the whole of `simulator.serve`,\nrouting tables included. The routing trace is "
        f"synthetic (zipf {EXPONENT}, {TOKENS:,} tokens in {RECORDED} requests), so latencies "
        "below describe no real model.\nLengths and bursts: Azure 2023 conversation trace "
        f"(CC-BY 4.0), the first requests, rescaled to {RATE:g} requests/s.\nAn event is one "
        "kernel or collective of one rank in one step (the second attention kernel of mixed steps "
        "not counted), an arrival, or an output token.\nThe target "
        "is 300 requests in at most 5 s on one core.\n\n"
        f"{SPEED}\n" + "\n".join(speed) + "\n\n"
        f"CPU time per request at {REQUESTS[1]:,} over {REQUESTS[0]}: "
        f"{per_request[1] / per_request[0]:.2f} (1 is linear).\n\n"
        f"{SERVED}\n" + "\n".join(outcome) + "\n\n"
        f"Last row: {said}.\n\n"
        "Command: `OMP_NUM_THREADS=1 MOEPLAN_DATA=... python benchmarks/serving_speed.py` "
        f"(Python {platform.python_version()}, numpy {np.__version__}, {os.cpu_count()} cores, "
        f"load average at the end {os.getloadavg()[0]:.1f}).\n"
    )
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
