"""Overhead sums and fits, and scores of predicted runs, against closed forms."""

import numpy as np
import pytest

from hwmodels.silicon.served_rows import Ranks, ServedRow
from moeplan.served import Prediction, Profile, leave_one_cell_out, tokens_per_step
from moeplan.served_loop import play
from moeplan.served_models import Policy
from moeplan.served_overhead import Overhead, Sample, Sums, fit_overhead
from moeplan.served_scores import contradicted, errors, interval, pairs

POLICY = Policy(budget=64, mixed=True, chunked=True)
TRUE = Overhead(share=1.0, prompt_share=0.8, gap=3e-7, eager=6e-5, sequence=1.2e-5, request=0.035)


def _row(**changed: object) -> ServedRow:
    base = {
        "name": "x",
        "family": "minimax",
        "checkpoint": "MiniMaxAI/MiniMax-M2.5",
        "precision": "fp8",
        "system": "b200_sxm",
        "engine": "vllm",
        "version": "1",
        "inputs": 1024,
        "outputs": 1024,
        "concurrency": 8,
        "ranks": Ranks(4, 1, 4, 1),
        "drafts": 0,
        "ttft": 0.1,
        "tpot": 0.01,
    }
    return ServedRow(**(base | changed))  # type: ignore[arg-type]


def _predicted(row: ServedRow, tpot: float, ttft: float = 0.1) -> Prediction:
    return Prediction(row=row, ttft=ttft, tpot=tpot, own_system=True)


def test_sums_give_the_mean_times_of_the_requests() -> None:
    rng = np.random.default_rng(3)
    schedule = play(rng.integers(5, 100, 30), rng.integers(1, 40, 30), 6, POLICY, ranks=2)
    kernels, gpu = 700.0, rng.uniform(1e-3, 2e-2, len(schedule.repeats))
    some = schedule.steps.prompts.sum(axis=1) > 0
    sequences = (schedule.steps.decodes + schedule.steps.ends).sum(axis=1)
    step = TRUE.share * gpu * np.where(some, TRUE.prompt_share, 1)
    step += kernels * (TRUE.gap + TRUE.eager * some) + TRUE.sequence * sequences
    ttft, tpot = schedule.times(step)
    predicted = Sums.of(schedule, gpu, kernels).times(TRUE)
    assert predicted == pytest.approx((ttft.mean() + TRUE.request, np.nanmean(tpot)))


def _samples(cell: str, level: float, seed: int, *, near: bool = True) -> list[Sample]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(40):
        kernels = rng.uniform(300, 1500)
        sums = Sums(
            decode=rng.uniform([0.005, 2e-3], [0.5, 3e-2]),
            prompts=rng.uniform([0.01, 1e-4], [0.8, 1e-2]),
            kernels=kernels * rng.uniform([2, 1], [20, 1.01]),
            eager=kernels * rng.uniform([1, 0.01], [8, 0.2]),
            sequences=rng.uniform([2, 2], [2000, 256]),
        )
        ttft, tpot = sums.times(TRUE)
        found.append(Sample(sums=sums, ttft=ttft * level, tpot=tpot * level, cell=cell, near=near))
    return found


def test_an_overhead_is_found_again_in_what_it_made() -> None:
    # at a level of one: any other is partly taken for the models', see the next test
    samples = [s for n in range(3) for s in _samples(f"model {n}", 1.0, n)]
    found = fit_overhead(samples)
    for name in ("share", "prompt_share", "eager", "sequence"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=0.15), name
    for new in _samples("unseen", 1.0, 77):
        assert new.sums.times(found) == pytest.approx((new.ttft, new.tpot), rel=0.08)


def test_the_level_of_one_model_is_not_taken_for_overhead() -> None:
    plain = [s for n in range(3) for s in _samples(f"model {n}", 1.0, n)]
    odd = [*plain, *_samples("odd", 2.0, 9)]
    pooled = np.mean([1.0, 1.0, 1.0, 2.0])
    moved = fit_overhead(odd).share / fit_overhead(plain).share
    assert 1.0 < moved < 0.5 * (1 + pooled)


def test_without_measured_runs_of_the_system_others_count_fully() -> None:
    far = [s for n in range(2) for s in _samples(f"model {n}", 1.0, n, near=False)]
    near = [s for n in range(2) for s in _samples(f"model {n}", 1.0, n)]
    assert fit_overhead(far) == fit_overhead(near)


def test_tokens_per_step() -> None:
    assert tokens_per_step(0) == 1
    assert tokens_per_step(1) == pytest.approx(1.8)  # DeepSeek-V3 report
    assert tokens_per_step(3) == pytest.approx(1 + 0.8 + 0.64 + 0.512)


