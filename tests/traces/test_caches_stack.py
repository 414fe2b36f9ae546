"""Stacks of all sizes against one replay for each size, with fixed and with changing worths."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traces.caches import LruStacks, lru_hits_by_size
from traces.caches_stack import Stacks, largest_key, worth


def slow(
    sequence: list[list[int]], keys: list[list[int]], experts: int, slots: int
) -> list[list[int]]:
    """Play one cache: lists of hits. ``keys[t]`` are those of all experts after access t."""
    held: set[int] = set()
    hits = []
    for used, key in zip(sequence, keys, strict=True):
        hits.append([e for e in used if e in held])
        held |= set(used)
        while len(held) > slots:
            others = held - set(used) or held
            held.remove(min(others, key=lambda e: (key[e], e)))
    return hits


@settings(max_examples=60)
@given(data=st.data(), experts=st.integers(1, 9), groups=st.integers(1, 3))
def test_places_are_those_of_one_cache_for_each_size(data: Any, experts: int, groups: int) -> None:
    many = data.draw(st.integers(1, experts))
    steps = data.draw(st.integers(1, 25))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    used = rng.random((steps, groups, experts)).argsort(axis=2)[..., :many]
    keys = rng.integers(0, 4, size=(steps, groups, experts))  # worths change at every step
    known = np.zeros((groups, experts), bool)
    stacks = Stacks(groups, experts)
    places = []
    for step in range(steps):
        np.put_along_axis(known, used[step], True, axis=1)
        key = np.where(known, keys[step], -1)
        cells = used[step] + np.arange(groups)[:, None] * experts
        places.append(stacks.access(cells, worth(key, np.arange(experts), experts)))
    for group in range(groups):
        sequence = used[:, group].tolist()
        for slots in range(experts + 1):
            hits = slow(sequence, keys[:, group].tolist(), experts, slots)
            for step, found in enumerate(hits):
                inside = places[step][group] < slots
                assert used[step, group][inside].tolist() == found


def test_only_the_first_groups_may_be_played() -> None:
    rng = np.random.default_rng(0)
    ids = np.arange(4)
    joint, alone = Stacks(3, 4), Stacks(1, 4)
    for step in range(20):
        count = 3 if step < 10 else 1
        used = rng.integers(4, size=(3, 1))
        key = np.full((3, 4), step)
        cells = (used + np.arange(3)[:, None] * 4)[:count]
        found = joint.access(cells, worth(key[:count], ids, 4))
        assert found[0] == alone.access(used[:1], worth(key[:1], ids, 4))[0]


@pytest.mark.parametrize("experts", [1, 2, 3, 8, 9])
def test_the_largest_key_fits(experts: int) -> None:
    ids = np.arange(experts)
    keys = np.array([-1, 0, 1, largest_key(experts)])[:, None]
    joined = worth(keys, ids, experts).reshape(-1)
    assert (np.diff(joined) > 0).all()


@given(seed=st.integers(0, 10**6), pieces=st.integers(1, 6))
def test_lru_stacks_may_be_played_in_pieces(seed: int, pieces: int) -> None:
    active = np.random.default_rng(seed).random((30, 2, 6)) < 0.4
    stacks = LruStacks(2, 6)
    for piece in np.array_split(active, pieces):
        stacks.play(piece)
    assert np.array_equal(stacks.hits.sum(axis=0), lru_hits_by_size(active))
    for layer in range(2):
        assert np.array_equal(stacks.hits[layer], lru_hits_by_size(active[:, [layer]]))
