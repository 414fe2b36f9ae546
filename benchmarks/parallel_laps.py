"""Where a step over two ranks takes its time: predicted beside measured, part by part.

    python benchmarks/parallel_laps.py MACHINE

MACHINE is what `moeplan calibrate --device cpu` wrote. Between two exchanges every rank computes;
all leave an exchange at the same time. So a step is the sum of what the ranks compute (mean over
ranks), what the earlier one waits for the later one, and the exchanges from the last rank's begin.
Laps of real runs are split that way, and so are the simulator's prices; writes
benchmarks/results/parallel_laps.md.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hwmodels.cluster import load_cluster
from kernels_ref import (
    Decoder,
    MovableExperts,
    PlacedSteps,
    TogetherClock,
    Weights,
    run_processes,
)
from moeplan.scenario import open_scenario
from moeplan.validate_parallel import each_case, place_steps, price_parallel
from moeplan.validate_parallel_cases import make_parallel_cases
from traces.model_spec import ModelSpec

RESULT = Path(__file__).parent / "results" / "parallel_laps.md"
EXAMPLE = Path(__file__).parents[1] / "examples" / "validate.yaml"
ROUNDS = 7
PARTS = ("attention to dispatch", "experts to combine", "waiting", "exchanges")
EXCHANGES = ("dispatch", "combine")
Laps = tuple[tuple[str, float], ...]
Row = tuple[str, list[float], NDArray[np.float64]]
"""Label, predicted seconds by part, measured ones [rounds, parts]."""


def run_rank(
    rank: int,
    _ranks: int,
    model: ModelSpec,
    placed: Sequence[PlacedSteps],
    lengths: Sequence[Sequence[int]],
    seed: int = 0,
) -> list[list[Laps]]:
    """Run on a rank; for every round the laps of each step."""
    own = list(lengths[rank])
    experts = MovableExperts(model, placed[0].slot_map_LS, seed=seed)
    weights = Weights.random(model, dtype=torch.float32, seed=seed)
    decoder = Decoder(model, weights, experts, requests=len(own), context=max(own) + 1)
    decoder.clock = clock = TogetherClock()
    decoder.warm_cache(own, seed=seed)
    tokens, order = np.random.default_rng([seed, rank]), np.random.default_rng(seed)
    found = []
    for _ in range(ROUNDS + 1):
        laps: dict[int, Laps] = {}
        for at in order.permutation(len(placed)):
            experts.place(placed[at].slot_map_LS)
            for step in placed[at].steps * 2:  # the first after a change of placement is dropped
                ids = tokens.integers(model.vocab_size, size=(step[rank].shape[1],))
                decoder.decode(ids, range(len(ids)), step)
                decoder.rewind(own)
                laps[at] = clock.laps_s()
        found.append([laps[at] for at in range(len(placed))])
    return found[1:]


def split(names: Sequence[str], seconds_RN: NDArray[np.float64]) -> list[float]:
    """Split the laps of all ranks into `PARTS`, s."""
    totals, run = dict.fromkeys(PARTS, 0.0), np.zeros(len(seconds_RN))
    for name, seconds_R in zip(names, seconds_RN.T, strict=True):
        if name not in EXCHANGES:
            run = run + seconds_R
            continue
        _close(totals, run, PARTS[0] if name == "dispatch" else PARTS[1])
        totals["exchanges"] += seconds_R.min()  # of the last to come: all leave at once
        run = np.zeros(len(seconds_RN))
    _close(totals, run, PARTS[0])
    return list(totals.values())


def _close(totals: dict[str, float], run_R: NDArray[np.float64], part: str) -> None:
    totals[part] += run_R.mean()
    totals["waiting"] += run_R.max() - run_R.mean()


def main() -> None:
    """Run, split, write."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("machine", type=Path)
    folder = options.parse_args().machine
    scenario = open_scenario(EXAMPLE, cluster=folder / "cluster.yaml")
    model, cluster = scenario.model, load_cluster(folder / "cluster.yaml")
    cases = make_parallel_cases(model, cluster, scenario.trace, windows=1)
    each = each_case(cases)
    placed = [place_steps(model, cluster, cases, [at]) for at in range(len(each))]
    lengths = [(own - 1).tolist() for own in cases.contexts]
    of_rank = run_processes(cluster.num_ranks, run_rank, model, placed, lengths, timeout=600)
    rows = []
    for at, (case, name, deployment) in enumerate(each):
        priced = price_parallel(model, cluster, case, deployment)
        predicted = split([item.name for item in priced.items], priced.seconds[0].T)
        measured = []
        for rounds in zip(*of_rank, strict=True):
            names = [kernel for kernel, _ in rounds[0][at]]
            measured.append(split(names, np.array([[s for _, s in r[at]] for r in rounds])))
        rows.append((f"{case.batch}, {case.load}: {name}", predicted, np.array(measured)))
    about = json.loads((folder / "machine.json").read_text(encoding="utf-8"))
    text = "\n".join(_page(rows, about)) + "\n"
    RESULT.write_text(text, encoding="utf-8")
    print(text)


def _page(rows: list[Row], about: dict[str, Any]) -> Iterator[str]:
    yield "# A step over two ranks, part by part"
    yield ""
    yield (
        "`python benchmarks/parallel_laps.py MACHINE`: ms predicted / measured (median of "
        f"{ROUNDS} rounds; for exchanges also the mean, which stalls of single rounds raise). "
        f"{about['processor']}, {about['threads']} pinned thread a rank, torch {about['torch']}, "
        f"{about['date'][:10]}. Computing is the mean over ranks; waiting is what the later rank "
        "computes more; an exchange lasts from the last rank's begin."
    )
    yield ""
    yield "| step | " + " | ".join(PARTS) + " | whole | error |"
    yield "|---" * (len(PARTS) + 3) + "|"
    shares = []
    for label, predicted, measured in rows:
        middle, whole = np.median(measured, axis=0) * 1e3, np.median(measured.sum(axis=1)) * 1e3
        said = np.array(predicted) * 1e3
        shares.append((middle - said) / whole)
        cells = [f"{p:.1f} / {m:.1f}" for p, m in zip(said, middle, strict=True)]
        cells[-1] += f" ({measured[:, -1].mean() * 1e3:.1f})"
        error = said.sum() / whole - 1
        yield f"| {label} | {' | '.join(cells)} | {said.sum():.1f} / {whole:.1f} | {error:+.1%} |"
    missing = ", ".join(
        f"{part} {share:+.1%}" for part, share in zip(PARTS, np.mean(shares, axis=0), strict=True)
    )
    yield ""
    yield f"Not predicted, as a share of the measured step, mean over the rows: {missing}."


if __name__ == "__main__":
    main()
