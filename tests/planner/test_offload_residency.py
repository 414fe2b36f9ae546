"""The residency programmes against brute force over every assignment of tiny problems."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basis.errors import InfeasibleError
from planner.offload_costs import ExpertTimes, GroupTimes
from planner.offload_grain import layer_grain
from planner.offload_layer import Layer, Rule
from planner.offload_program import Column, LayerProgram, least_times
from planner.offload_residency import bound_any, solve_residency
from planner.offload_search import pick
from planner.solver import Backend

EXPERTS, LAYERS, TOP_K = 4, 2, 2


def _times(
    fetch: float = 5e-4, lead: float = -2e-6, side: float = 2e-4, without_side: bool = False
) -> ExpertTimes:
    n = np.arange(9)
    return ExpertTimes(
        fast=GroupTimes(launch=5e-6, parts=np.stack([n * 2e-5, (n > 0) * 4e-5 + n * 1e-6])),
        side=None
        if without_side
        else GroupTimes(launch=3e-5, parts=np.stack([n * 9e-5, (n > 0) * side + n * 2e-6])),
        transfer=2e-5,
        per_token=4e-7,
        fetch=fetch,
        lead=lead,
        top_k=TOP_K,
    )


def _counts(steps: int, batch: int, seed: int) -> np.ndarray:
    """Tokens per expert of random steps, [steps, layers, experts]; skewed."""
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.ones(EXPERTS), LAYERS)
    counts = np.zeros((steps, LAYERS, EXPERTS), dtype=np.int64)
    for step, layer, _ in product(range(steps), range(LAYERS), range(batch)):
        chosen = rng.choice(EXPERTS, TOP_K, replace=False, p=shares[layer])
        counts[step, layer, chosen] += 1
    return counts


def _layers(counts: np.ndarray, times: ExpertTimes) -> list[Layer]:
    return [Layer.of(counts[:, layer], times) for layer in range(counts.shape[1])]


def _assignments(layer: Layer, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
    """Every (keep, fetch) of one layer that the rule allows."""
    sites = ("keep", "fetch", "side")
    if layer.times.side is None:
        sites = ("keep", "fetch")
    elif rule == "home":
        sites = ("keep", "side")
    every = np.array(list(product(sites, repeat=layer.num_experts)))
    return every == "keep", every == "fetch"


def _optimum(layers: list[Layer], slots: int, rule: Rule, landing: bool) -> float:
    """Least mean over all assignments of all layers within the slots."""
    options = []
    for layer in layers:
        keep, fetch = _assignments(layer, rule)
        means = layer.mean(keep, fetch)
        lands = np.array([layer.landing(f) for f in fetch]) * landing
        options.append(list(zip(means, keep.sum(axis=1), lands, strict=True)))
    best = np.inf
    for chosen in product(*options):
        if sum(c[1] for c in chosen) + max(c[2] for c in chosen) <= slots:
            best = min(best, sum(c[0] for c in chosen))
    return best


CASES = [
    ("home", 1, 0, {}),
    ("home", 3, 1, {}),
    ("planned", 1, 2, {}),
    ("planned", 3, 3, {}),
    ("planned", 3, 4, {"fetch": 6e-5, "side": 9e-5}),
    ("planned", 3, 5, {"fetch": 1e-5, "lead": 3e-5}),  # calls longer than copies
    ("planned", 2, 6, {"without_side": True}),
]


@pytest.mark.parametrize(("rule", "batch", "seed", "costs"), CASES)
@pytest.mark.parametrize("slots", [1, 3, 6])
def test_bound_and_residency_enclose_the_brute_force_optimum(
    rule: Rule, batch: int, seed: int, costs: dict[str, float], slots: int
) -> None:
    layers = _layers(_counts(12, batch, seed), _times(**costs))
    lands = _optimum(layers, slots, rule, landing=True)
    if np.isinf(lands):  # even the least that a step fetches does not fit
        with pytest.raises(InfeasibleError, match="a step fetches"):
            solve_residency(layers, slots, rule, workers=1)
        return
    found = solve_residency(layers, slots, rule, gap=0.0, time_limit=20.0, workers=1)
    best = _optimum(layers, slots, rule, landing=False)
    assert found.bound <= best * (1 + 1e-6)
    assert found.objective >= best * (1 - 1e-9)
    assert found.keep.sum() + found.landing <= slots
    own = sum(
        layer.mean(k[None], f[None])[0]
        for layer, k, f in zip(layers, found.keep, found.fetch, strict=True)
    )
    assert found.objective == pytest.approx(own, rel=1e-12)
    assert not (found.keep & found.fetch).any()
    assert found.objective <= lands * 1.03  # a gap of the decomposition, at most


@pytest.mark.parametrize("backend", ["highs", "cbc"])
@pytest.mark.parametrize("rule", ["home", "planned"])
@pytest.mark.parametrize("price", [0.0, 2e-5, 1e-4])
def test_a_layers_programme_is_bounded_by_brute_force(
    rule: Rule, price: float, backend: Backend
) -> None:
    for seed in range(3):
        layer = _layers(_counts(10, 1 + seed, seed), _times())[0]
        column, bound, late = LayerProgram(layer, rule).solve(
            price, backend=backend, time_limit=20.0, gap=0.0
        )
        keep, fetch = _assignments(layer, rule)
        best = (layer.mean(keep, fetch) + price * keep.sum(axis=1)).min()
        assert column is not None
        assert not late
        assert bound <= best * (1 + 1e-6)
        assert bound >= best * 0.98  # loose by no more than the terms that rows leave out
        assert column.mean + price * column.slots <= best * 1.02


@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 4),
    fetch=st.floats(1e-6, 1e-3),
    lead=st.floats(-1e-5, 3e-4),
    side=st.floats(1e-6, 1e-3),
    rule=st.sampled_from(["home", "planned"]),
)
@settings(max_examples=40)
def test_least_times_are_below_every_assignment(
    seed: int, batch: int, fetch: float, lead: float, side: float, rule: Rule
) -> None:
    layer = _layers(_counts(3, batch, seed), _times(fetch, lead, side))[0]
    keep, fetched = _assignments(layer, rule)
    seconds = layer.seconds(keep, fetched)
    for p, tokens in enumerate(layer.tokens):
        least = least_times(layer, p, rule)
        away = (~keep & (tokens > 0)).sum(axis=1)
        assert (seconds[:, p] >= least[away] - 1e-15).all()


def _every_step(layer: Layer, p: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every (runs fast, fetched, seconds) of one step; the rest runs aside."""
    one = Layer(tokens=layer.tokens[p : p + 1], weight=np.ones(1), times=layer.times)
    fast, fetched = _assignments(one, "planned")
    return fast, fetched, one.seconds(fast, fetched)[:, 0]


