"""How close traces from a fitted generator come to the recorded ones, on requests not fitted to.

    python benchmarks/synth_fidelity.py --trace DATA/traces/gpt-oss-20b-mmlu.parquet \
        --out benchmarks/results/synth_fidelity.md

Fitted to the even requests, scored on the odd ones; `--develop` does the same within the even
requests only, which is where the structure of the generator was chosen.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from traces.batches import decode_batches
from traces.caches import hit_rate_curve
from traces.caches_inputs import active_experts, token_steps
from traces.counts import expert_counts, step_counts
from traces.routing_trace import RoutingTrace, read_trace, request_order
from traces.splits import split_requests
from traces.stats import trace_statistics
from traces.synth_draw import draw_trace
from traces.synth_fit import fit_trace
from traces.synth_model import SynthFit

Floats = NDArray[np.float64]
SEEDS = range(8)
STEPS, COMPOSED = 200, 8
"""Decode steps, from so many compositions of the batch: the figure of one alone depends on it."""
FITTED, IMPLIED, FREE = "fitted", "follows from fitted ones", "not fitted"
LIMIT = 0.03


class Sample:
    """A trace with what several statistics need of it; rows request after request."""

    def __init__(self, trace: RoutingTrace) -> None:
        order = np.lexsort((trace.position, request_order(trace)))
        self.trace = trace.select(order)
        self.request = request_order(self.trace)
        self.top_k, self.experts = trace.meta.top_k, trace.meta.num_experts
        self.active = active_experts(self.trace, token_steps(self.trace, "any"))
        self.main = trace_statistics(self.trace)
        self.starts = np.flatnonzero(np.diff(self.request, prepend=-1))
        self.lengths = np.diff([*self.starts, len(self.request)])

    def reused(self, lag: int) -> float:
        """Share of a token's experts that the token `lag` earlier used."""
        same = self.request[lag:] == self.request[:-lag]
        both = self.active[lag:] & self.active[:-lag]
        return float(both[same].sum() / (same.sum() * both.shape[1] * self.top_k))

    def segments(self, tokens: int) -> NDArray[np.int32]:
        """Return uses ``[S, L, E]`` in whole segments of requests."""
        rows = [
            np.arange(at, at + tokens)
            for start, length in zip(self.starts.tolist(), self.lengths.tolist(), strict=True)
            for at in range(start, start + length - tokens + 1, tokens)
        ]
        return step_counts(self.trace, rows)

    def by_request(self) -> NDArray[np.int32]:
        """Return uses ``[R, L, E]`` of the requests of at least 64 tokens."""
        long = np.flatnonzero(self.lengths >= 64)
        rows = [np.arange(self.starts[r], self.starts[r] + self.lengths[r]) for r in long]
        return step_counts(self.trace, rows)

    def imbalance(self, batch: int) -> float:
        """Load max/mean of a decode step, mean over steps, layers and compositions of the batch."""
        found = [
            decode_batches(self.trace, batch=batch, steps=STEPS, seed=seed, phase="any").rows
            for seed in range(COMPOSED)
        ]
        return float(np.mean([load_skew(step_counts(self.trace, rows)).mean() for rows in found]))

    def drift(self) -> float:
        """Total variation distance of the loads of early and late requests, mean over layers."""
        early, late = split_requests(self.trace, "early_late")
        shares = [
            expert_counts(part.experts, self.experts) / part.experts.size * self.trace.num_layers
            for part in (early, late)
        ]
        return float(np.abs(shares[0] - shares[1]).sum(axis=1).mean() / 2)

    def pair_shares(self) -> Floats:
        """Return ``[L, E, E]`` the share of tokens that use two experts of a layer."""
        pairs = np.zeros((self.active.shape[1], self.experts, self.experts))
        for start in range(0, len(self.active), 8192):
            part = self.active[start : start + 8192].transpose(1, 0, 2).astype(np.float32)
            pairs += part.transpose(0, 2, 1) @ part
        return pairs / len(self.active)


def load_skew(uses: NDArray[np.int32]) -> Floats:
    """Return the load max/mean ``[...]`` of uses ``[..., E]``."""
    return uses.max(axis=-1) / uses.mean(axis=-1)


def repeated_sets(sample: Sample) -> float:
    """Share of consecutive (token, layer) pairs with exactly the same experts."""
    same = sample.request[1:] == sample.request[:-1]
    equal = (sample.active[1:] == sample.active[:-1]).all(axis=-1)
    return float(equal[same].mean())


def best_of_segment(sample: Sample) -> float:
    """Share of the uses in 16 tokens that the 2k experts used most there serve (SCH-like)."""
    uses = np.sort(sample.segments(16), axis=-1)
    return float(uses[..., -2 * sample.top_k :].sum() / uses.sum())


