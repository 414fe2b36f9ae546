"""Kinds of tokens: a number, a space, a function word of prose; each uses experts of its own.

Along a request the kinds follow each other as a Markov chain that is tilted by what the request
prefers:

    P(next is y | now is z) ~ transitions[z, y] * exp(preference[y]),    preference normal

so that a request of formulas stays one of formulas. Probabilities and preferences have no unit.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_BALANCING = 4  # rounds


@dataclass(frozen=True, kw_only=True, eq=False)
class Kinds:
    """M kinds of tokens.

    Raises
    ------
    InputError
        If shapes or values are impossible.
    """

    share: Floats
    """``[M]`` share of the tokens, sum 1."""
    transitions: Floats
    """``[M, M]`` probability of the next kind, before preferences; rows sum to 1."""
    loadings: Floats
    """``[M, r]`` of the preferences, on r common factors of a request."""
    own: Floats
    """``[M]`` variance of a kind's preference that it shares with no other."""

    def __post_init__(self) -> None:
        count = len(self.share)
        right = (
            self.share.shape == self.own.shape == (count,)
            and self.transitions.shape == (count, count)
            and self.loadings.shape == (count, self.loadings.shape[-1])
        )
        if not right:
            raise InputError(
                f"kinds: share {list(self.share.shape)}, transitions "
                f"{list(self.transitions.shape)}, loadings {list(self.loadings.shape)}, own "
                f"{list(self.own.shape)} -- must be [M], [M, M], [M, r] and [M]"
            )
        sums = np.append(self.transitions.sum(axis=1), self.share.sum())
        if self.share.min() <= 0 or self.transitions.min() < 0 or not np.allclose(sums, 1):
            raise InputError("kinds: shares and rows of transitions must be from 0 and sum to 1")
        if not (np.isfinite(self.loadings).all() and (self.own >= 0).all()):
            raise InputError("kinds: loadings must be finite, variances from 0")

    def preferences(self, common: Floats, own: Floats) -> Floats:
        """Return those of requests ``[R, M]``, of standard normals ``[R, r]`` and ``[R, M]``."""
        return common @ self.loadings.T + own * np.sqrt(self.own)

    def chains(self, preferences: Floats) -> Floats:
        """Return the transitions ``[R, M, M]`` of requests with these preferences ``[R, M]``."""
        weight = np.exp(preferences - preferences.max(axis=1, keepdims=True))
        found = self.transitions * weight[:, None, :]
        return found / found.sum(axis=2, keepdims=True)

    def balanced(self, preferences: Floats) -> Floats:
        """Shift the preferences ``[R, M]`` so that these requests together have the shares."""
        for _ in range(_BALANCING):
            found = stationary(self.chains(preferences)).mean(axis=0)
            preferences = preferences + np.log(self.share / np.maximum(found, 1e-12))
        return preferences

    def walk(self, length: int, preference: Floats, rng: np.random.Generator) -> Ints:
        """Draw the kinds ``[length]`` of the tokens of a request with this preference ``[M]``."""
        if len(self.share) == 1:
            return np.zeros(length, np.int64)
        chain = self.chains(preference[None])
        last = len(self.share) - 1  # a cumulative sum may end just below 1
        found, edges = np.empty(length, np.int64), np.cumsum(chain[0], axis=1)
        row = np.cumsum(stationary(chain)[0])
        for place, draw in enumerate(rng.random(length).tolist()):
            found[place] = min(row.searchsorted(draw), last)
            row = edges[found[place]]
        return found


ONE_KIND = Kinds(
    share=np.ones(1), transitions=np.ones((1, 1)), loadings=np.zeros((1, 1)), own=np.zeros(1)
)


def stationary(chains: Floats) -> Floats:
    """Return the shares ``[R, M]`` of long walks on chains ``[R, M, M]`` that reach every kind."""
    count = chains.shape[-1]
    # p (I - P) = 0 and p 1 = 1, in one: p (I - P + 1 1') = 1'
    balance = np.eye(count) - chains + 1
    found = np.linalg.solve(balance.swapaxes(1, 2), np.ones((len(chains), count, 1)))[..., 0]
    return np.maximum(found, 0)
