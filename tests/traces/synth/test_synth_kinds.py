"""Walks over kinds have the shares of their chains; a fit brings a known chain back."""

from dataclasses import replace

import numpy as np
import pytest

from basis.errors import InputError
from traces.synth_kinds import ONE_KIND, Kinds, stationary
from traces.synth_kinds_fit import Thirds, cluster, fit_kinds, pairs_of_kinds

TRANSITIONS = np.array([[0.1, 0.6, 0.3], [0.5, 0.4, 0.1], [0.2, 0.2, 0.6]])


def kinds(*, strength: float) -> Kinds:
    return Kinds(
        share=stationary(TRANSITIONS[None])[0], transitions=TRANSITIONS,
        loadings=strength * np.array([[1.0, 0.0], [-1.0, 0.5], [0.0, 1.0]]),
        own=np.full(3, strength**2 / 4),
    )  # fmt: skip


def walks(of: Kinds, requests: int, length: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.stack([of.walk(length, taste, rng) for taste in tastes(of, requests)])


def tastes(of: Kinds, requests: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    sizes = ((requests, of.loadings.shape[1]), (requests, len(of.own)))
    return of.preferences(*(rng.standard_normal(size) for size in sizes))


def test_stationary_shares_stay_as_they_are() -> None:
    chains = np.random.default_rng(0).dirichlet(np.ones(7), (5, 7))
    shares = stationary(chains)
    assert shares.sum(axis=1) == pytest.approx(1)
    assert np.einsum("rz,rzy->ry", shares, chains) == pytest.approx(shares)


def test_walks_follow_their_chain() -> None:
    found = walks(kinds(strength=0.0), 2000, 30)
    share = np.bincount(found.reshape(-1), minlength=3) / found.size
    assert share == pytest.approx(stationary(TRANSITIONS[None])[0], abs=0.02)
    assert np.bincount(found[:, 0]) / 2000 == pytest.approx(share, abs=0.05)  # from the start
    for kind in range(3):
        after = np.bincount(found[:, 1:][found[:, :-1] == kind], minlength=3)
        assert after / after.sum() == pytest.approx(TRANSITIONS[kind], abs=0.02)


def test_preferences_last_for_the_request() -> None:
    of = kinds(strength=1.0)
    found = walks(of, 3000, 40)
    expected = pairs_of_kinds(of, (1, 4), seed=0)
    chance = np.square(np.bincount(found.reshape(-1)) / found.size).sum()
    for lag, pairs in ((1, expected[1]), (4, expected[2]), (30, expected[3])):
        same = (found[:, lag:] == found[:, :-lag]).mean()
        assert same == pytest.approx(np.trace(pairs), abs=0.02)
    assert np.trace(expected[3]) > chance + 0.05
    assert expected.sum(axis=(1, 2)) == pytest.approx(1)


def test_a_request_walks_by_its_preferences() -> None:
    of = kinds(strength=2.0)
    found = []
    for taste in (np.array([1.0, 0.0, -1.0]), np.array([-1.0, 0.0, 1.0])):
        walk = of.walk(6000, taste, np.random.default_rng(0))
        found.append(np.bincount(walk, minlength=3) / 6000)
        assert found[-1] == pytest.approx(stationary(of.chains(taste[None]))[0], abs=0.04)
    assert np.abs(found[0] - found[1]).sum() > 0.5


def test_balanced_requests_have_the_shares_together() -> None:
    of = kinds(strength=2.0)
    taste = tastes(of, 16)
    far, near = (
        np.abs(stationary(of.chains(each)).mean(axis=0) - of.share).max()
        for each in (taste, of.balanced(taste))
    )
    assert far > 0.02
    assert near < 0.002
    # all are shifted alike: what tells requests apart stays
    shift = of.balanced(taste) - taste
    assert shift == pytest.approx(np.tile(shift[0], (16, 1)))


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_a_fit_brings_the_chain_back(strength: float) -> None:
    truth = kinds(strength=strength)
    found = walks(truth, 1200, 100)
    request = np.repeat(np.arange(1200), 100)
    fit = fit_kinds(found.reshape(-1), request, seed=0)
    again = walks(fit, 1200, 100)
    # what it is fitted to: the next kind, and the same kind later; the other pairs follow roughly
    for lag, bound in ((1, 0.02), (2, 0.03), (50, 0.03)):
        wanted, ours = (
            np.histogram2d(w[:, :-lag].reshape(-1), w[:, lag:].reshape(-1), 3)[0]
            / w[:, lag:].size
            for w in (found, again)
        )  # fmt: skip
        assert ours == pytest.approx(wanted, abs=bound)
    assert np.trace(ours) == pytest.approx(np.trace(wanted), abs=0.02)  # far apart
    assert fit.share == pytest.approx(np.bincount(found.reshape(-1)) / found.size)


def test_one_kind_is_no_chain() -> None:
    assert fit_kinds(np.zeros(70, np.int64), np.zeros(70, np.int64), seed=0) is ONE_KIND
    rng = np.random.default_rng(0)
    assert ONE_KIND.walk(5, np.zeros(1), rng).tolist() == [0] * 5
    assert pairs_of_kinds(ONE_KIND, (1, 2), seed=0) == pytest.approx(np.ones((4, 1, 1)))


def test_clusters_are_those_that_are_there() -> None:
    rng = np.random.default_rng(0)
    centres = np.array([[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]], np.float32)
    tokens = centres[rng.integers(3, size=200)]
    found = cluster(tokens, 8, 0)  # many of the first centres are the same
    assert {tuple(each) for each in found.tolist()} == {tuple(each) for each in centres.tolist()}
    assert len(cluster(tokens[:2], 8, 0)) <= 2


def test_thirds_are_of_long_requests() -> None:
    thirds = Thirds.of(np.repeat([0, 1, 2], [70, 63, 65]))
    assert thirds.size.tolist() == [23, 21]
    assert [rows[0] for rows in thirds.first] == [0, 133]
    assert [rows[-1] for rows in thirds.last] == [69, 197]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share": np.array([0.5, 0.5])}, r"share \[2\], transitions \[3, 3\]"),
        ({"transitions": TRANSITIONS * 2}, "sum to 1"),
        ({"transitions": TRANSITIONS * np.nan}, "sum to 1"),
        ({"loadings": np.full((3, 2), np.inf)}, "loadings must be finite"),
        ({"own": np.array([0.1, -0.1, 0.1])}, "variances from 0"),
    ],
)
def test_impossible_kinds(change: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(kinds(strength=1.0), **change)
