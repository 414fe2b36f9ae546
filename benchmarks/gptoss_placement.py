"""Placement of gpt-oss-20b on its recorded trace: stragglers on one node, sends on two and four.

Planned on one part of the requests, scored on the other with the realised (integer) dispatch.

    python benchmarks/gptoss_placement.py --trace DATA/traces/gpt-oss-20b-mmlu.parquet \
        --model gpt-oss-20b/config.json --out benchmarks/results/gptoss_placement.md

A straggler is busiest over mean rank load of a step and layer; sends are copies per token and
layer.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hwmodels import load_cluster
from planner.baselines import contiguous, eplb_placement
from planner.certificate import certify
from planner.options import PlanOptions
from planner.plan import Placed, baseline_deployments, place
from planner.scoring import Facts, score
from simulator.deployment import Workload
from simulator.dispatch import (
    Dispatch,
    Dispatcher,
    homes,
    remote_sends,
    tokens_per_slot,
    touched_ranks,
)
from simulator.metrics import distinct_nodes, sampling_floor, straggler
from simulator.placement import Placement
from traces.batches import decode_batches
from traces.counts import expert_counts
from traces.model_spec import ModelSpec, load_model
from traces.routing_trace import RoutingTrace, check_against_model, read_trace
from traces.splits import Split, split_requests

SPLITS: tuple[Split, ...] = ("early_late", "interleaved")
SEEDS = range(5)
STEPS = 64
PER_NODE = 8
Row = list[str]


class Part:
    """A part of the requests, and what is planned on it."""

    def __init__(self, trace: RoutingTrace, model: ModelSpec) -> None:
        self.trace = trace
        self.model = model
        self.experts = trace.meta.num_experts
        self.loads = expert_counts(trace.experts, self.experts).astype(np.float64)

    def eplb(self, slots: int, ranks: int) -> Placement:
        """Place as EPLB would with the loads of this part."""
        return eplb_placement(self.loads, slots, ranks)

    def facts(self, slots: int, ranks: int, batch: int, dispatch: Dispatch, seed: int) -> Facts:
        """Ask the question of a scenario file, with its default options."""
        nodes = ranks // PER_NODE
        asked = {"redundant_experts": slots - self.experts, "dispatch": dispatch, "seed": seed}
        return Facts(
            model=self.model,
            cluster=load_cluster("hgx-h100-8" + (f"x{nodes}" if nodes > 1 else "")),
            workload=Workload(decode_batch=batch),
            options=PlanOptions.model_validate(asked),
        )

    def plan(self, slots: int, ranks: int, batch: int, dispatch: Dispatch, seed: int) -> Placed:
        """Plan on this part as `moeplan plan` does."""
        return place(self.facts(slots, ranks, batch, dispatch, seed), self.trace)

    def placed(self, slots: NDArray[np.int32], ranks: int) -> Placement:
        """Make slots a placement."""
        return Placement(slots=slots, num_experts=self.experts, num_ranks=ranks)


def placement(plan: Placed, part: Part) -> Placement:
    """Return the placement that a plan chose."""
    slots = np.array(plan.deployment.physical_to_logical_map, dtype=np.int32)
    return part.placed(slots, plan.deployment.parallelism.experts.ep)


def played(
    part: Part, place: Placement, dispatch: Dispatch, batch: int, seed: int
) -> tuple[float, float, float]:
    """Mean straggler, cross-node and cross-rank sends over decode steps of a part."""
    node_of = np.arange(place.num_ranks) // PER_NODE
    chooser = Dispatcher(placement=place, dispatch=dispatch, node_of=node_of)
    home = homes(batch, place.num_ranks)
    rows = decode_batches(part.trace, batch=batch, steps=STEPS, seed=seed).rows
    found = []
    for number, step in enumerate(rows):
        slot = chooser.assign(part.trace.experts[step], home, seed + number)
        load = tokens_per_slot(slot, place.num_slots).reshape(len(place.slots), place.num_ranks, -1)
        sends = [0.0, 0.0]
        if dispatch == "nearest":
            away = remote_sends(touched_ranks(slot, place), home, node_of)
            sends = [float(a.mean()) / batch for a in away]
        found.append([float(straggler(load.sum(-1)).mean()), *sends])
    mean = np.mean(found, axis=0)
    return float(mean[0]), float(mean[1]), float(mean[2])


def one_node(parts: dict[Split, tuple[Part, Part]]) -> Iterator[Row]:
    """8 ranks, 40 slots, even dispatch: stragglers against EPLB's, by split and batch."""
    slots, ranks = 40, 8
    for split, (seen, unseen) in parts.items():
        rivals = {
            "contiguous": contiguous(len(seen.loads), seen.experts, seen.experts, ranks),
            "eplb": seen.eplb(slots, ranks),
        }
        for batch in (64, 256, 1024):
            scores = {
                name: np.array([played(unseen, place, "even", batch, s)[0] for s in SEEDS])
                for name, place in rivals.items()
            }
            plans = [seen.plan(slots, ranks, batch, "even", seed) for seed in SEEDS]
            mine = np.array(
                [
                    played(unseen, placement(plan, seen), "even", batch, seed)[0]
                    for seed, plan in zip(SEEDS, plans, strict=True)
                ]
            )
            change = 100 * (mine / scores["eplb"] - 1)
            yield [
                split,
                str(batch),
                f"{sampling_floor(batch, seen.trace.meta.top_k, ranks):.4f}",
                *(f"{value.mean():.4f} ± {value.std(ddof=1):.4f}" for value in scores.values()),
                f"{mine.mean():.4f} ± {mine.std(ddof=1):.4f}",
                f"{change.mean():+.2f} %",
                f"{change.min():+.2f} to {change.max():+.2f} %",
                *speeds(seen, unseen, plans[0], batch),
            ]


