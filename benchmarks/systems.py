"""Published systems: every composition, Duplex term by term, the bound of MoE-Lens, gpt-oss-20b.

`python benchmarks/systems.py` writes benchmarks/results/systems.md and the table of the guide
docs/guides/published-systems.md. With MOEPLAN_DATA (recorded traces) and `--gptoss CONFIG` also
the systems that apply to gpt-oss-20b on its recorded trace.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.composition import Run, composition_answer, run
from moeplan.composition_file import Composition, Routing, Variant, read_composition
from planner.streaming_bound import StreamingBound
from simulator.deployment import Parallelism, Workload
from simulator.program import Played

ROOT = Path(__file__).resolve().parent.parent
SYSTEMS = ROOT / "examples" / "systems"
RESULTS = ROOT / "benchmarks" / "results" / "systems.md"
GUIDE = ROOT / "docs" / "guides" / "published-systems.md"
BEGIN, END = "<!-- begin: benchmarks/systems.py -->", "<!-- end -->"
NAMES = {
    "P": "paper's text",
    "C": "authors' code",
    "N": "notes of others",
    "A": "abstract",
    "R": "recollection",
    "own": "recomputed",
}
ON_GPTOSS = ("pre-gated-moe", "moe-infinity", "se-moe", "hybrimoe")
FAST, SIDE, BALANCE = 1.0, 4.0, 32.0
"""Duplex: bandwidths of xPU and PIM (in the stack's), tokens per expert at which both tie."""
PAPER = 2.67
"""Duplex over the GPU system, "up to"."""
Row = Sequence[str]


def claims(answers: Sequence[dict[str, Any]]) -> Iterator[Row]:
    """One row for each claim of each system."""
    for answer in answers:
        for claim in answer["claims"]:
            yield (
                answer["system"],
                claim["claim"],
                NAMES[claim["confidence"]],
                _number(claim["claimed"]),
                _number(claim["ours"]),
                _direction(claim),
                claim["remark"],
            )


def variants(answer: dict[str, Any]) -> Iterator[Row]:
    """One row for each variant and workload of a system."""
    for found in answer["runs"]:
        (kind, tokens), *_ = found["workload"].items()
        summary = found["summary"]
        workload = f"{kind.removesuffix('_tokens').removesuffix('_batch')} {tokens}"
        if summary is None:
            yield workload, found["variant"], "cannot run", "", "", "", ""
            continue
        below = next(
            r["summary"]
            for r in answer["runs"]
            if r["workload"] == found["workload"] and r["variant"] == answer["baseline"]
        )
        ratio = summary["tokens_per_second"] / below["tokens_per_second"]
        yield (
            workload,
            found["variant"],
            f"{summary['tokens_per_second']:,.0f}",
            f"{summary['step_time_s'] * 1e3:,.2f}",
            f"{ratio:.2f}",
            f"{summary['hit_rate']:.1%}" if "hit_rate" in summary else "",
            f"{summary['memory_bytes_fullest_rank'] / 1e9:,.2f}",
        )


class Duplex:
    """One model on Duplex at one context: seconds of a step by what takes them."""

    def __init__(self, base: Composition, length: int, batches: Sequence[int]) -> None:
        self.length, self.batches = length, batches
        decode = base.model_copy(
            update={
                "trace": Routing(
                    tokens=16384, requests=512, context=(length, max(2 * length - 32, length))
                ),
                "workloads": tuple(Workload(decode_batch=b) for b in batches),
            }
        )
        prompt = base.model_copy(
            update={
                "trace": Routing(tokens=8 * length, requests=8),
                "workloads": (Workload(prefill_tokens=length),),
                "steps": 2,
            }
        )
        self.runs = {(r.workload.tokens, r.variant): r for r in run(decode, SYSTEMS)}
        self.prompts = {r.variant: _step(r) for r in run(prompt, SYSTEMS)}

    def rows(self) -> Iterator[Row]:
        """Terms of the GPU's step, bounds, and both ratios, for each batch size."""
        for batch in self.batches:
            gpu = self.runs[batch, "gpu"]
            assert gpu.result is not None
            terms = kernel_seconds(gpu.result.first_step)
            total = sum(terms.values())
            attention, experts, rest = (terms[n] for n in ("attention", "experts", "rest"))
            model = gpu.facts.model
            tokens = batch * model.top_k / model.num_experts
            alone, both = (self._seconds(batch, n) for n in ("duplex", "co-processing"))
            least = rest + attention / SIDE
            side = min(SIDE, BALANCE / tokens)
            yield (
                f"{batch}",
                f"{self.length}",
                f"{tokens:.0f}",
                *(f"{t * 1e3:.2f} ({t / total:.0%})" for t in (attention, experts, rest)),
                f"{total / (least + experts / max(side, FAST)):.2f}",
                f"{total / alone:.2f}",
                f"{total / (least + experts / (FAST + side)):.2f}",
                f"{total / (least + experts / (FAST + SIDE)):.2f}",
                f"{total / both:.2f}",
                f"{self._with_prompts(batch):.2f}",
                _share_for(PAPER, attention / SIDE + experts / max(side, FAST), rest, total),
            )

    def _seconds(self, batch: int, variant: str) -> float:
        return _step(self.runs[batch, variant])

    def _with_prompts(self, batch: int) -> float:
        """Ratio if each request's prompt is a step of its own before as many decode steps."""
        gpu, both = (
            self.length * self._seconds(batch, v) + batch * self.prompts[v]
            for v in ("gpu", "co-processing")
        )
        return gpu / both


def _share_for(ratio: float, moved: float, rest: float, total: float) -> str:
    """Share of PIM's speed at which ``total / (moved / share + rest)`` is the ratio."""
    share = moved / (total / ratio - rest)
    return f"{share:.0%}" if 0 < share <= 1 else ""


def kernel_seconds(played: Played) -> dict[str, float]:
    """Split a step of one stream into decode attention, experts' products and the rest.

    Seconds, mean over ranks.
    """
    seconds = {"attention": 0.0, "experts": 0.0, "rest": 0.0}
    for item, took in zip(played.items, played.busy[0].mean(axis=1).tolist(), strict=True):
        seconds[item.name if item.name in seconds else "rest"] += took
    return seconds


def duplex_systems() -> Iterator[tuple[str, Composition, Sequence[int], Sequence[int]]]:
    """Name, composition, request lengths and batch sizes of the paper's three MoE models."""
    base = read_composition(SYSTEMS / "duplex.yaml")
    yield "Mixtral on 4", base, (256, 1024, 2048, 4096), (32, 64, 128)
    node = {"attention": {"dp": 1, "tp": 8}, "experts": {"ep": 1, "tp": 8}}
    two = {"attention": {"dp": 2, "tp": 8}, "experts": {"ep": 2, "tp": 8}}
    for name, model, cluster, layout in (
        ("GLaM on 8", "models/glam-143b.yaml", "duplex-8", node),
        ("Grok-1 on 2 x 8", "models/grok-1.yaml", "duplex-8x2", two),
    ):
        other = {"parallelism": Parallelism.model_validate(layout)}
        changed: dict[str, Variant] = {
            n: v.model_copy(update=other) for n, v in base.variants.items()
        }
        update = {"model": model, "cluster": cluster, "variants": changed, "steps": 4}
        yield name, base.model_copy(update=update), (256, 2048), (32, 64, 128)


def streaming(runs: Sequence[Run]) -> Iterator[Row]:
    """MoE-Lens: output tokens/s against the bound at the cache that each batch takes."""
    for done in runs:
        if done.result is None or done.variant != "moe-lens":
            continue
        bound = lens_bound(done)
        reached = done.result.tokens_per_second
        yield (
            f"{done.workload.tokens}",
            f"{bound.cached_tokens * done.facts.model.kv_bytes_per_token / 1e9:.1f}",
            f"{bound.streamed_bytes / 1e9:.1f}",
            f"{bound.tokens_per_second:,.0f}",
            f"{bound.generated_per_second:,.0f}",
            f"{reached:,.0f}",
            f"{reached / bound.generated_per_second:.1%}",
        )


def lens_bound(done: Run) -> StreamingBound:
    """Bound at a run's own streamed bytes, batch and link; p and g as in the paper's example."""
    assert done.result is not None
    summary = done.result.summary()
    link = done.facts.cluster.path("host", "hbm")[0]
    return StreamingBound(
        prompt=98,
        output=32,
        cached_tokens=done.workload.tokens * (98 + 32 / 2),
        streamed_bytes=float(summary["fetched_bytes_per_token"]) * done.workload.tokens,
        bandwidth=link.bandwidth.value * link.copy_cost().efficiency,
    )


def markdown(head: Row, rows: Iterator[Row]) -> list[str]:
    """Return a table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def _direction(claim: dict[str, Any]) -> str:
    if claim["same_direction"] is not None:
        return "same" if claim["same_direction"] else "opposite"
    return "" if claim["ours"] is None else "figure"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def _step(done: Run) -> float:
    assert done.result is not None, done.refused
    return float(np.mean(done.result.step_times))


def main() -> None:
    """Run everything and write both pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gptoss", type=Path, help="config.json of gpt-oss-20b")
    options = parser.parse_args()
    files = sorted(SYSTEMS.glob("*.yaml"))
    runs = {f.stem: (read_composition(f), run(read_composition(f), SYSTEMS)) for f in files}
    answers = {name: composition_answer(c, found) for name, (c, found) in runs.items()}
    head = ("system", "claim", "from", "claimed", "ours", "direction", "why they differ")
    table = markdown(head, claims(list(answers.values())))
    text = [
        "# Published systems: claims and our figures",
        "",
        "Made by `python benchmarks/systems.py --gptoss CONFIG` (config.json of gpt-oss-20b;",
        "MOEPLAN_DATA names the folder of recorded traces). Synthetic routing unless it says",
        "otherwise; what a composition is: docs/guides/published-systems.md.",
        "",
        *table,
        "",
        *_duplex_pages(),
        "## MoE-Lens: the bound of streamed weights",
        "",
        "p = 98, g = 32, 19.5 GB/s. The paper's example (94 GB streamed, 70 GB of cache) gives "
        f"{_example().tokens_per_second:,.0f} tokens/s, {_example().generated_per_second:,.0f} of "
        "them output.",
        "",
        *markdown(
            ("batch", "cache GB", "streamed GB", "bound tokens/s", "of it output", "ours output",
             "reached"),
            streaming(runs["moe-lens"][1]),
        ),
        "",
    ]  # fmt: skip
    head = ("step", "variant", "tokens/s", "step ms", "x baseline", "hit rate", "memory GB")
    for answer in answers.values():
        text += [
            f"## {answer['system']} ({answer['model']})",
            "",
            *markdown(head, variants(answer)),
            "",
        ]
    if options.gptoss:
        trace = Path(os.environ["MOEPLAN_DATA"]) / "traces" / "gpt-oss-20b-mmlu.parquet"
        for name in ON_GPTOSS:
            composition = runs[name][0]
            found = run(composition, SYSTEMS, model=options.gptoss, trace=trace)
            answer = composition_answer(composition, found)
            refused = sorted({r.refused for r in found if r.refused})
            text += [f"## {answer['system']} on gpt-oss-20b's recorded trace", ""]
            text += [*markdown(head, variants(answer)), "", *(f"cannot run: {r}" for r in refused)]
            text += [""] * bool(refused)
    RESULTS.write_text("\n".join(text).rstrip() + "\n", encoding="utf-8")
    page = GUIDE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    GUIDE.write_text("\n".join([before + BEGIN, *table, END]) + after, encoding="utf-8")


def _example() -> StreamingBound:
    """Return the example of the paper's section 5.2, Mixtral at 47 billion parameters in bf16."""
    return StreamingBound(
        prompt=98, output=32, cached_tokens=70e9 / 131072, streamed_bytes=94e9, bandwidth=19.5e9
    )


def _duplex_pages() -> list[str]:
    head = (
        "batch", "length", "tokens per expert", "attention ms", "experts ms", "rest ms",
        "PIM alone: by terms", "PIM alone: ours", "both: by terms", "both: bound", "both: ours",
        "with prompts", "PIM at",
    )  # fmt: skip
    text = ["## Duplex: the step term by term", "", *DUPLEX_TEXT]
    for name, base, lengths, batches in duplex_systems():
        rows = [row for length in lengths for row in Duplex(base, length, batches).rows()]
        text += [f"### {name}", "", *markdown(head, iter(rows)), ""]
    return text


DUPLEX_TEXT = (
    "Decode steps with uniform routing; requests of `length` tokens in and as many out, so the",
    "context is 1.5 lengths in the mean. The GPU system's step has three terms: decode attention",
    "and the experts' products move to PIM (4 times the stack's bandwidth, 8 FLOP per byte), the",
    "rest (projections, router, head, all-reduces) does not. With n tokens per expert PIM computes",
    "an expert min(4, 32 / n) times as fast as the xPU (bound by bandwidth below 295 tokens).",
    "`by terms`: attention / 4 + experts / max(1, min(4, 32 / n)) + rest, and with both processors",
    "experts / (1 + min(4, 32 / n)); `bound` (Amdahl): experts / 5 whatever n is. `with prompts`:",
    "each request's prompt is a step of its own before its decode steps. `PIM at`: the share of",
    "its 4 times at which PIM alone would give the paper's 2.67; none above 1, where it cannot.",
    "",
)


if __name__ == "__main__":
    main()
