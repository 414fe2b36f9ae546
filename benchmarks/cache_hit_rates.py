"""Hit rates of expert caches on gpt-oss-20b's recorded trace, and of MRS on synthetic ones.

    python benchmarks/cache_hit_rates.py --trace DATA/traces/gpt-oss-20b-mmlu.parquet \
        --out benchmarks/results/cache_hit_rates.md

A hit rate is the share of (step, layer, distinct expert) accesses that find their expert in the
cache; docs/background/expert-caches.md defines scores and scopes. Caches start empty.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from traces.batches import decode_batches
from traces.caches import Admission, Scope, replay
from traces.caches_inputs import active_experts, expert_scores, token_steps
from traces.counts import expert_counts
from traces.routing_trace import RoutingTrace, read_trace
from traces.splits import split_requests
from traces.synth import synthetic_trace, zipf_shares

Row = list[str]
SHARES = (0.25, 0.5, 0.75)
ALWAYS: Admission = "always"
BY_SCORE: Admission = "score"
POLICIES = (("lru", ALWAYS), ("lfu", ALWAYS), ("weight_ema", ALWAYS), ("belady", ALWAYS))
SELECTIVE = (("lfu", BY_SCORE), ("weight_ema", BY_SCORE), ("belady", BY_SCORE))
BATCHES = (1, 8)
HEADER = "part|batch|score|25 %|50 %|75 %|seconds per replay"


@dataclass(frozen=True)
class Paper:
    """HybriMoE's cache ablation: hit rates of LRU and MRS (percent) by share of the experts."""

    name: str
    experts: int
    top_k: int
    at: dict[float, tuple[float, float]]


# HybriMoE (arXiv 2504.05897), cache hit rates of LRU and MRS
PAPER = (
    Paper("Mixtral-8x7B", 8, 2, {0.25: (30.2, 36.2), 0.75: (80.6, 83.3)}),
    Paper("DeepSeek-V2-Lite", 64, 6, {0.25: (47.7, 52.7)}),
    Paper("Qwen2-57B-A14B", 64, 8, {0.25: (45.0, 52.8)}),
)
LAYERS, TOKENS, REQUESTS, SKEW = 8, 6000, 12, 0.3


