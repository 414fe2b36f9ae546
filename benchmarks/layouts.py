"""Which parallel layout: DeepSeek-V3 on 16, 32 and 72 GPUs, gpt-oss-20b on 1, 2, 4 and 8.

    MOEPLAN_DATA=<folder> python benchmarks/layouts.py [--only 16 72 ...]

DeepSeek-V3 has no recorded trace here: its trace is synthetic, with the skew of the published load
statistics and independent tokens. gpt-oss-20b replays its recorded trace. Configurations are those
of aiconfigurator-core. Each plan is timed; the tables go to benchmarks/results/layouts.md.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from pathlib import Path

import numpy as np

from basis.units import format_quantity
from hwmodels import Cluster, load_cluster
from planner.layouts_measured import Measured
from planner.layouts_plan import LayoutPlan, confirm_layouts, plan_layouts
from planner.layouts_question import Sweep
from planner.options import PlanOptions
from planner.scoring import Facts
from simulator.deployment import Workload
from traces.model_spec import ModelSpec, load_model
from traces.routing_trace import RoutingTrace, read_trace
from traces.synth import shares_from_loadstats, synthetic_trace

RESULT = Path(__file__).parent / "results" / "layouts.md"
TOKENS, REQUESTS = 32768, 256
SWEEPS = {
    "deepseek": Sweep(input_tokens=4096, output_tokens=1024),
    "gpt-oss": Sweep(input_tokens=1024, output_tokens=1024),
}


@dataclass(frozen=True)
class Case:
    """One question."""

    key: str
    model: str
    cluster: Callable[[], Cluster]


CASES = (
    Case("16", "deepseek", lambda: load_cluster("hgx-h200-8x2")),
    Case("32", "deepseek", lambda: load_cluster("hgx-h200-8x4")),
    Case("72", "deepseek", lambda: load_cluster("gb200-nvl72")),
    *(Case(f"g{n}", "gpt-oss", partial(load_cluster, "hgx-h100-8", gpus=n)) for n in (1, 2, 4, 8)),
)


def data() -> Path:
    folder = os.environ.get("MOEPLAN_DATA")
    if not folder:
        raise SystemExit("set MOEPLAN_DATA to the folder with deepseek-v3r1-loadstats.csv, traces/")
    return Path(folder)


def config(name: str) -> ModelSpec:
    return load_model(
        Path(str(files("aiconfigurator_core"))) / "model_configs" / f"{name}_config.json"
    )


def deepseek() -> tuple[ModelSpec, RoutingTrace]:
    model = config("deepseek-ai--DeepSeek-V3")
    shares = shares_from_loadstats(data() / "deepseek-v3r1-loadstats.csv", model.num_experts, 0)
    made = synthetic_trace(
        shares, tokens=TOKENS, requests=REQUESTS, top_k=model.top_k, seed=0, model=model.name
    )
    return model, replace(made, meta=replace(made.meta, moe_layer_ids=model.moe_layer_ids))


def gpt_oss() -> tuple[ModelSpec, RoutingTrace]:
    return config("openai--gpt-oss-20b"), read_trace(data() / "traces/gpt-oss-20b-mmlu.parquet")


def run(case: Case, model: ModelSpec, trace: RoutingTrace) -> str:
    cluster, sweep = case.cluster(), SWEEPS[case.model]
    facts = Facts(
        model=model,
        cluster=cluster,
        workload=Workload(decode_batch=cluster.num_ranks),
        options=PlanOptions(),
    )
    start = time.monotonic()
    plan = plan_layouts(facts, trace, "early_late", sweep=sweep)
    other = confirm_layouts(facts, trace, "interleaved", plan, sweep=sweep)
    seconds = time.monotonic() - start
    print(case.key, plan.chosen.candidate.name, f"{seconds:.1f} s", flush=True)
    return section(facts, trace, plan, other, seconds)


def section(facts: Facts, trace: RoutingTrace, plan: LayoutPlan, other: str, seconds: float) -> str:
    kind = "synthetic trace" if trace.meta.synthetic else "recorded trace"
    counts = plan.to_dict()["layouts"]
    lines = [
        f"## {facts.model.name}, {facts.cluster.num_ranks} x {facts.cluster.device.name} ({kind})",
        "",
        f"{plan.question.statement[0].upper()}{plan.question.statement[1:]}. "
        f"{counts['enumerated']} layouts divide ranks and model, {counts['fit']} fit into memory. "
        f"{seconds:.1f} s in all (the search {plan.seconds:.1f} s).",
        "",
        f"**Chosen: {plan.chosen.candidate.name}**, {plan.chosen.size} running requests: "
        f"{plan.chosen.tokens_per_second:,.0f} tokens/s "
        f"({plan.chosen.tokens_per_second / plan.chosen.ranks:,.0f} per GPU), "
        f"TPOT {plan.chosen.step_time * 1e3:.1f} ms.",
        *(f"{remark[0].upper()}{remark[1:]}." for remark in plan.remarks),
        "",
    ]
    if plan.runner_up is not None:
        verdict = "A tie with" if plan.tie else "Runner-up:"
        lines += [f"{verdict} **{plan.runner_up.candidate.name}**: {plan.why_lost}.", ""]
    lines += [f"Proof: {plan.proof.statement}.", "", f"Other split: {other}.", ""]
    lines += ["Memory of the fullest rank:", "", *memory_table(plan), ""]
    lines += ["Pareto front:", "", *front_table(plan.front), ""]
    return "\n".join(lines)


def memory_table(plan: LayoutPlan) -> list[str]:
    names = ("weights", "experts", "kv_cache", "activations", "communication", "total", "usable")
    rows = [plan.chosen] + ([plan.runner_up] if plan.runner_up else [])
    return [
        "| layout | " + " | ".join(name.replace("_", " ") for name in names) + " |",
        "|---" * (len(names) + 1) + "|",
        *(
            f"| {m.candidate.name} | "
            + " | ".join(format_quantity(m.memory[name], "B") for name in names)
            + " |"
            for m in rows
        ),
    ]


def front_table(front: tuple[Measured, ...]) -> list[str]:
    return [
        "| running requests | layout | TPOT, ms | tokens/s | per GPU | bound / simulated |",
        "|---|---|---|---|---|---|",
        *(
            f"| {m.size} | {m.candidate.name} | {m.step_time * 1e3:.2f} "
            f"| {m.tokens_per_second:,.0f} | {m.tokens_per_second / m.ranks:,.0f} "
            f"| {m.bound / m.step_time:.2f} |"
            for m in front
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", help="keys of cases: 16 32 72 g1 g2 g4 g8")
    wanted = parser.parse_args().only
    facts: dict[str, tuple[ModelSpec, RoutingTrace]] = {}
    parts = []
    for case in CASES:
        if wanted and case.key not in wanted:
            continue
        if case.model not in facts:
            facts[case.model] = {"deepseek": deepseek, "gpt-oss": gpt_oss}[case.model]()
        parts.append(run(case, *facts[case.model]))
    head = (
        "# Parallel layouts: DeepSeek-V3 and gpt-oss-20b\n\n"
        "Command: `MOEPLAN_DATA=... python benchmarks/layouts.py` "
        f"(Python {platform.python_version()}, numpy {np.__version__}, {os.cpu_count()} cores). "
        "Decode only; placements planned on the early half of the requests, layouts compared on "
        "the late half. The DeepSeek-V3 trace is synthetic (skew of its published load "
        f"statistics, {TOKENS} independent tokens): it shows balance, not co-activation.\n\n"
    )
    text = head + "\n".join(parts)
    if wanted:
        print(text)
    else:
        RESULT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
