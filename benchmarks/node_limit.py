"""How unequal may nodes become for fewer sends: the trade-off, on a part that scores nothing else.

Only the early half of the requests is used: its own early part is planned on, its own late part
scored. The limit that `planner.affinity` takes by default follows from the table by a rule.

    python benchmarks/node_limit.py --trace DATA/traces/gpt-oss-20b-mmlu.parquet \
        --out benchmarks/results/node_limit.md
"""

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from planner.affinity import refine
from planner.balance import balance
from planner.baselines import eplb_placement
from simulator.metrics import distinct_nodes, straggler
from traces.counts import expert_counts
from traces.routing_trace import RoutingTrace, read_trace
from traces.splits import split_requests

PER_NODE = 8
LIMITS = (1.02, 1.05, 1.08, 1.10, 1.12, 1.15, 1.20)


def loads_of(part: RoutingTrace) -> NDArray[np.float64]:
    """Count the tokens of each expert."""
    return expert_counts(part.experts, part.meta.num_experts).astype(np.float64)


def scored(part: RoutingTrace, slots: NDArray[np.int32], nodes: int) -> tuple[float, float]:
    """Return expected cross-node sends per token and layer, and the straggler node's load."""
    layers, count = slots.shape
    node = np.empty((layers, count), dtype=np.int64)
    of_slot = np.broadcast_to(np.arange(count) * nodes // count, slots.shape)
    np.put_along_axis(node, slots.astype(np.int64), of_slot, axis=1)
    sends = distinct_nodes(part.experts, node).mean() * (nodes - 1) / nodes
    loads = loads_of(part)
    by_node = np.stack([(loads * (node == n)).sum(axis=1) for n in range(nodes)], axis=1)
    return float(sends), float(straggler(by_node).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, required=True, help="gpt-oss-20b-mmlu.parquet")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    arguments = parser.parse_args()
    early, _ = split_requests(read_trace(arguments.trace), "early_late")
    seen, unseen = split_requests(early, "early_late")
    experts = early.meta.num_experts
    lines = [
        "# Node limit, chosen on the early half of the requests only",
        "",
        "`python benchmarks/node_limit.py --trace gpt-oss-20b-mmlu.parquet --out "
        "benchmarks/results/node_limit.md`",
        "",
        "Planned on the first quarter of the requests, scored on the second. Rule: the largest "
        "limit that keeps the held-out node loads 3 % below EPLB's on two and on four nodes.",
        "",
        "| nodes | limit | sends against EPLB | node max/mean over EPLB's |",
        "|---|---|---|---|",
    ]
    for nodes in (2, 4):
        ranks = nodes * PER_NODE
        theirs = scored(unseen, eplb_placement(loads_of(seen), experts, ranks).slots, nodes)
        first = balance(loads_of(seen), experts, ranks, gap=0.002, time_limit=10)
        for limit in LIMITS:
            node_of = np.arange(ranks) // PER_NODE
            plan = refine(first, seen, node_of, batch=256, node_limit=limit, time_limit=30)
            sends, load = scored(unseen, plan.slots, nodes)
            change, ratio = sends / theirs[0] - 1, load / theirs[1]
            lines.append(f"| {nodes} | {limit:.2f} | {change:+.2%} | {ratio:.4f} |")
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