def steps_of(part: RoutingTrace, batch: int) -> NDArray[np.int64]:
    """Rows of each step: request after request, or decode batches over as many tokens."""
    if batch == 1:
        return token_steps(part)
    return decode_batches(part, batch=batch, steps=part.num_tokens // batch, seed=0).rows


def recorded(
    parts: dict[str, RoutingTrace], scope: Scope, policies: tuple[tuple[str, Admission], ...]
) -> Iterator[Row]:
    """Replay every score at every size, and count a static choice made on the other half."""
    for name, part in parts.items():
        other = parts[{"early": "late", "late": "early", "even": "odd", "odd": "even"}[name]]
        for batch in BATCHES:
            rows = steps_of(part, batch)
            active = active_experts(part, rows)
            weights = expert_scores(part, rows, "weight_ema")
            for score, admission in policies:
                cells, start = [], time.perf_counter()
                for share in SHARES:
                    slots = round(
                        share * (active[0].size if scope == "global" else len(active[0, 0]))
                    )
                    result = replay(
                        active, slots=slots, score=score, scope=scope, scores=weights,
                        admission=admission,
                    )  # fmt: skip
                    cells.append(f"{100 * result.hit_rate:.1f}")
                seconds = (time.perf_counter() - start) / len(SHARES)
                label = score if admission == ALWAYS else f"{score}, admitted by score"
                yield [name, str(batch), label, *cells, f"{seconds:.1f}"]
            static = [f"{100 * fixed_rate(active, other, share, scope):.1f}" for share in SHARES]
            yield [name, str(batch), "static", *static, ""]


def fixed_rate(
    active: NDArray[np.bool_], planned_on: RoutingTrace, share: float, scope: Scope
) -> float:
    """Share of accesses to the experts used most in another part, which never change."""
    counts = expert_counts(planned_on.experts, active.shape[2])
    groups = counts if scope == "layer" else counts.reshape(1, -1)
    rank = (-groups).argsort(axis=1, kind="stable").argsort(axis=1)
    kept = (rank < round(share * groups.shape[1])).reshape(counts.shape)
    return float((active & kept).sum() / active.sum())


def made_up(paper: Paper, reuse: float) -> RoutingTrace:
    """Draw a trace of the paper's geometry with the 2k candidates of each token."""
    return synthetic_trace(
        zipf_shares(paper.experts, SKEW, layers=LAYERS, seed=0),
        tokens=TOKENS, requests=REQUESTS, top_k=paper.top_k, seed=0,
        candidates=2 * paper.top_k, reuse=reuse,
    )  # fmt: skip


def rate(trace: RoutingTrace, score: str, share: float, admission: Admission = ALWAYS) -> float:
    """Hit rate in percent, one token per step, slots per layer."""
    rows = token_steps(trace)
    result = replay(
        active_experts(trace, rows), slots=round(share * trace.meta.num_experts), score=score,
        scores=expert_scores(trace, rows, score), admission=admission,
    )  # fmt: skip
    return 100 * result.hit_rate


def fitted_reuse(paper: Paper) -> float:
    """Solve for the reuse at which LRU at 25 % hits as often as in the paper."""
    low, high = 0.0, 0.999
    for _ in range(12):
        middle = (low + high) / 2
        reached = rate(made_up(paper, middle), "lru", 0.25) >= paper.at[0.25][0]
        low, high = (low, middle) if reached else (middle, high)
    return high


def synthetic() -> Iterator[Row]:
    """Score MRS where LRU was fitted, and both at the other sizes."""
    for paper in PAPER:
        reuse = fitted_reuse(paper)
        trace = made_up(paper, reuse)
        for share in SHARES:
            ours = {
                policy: rate(trace, policy[0], share, policy[1])
                for policy in (*POLICIES, ("mrs", ALWAYS), ("mrs", BY_SCORE))
            }
            lru = ours["lru", ALWAYS]
            theirs = [f"{value:.1f}" for value in paper.at.get(share, ())] or ["", ""]
            fitted = " (fitted)" if share == 0.25 else ""
            yield [
                f"{paper.name}: {paper.experts} experts, top-{paper.top_k}",
                f"{reuse:.3f}",
                f"{100 * share:.0f} %",
                f"{lru:.1f}{fitted}",
                *(
                    f"{ours['mrs', a]:.1f} ({ours['mrs', a] - lru:+.1f})"
                    for a in (ALWAYS, BY_SCORE)
                ),
                *theirs,
                *(f"{ours[score, ALWAYS]:.1f}" for score in ("weight_ema", "lfu", "belady")),
            ]


def tables(trace: RoutingTrace) -> Iterator[tuple[str, str, str, Iterator[Row]]]:
    """Yield title, note, header and rows of each table."""
    early, late = split_requests(trace, "early_late")
    even, odd = split_requests(trace, "interleaved")
    halves = {"early": early, "late": late}
    yield (
        "gpt-oss-20b, slots per layer (8, 16, 24 of 32)",
        "Hit rates in percent. Batch 1: every token a step, request after request; batch 8: decode "
        "batches over as many tokens, seed 0. Both splits: early and late halves of the requests, "
        "even and odd ones. `static`: the experts used most in the other half of the split, never "
        "changed. weight_ema: decay 0.5 per step. Belady knows the future: a bound. Admitted by "
        "score: a missed expert takes a slot only where its score says so.",
        HEADER,
        recorded(halves | {"even": even, "odd": odd}, "layer", POLICIES + SELECTIVE),
    )
    yield (
        "gpt-oss-20b, one pool for all layers (192, 384, 576 of 768 experts)",
        "As above, with as many slots in all; early and late halves.",
        HEADER,
        recorded(halves, "global", POLICIES),
    )
    yield (
        "MRS against LRU on synthetic traces with 2k candidates",
        f"Synthetic: {LAYERS} layers, {TOKENS} tokens in {REQUESTS} requests, one token per step, "
        f"slots per layer, loads by rank^-{SKEW}. `reuse`, the share of the router scores' "
        "variance that drifts slowly along a request (0.97 per token, assumed), is fitted to one "
        "figure, HybriMoE's LRU hit rate at 25 %; all else follows. Hit rates in percent (against "
        "LRU), decay 0.5. The paper's are of real routing. With as many slots as a token has "
        "experts (Mixtral, 25 %) every cache that admits each miss is LRU; the paper's differ "
        "there, so its cache seems not to.",
        "geometry|reuse|slots|LRU|MRS|MRS, admitted by score|LRU, paper|MRS, paper|weight_ema|LFU"
        "|Belady",
        synthetic(),
    )


def main() -> None:
    """Compute the tables, print them, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, required=True, help="gpt-oss-20b-mmlu.parquet")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    arguments = parser.parse_args()
    start = time.monotonic()
    trace = read_trace(arguments.trace)
    lines = [
        "# Hit rates of expert caches",
        "",
        "`python benchmarks/cache_hit_rates.py --trace gpt-oss-20b-mmlu.parquet --out "
        "benchmarks/results/cache_hit_rates.md`",
        "",
        f"Trace: {trace.num_tokens} decode tokens of {trace.num_requests} requests, "
        f"{trace.num_layers} layers x {trace.meta.num_experts} experts, top-{trace.meta.top_k} "
        f"({trace.meta.source.split(';')[0]}, {trace.meta.licence}).",
    ]
    print("\n".join(lines), flush=True)
    for title, note, header, rows in tables(trace):
        names = header.split("|")
        text = ["", f"## {title}", "", note, "", _row(names), _row(["---"] * len(names))]
        print("\n".join(text), flush=True)
        lines += text
        for row in rows:
            print(_row(row), flush=True)
            lines.append(_row(row))
    print(f"\n{time.monotonic() - start:.0f} s in all")
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
