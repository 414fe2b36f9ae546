"""Cache replay against a plain loop, an OrderedDict, brute force and closed forms."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basis.errors import InputError
from traces.caches import Replay, hit_rate_curve, lru_hits_by_size, replay
from traces.caches_inputs import active_experts, expert_scores, token_steps
from traces.caches_scores import SCORES, needs, score_keys
from traces.predictors import predict
from traces.routing_trace import RoutingTrace, read_trace
from traces.synth import synthetic_trace, zipf_shares

Make = Callable[..., RoutingTrace]
Cell = tuple[int, int]
SCOPES = ("layer", "global")


def random_access(seed: int, steps: int, layers: int, experts: int, used: int) -> np.ndarray:
    """Return bool [S, L, E] with 0 to ``used`` experts per access, some of them favourites."""
    rng = np.random.default_rng(seed)
    clocks = rng.exponential(size=(steps, layers, experts)) * (1 + np.arange(experts))
    count = rng.integers(0, used + 1, size=(steps, layers, 1))
    return clocks.argsort(axis=-1).argsort(axis=-1) < count


def random_scores(seed: int, active: np.ndarray) -> np.ndarray:
    """Return scores that are positive for what is used and for some that is not."""
    rng = np.random.default_rng(seed)
    seen = active | (rng.random(active.shape) < 0.2)
    return np.where(seen, rng.random(active.shape) + 0.01, 0)


@dataclass
class Slow:
    """The rule of `replay`, literally, one access and one eviction at a time."""

    active: np.ndarray
    slots: int
    scope: str
    score: str
    scores: np.ndarray
    decay: float
    resident: set[Cell]
    by_score: bool = False
    most_ahead: int | None = None
    elsewhere: np.ndarray | None = None
    fetched: int = 0
    hits: int = 0
    misses: int = 0
    prefetches: int = 0
    useless: int = 0
    evictions: int = 0
    unused: set[Cell] = field(default_factory=set)
    seen: list[set[Cell]] = field(default_factory=list)

    def __post_init__(self) -> None:
        _, self.layers, self.experts = self.active.shape
        shape = self.active.shape[1:]
        self.last, self.count = np.full(shape, -1), np.zeros(shape)
        self.value, self.updated = np.zeros(shape), np.zeros(shape)
        self.time = -1

    def worth(self, cell: Cell) -> tuple[float, ...]:
        if self.score == "lru":
            return (self.last[cell],)
        if self.score == "lfu":
            return (self.count[cell], self.last[cell])
        if self.score == "belady":
            later = self.active.reshape(-1, self.experts)[self.time :, cell[1]]
            mine = (np.arange(len(later)) + self.time) % self.layers == cell[0]
            next_use = np.flatnonzero(later & mine)
            return (-next_use[0] if len(next_use) else -np.inf,)
        age = (self.time - self.updated[cell]) / self.layers
        return (self.value[cell] * self.decay**age,)

    def shrink(self, layer: int, wanted: set[Cell], yielding: set[Cell]) -> None:
        while True:
            held = {c for c in self.resident if self.scope == "global" or c[0] == layer}
            if len(held) <= self.slots:
                return
            victims = held - wanted or yielding
            victim = min(victims, key=lambda cell: (*self.worth(cell), cell))
            self.resident.remove(victim)
            yielding.discard(victim)
            self.evictions += 1
            self.useless += victim in self.unused
            self.unused.discard(victim)

    def play(self, prefetched: np.ndarray | None) -> "Slow":
        for step, layer in np.ndindex(*self.active.shape[:2]):
            used = {(layer, int(e)) for e in np.flatnonzero(self.active[step, layer])}
            self.time = step * self.layers + layer
            if prefetched is not None:
                ahead = {(layer, int(e)) for e in np.flatnonzero(prefetched[step, layer])}
                new = ahead - self.resident
                if self.most_ahead is not None:
                    by_use = sorted(new, key=lambda cell: (-self.count[cell], cell))
                    new = set(by_use[: self.most_ahead])
                    ahead = (ahead & self.resident) | new
                by_worth = sorted(new, key=lambda cell: (*self.worth(cell), cell))
                room = self.slots - len(ahead & self.resident)
                new = set(by_worth[max(len(by_worth) - room, 0) :])
                self.prefetches += len(new)
                self.unused |= new
                self.resident |= new
                self.shrink(layer, ahead, set())
            self.seen.append({cell for cell in self.resident if cell[0] == layer})
            self.hits += len(used & self.resident)
            self.misses += len(used - self.resident)
            self.unused -= used
            self.time += 1  # from here on this access is past
            self.touch(step, layer, used)
            copied = used - self.resident
            if self.elsewhere is not None:
                copied = {cell for cell in copied if not self.elsewhere[step, cell[0], cell[1]]}
            self.fetched += len(copied)
            self.resident |= copied
            spared = set[Cell]() if self.by_score else used
            self.shrink(layer, spared, spared & self.resident)
        self.useless += len(self.unused)
        return self

    def touch(self, step: int, layer: int, used: set[Cell]) -> None:
        for cell in used:
            self.last[cell] = self.time
            self.count[cell] += 1
        fresh = (1 - self.decay) * self.scores[step, layer]
        self.value[layer] = self.decay * self.value[layer] + fresh
        self.updated[layer] = self.time


@settings(max_examples=150)
@given(
    seed=st.integers(0, 10**6), score=st.sampled_from(list(SCORES)), scope=st.sampled_from(SCOPES),
    slots=st.integers(0, 9), layers=st.integers(1, 3), used=st.integers(1, 5),
    ahead=st.booleans(), warm=st.booleans(), by_score=st.booleans(), aside=st.booleans(),
    most=st.sampled_from([None, 1, 2]), decay=st.sampled_from([0.2, 0.5, 0.9]),
)  # fmt: skip
def test_replay_is_the_plain_loop(
    seed: int, score: str, scope: Any, slots: int, layers: int, used: int, ahead: bool,
    warm: bool, by_score: bool, aside: bool, most: int | None, decay: float,
) -> None:  # fmt: skip
    active = random_access(seed, 20, layers, 6, used)
    scores = random_scores(seed, active)
    prefetched = random_access(seed + 1, 20, layers, 6, used) if ahead else None
    start = np.zeros((layers, 6), bool)
    if warm:
        start[0, : min(slots, 3)] = True
    elsewhere = random_access(seed + 2, 20, layers, 6, 4) if aside else None
    seen_by_site = []

    def loaded(step: int, which: slice, resident: np.ndarray) -> np.ndarray:
        assert elsewhere is not None
        seen_by_site.append(resident)
        return np.asarray(~elsewhere[step, which])

    fast = replay(
        active, slots=slots, score=score, scope=scope, scores=scores, decay=decay,
        prefetched=prefetched, start=start, admission="score" if by_score else "always",
        most_ahead=most, loaded=loaded if aside else None,
    )  # fmt: skip
    resident = {(0, int(e)) for e in np.flatnonzero(start[0])}
    slow = Slow(active, slots, scope, score, scores, decay, resident, by_score, most, elsewhere)
    slow.play(prefetched)
    assert (fast.hits, fast.misses) == (slow.hits, slow.misses)
    assert int(fast.fetched.sum()) == slow.fetched
    if aside:
        assert np.array_equal(np.concatenate(seen_by_site), fast.resident.reshape(-1, 6))
        assert not (fast.fetched & elsewhere).any()
    assert fast.prefetch_loads == slow.prefetches
    assert fast.useless_prefetches == slow.useless
    assert fast.evictions == slow.evictions
    assert {(int(i), int(e)) for i, e in np.argwhere(fast.final)} == slow.resident
    seen = fast.resident.reshape(-1, 6)
    for access, cells in enumerate(slow.seen):
        assert {(access % layers, int(e)) for e in np.flatnonzero(seen[access])} == cells
    check_conservation(fast)


def check_conservation(result: Replay) -> None:
    assert result.hits + result.misses == result.active.sum()
    residents = int(result.final.sum()) - int(result.start.sum())
    assert result.loads - result.evictions == residents
    assert not (result.prefetched & ~result.resident).any()
    assert result.useless_prefetches <= result.prefetch_loads


@settings(max_examples=60)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=80), st.integers(1, 9))
def test_lru_is_an_ordered_dict(sequence: list[int], slots: int) -> None:
    cache: OrderedDict[int, None] = OrderedDict()
    hits = []
    for expert in sequence:
        hits.append(expert in cache)
        cache[expert] = None
        cache.move_to_end(expert)
        if len(cache) > slots:
            cache.popitem(last=False)
    active = np.zeros((len(sequence), 1, 8), bool)
    active[np.arange(len(sequence)), 0, sequence] = True
    for scope in SCOPES:
        result = replay(active, slots=slots, score="lru", scope=scope)  # type: ignore[arg-type]
        assert result.hit.any(axis=(1, 2)).tolist() == hits
        assert set(np.flatnonzero(result.final)) == set(cache)


def fewest_misses(accesses: list[frozenset[int]], slots: int, *, free: bool = False) -> int:
    """Try every choice of what stays; an access that exceeds the slots keeps only its own.

    With ``free`` choice nothing that was used has to stay.
    """
    reached = {frozenset[int](): 0}
    for used in accesses:
        after: dict[frozenset[int], int] = {}
        for held, misses in reached.items():
            cost = misses + len(used - held)
            must, may = (used, held - used) if len(used) <= slots else (frozenset(), used)
            if free:
                must, may = frozenset(), used | held
            for size in range(max(slots - len(must), 0) + 1):
                for kept in combinations(sorted(may), size):
                    state = must | frozenset(kept)
                    after[state] = min(after.get(state, cost), cost)
        reached = after
    return min(reached.values())


@settings(max_examples=80)
@given(
    accesses=st.lists(st.frozensets(st.integers(0, 4), max_size=4), min_size=1, max_size=9),
    slots=st.integers(1, 4),
)
def test_belady_is_the_best_of_all_choices(accesses: list[frozenset[int]], slots: int) -> None:
    active = np.array([[[e in used for e in range(5)]] for used in accesses])
    assert replay(active, slots=slots, score="belady").misses == fewest_misses(accesses, slots)
    free = replay(active, slots=slots, score="belady", admission="score")
    assert free.misses == fewest_misses(accesses, slots, free=True)
    # and with two layers that share one pool
    pairs = active[: len(active) // 2 * 2].reshape(-1, 2, 5)
    cells = [
        frozenset(int(e) + 5 * layer for e in np.flatnonzero(step[layer]))
        for step in pairs
        for layer in range(2)
    ]
    pool = replay(pairs, slots=slots, score="belady", scope="global")
    assert pool.misses == (fewest_misses(cells, slots) if cells else 0)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6), scope=st.sampled_from(SCOPES), slots=st.integers(1, 20),
    used=st.integers(1, 6), admission=st.sampled_from(("always", "score")),
)  # fmt: skip
def test_belady_never_misses_more_than_any_policy(
    seed: int, scope: Any, slots: int, used: int, admission: Any
) -> None:
    active = random_access(seed, 40, 3, 8, used)
    scores = random_scores(seed, active)
    options = {"slots": slots, "scope": scope, "admission": admission, "scores": scores}
    misses = {score: replay(active, score=score, **options).misses for score in SCORES}
    assert min(misses.values()) == misses["belady"]


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), used=st.integers(1, 6))
def test_lru_stack_distances_and_inclusion(seed: int, used: int) -> None:
    active = random_access(seed, 40, 2, 6, used)
    hits = lru_hits_by_size(active)
    smaller = np.zeros_like(active)
    for slots in range(7):
        result = replay(active, slots=slots, score="lru")
        assert result.hits == hits[slots]
        assert not (smaller & ~result.resident).any()
        smaller = result.resident
    curve = hit_rate_curve(active, "lru", range(9))
    assert curve == pytest.approx(np.append(hits, hits[[-1, -1]]) / max(active.sum(), 1))


def test_hit_rate_curve_replays_other_scores() -> None:
    active = random_access(1, 60, 2, 6, 3)
    for score, scope in (("belady", "layer"), ("lru", "global")):
        curve = hit_rate_curve(active, score, (2, 4), scope=scope)  # type: ignore[arg-type]
        alone = [
            replay(active, slots=c, score=score, scope=scope).hit_rate  # type: ignore[arg-type]
            for c in (2, 4)
        ]
        assert curve.tolist() == alone


@pytest.mark.parametrize("score", list(SCORES))
@pytest.mark.parametrize(("scope", "slots"), [("layer", 6), ("global", 18)])
def test_room_for_all_leaves_compulsory_misses(score: str, scope: Any, slots: int) -> None:
    active = random_access(3, 50, 3, 6, 4)
    scores = random_scores(3, active)
    result = replay(active, slots=slots, score=score, scope=scope, scores=scores)
    assert result.misses == active.any(axis=0).sum()
    assert result.evictions == 0
    full = replay(
        active, slots=slots, score=score, scope=scope, scores=scores, start=np.ones((3, 6), bool)
    )
    assert full.hit_rate == 1
    assert full.loads == 0


@pytest.mark.parametrize(("scope", "slots"), [("layer", 4), ("global", 5)])
@pytest.mark.parametrize("depth", [1, 2])
def test_exact_prefetch_leaves_misses_in_the_first_layers(
    scope: Any, slots: int, depth: int
) -> None:
    active = random_access(5, 50, 3, 8, 4)
    prefetched = predict("exact", active, depth=depth)
    result = replay(active, slots=slots, score="lru", scope=scope, prefetched=prefetched)
    assert result.miss[:, depth:].sum() == 0
    assert result.miss[:, :depth].sum() > 0
    assert result.useless_prefetches == 0
    everything = replay(
        active, slots=8, score="lru", scope=scope, prefetched=predict("all", active)
    )
    assert everything.misses == 0


def test_slots_per_layer_are_independent_caches() -> None:
    active = random_access(7, 40, 3, 6, 3)
    slots = np.array([1, 3, 5])
    joint = replay(active, slots=slots, score="lfu")
    for layer, count in enumerate(slots):
        alone = replay(active[:, [layer]], slots=int(count), score="lfu")
        assert np.array_equal(joint.resident[:, layer], alone.resident[:, 0])
    assert (joint.resident.sum(axis=2) <= slots).all()


@pytest.mark.parametrize("scope", SCOPES)
def test_what_is_computed_elsewhere_does_not_come_in(scope: Any) -> None:
    active = random_access(11, 40, 3, 6, 3)
    none = replay(
        active, slots=4, score="lru", scope=scope, loaded=lambda _, which, held: np.zeros_like(held)
    )
    assert (none.hits, none.loads, none.evictions) == (0, 0, 0)
    assert none.misses == active.sum()
    every = replay(
        active, slots=4, score="lru", scope=scope, loaded=lambda _, which, held: np.ones_like(held)
    )
    assert np.array_equal(
        every.resident, replay(active, slots=4, score="lru", scope=scope).resident
    )
    assert np.array_equal(every.fetched, every.miss)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("score", list(SCORES))
def test_pinned_experts_are_outside(scope: Any, score: str) -> None:
    active = random_access(8, 40, 2, 6, 3)
    scores = random_scores(8, active)
    pinned = np.zeros((2, 6), bool)
    pinned[0, :2] = pinned[1, 3] = True
    options: dict[str, Any] = {"slots": 3, "score": score, "scope": scope}
    prefetched = random_access(9, 40, 2, 6, 2)
    result = replay(active, **options, scores=scores, pinned=pinned, prefetched=prefetched)
    assert not (result.resident & pinned).any()
    assert not (result.active & pinned).any()
    without = replay(
        active & ~pinned, **options, scores=np.where(pinned, 0, scores),
        prefetched=prefetched & ~pinned,
    )  # fmt: skip
    assert np.array_equal(result.resident, without.resident)
    assert result.hits == without.hits


def test_averages_are_the_formula() -> None:
    scores = np.where(np.random.default_rng(0).random((300, 2, 5)) < 0.3, 0.7, 0)
    scores[:3] = 0.1
    for name in ("weight_ema", "mrs"):
        keys = score_keys(name, scores > 0, scores=scores, decay=0.8)
        value = np.zeros((2, 5))
        for step in range(300):
            value = 0.8 * value + 0.2 * scores[step]
            for layer in range(2):
                access = step * 2 + layer
                touched = slice(keys.bounds[access], keys.bounds[access + 1])
                cells = keys.cells[touched]
                now = np.exp(keys.values[touched] + access / 2 * np.log(0.8))
                assert now == pytest.approx(value.reshape(-1)[cells], rel=1e-9)


def test_a_small_case_by_hand() -> None:
    sequence = [{0}, {1}, {2}, {0}, {1, 2}]
    active = np.array([[[e in used for e in range(3)]] for used in sequence])
    lru = replay(active, slots=2, score="lru")
    assert (lru.hits, lru.misses, lru.evictions) == (1, 5, 3)  # only the last 2 is found
    ahead = np.zeros_like(active)
    ahead[3, 0, 0] = True  # in time
    ahead[4, 0, 0] = True  # already there: no load
    ahead[1, 0, 2] = True  # a step too early: the access it was made for pushes it out
    ahead[2, 0, 1] = True  # already there
    result = replay(active, slots=2, score="lru", prefetched=ahead)
    assert result.prefetch_loads == 2
    assert result.useless_prefetches == 1
    assert np.argwhere(result.miss)[:, [0, 2]].tolist() == [[0, 0], [1, 1], [2, 2], [4, 1]]
    assert (result.evictions, np.flatnonzero(result.final).tolist()) == (4, [1, 2])
    roomy = replay(active, slots=3, score="lru", prefetched=ahead)
    assert (roomy.prefetch_loads, roomy.useless_prefetches, roomy.misses) == (1, 0, 2)
    assert replay(np.zeros((3, 1, 4), bool), slots=1, score="lfu").hit_rate == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": "fifo"}, "unknown eviction score 'fifo' -- one of lru, lfu, belady"),
        ({"admission": "no"}, "unknown admission 'no' -- one of always, score"),
        ({"scope": "node"}, "unknown cache scope 'node' -- one of layer, global"),
        ({"slots": -1}, r"cache slots -1 \(scope layer\) -- must be a count, or one for each of 2"),
        ({"slots": 1.5}, "cache slots 1.5"),
        ({"most_ahead": 0}, "most_ahead 0 -- must be at least 1, or none for no limit"),
        ({"slots": np.array([1, 2, 3])}, r"cache slots \[1 2 3\] .* each of 2 layers"),
        ({"slots": np.array([1, 2]), "scope": "global"}, "must be a count, from 0"),
        ({"start": np.ones((2, 6), bool)}, "start holds 6 experts, slots 2"),
        ({"start": np.ones((2, 5), bool)}, r"start is bool\[2, 5\] -- must be bool\[2, 6\]"),
        ({"pinned": np.ones((2, 6))}, r"pinned is float64\[2, 6\] -- must be bool"),
        ({"prefetched": np.ones((3, 2, 6), bool)}, r"prefetched is bool\[3, 2, 6\]"),
        ({"score": "mrs"}, r"score 'mrs' needs router scores \[20, 2, 6\], got none"),
        ({"score": "mrs", "scores": np.ones((1, 2, 6))}, r"got \[1, 2, 6\]"),
        ({"score": "weight_ema", "scores": np.full((20, 2, 6), -1.0)}, "finite and not negative"),
        ({"score": "mrs", "scores": np.ones((20, 2, 6)), "decay": 1.0}, "decay 1.0 of score 'mrs'"),
    ],
)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    options = {"slots": 2, "score": "lru"} | changes
    with pytest.raises(InputError, match=message):
        replay(random_access(0, 20, 2, 6, 3), **options)


def test_bad_accesses() -> None:
    for active in (np.ones((2, 3), bool), np.ones((2, 3, 4))):
        with pytest.raises(InputError, match=r"active is .* -- must be bool \[steps, layers"):
            replay(active, slots=1, score="lru")


def test_inputs_are_plain_sums(make_trace: Make) -> None:
    trace = make_trace(lengths=(7, 4, 9), experts=8, top_k=2)
    rng = np.random.default_rng(0)
    assert trace.weights is not None
    for rows in (
        rng.integers(trace.num_tokens, size=(5, 3)),
        [rng.integers(trace.num_tokens, size=n) for n in (1, 6, 2)],
    ):
        active = active_experts(trace, rows)
        scores = expert_scores(trace, rows, "weight_ema")
        assert scores is not None
        expected = np.zeros(active.shape)
        for step, row in enumerate(rows):
            for token in row:
                for layer, expert in np.ndindex(3, 2):
                    weight = float(trace.weights[token, layer, expert])
                    expected[step, layer, trace.experts[token, layer, expert]] += weight
        assert np.array_equal(active, expected > 0)
        assert scores == pytest.approx(expected, rel=1e-6)
        assert expert_scores(trace, rows, "lru") is None


def test_token_steps_go_request_after_request(make_trace: Make) -> None:
    trace = make_trace(lengths=(7, 4, 9), prompt=2)
    rows = token_steps(trace)
    assert rows.shape == (20 - 6, 1)
    order = list(zip(trace.request_id[rows[:, 0]], trace.position[rows[:, 0]], strict=True))
    expected = [(r, p) for r, n in ((30, 7), (20, 4), (10, 9)) for p in range(2, n)]
    assert order == expected


def with_candidates(count: int, **options: Any) -> RoutingTrace:
    shares = zipf_shares(12, 0.3, layers=2, seed=0)
    return synthetic_trace(
        shares, tokens=40, requests=2, top_k=3, seed=0, candidates=count, **options
    )


def test_mrs_takes_the_2k_best_candidates() -> None:
    trace = with_candidates(8)
    rows = np.arange(40).reshape(20, 2)
    scores = expert_scores(trace, rows, "mrs")
    assert trace.candidates is not None
    assert trace.candidate_scores is not None
    assert scores is not None
    expected = np.zeros((20, 2, 12))
    for step, layer, token in np.ndindex(20, 2, 2):
        for place in range(6):
            expert = trace.candidates[rows[step, token], layer, place]
            score = trace.candidate_scores[rows[step, token], layer, place]
            expected[step, layer, expert] += score
    assert scores == pytest.approx(expected, rel=1e-6)
    result = replay(active_experts(trace, rows), slots=6, score="mrs", scores=scores)
    assert 0 < result.hit_rate < 1


def test_what_a_trace_cannot_give(make_trace: Make) -> None:
    bare = make_trace(top_k=4, weights=False)
    weighted = make_trace(top_k=4)
    few = with_candidates(5)
    needs("lru", bare)
    needs("weight_ema", weighted)
    needs("mrs", with_candidates(6))
    for name, trace, message in (
        ("mrs", weighted, r"needs the 2k = 8 best candidates of each token, this trace has only "
         "the chosen 4 -- record candidates or use weight_ema"),
        ("mrs", bare, "the chosen 4 -- record candidates or use lru"),
        ("mrs", few, "2k = 6 best candidates of each token, this trace has only 5 -- record"),
        ("weight_ema", bare, "needs the router weights .* has none -- record weights or use lru"),
        ("fifo", bare, "unknown eviction score 'fifo'"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            needs(name, trace)
    with pytest.raises(InputError, match="2k = 8 best"):
        expert_scores(weighted, np.zeros((1, 1), int), "mrs")


def test_gpt_oss_hit_rates(moeplan_data: Path) -> None:
    trace = read_trace(moeplan_data / "traces" / "gpt-oss-20b-mmlu.parquet")
    rows = token_steps(trace)[:3000]
    active = active_experts(trace, rows)
    scores = expert_scores(trace, rows, "weight_ema")
    rates = {
        name: replay(active, slots=8, score=name, scores=scores).hit_rate
        for name in ("lru", "lfu", "weight_ema", "belady")
    }
    assert rates["lru"] == pytest.approx(hit_rate_curve(active, "lru", [8])[0])
    assert max(rates.values()) == rates["belady"]
    assert min(rates.values()) > 8 / 32  # better than eight fixed experts under uniform routing
    with pytest.raises(InputError, match="2k = 8 best candidates"):
        needs("mrs", trace)


@pytest.mark.parametrize("score", ["lru", "lfu", "belady", "weight_ema"])
def test_a_sequence_without_accesses_loads_nothing(score: str) -> None:
    nothing = np.zeros((3, 2, 4), dtype=np.bool_)
    scores = np.zeros((3, 2, 4)) if score == "weight_ema" else None
    played = replay(nothing, slots=2, score=score, scores=scores)
    assert (played.hits, played.misses, played.loads, played.evictions) == (0, 0, 0, 0)