def chunk_sparsity(sample: Sample) -> float:
    """CLS(8): share of the experts that 8 consecutive tokens leave out (BlockFFN)."""
    return float((sample.segments(8) == 0).mean())


def request_reuse_spread(sample: Sample) -> float:
    """Return the standard deviation over requests of the share reused from the previous token."""
    both = (sample.active[1:] & sample.active[:-1]).sum(axis=(1, 2))
    same = sample.request[1:] == sample.request[:-1]
    owner = sample.request[1:][same]
    count = np.bincount(owner)
    mean = np.bincount(owner, weights=both[same]) / np.maximum(count, 1)
    return float(np.std(mean[count >= 64]) / (sample.active.shape[1] * sample.top_k))


def cache(policy: str, slots: Callable[[Sample], int]) -> Callable[[Sample], float]:
    """Return the hit rate of a cache with as many slots per layer, one token per step."""
    return lambda s: float(hit_rate_curve(s.active, policy, [slots(s)])[0])


def batch_imbalance(batch: int) -> Callable[[Sample], float]:
    return lambda s: s.imbalance(batch)


def reused_at(lag: int) -> Callable[[Sample], float]:
    return lambda s: s.reused(lag)


STATISTICS: tuple[tuple[str, str, Callable[[Sample], float]], ...] = (
    ("load max/mean, mean over layers", FITTED, lambda s: float(s.main.load_max_over_mean.mean())),
    ("load max/mean, worst layer", FITTED, lambda s: float(s.main.load_max_over_mean.max())),
    ("reuse of the previous token's experts", FITTED, lambda s: float(s.main.reuse.mean())),
    ("reuse at lag 4", FREE, reused_at(4)),
    ("reuse at lag 16", FITTED, reused_at(16)),
    ("next layer predicted", IMPLIED, lambda s: float(s.main.predictability.mean())),
    ("reuse at lag 128", FREE, reused_at(128)),
    ("LRU hit rate, k slots", IMPLIED, cache("lru", lambda s: s.top_k)),
    ("LRU hit rate, 2k slots", FREE, cache("lru", lambda s: 2 * s.top_k)),
    ("LRU hit rate, E/2 slots", FREE, cache("lru", lambda s: s.experts // 2)),
    ("Belady hit rate, 2k slots", FREE, cache("belady", lambda s: 2 * s.top_k)),
    ("step imbalance, batch 16", IMPLIED, batch_imbalance(16)),
    ("step imbalance, batch 64", IMPLIED, batch_imbalance(64)),
    ("step imbalance, batch 256", IMPLIED, batch_imbalance(256)),
    ("step imbalance, batch 1024", IMPLIED, batch_imbalance(1024)),
    ("CLS(8)", FREE, chunk_sparsity),
    ("2k most used serve, segments of 16", FREE, best_of_segment),
    ("same expert set as the token before", FREE, repeated_sets),
    (
        "load max/mean inside a request",
        FREE,
        lambda s: float(load_skew(s.by_request()).mean()),
    ),
    ("reuse, standard deviation over requests", FREE, request_reuse_spread),
    ("drift of loads, early to late requests", FREE, lambda s: s.drift()),
)


def lift_distance(one: Floats, other: Floats) -> float:
    """Distance of two traces' lifts of expert pairs, over how far the second is from no structure.

    Lift = share of tokens that use both / product of the shares that use each; squares are weighted
    by that product and summed over pairs of different experts and layers.
    """
    weight, lifts = [], []
    for pairs in (one, other):
        used = np.einsum("lee->le", pairs)
        independent = used[:, :, None] * used[:, None, :]
        weight.append(independent * ~np.eye(used.shape[1], dtype=bool))
        lifts.append(pairs / np.maximum(independent, 1e-12))
    apart = (weight[1] * (lifts[0] - lifts[1]) ** 2).sum()
    return float(np.sqrt(apart / (weight[1] * (lifts[1] - 1) ** 2).sum()))


def compare(learn: RoutingTrace, score: RoutingTrace) -> tuple[list[list[str]], list[str]]:
    """Return rows of the table and lines on the fit."""
    start = time.monotonic()
    fit = fit_trace(learn)
    fitted = time.monotonic()
    lengths = np.bincount(request_order(score))
    drawn = [Sample(draw_trace(fit, lengths, seed=seed)) for seed in SEEDS]
    drawing = (time.monotonic() - fitted) / len(SEEDS)
    seen, new = Sample(learn), Sample(score)
    rows = []
    for name, kind, statistic in STATISTICS:
        values = np.array([statistic(sample) for sample in drawn])
        real, other = statistic(new), statistic(seen)
        floor = abs(other / real - 1)
        rows.append(
            [name, kind, f"{real:.4f}", f"{other:.4f}", *_described(values),
             *_verdict(abs(values.mean() / real - 1), np.abs(values / real - 1), floor)]
        )  # fmt: skip
    pairs = new.pair_shares()
    floor = lift_distance(seen.pair_shares(), pairs)
    values = np.array([lift_distance(sample.pair_shares(), pairs) for sample in drawn])
    rows.insert(
        6, ["co-activation: distance of pair lifts to odd", FITTED, "0", f"{floor:.4f}",
            *_described(values), *_verdict(values.mean(), values, floor)],
    )  # fmt: skip
    lines = [
        f"Fitted processes with {len(fit.kinds.share)} kinds of tokens (variances of an average "
        "cell's score, 1 in all):", "", *processes(fit), "",
        "The same with one kind; `traces.synth_loads` assumes these, rounded, where only loads are "
        "known:", "", *processes(fit_trace(learn, kinds=1)),
    ]  # fmt: skip
    print(
        f"fit {fitted - start:.0f} s, draw {drawing:.1f} s for {score.num_tokens} tokens "
        f"({score.num_tokens / drawing:.0f} tokens/s)"
    )
    return rows, lines


def processes(fit: SynthFit) -> list[str]:
    """Return the table of a generator's processes."""
    return [
        "| process | correlation with the next token | variance, common factors | variance, own |",
        "|---|---|---|---|",
        *(
            f"| {p.name} | {p.decay:g} | {p.common.mean():.3f} | {p.own.mean():.3f} |"
            for p in fit.processes
        ),
    ]


def _described(values: Floats) -> list[str]:
    return [f"{values.mean():.4f}", f"{values.min():.4f} to {values.max():.4f}"]


def _verdict(error: float, single: Floats, floor: float) -> list[str]:
    """Return error, difference of the halves, what is allowed, and what holds: mean and single."""
    allowed = max(2 * floor, LIMIT)
    percent = [f"{100 * value:.1f} %" for value in (error, floor, allowed)]
    held = "yes" if error <= allowed else "**no**"
    return [*percent, held, f"{np.count_nonzero(single <= allowed)} of {len(single)}"]


HEADER = (
    "statistic", "fitted?", "odd (real)", "even (real)", "synthetic, mean", "lowest to highest",
    "error", "even against odd", "allowed", "held", "by single traces",
)  # fmt: skip


def main() -> None:
    """Fit, draw, score; print the tables and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, required=True, help="gpt-oss-20b-mmlu.parquet")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--develop", action="store_true", help="even requests only")
    arguments = parser.parse_args()
    even, odd = split_requests(read_trace(arguments.trace, weights=False), "interleaved")
    if arguments.develop:
        even, odd = split_requests(even, "interleaved")
    rows, lines = compare(even, odd)
    held = sum(row[-2] == "yes" for row in rows)
    text = [
        "# Synthetic against recorded routing",
        "",
        "`python benchmarks/synth_fidelity.py --trace gpt-oss-20b-mmlu.parquet --out "
        "benchmarks/results/synth_fidelity.md`",
        "",
        f"{even.meta.model}, {even.num_layers} layers x {even.meta.num_experts} experts, top-"
        f"{even.meta.top_k}. Fitted to the even requests ({even.num_tokens} tokens, "
        f"{even.num_requests} requests), scored on the odd ones ({odd.num_tokens} tokens, "
        f"{odd.num_requests} requests); structure and settings were chosen on even ones, with "
        "reservations (docs/background/synthetic-traces.md). Synthetic traces, one for each of "
        f"{len(SEEDS)} seeds, have the odd requests' lengths. Error: their mean against odd, "
        "relative (of co-activation the mean distance, where 100 % is no structure at all). "
        "Single traces scatter as real ones do; the last column says how many of them hold by "
        "themselves. Allowed: twice the difference of "
        f"even and odd, or {100 * LIMIT:.0f} %, whichever is larger. Hit rates: one token per "
        f"step, slots per layer. Step imbalance: max/mean load over {STEPS} decode steps of each "
        f"of {COMPOSED} compositions of the batch.",
        "",
        f"{held} of {len(rows)} hold.",
        "",
        _row(HEADER),
        _row(["---"] * len(HEADER)),
        *(_row(row) for row in rows),
        "",
        *lines,
    ]
    print("\n".join(text))
    if arguments.out:
        arguments.out.write_text("\n".join(text) + "\n", encoding="utf-8")


def _row(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
