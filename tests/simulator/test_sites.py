"""Compute sites: published examples, brute force over all assignments, and bounds."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from basis.errors import InputError
from simulator.sites import SITES, SiteProblem, Where, assign, makespan


def _problem(tokens: Any, resident: Any, fast: Any, copy: Any, side: Any, **k: Any) -> SiteProblem:
    tokens = np.asarray(tokens)

    def wide(values: Any) -> NDArray[np.float64]:
        return np.broadcast_to(np.asarray(values, dtype=np.float64), tokens.shape)

    return SiteProblem(
        tokens=tokens,
        resident=np.asarray(resident, dtype=np.bool_),
        fast_s=wide(fast),
        fetch_s=wide(copy),
        side_s=wide(side),
        **k,
    )


def _random(seed: int, n: int, rows: int = 1) -> SiteProblem:
    """Side time linear in tokens, fast time flat, one copy time: HybriMoE's cost model."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 12, size=(rows, n))
    return _problem(
        tokens,
        rng.random((rows, n)) < rng.random(),
        rng.choice([0.25, 1.0, 2.0]),
        rng.choice([0.5, 1.5, 3.0, 10.0]),
        tokens * rng.choice([0.25, 0.5, 1.0, 3.0]),
        fast_fixed=float(rng.choice([0.0, 0.5])),
        side_fixed=float(rng.choice([0.0, 2.0])),
    )


def _played(p: SiteProblem, row: int, where: NDArray[np.integer]) -> float:
    """Event by event: copies by falling tokens, residents first, fetched as they land."""
    order = sorted(range(len(where)), key=lambda e: -p.tokens[row, e])
    gpu = cpu = link = 0.0
    held = [e for e in order if where[e] == Where.FAST]
    if held:
        gpu = p.fast_fixed + sum(p.fast_s[row, e] for e in held)
    for e in order:
        if where[e] == Where.FETCH:
            link += p.fetch_s[row, e]
            gpu = max(gpu, link) + p.fast_fixed + p.fast_s[row, e]
    aside = [e for e in order if where[e] == Where.SIDE]
    if aside:
        cpu = p.side_fixed + sum(p.side_s[row, e] for e in aside)
    return float(max(gpu, cpu))


def _brute(p: SiteProblem, row: int = 0) -> float:
    active = np.flatnonzero(p.tokens[row])
    best = np.inf
    for aside in itertools.product([False, True], repeat=len(active)):
        where = np.zeros(p.tokens.shape[1], dtype=np.int8)
        where[active] = np.where(p.resident[row, active], Where.FAST, Where.FETCH)
        where[active[list(aside)]] = Where.SIDE
        best = min(best, _played(p, row, where))
    return best


@pytest.mark.parametrize("name", ["list", "list_code", "split"])
def test_figure_5_of_hybrimoe_takes_four(name: Any) -> None:
    """Uncached A1 B1 C3, cached D4 E1; CPU time = load, GPU 1, copy 3."""
    tokens = [1, 1, 3, 4, 1]
    p = _problem([tokens], [[0, 0, 0, 1, 1]], 1, 3, [tokens])
    assert assign(name, p).makespan.tolist() == [4]
    assert _brute(p) == 4


@settings(max_examples=150)
@given(st.integers(0, 2**32 - 1), st.integers(1, 7), st.sampled_from(list(SITES)[:-1]))
def test_no_rule_beats_brute_force_and_its_makespan_is_that_of_its_schedule(
    seed: int, n: int, name: Any
) -> None:
    p = _random(seed, n)
    answer = assign(name, p)
    assert answer.makespan[0] == pytest.approx(_played(p, 0, answer.where[0]))
    assert answer.makespan[0] >= _brute(p) - 1e-9


