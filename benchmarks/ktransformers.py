"""Tokens/s of ktransformers by share of experts on the GPU: predicted against its published table.

    python benchmarks/ktransformers.py --out benchmarks/results/ktransformers.md

Qwen3-Next-80B-A3B FP8 on 4 x RTX 4090 and a Xeon Gold 6454S. A layer takes ``base`` seconds, then
the longer of its experts on the GPUs and of its experts on the CPU (a fixed cost where any active
expert is there, and a time per active expert): the recurrence of the simulator's compute site
``home``. Routing is drawn, not recorded. docs/background/ktransformers.md says what rests on what.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator
from scipy.optimize import brentq, minimize_scalar

from hwmodels import Copy, GroupedGemm, load_cluster, price
from traces.synth import synthetic_trace, zipf_shares

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Strategy = Literal["random", "uniform", "front-loading", "frequency"]

LAYERS, EXPERTS, TOP_K, HIDDEN, WIDTH, TP = 48, 512, 10, 2048, 512, 4
EXPERT_BYTES = 3 * HIDDEN * WIDTH * (1 + 4 / 128**2)  # FP8, an fp32 scale per 128 x 128 block
DDR_PEAK = 8 * 38.4e9  # bytes/s: one socket, eight channels of DDR5-4800
SHARES = np.arange(11) / 10
ROWS = range(1, 10)  # between the ends
MEASURED: dict[Strategy, Floats] = {
    "random": np.array(
        [53.01, 56.63, 58.75, 62.86, 66.81, 70.38, 71.33, 74.40, 79.71, 88.82, 112.61]
    ),
    "uniform": np.array(
        [52.96, 56.57, 60.28, 62.08, 66.82, 65.25, 72.80, 76.17, 79.20, 81.06, 112.32]
    ),
    "front-loading": np.array(
        [54.18, 57.18, 58.82, 63.87, 67.45, 73.65, 77.95, 81.59, 89.20, 98.14, 111.82]
    ),
    "frequency": np.array(
        [52.72, 58.60, 61.92, 66.50, 72.78, 76.19, 82.33, 89.37, 100.67, 107.15, 114.26]
    ),
}
"""Tokens/s per tenth of the experts on the GPU, from ktransformers' experts-sched-Tutorial.md."""
DYNAMIC_ENDS = (53.37, 112.99)  # of the column left out; used only where ends are pooled
SCORED: tuple[Strategy, ...] = ("uniform", "front-loading", "frequency")
SKEW_ROW = 5  # frequency at 50 %

FAMILIES: dict[str, tuple[Callable[[float, int], Floats], tuple[float, ...]]] = {
    "log-normal": (lambda sigma, seed: _drawn("lognormal", sigma, seed), (0.1, 0.3, 0.5, 0.7, 0.9)),
    "gamma": (lambda cv, seed: _drawn("gamma", cv, seed), (0.1, 0.3, 0.5, 0.7, 0.9)),
    "Zipf": (lambda s, seed: zipf_shares(EXPERTS, s, LAYERS, seed), (0.2, 0.4, 0.6, 0.8)),
}
"""Shares of the experts [L, E] by one skew parameter, and the grid on which it is looked for."""


@dataclass(frozen=True, kw_only=True)
class Structure:
    """Which costs a layer has, and where its scales come from."""

    fixed_where: Literal["active", "layer", "step"] = "active"
    """The fixed CPU cost is paid where an *active* expert is on the CPU, in each layer that has
    any expert there, or in every layer while any expert of the model is there."""
    fixed: Literal["fitted", "none", "ddr"] = "fitted"
    """Fitted on the random column; none; or what the ends leave when an expert takes its bytes
    over the peak of the DRAM."""
    ends: Literal["own", "pooled"] = "own"
    """Scales from the column's own two end rows, or from the mean time of all five columns'."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is assumed about the run, and the seed of the drawn routing."""

    concurrency: int = 1
    """Requests decoded together, tokens per step."""
    family: str = "log-normal"
    seed: int = 0
    tokens: int = 1024
    """Tokens drawn; steps are tokens / concurrency."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Of one residency: distinct active experts of each step and layer."""

    gpu: NDArray[np.int64]
    """[S, L] on the GPUs."""
    cpu: NDArray[np.int64]
    """[S, L] on the CPU."""
    any_in_layer: Bools
    """[L] whether the layer has any expert on the CPU."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A fitted model and its predictions."""

    skew: float
    met: bool
    """Whether a skew of the grid meets the row; if not, it is the nearest of the grid."""
    fixed: float
    """Fixed CPU cost, s per layer."""
    per_expert: float
    """CPU time of one active expert, s (from the uniform column's ends)."""
    predicted: dict[Strategy, Floats]
    """Tokens/s [11] by strategy."""

    def errors(self, strategy: Strategy) -> Floats:
        """Return predicted / measured - 1 of the nine rows between the ends."""
        return (self.predicted[strategy] / MEASURED[strategy] - 1)[1:-1]