@given(seed=st.integers(0, 10_000), batch=st.integers(1, 3), side=st.floats(1e-5, 1e-3))
@settings(max_examples=25)
def test_bound_of_all_rules_is_below_the_best_site_in_every_step(
    seed: int, batch: int, side: float
) -> None:
    layers, slots = _layers(_counts(6, batch, seed), _times(side=side)), 3
    best = np.full((LAYERS, EXPERTS + 1), np.inf)  # least mean by kept experts
    for row, layer in zip(best, layers, strict=True):
        runs = [_every_step(layer, p) for p in range(len(layer.tokens))]
        for keep in np.array(list(product([False, True], repeat=EXPERTS))):
            means = [
                seconds[~((fast & ~keep) | (fetched & keep)).any(axis=1)].min()
                for fast, fetched, seconds in runs
            ]
            row[keep.sum()] = min(row[keep.sum()], np.dot(layer.weight, means))
    optimum = min(best[0, k] + best[1, slots - k] for k in range(slots + 1))
    bound = bound_any(layers, slots, 5e-5, gap=0.0, workers=1)
    assert bound <= optimum * (1 + 1e-6)
    assert bound > 0


def test_a_step_by_hand() -> None:
    """Experts 0 kept, 1 and 2 fetched, 3 aside; one token each."""
    layer = Layer(tokens=np.array([[1, 1, 1, 1]]), weight=np.ones(1), times=_times(lead=1e-5))
    keep = np.array([[True, False, False, False]])
    fetch = np.array([[False, True, True, False]])
    call = 5e-6 + 4.1e-5
    copies = 2 * 5e-4 + 1e-5 + call  # the second call is behind its copy
    aside = 2e-5 + 1 * 4e-7 + 3e-5 + 2.02e-4
    assert layer.seconds(keep, fetch)[0, 0] == pytest.approx(max(3 * call, copies, aside))
    assert layer.seconds(keep, fetch & ~fetch)[0, 0] == pytest.approx(
        2e-5 + 2 * 4e-7 + 3e-5 + 3 * 2.02e-4  # three rows, but only two tokens to send
    )


def test_equal_steps_become_one_pattern() -> None:
    counts = np.array([[1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0]])
    layer = Layer.of(counts, _times())
    assert len(layer.tokens) == 2
    keep, fetch = _assignments(layer, "planned")
    whole = Layer(tokens=counts, weight=np.full(4, 0.25), times=_times())
    np.testing.assert_allclose(layer.mean(keep, fetch), whole.mean(keep, fetch), rtol=1e-12)


def test_pick_is_the_best_choice_of_columns() -> None:
    rng = np.random.default_rng(1)
    no = np.zeros(6, dtype=bool)
    pools = [
        [
            Column(keep=np.arange(6) < n, fetch=no, mean=float(rng.random()), landing=0)
            for n in range(6)
        ]
        for _ in range(3)
    ]
    for slots in (0, 4, 9, 20):
        chosen = pick(pools, slots)
        assert sum(c.slots for c in chosen) <= slots
        best = min(
            sum(c.mean for c in cs) for cs in product(*pools) if sum(c.slots for c in cs) <= slots
        )
        assert sum(c.mean for c in chosen) == pytest.approx(best)


@pytest.mark.parametrize("slots", [0, 4, 7, 8, 13, 100])
def test_layer_grain_equals_brute_force(slots: int) -> None:
    rng = np.random.default_rng(slots)
    counts = rng.integers(0, 3, (10, 4, EXPERTS))
    layers = _layers(counts, _times())
    grain = layer_grain(layers, slots)

    def mean(kept: np.ndarray) -> float:
        keep = np.repeat(kept[:, None], EXPERTS, axis=1)
        none = np.zeros((1, EXPERTS), dtype=bool)
        return sum(float(x.mean(k[None], none)[0]) for x, k in zip(layers, keep, strict=True))

    sets = [np.array(s, dtype=bool) for s in product([0, 1], repeat=4)]
    fits = [s for s in sets if s.sum() * EXPERTS <= slots]
    assert mean(grain.best) == pytest.approx(min(map(mean, fits)))
    tails = [s for s in fits if (np.diff(s.astype(int)) >= 0).all()]
    assert mean(grain.last) == pytest.approx(min(map(mean, tails)))
    assert (np.diff(grain.last.astype(int)) >= 0).all()
