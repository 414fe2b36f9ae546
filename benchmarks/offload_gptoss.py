"""Offload plans for gpt-oss-20b: planned on one half of the requests, scored on the other.

    python benchmarks/offload_gptoss.py --trace DATA/traces/gpt-oss-20b-mmlu.parquet \
        --model gpt-oss-20b/config.json --out benchmarks/results/offload_gptoss.md

Times are predicted milliseconds per output token (mean step time); experts are mxfp4.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from basis.errors import InputError
from hwmodels import load_cluster
from planner.offload_options import OffloadOptions
from planner.offload_plan import OffloadPlan, make_offload_plan
from planner.offload_sample import OffloadFacts
from planner.scoring import Score
from simulator.deployment import Workload
from traces.caches import replay
from traces.caches_inputs import active_experts, expert_scores, token_steps
from traces.model_spec import ModelSpec, load_model
from traces.routing_trace import RoutingTrace, check_against_model, read_trace
from traces.splits import Split, split_requests
from traces.synth import synthetic_trace, zipf_shares

SPLITS: tuple[Split, ...] = ("early_late", "interleaved")
WORKSTATION = ("workstation-rtx4090", "host", (2, 4, 6, 8), (1, 8))
NEAR_DATA = ("gpu-cxl-ndp", "cxl", (2, 8), (1,))
TIME_LIMIT = "20 s"
HIT_TOKENS = 20_000
SHARES = (0.25, 0.5, 0.75)
SCORES = ("lru", "lfu", "weight_ema", "belady")
Row = list[str]
Setting = tuple[str, str, tuple[int, ...], tuple[int, ...]]


def plans(
    model: ModelSpec, trace: RoutingTrace, setting: Setting
) -> Iterator[tuple[int, OffloadPlan]]:
    """Plan every size and batch on both splits; with the batch."""
    cluster, home, sizes, batches = setting
    for batch in batches:
        for size in sizes:
            for split in SPLITS:
                facts = OffloadFacts(
                    model=model,
                    cluster=load_cluster(cluster),
                    workload=Workload(decode_batch=batch),
                    options=OffloadOptions.model_validate(
                        {"fast_memory": f"{size} GB", "home": home, "time_limit": TIME_LIMIT}
                    ),
                )
                yield batch, make_offload_plan(facts, trace, split)


def plan_rows(found: list[tuple[int, OffloadPlan]]) -> Iterator[Row]:
    """One line per plan: its time, each baseline's, and the gain over the best of them."""
    for batch, plan in found:
        base = {name: ms(score) for name, score in plan.baselines.items()}
        best = min(base, key=lambda name: base[name])
        gain, noise = plan.gain_over(best)
        verdict = "tie" if best in plan.ties else f"{gain:+.1%} ± {noise:.1%}"
        yield [
            f"{batch}",
            f"{plan.fast_bytes / 1e9:g} GB ({plan.slots})",
            plan.split,
            plan.name,
            f"{ms(plan.predicted):.2f}",
            *(f"{value:.2f}" for value in base.values()),
            f"{best}: {verdict}",
        ]


def proof_rows(found: list[tuple[int, OffloadPlan]]) -> Iterator[Row]:
    """One line per plan and integer programme."""
    for batch, plan in found:
        for rule, c in plan.certificates.items():
            yield [
                f"{batch}",
                f"{plan.fast_bytes / 1e9:g} GB",
                plan.split,
                rule,
                f"{c.objective * 1e3:.3f}",
                f"{c.bound * 1e3:.3f}",
                f"{c.gap:.2%}",
                c.status,
                f"{c.seconds:.0f}",
            ]


def engine_rows(found: list[tuple[int, OffloadPlan]]) -> Iterator[Row]:
    """One line per plan: what engines can run of it, and what the coarser grain costs."""
    for batch, plan in found:
        times = {name: ms(score) for name, score in plan.engine_predicted.items()}
        if times:
            yield [
                f"{batch}",
                f"{plan.fast_bytes / 1e9:g} GB",
                plan.split,
                f"{ms(plan.predicted):.2f}",
                *(f"{value:.2f}" for value in times.values()),
                f"{times['layers'] / times['experts'] - 1:+.0%}",
            ]


def hit_rows(trace: RoutingTrace, scores: tuple[str, ...]) -> Iterator[Row]:
    """Hit rate of each eviction score at each share of a layer's experts."""
    rows = token_steps(trace)[:HIT_TOKENS]
    active = active_experts(trace, rows)
    for score in scores:
        extra = expert_scores(trace, rows, score)
        cells = [
            replay(
                active, slots=round(share * trace.meta.num_experts), score=score, scores=extra
            ).hit_rate
            for share in SHARES
        ]
        yield [score, *(f"{cell:.1%}" for cell in cells)]