def _drawn(kind: str, spread: float, seed: int) -> Floats:
    """Draw independent weights per layer and expert and normalise each layer."""
    rng = np.random.default_rng(seed)
    size = (LAYERS, EXPERTS)
    if kind == "lognormal":
        weights = np.exp(spread * rng.standard_normal(size))
    else:
        weights = rng.gamma(spread**-2, size=size)
    return weights / weights.sum(axis=1, keepdims=True)


def active_experts(shares: Floats, setting: Setting) -> Bools:
    """Return which experts each step uses in each layer [S, L, E]."""
    trace = synthetic_trace(
        shares, tokens=setting.tokens, requests=1, top_k=TOP_K, seed=setting.seed + 1
    )
    steps = setting.tokens // setting.concurrency
    chosen = trace.experts[: steps * setting.concurrency].astype(np.int64)
    chosen = chosen.reshape(steps, setting.concurrency, LAYERS, TOP_K).swapaxes(1, 2)
    active = np.zeros((steps, LAYERS, EXPERTS), dtype=np.bool_)
    np.put_along_axis(active, chosen.reshape(steps, LAYERS, -1), True, axis=2)
    return active


def resident(strategy: Strategy, share: float, loads: Floats, seed: int = 42) -> Bools:
    """Return the experts on the GPU [L, E], as ktransformers' mask functions choose them.

    uniform: the first ids of each layer, equally many; front-loading: whole layers in order;
    frequency: the most used of all layers together; random: anywhere.
    """
    count = int(LAYERS * EXPERTS * share)
    if strategy == "uniform":
        per_layer = count // LAYERS + (np.arange(LAYERS) < count % LAYERS)
        return np.arange(EXPERTS) < per_layer[:, None]
    mask = np.zeros(LAYERS * EXPERTS, dtype=np.bool_)
    if strategy == "front-loading":
        mask[:count] = True
    elif strategy == "frequency":
        mask[np.argsort(-loads.ravel(), kind="stable")[:count]] = True
    else:
        mask[np.random.default_rng(seed).permutation(mask.size)[:count]] = True
    return mask.reshape(LAYERS, EXPERTS)


def count(active: Bools, on_gpu: Bools) -> Counts:
    """Split the active experts of each step and layer by where they are."""
    gpu = (active & on_gpu).sum(axis=2)
    return Counts(
        gpu=gpu, cpu=active.sum(axis=2) - gpu, any_in_layer=np.asarray((~on_gpu).any(axis=1))
    )


@cache
def gpu_seconds() -> Floats:
    """Price n = 0 ... E experts of one token each on one of the four GPUs, s [E + 1]."""
    tokens = np.tri(EXPERTS + 1, EXPERTS, -1, dtype=np.int64)
    work = GroupedGemm(
        tokens_per_expert=tokens, hidden=HIDDEN, width=WIDTH // TP, gated=True,
        weight_dtype="fp8_block", activation_dtype="bf16",
    )  # fmt: skip
    return price(work, load_cluster("ktransformers-4x4090")).seconds * (tokens.sum(axis=1) > 0)


def catalog_cpu_seconds() -> float:
    """Price a layer's ten experts on the CPU of the catalog, activations' way included, s."""
    cluster = load_cluster("ktransformers-4x4090")
    work = GroupedGemm(
        tokens_per_expert=np.ones((1, TOP_K), dtype=np.int64), hidden=HIDDEN, width=WIDTH // TP,
        gated=True, weight_dtype="fp8_block", activation_dtype="bf16",
    )  # fmt: skip
    way = price(Copy(bytes=np.array([2.0 * HIDDEN]), source="hbm", target="host"), cluster).seconds
    return float(price(work, cluster, on="cpu").seconds[0] + 2 * way[0])