def speeds(seen: Part, unseen: Part, plan: Placed, batch: int) -> list[str]:
    """Predicted tokens/s of contiguous, EPLB and plan, and the certificate of the plan."""
    facts = seen.facts(40, 8, batch, "even", 0)
    baselines = baseline_deployments(facts, seen.trace)
    scores = {n: score(facts, unseen.trace, baselines[n]) for n in ("contiguous", "eplb")}
    scores["plan"] = score(facts, unseen.trace, plan.deployment)
    gain, noise = scores["plan"].gain_over(scores["eplb"])
    proof = certify(facts, plan.deployment, plan.stage_one, seen.loads)
    return [
        *(f"{s.summary()['tokens_per_second']:,.0f}" for s in scores.values()),
        f"{gain:+.2%} ± {noise:.2%}",
        f"{proof.bound:,.0f} / {proof.objective:,.0f} ({proof.gap:.2%})",
    ]


def spread_of(part: Part, place: Placement) -> tuple[float, NDArray[np.float64]]:
    """Score a whole part: expected cross-node sends, max/mean load of nodes and ranks [2, L]."""
    rank = place.rank_of_slot[place.replica_slots[:, :, 0]]
    nodes = place.num_ranks // PER_NODE
    sends = distinct_nodes(part.trace.experts, rank // PER_NODE).mean() * (nodes - 1) / nodes
    load = part.loads[:, None, :] @ place.hosts
    by_node = load.reshape(len(part.loads), nodes, PER_NODE).sum(-1)
    return float(sends), np.stack([straggler(by_node), straggler(load[:, 0])])


def several_nodes(parts: dict[Split, tuple[Part, Part]]) -> Iterator[Row]:
    """Two and four nodes of 8, no redundant experts: cross-node sends against EPLB's."""
    for split, (seen, unseen) in parts.items():
        for ranks in (16, 32):
            slots = seen.experts
            theirs, their_load = spread_of(unseen, seen.eplb(slots, ranks))
            for name, planned_on in (("plan", seen), ("on the scored part itself", unseen)):
                plan = planned_on.plan(slots, ranks, 256, "even", 0)
                mine, load = spread_of(unseen, seen.placed(plan.refined.slots, ranks))
                mean, worst = load.mean(axis=1), load.max(axis=1)
                their_mean, their_worst = their_load.mean(axis=1), their_load.max(axis=1)
                yield [
                    split,
                    str(ranks // PER_NODE),
                    name,
                    f"{theirs:.4f}",
                    f"{mine:.4f}",
                    f"{100 * (mine / theirs - 1):+.2f} %",
                    *(
                        f"{mean[i]:.3f} / {their_mean[i]:.3f} = {mean[i] / their_mean[i]:.4f}"
                        for i in (0, 1)
                    ),
                    *(f"{worst[i]:.3f} / {their_worst[i]:.3f}" for i in (0, 1)),
                    plan.name,
                    f"{plan.stage_one.seconds + plan.refined.seconds:.1f}",
                ]


def with_replicas(parts: dict[Split, tuple[Part, Part]]) -> Iterator[Row]:
    """Redundant experts on two and four nodes, nearest dispatch: sends and stragglers."""
    batch = 256
    for split, (seen, unseen) in parts.items():
        for ranks, redundant in ((16, 16), (16, 32), (32, 32)):
            slots = seen.experts + redundant
            plan = seen.plan(slots, ranks, batch, "nearest", 0)
            places = (
                seen.eplb(slots, ranks),
                seen.placed(plan.stage_one.slots, ranks),
                seen.placed(plan.refined.slots, ranks),
            )
            scores = np.array(
                [
                    [played(unseen, place, "nearest", batch, seed) for seed in SEEDS]
                    for place in places
                ]
            ).mean(axis=1)
            eplb, first, mine = scores
            yield [
                split,
                str(ranks // PER_NODE),
                str(redundant),
                f"{eplb[1]:.4f}",
                f"{first[1]:.4f}",
                f"{mine[1]:.4f}",
                f"{100 * (mine[1] / eplb[1] - 1):+.1f} %",
                f"{100 * (mine[2] / eplb[2] - 1):+.1f} %",
                f"{eplb[0]:.4f} / {first[0]:.4f} / {mine[0]:.4f}",
                plan.name,
                f"{plan.stage_one.seconds + plan.refined.seconds:.1f}",
            ]


TABLES = (
    (
        "One node of 8 ranks, 8 redundant experts, even dispatch",
        f"Straggler on the scored part: mean over {STEPS} steps and all layers, then mean ± "
        f"standard deviation over {len(SEEDS)} seeds of batches and of the planner. Contiguous has "
        "no redundant experts. A plan may be below the floor: the experts of a token are distinct. "
        "Tokens/s are predicted for hgx-h100-8 on the scored part (seed 0's plan); the certificate "
        "is the busiest rank's expected load on the part planned on.",
        one_node,
        "split|batch|sampling floor|contiguous|EPLB|plan|plan against EPLB|over seeds"
        "|tokens/s contiguous|tokens/s EPLB|tokens/s plan|plan against EPLB"
        "|bound / objective (gap)",
    ),
    (
        "Two and four nodes of 8 ranks, no redundant experts",
        "Expected copies of a token to other nodes per layer, homes uniform, over the whole scored "
        "part; max/mean loads are plan / EPLB, mean over layers and in the worst layer. Planned on "
        "the scored part itself, the same limits on nodes and ranks hold there exactly: that plan "
        "is better balanced, and shows how little is lost by not knowing the future. The figures "
        "are the second stage's; `deployed` is the candidate predicted to be fastest on the "
        "part planned on (hgx-h100-8x2 or x4, 256 tokens per step: 8 to 16 tokens per rank, where "
        "bytes hardly matter).",
        several_nodes,
        "split|nodes|planned on|EPLB sends|sends|against EPLB|node max/mean|rank max/mean"
        "|worst layer, node|worst layer, rank|deployed|planning s",
    ),
    (
        "Redundant experts on several nodes, nearest dispatch",
        f"Realised on the scored part, batch 256, {len(SEEDS)} seeds of {STEPS} steps.",
        with_replicas,
        "split|nodes|redundant|EPLB cross-node sends|first stage|plan|cross-node against EPLB"
        "|cross-rank against EPLB|straggler EPLB / first stage / plan|deployed|planning s",
    ),
)


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
    parts = {}
    for split in SPLITS:
        seen, unseen = split_requests(trace, split)
        parts[split] = (Part(seen, model), Part(unseen, model))
    lines = [
        "# Placement of gpt-oss-20b, planned on one half of the requests, scored on the other",
        "",
        "`python benchmarks/gptoss_placement.py --trace gpt-oss-20b-mmlu.parquet --model "
        "gpt-oss-20b/config.json --out benchmarks/results/gptoss_placement.md`",
        "",
        f"Trace: {trace.num_tokens} decode tokens of {trace.num_requests} requests, "
        f"{trace.num_layers} layers x {trace.meta.num_experts} experts, top-{trace.meta.top_k} "
        f"({trace.meta.source.split(';')[0]}, {trace.meta.licence}).",
    ]
    print("\n".join(lines), flush=True)
    for title, note, rows, header in TABLES:
        names = header.split("|")
        text = ["", f"## {title}", "", note, "", _row(names), _row(["---"] * len(names))]
        print("\n".join(text), flush=True)
        lines += text
        for row in rows(parts):
            print(_row(row), flush=True)
            lines.append(_row(row))
    print(f"\n{time.monotonic() - start:.0f} s in all")
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