def test_errors_by_hand() -> None:
    rows = [_row(tpot=t) for t in (0.01, 0.02, 0.04)]
    predicted = [_predicted(r, t) for r, t in zip(rows, (0.011, 0.01, 0.04), strict=True)]
    found = errors(predicted, "tpot")
    assert found.median == pytest.approx(0.1)
    assert found.mean == pytest.approx(0.2)
    assert found.ratio == pytest.approx(1.0)
    assert found.rank == pytest.approx(0.5)
    assert errors(predicted, "latency").mean < found.mean  # the same TTFT on both sides


def test_pairs_differ_in_the_layout_alone() -> None:
    expert = Ranks(4, 1, 1, 4)
    runs = [
        _predicted(_row(tpot=0.010), 0.010),
        _predicted(_row(tpot=0.010 * 1.44), 0.010 * 1.44),  # again: averaged to 12 ms
        _predicted(_row(tpot=0.015, ranks=expert), 0.016),
        _predicted(_row(tpot=0.009, ranks=Ranks(8, 1, 8, 1)), 0.001),  # more GPUs
        _predicted(_row(tpot=0.009, ranks=expert, version="2"), 0.001),
        _predicted(_row(tpot=0.009, ranks=expert, concurrency=16), 0.001),
        _predicted(_row(tpot=0.009, ranks=expert, precision="fp4"), 0.001),
    ]
    (pair,) = pairs(runs)
    assert pair.measured == pytest.approx(12 / 15)
    assert pair.predicted == pytest.approx(12 / 16)
    assert pair.right
    assert not pairs([runs[0], _predicted(runs[2].row, 0.001)])[0].right


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(8, 10, 0.4439, 0.9748), (0, 5, 0.0, 0.5218), (5, 5, 0.4782, 1.0), (0, 0, 0.0, 1.0)],
)
def test_intervals_are_clopper_and_pearsons(
    right: int, count: int, low: float, high: float
) -> None:
    assert interval(right, count) == pytest.approx((low, high), abs=1e-4)


def test_runs_that_do_more_in_less_time_than_two_others_are_contradicted() -> None:
    def run(name: str, concurrency: int, tpot: float, **more: object) -> ServedRow:
        return _row(name=name, concurrency=concurrency, tpot=tpot, ttft=0.1, **more)

    usual = [run("a", 8, 0.010), run("b", 16, 0.012), run("c", 32, 0.015)]
    assert contradicted(usual) == set()
    assert contradicted([*usual, run("odd", 64, 0.0066)]) == {"odd"}
    # one slow run alone contradicts nobody; other lengths, layouts or drafts are no witnesses
    assert contradicted([run("slow", 8, 0.060), *usual]) == set()
    assert contradicted([*usual, run("odd", 64, 0.0066, drafts=3)]) == set()
    assert contradicted([*usual, run("odd", 64, 0.0066, outputs=512)]) == set()
    # most of its requests wait for the first token: few decode
    waits = _row(name="waits", concurrency=64, tpot=0.0066, ttft=60.0)
    assert contradicted([*usual, waits]) == set()


def test_a_cells_own_runs_do_not_touch_its_prediction() -> None:
    def found(factor: float) -> list[Profile]:
        made = []
        for family in ("minimax", "kimi", "gpt-oss"):
            level = factor if family == "kimi" else 1.0
            for s in _samples(family, level, len(family))[:8]:
                row = _row(family=family, ttft=s.ttft, tpot=s.tpot)
                made.append(Profile(row=row, sums=s.sums, parts=(), evidence="fitted", remark=""))
        return made

    here, there = (leave_one_cell_out(found(factor))[0] for factor in (1.0, 3.0))
    cells = {p.row.family: [] for p in here}  # type: ignore[var-annotated]
    for one, other in zip(here, there, strict=True):
        cells[one.row.family].append(one.tpot == other.tpot and one.ttft == other.ttft)
        assert one.own_system
    assert all(cells["kimi"])
    assert not any(cells["minimax"])


def test_a_cell_without_sibling_takes_other_systems_and_none_of_other_engines() -> None:
    def profile(family: str, system: str, engine: str, seed: int) -> Profile:
        s = _samples(family, 1.0, seed)[0]
        row = _row(family=family, system=system, engine=engine, ttft=s.ttft, tpot=s.tpot)
        return Profile(row=row, sums=s.sums, parts=(), evidence="fitted", remark="")

    runs = [
        profile("minimax", "b200_sxm", "vllm", 1),
        profile("kimi", "h200_sxm", "vllm", 2),
        profile("deepseek", "b200_sxm", "trtllm", 3),
    ]
    predictions, overheads = leave_one_cell_out(runs)
    assert [p.own_system for p in predictions] == [False] * 3
    assert overheads["deepseek|b200_sxm|trtllm"] == Overhead()  # no other run of its engine
    assert overheads["minimax|b200_sxm|vllm"] != Overhead()
