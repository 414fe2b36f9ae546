from types import SimpleNamespace
from typing import Any

import pytest

from moeplan.verdict import judge
from planner.scoring import Score


def _score(*speeds: float) -> Score:
    return Score(results=tuple(SimpleNamespace(tokens_per_second=s) for s in speeds))  # type: ignore[misc]


def _judge(plan: Score, default: Score, eplb: Score, without: Score | None = None) -> Any:
    found = SimpleNamespace(
        predicted=plan,
        baselines={"contiguous": default, "eplb": eplb},
        without_redundancy=without,
    )
    return judge(found, found)  # type: ignore[arg-type]


def test_a_clear_gain_over_both() -> None:
    verdict = _judge(_score(110, 111), _score(100, 101), _score(105, 106))
    assert verdict["worth_it"]
    assert not verdict["tie"]
    assert verdict["gain_over_default"] == pytest.approx((0.1 + 10 / 101) / 2)
    assert verdict["answer"].startswith("Deploy this placement: +10.0% tokens/s")
    assert "+4.7% against EPLB" in verdict["answer"]


def test_as_good_as_eplb_is_a_tie() -> None:
    verdict = _judge(_score(110, 111), _score(100, 101), _score(110.1, 111.1))
    assert verdict["tie"]
    assert "as good as EPLB (a tie)" in verdict["answer"]


def test_behind_eplb_is_said() -> None:
    verdict = _judge(_score(105, 106), _score(100, 101), _score(110, 111))
    assert "below EPLB" in verdict["answer"]


@pytest.mark.parametrize("speeds", [(100.5, 101.5), (99, 100)])
def test_little_or_nothing_is_not_worth_it(speeds: tuple[float, float]) -> None:
    verdict = _judge(_score(*speeds), _score(100, 101), _score(100, 101))
    assert not verdict["worth_it"]
    assert verdict["answer"].startswith("Not worth it")


def test_a_gain_within_the_noise_is_not_worth_it() -> None:
    verdict = _judge(_score(104, 98), _score(100, 98), _score(100, 98))
    assert verdict["gain_over_default"] == pytest.approx(0.02)
    assert not verdict["worth_it"]
    assert verdict["tie"]


def test_better_without_redundancy_is_said() -> None:
    verdict = _judge(_score(110, 111), _score(100, 101), _score(105, 106), _score(120, 121))
    assert "without redundant experts would do better: +19.9%" in verdict["answer"]
    same = _judge(_score(110, 111), _score(100, 101), _score(105, 106), _score(110, 111))
    assert "without redundant" not in same["answer"]