def step_seconds(
    counts: Counts, *, base: float, fixed: float, per_expert: float, where: str = "active"
) -> float:
    """Return the mean time of a step: per layer base + max(GPU experts, CPU experts), s."""
    pays = {
        "active": counts.cpu > 0,
        "layer": np.broadcast_to(counts.any_in_layer, counts.cpu.shape),
        "step": np.full(counts.cpu.shape, counts.any_in_layer.any()),
    }[where]
    side = pays * fixed + counts.cpu * per_expert
    layers = base + np.maximum(gpu_seconds()[counts.gpu], side)
    return float(layers.sum(axis=1).mean())


def end_rows(strategy: Strategy, ends: str) -> tuple[float, float]:
    """Return the time per token at 0 % and at 100 %, s."""
    if ends == "own":
        return 1 / MEASURED[strategy][0], 1 / MEASURED[strategy][-1]
    tokens_per_s = np.array([column[[0, -1]] for column in MEASURED.values()] + [DYNAMIC_ENDS])
    none, every = (1 / tokens_per_s).mean(axis=0)
    return float(none), float(every)


def scales(
    strategy: Strategy, curve: Sequence[Counts], fixed: float, setting: Setting, how: Structure
) -> dict[str, float]:
    """Return base, fixed cost and time per CPU expert of a layer that meet both end rows, s."""
    none, every = (setting.concurrency * time for time in end_rows(strategy, how.ends))
    base = every / LAYERS - float(gpu_seconds()[curve[-1].gpu].mean())
    on_cpu = none / LAYERS - base  # one layer's experts, all on the CPU
    distinct = float(curve[0].cpu.mean())
    if how.fixed == "ddr":
        fixed = on_cpu - distinct * EXPERT_BYTES / DDR_PEAK
    return {"base": base, "fixed": fixed, "per_expert": (on_cpu - fixed) / distinct}


def predict(
    strategy: Strategy, curve: Sequence[Counts], fixed: float, setting: Setting, how: Structure
) -> Floats:
    """Return tokens/s [11]; all but the fixed cost and the routing comes from the two ends."""
    scale = scales(strategy, curve, fixed, setting, how)
    seconds = [step_seconds(c, where=how.fixed_where, **scale) for c in curve]
    return setting.concurrency / np.array(seconds)


class Curves:
    """Drawn routing on a grid of skews; everything is fitted by interpolation between them."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.grid = FAMILIES[setting.family][1]
        self._curves = {skew: self.draw(skew) for skew in self.grid}

    def draw(self, skew: float) -> dict[Strategy, list[Counts]]:
        """Draw the routing of one skew and count every residency."""
        loads = FAMILIES[self.setting.family][0](skew, self.setting.seed)
        active = active_experts(loads, self.setting)
        return {
            strategy: [count(active, resident(strategy, share, loads)) for share in SHARES]
            for strategy in MEASURED
        }

    def fixed_cost(
        self, curves: dict[Strategy, list[Counts]], how: Structure,
        column: Strategy = "random", rows: slice = slice(1, -1),
    ) -> float:  # fmt: skip
        """Fit the fixed cost to rows of a column: least squares of log(predicted / measured)."""
        if how.fixed != "fitted":
            return 0.0

        def loss(fixed: float) -> float:
            tokens_per_s = predict(column, curves[column], fixed, self.setting, how)
            return float((np.log(tokens_per_s / MEASURED[column])[rows] ** 2).sum())

        none, every = end_rows(column, how.ends)
        most = 0.9 * self.setting.concurrency * (none - every) / LAYERS
        return float(minimize_scalar(loss, bounds=(0, most), options={"xatol": 1e-9}).x)

    def fit(
        self, how: Structure, *, skew_row: int = SKEW_ROW,
        column: Strategy = "random", rows: slice = slice(1, -1),
    ) -> Fit:  # fmt: skip
        """Fit the skew so that one row of the frequency column is met."""
        target = MEASURED["frequency"][skew_row]
        misses = []
        for curves in self._curves.values():
            fixed = self.fixed_cost(curves, how, column, rows)
            row = predict("frequency", curves["frequency"], fixed, self.setting, how)[skew_row]
            misses.append(np.log(row / target))
        met = misses[0] < 0 < misses[-1]
        skew = self.grid[int(np.argmin(np.abs(misses)))]
        if met:
            curve = PchipInterpolator(self.grid, misses)
            skew = float(brentq(lambda at: float(curve(at)), self.grid[0], self.grid[-1]))
        curves = self.draw(skew)
        fixed = self.fixed_cost(curves, how, column, rows)
        scale = scales("uniform", curves["uniform"], fixed, self.setting, how)
        return Fit(
            skew=skew, met=met,
            predicted={s: predict(s, curves[s], fixed, self.setting, how) for s in MEASURED},
            fixed=scale["fixed"], per_expert=scale["per_expert"],
        )  # fmt: skip


def straight_line() -> dict[Strategy, Floats]:
    """Return tokens/s [11] of a line in time per token through each column's end rows."""
    line = {}
    for strategy in MEASURED:
        none, every = end_rows(strategy, "own")
        line[strategy] = 1 / (none + (every - none) * SHARES)
    return line