def mrs_refused(trace: RoutingTrace) -> str:
    """Return the message with which MRS is refused on a trace without candidates."""
    try:
        expert_scores(trace, token_steps(trace)[:1], "mrs")
    except InputError as error:
        return str(error)
    raise AssertionError("mrs was not refused on a trace without candidates")


def synthetic() -> RoutingTrace:
    """Return a synthetic trace of the same shape with 2k candidates and some reuse."""
    shares = zipf_shares(32, 0.5, 4, 0)
    return synthetic_trace(
        shares, tokens=4000, requests=16, top_k=4, seed=0, candidates=8, reuse=0.7
    )


def ms(score: Score) -> float:
    """Mean step time, milliseconds."""
    return float(score.step_times.mean()) * 1e3


def table(header: str, rows: Iterator[Row]) -> list[str]:
    """Format rows as Markdown."""
    names = header.split("|")
    return ["", line(names), line(["---"] * len(names)), *(line(row) for row in rows)]


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def device(model: ModelSpec, trace: RoutingTrace, setting: Setting) -> Iterator[str]:
    """Yield the tables of one machine."""
    cluster, home, _, _ = setting
    found = []
    for batch, plan in plans(model, trace, setting):
        found.append((batch, plan))
        print(line([cluster, *next(plan_rows([(batch, plan)]))]), flush=True)
    yield from ["", f"## {cluster}, the other experts in {home}: plan against baselines"]
    names = "|".join(found[0][1].baselines)
    header = f"batch|kept|split|plan|plan ms|{names}|against the best baseline"
    yield from table(header, plan_rows(found))
    yield from ["", f"### {cluster}: the proofs, ms per step on the sampled steps"]
    header = "batch|kept|split|programme|objective|bound|gap|status|s"
    yield from table(header, proof_rows(found))
    yield from ["", f"### {cluster}: what engines can load, ms"]
    header = "batch|kept|split|plan|experts (sglang-kt)|best layers (-ot)|--n-cpu-moe|layer grain"
    yield from table(header, engine_rows(found))


def main() -> None:
    """Compute the tables, print them, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, required=True, help="gpt-oss-20b-mmlu.parquet")
    parser.add_argument("--model", type=Path, required=True, help="config.json of gpt-oss-20b")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    arguments = parser.parse_args()
    start = time.monotonic()
    trace, model = read_trace(arguments.trace), load_model(arguments.model)
    check_against_model(trace, model)
    total = model.num_moe_layers * model.num_experts
    lines = [
        "# Offload plans for gpt-oss-20b, planned on one half of the requests, scored on the other",
        "",
        "`python benchmarks/offload_gptoss.py --trace gpt-oss-20b-mmlu.parquet --model "
        "gpt-oss-20b/config.json --out benchmarks/results/offload_gptoss.md`",
        "",
        f"{trace.num_requests} requests, {trace.num_tokens} decode tokens "
        f"({trace.meta.source.split(';')[0]}, {trace.meta.licence}). "
        f"{total} experts of {model.bytes_per_expert / 1e6:.1f} MB "
        f"({total * model.bytes_per_expert / 1e9:.1f} GB). Predicted times: the CPU's and the "
        "links' efficiencies are assumed or transferred (docs/reference/hardware-catalog.md). "
        "A plan is the fastest candidate on the requests planned on; baselines keep the same "
        "number of experts; within 0.5 % of a baseline is a tie. Noise: two standard errors of "
        "the mean over paired compositions.",
    ]
    for setting in (WORKSTATION, NEAR_DATA):
        lines += device(model, trace, setting)
    _, unseen = split_requests(trace, "early_late")
    header = "score|" + "|".join(f"{share:.0%}" for share in SHARES)
    lines += ["", "## Hit rates of caches", ""]
    lines += [
        f"First {HIT_TOKENS} decode tokens of the late requests, one token per step, slots per "
        "layer as a share of its experts."
    ]
    lines += table(header, hit_rows(unseen, SCORES))
    lines += ["", f"MRS on this trace: {mrs_refused(unseen)}", ""]
    made = synthetic()
    lines += [
        f"On a synthetic trace with candidates ({made.num_tokens} tokens, reuse 0.7 along a "
        "request; no model's routing):"
    ]
    lines += table(header, hit_rows(made, (*SCORES, "mrs")))
    text = "\n".join(lines) + "\n"
    print(text)
    print(f"{time.monotonic() - start:.0f} s in all")
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