@settings(max_examples=150)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_split_is_at_most_every_cut_of_its_list(seed: int, n: int) -> None:
    p = _random(seed, n, rows=20)
    best = assign("split", p).makespan
    for name in ("fetch", "list_code", "one_unit"):
        assert (best <= assign(name, p).makespan + 1e-9).all()
    everything_aside = np.where(p.tokens > 0, Where.SIDE, Where.IDLE)
    assert (best <= makespan(p, everything_aside) + 1e-9).all()
    nothing_resident = _problem(p.tokens, False, p.fast_s, p.fetch_s, p.side_s)
    home = assign("home", nothing_resident).makespan
    assert (assign("split", nothing_resident).makespan <= home + 1e-9).all()


@settings(max_examples=80)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.booleans())
def test_split_equals_brute_force_where_rising_tokens_are_optimal(
    seed: int, n: int, resident: bool
) -> None:
    """One kind of expert, equal fast times, side time per token: fewest tokens go aside."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 12, size=(1, n))
    p = _problem(tokens, np.full((1, n), resident), 1.0, 2.5, tokens * rng.choice([0.3, 1.0]))
    assert assign("split", p).makespan[0] == pytest.approx(_brute(p))


def test_list_scheduling_is_close_to_optimal_on_average() -> None:
    """The ratios are what the rule reaches here; docs/background/offload.md quotes them."""
    cases = [_random(seed, 8) for seed in range(150)]
    ratios = np.array(
        [[assign(n, p).makespan[0] for n in ("list", "list_code", "split")] for p in cases]
    )
    best = np.array([_brute(p) for p in cases])
    ratios = ratios[best > 0] / best[best > 0, None]
    assert (ratios >= 1 - 1e-9).all()
    assert (ratios.mean(axis=0) < 1.08).all()
    assert (ratios.max(axis=0) <= 3).all()


@settings(max_examples=80)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8))
def test_one_unit_is_the_faster_of_both_processors(seed: int, n: int) -> None:
    p = _random(seed, n, rows=20)
    fast = assign("fetch", p)
    aside = np.where(p.tokens > 0, Where.SIDE, Where.IDLE)
    side_s = makespan(p, aside)
    answer = assign("one_unit", p)
    assert answer.makespan.tolist() == np.minimum(fast.makespan, side_s).tolist()
    for row in range(20):
        chosen = aside[row] if side_s[row] < fast.makespan[row] else fast.where[row]
        assert answer.where[row].tolist() == chosen.tolist()


def test_rules_that_know_no_times() -> None:
    p = _problem([5, 3, 0, 9], [0, 1, 1, 0], 1, 1, 1, threshold=4, aside=np.array([1, 1, 1, 0]) > 0)
    where = {name: assign(name, p).where.tolist() for name in SITES}
    fast, fetch, side, idle = Where.FAST, Where.FETCH, Where.SIDE, Where.IDLE
    assert where["home"] == [side, fast, idle, side]
    assert where["fetch"] == [fetch, fast, idle, fetch]
    assert where["ops_per_byte"] == [fetch, side, idle, fetch]
    assert where["one_unit"] == [fetch, fast, idle, fetch]  # three seconds on either
    assert where["planned"] == [side, fast, idle, fetch]
    assert assign("fetch", p).order.tolist() == [1, 0, 0, 0]
    assert assign("home", p).order.tolist() == [0, 0, 0, 1]


def test_leading_axes_are_independent_problems() -> None:
    p = _random(5, 9, rows=12)
    names: list[Any] = list(SITES)[:-1]
    for name in names:
        whole = assign(name, p)
        for row in range(12):
            one = SiteProblem(
                tokens=p.tokens[row : row + 1],
                resident=p.resident[row : row + 1],
                fast_s=p.fast_s[row : row + 1],
                fetch_s=p.fetch_s[row : row + 1],
                side_s=p.side_s[row : row + 1],
                fast_fixed=p.fast_fixed,
                side_fixed=p.side_fixed,
            )
            assert assign(name, one).where[0].tolist() == whole.where[row].tolist()


def test_bad_names_and_a_missing_table_are_refused() -> None:
    p = _problem([1], [1], 1, 1, 1)
    with pytest.raises(InputError, match="unknown site policy 'gpu' -- known are home, fetch"):
        assign("gpu", p)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no table -- give a choice"):
        assign("planned", p)