def scores(fit: Fit, unscored: Sequence[tuple[Strategy, int]]) -> dict[str, float]:
    """Return the median |error| of each scored column and the worst of all, percent."""
    kept = {}
    for strategy in SCORED:
        rows = [r for r in range(1, 10) if (strategy, r) not in unscored]
        kept[strategy] = 100 * np.abs(fit.errors(strategy))[np.array(rows) - 1]
    medians = {strategy: float(np.median(errors)) for strategy, errors in kept.items()}
    return medians | {"worst": float(max(errors.max() for errors in kept.values()))}


def with_constant(row: int) -> float:
    """Front-loading as a line plus a constant per token while the CPU has any expert at all.

    The constant is what one row asks for; returns the median |error| of the other eight, percent.
    """
    none, every = end_rows("front-loading", "own")
    measured = 1 / MEASURED["front-loading"]
    left = (measured - every) / (none - every)
    constant = (left[row] - (1 - SHARES[row])) / SHARES[row]
    time = every + (none - every) * (constant + (1 - constant) * (1 - SHARES))
    return float(np.median([100 * abs(measured[r] / time[r] - 1) for r in ROWS if r != row]))


def cells(fit: Fit, *unscored: tuple[Strategy, int]) -> str:
    """Return cells of a table: skew, fixed cost, CPU bandwidth, the three medians, the worst."""
    found = scores(fit, unscored or [("frequency", SKEW_ROW)])
    skew = f"{fit.skew:.2f}" if fit.met else f"none fits, {fit.skew:.2f}"
    first = f"{skew} | {1e6 * fit.fixed:.0f} | {EXPERT_BYTES / fit.per_expert / 1e9:.0f} | "
    return first + " | ".join(f"{value:.2f}" for value in found.values())


HEADER = (
    " | skew | fixed cost, µs a layer | CPU, GB/s | uniform | front-loading | frequency | worst |\n"
    "|---|---|---|---|---|---|---|---|"
)


def comparison(fit: Fit) -> list[str]:
    """Return the table of every row, and the medians beside the straight line's."""
    line = Fit(skew=0, met=True, fixed=0, per_expert=1, predicted=straight_line())
    rows = ["| GPU share | " + " | ".join(f"{s}: measured | predicted | error" for s in SCORED)]
    rows = [rows[0] + " |", "|---" * 10 + "|"]
    for r, share in enumerate(SHARES):
        row = [f"{share:.0%}"]
        for s in SCORED:
            error = f"{100 * (fit.predicted[s][r] / MEASURED[s][r] - 1):+.1f} %"
            note = "end" if r in (0, 10) else error
            note = "skew fitted here" if (s, r) == ("frequency", SKEW_ROW) else note
            row += [f"{MEASURED[s][r]:.2f}", f"{fit.predicted[s][r]:.2f}", note]
        rows.append("| " + " | ".join(row) + " |")
    rows += ["", "| median of \\|error\\|, % | straight line | half of it | model | halved |"]
    rows.append("|---" * 5 + "|")
    ours, theirs = scores(fit, [("frequency", SKEW_ROW)]), scores(line, [])
    for name, value in ours.items():
        half = theirs[name] / 2
        verdict = "yes" if value <= half else "**no**"
        rows.append(f"| {name} | {theirs[name]:.2f} | {half:.2f} | {value:.2f} | {verdict} |")
    return rows


def structures(curves: Curves) -> list[str]:
    """Return one line per structure that was tried, all of them."""
    tried = {
        "chosen": Structure(),
        "fixed cost in each layer with any expert on the CPU, active or not": Structure(
            fixed_where="layer"
        ),
        "fixed cost in all layers while any expert is on the CPU": Structure(fixed_where="step"),
        "no fixed cost": Structure(fixed="none"),
        "an expert at the DDR5 peak, fixed cost from the ends": Structure(fixed="ddr"),
        "chosen, ends pooled over the five columns": Structure(ends="pooled"),
    }
    fits = {name: curves.fit(how) for name, how in tried.items()}
    return ["| structure" + HEADER] + [f"| {name} | {cells(fit)} |" for name, fit in fits.items()]


def sensitivities(curves: Curves) -> list[str]:
    """Return tables over the concurrency, the rows fitted on, the seed and the family of loads."""
    chosen = Structure()
    out = ["", "## Concurrency (assumed: 1)", "", "| requests decoded together" + HEADER]
    for concurrency in (1, 2, 4, 8, 16, 32):
        fit = Curves(Setting(concurrency=concurrency)).fit(chosen)
        out.append(f"| {concurrency} | {cells(fit)} |")
    out += ["", "## Row on which the skew is fitted", "", "| row of frequency, not scored" + HEADER]
    for r in ROWS:
        fit = curves.fit(chosen, skew_row=r)
        out.append(f"| {SHARES[r]:.0%} | {cells(fit, ('frequency', r))} |")
    out += ["", "## Where the fixed cost is fitted", "", "| rows, not scored" + HEADER]
    out.append(f"| random, all nine | {cells(curves.fit(chosen))} |")
    columns: tuple[Strategy, ...] = ("random", "uniform")
    for column in columns:
        for r in ROWS:
            fit = curves.fit(chosen, column=column, rows=slice(r, r + 1))
            unscored = cells(fit, ("frequency", SKEW_ROW), (column, r))
            out.append(f"| {column} {SHARES[r]:.0%} | {unscored} |")
    out += ["", "## Seed of the routing", "", "| seed" + HEADER]
    out += [f"| {seed} | {cells(Curves(Setting(seed=seed)).fit(chosen))} |" for seed in range(5)]
    out += ["", "## Family of the experts' loads", "", "| shares" + HEADER]
    for family in FAMILIES:
        out.append(f"| {family} | {cells(Curves(Setting(family=family)).fit(chosen))} |")
    return out


def noise_floor(draws: int = 100_000) -> tuple[float, float, float]:
    """Return what a perfect model that meets both ends would score on front-loading.

    The five columns measure the same two ends; the pooled spread of these repeats is the noise of
    one row. True times on a line, measured with that noise at every row, ends included.

    Returns
    -------
    tuple of float
        Spread of a row, mean of the median |error|, both in percent; share of the draws at or
        below half of the straight line's median.
    """
    ends = np.array([column[[0, -1]] for column in MEASURED.values()] + [DYNAMIC_ENDS])
    spread = float(np.sqrt(np.log(ends).var(axis=0, ddof=1).mean()))
    none, every = (1 / ends).mean(axis=0)
    true = none + (every - none) * SHARES
    measured = true * np.exp(spread * np.random.default_rng(0).standard_normal((draws, 11)))
    line = measured[:, :1] + (measured[:, -1:] - measured[:, :1]) * SHARES
    medians = np.median(np.abs(measured / line - 1)[:, 1:-1], axis=1)
    straight = Fit(skew=0, met=True, fixed=0, per_expert=1, predicted=straight_line())
    half = float(np.median(np.abs(straight.errors("front-loading")))) / 2
    return 100 * spread, 100 * float(medians.mean()), float((medians <= half).mean())


def limits() -> list[str]:
    """Return what the table's own noise allows."""
    spread, floor, lucky = noise_floor()
    apart = 100 * np.abs(MEASURED["random"] / MEASURED["uniform"] - 1)[1:-1]
    cell = float(np.median(apart)) / np.sqrt(2)
    fitted = [with_constant(r) for r in ROWS]
    slower = 1e3 * (1 / MEASURED["front-loading"] - 1 / straight_line()["front-loading"])[7:10]
    left = 1e3 * (1 / MEASURED["frequency"][9] - 1 / MEASURED["frequency"][10])
    return [
        "", "## Why front-loading is not halved", "",
        "`random` and `uniform` put equally many experts on the GPU, not by their use: the same "
        f"physics. Their rows are {np.median(apart):.1f} % apart in the median and "
        f"{apart.max():.1f} % at most, so that one row alone is off by about {cell:.1f} % in the "
        "median: what a perfect model would be left with. With whole layers on either side, "
        "front-loading is a line in time whatever the skew and the fixed cost; only the one layer "
        f"that is split bends it. Its rows from 70 to 90 % are {slower.min():.1f} to "
        f"{slower.max():.1f} ms a token above the line, as if something cost that while the CPU is "
        "used at all. Such a constant, fitted on one of the nine rows and scored on the other "
        f"eight, leaves {min(fitted):.1f} to {max(fitted):.1f} % by the row chosen, and the other "
        f"columns speak against it: frequency at 90 % is {left:.1f} ms above its end in all.", "",
        "The ends are repeats: all five columns measure the same two configurations, and these "
        f"rows spread by {spread:.2f} % (pooled standard deviation). A model that is exactly right "
        "and meets both ends of a column measured with that noise would show a median error of "
        f"{floor:.2f} % in the mean, and reach half of the straight line's in {lucky:.0%} of such "
        "tables. (The nine rows between the ends scatter more than the ends do: 1.4 % by `random` "
        "against `uniform`.) Whether the half is reached is decided by the noise of this table, "
        "not by the model.",
    ]  # fmt: skip


def report() -> str:
    curves = Curves(Setting())
    fit = curves.fit(Structure())
    fixed, expert = 1e6 * fit.fixed, 1e6 * fit.per_expert
    lines = [
        "# ktransformers by share of experts on the GPU, predicted and measured", "",
        "`python benchmarks/ktransformers.py --out benchmarks/results/ktransformers.md`", "",
        "Tokens/s of Qwen3-Next-80B-A3B FP8 on 4 x RTX 4090 and a Xeon Gold 6454S (ktransformers, "
        "`doc/en/kt-kernel/experts-sched-Tutorial.md`). The straight line in time per token "
        "through a column's two ends is the baseline. The model has the same two ends, a skew "
        "fitted on frequency at 50 % (not scored), and a fixed CPU cost fitted on the column "
        f"`random` (not scored): {fixed:.0f} µs in a layer with an active expert on the CPU, then "
        f"{expert:.1f} µs per such expert. Errors are predicted / measured - 1. `dynamic` (experts "
        "moved while serving) is out of scope. What the parameters rest on: "
        "[docs/background/ktransformers.md](../../docs/background/ktransformers.md).", "",
        *comparison(fit), "",
        "The worst row is uniform at 90 %, where random, the same physics, was measured "
        f"{100 * (MEASURED['random'][9] / MEASURED['uniform'][9] - 1):.1f} % faster: that it is "
        "halved depends on the draw (see the seeds) and on the rows that the fixed cost is fitted "
        "on. The catalog's CPU (two sockets assumed) would take "
        f"{1e6 * catalog_cpu_seconds():.0f} µs for a layer's ten experts, the table asks for "
        f"{fixed + TOP_K * expert:.0f} µs: without the ends its prediction would be far too fast.",
        *limits(), "", "## Structures compared", "",
        "CPU: bytes of an expert over its fitted time; the peak of one socket's DDR5 is "
        f"{DDR_PEAK / 1e9:.0f} GB/s. Medians and worst in percent.", "",
        *structures(curves), *sensitivities(curves), "",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    arguments = parser.parse_args()
    text = report()
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
