"""What an expert of one layer says about the experts of the next.

Counts, for every two adjacent layers, how often a token uses expert e of the first and f of the
second; of even-numbered and odd-numbered requests apart, so that what is learnt on the ones is
scored on the others. Predictability is a share; mutual information is in bits.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from traces.measures.base import About, Floats, Ints, groups, spread
from traces.routing_trace import RoutingTrace

MAX_BYTES = 2**30
"""Pair counts are not made where they would take more than this (bytes)."""
_KEYS = 2**20  # pairs counted at a time


@dataclass(frozen=True, kw_only=True, eq=False)
class FlowResult:
    """Figures of A pairs of adjacent layers; NaN where the trace cannot say."""

    layers: tuple[tuple[int, int], ...]
    """The model's layer indices of each pair."""
    predictability: Floats
    """``[A]`` P(best next expert among a token's experts of the second layer | an expert of the
    first), the best learnt on even requests and scored on odd ones."""
    unconditional: Floats
    """``[A]`` the same of the one expert that is most used on even requests."""
    mutual_information: Floats
    """``[A]`` between a random expert of a token in the first layer and one in the second, bits,
    from the observed shares."""
    mutual_information_floor: float
    """What independent layers and tokens would show on average, bits: ``(E - K)^2 / (2 T K^2 ln
    2)``, from the chi-square of T random K-subsets. Tokens of a request are alike: then more."""
    next_entropy: Floats
    """``[A]`` entropy of the second layer's loads, bits: an upper bound of the information."""
    skipped: str
    """Why there are no figures, where that is so; else empty."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        names = [f"{a} to {b}" for a, b in self.layers]
        answer: dict[str, Any] = {
            "layer_pairs": [list(pair) for pair in self.layers],
            "predictability": spread(self.predictability, names),
            "predictability_unconditional": spread(self.unconditional, names),
            "mutual_information_bits": spread(self.mutual_information, names),
            "next_layer_entropy_bits": spread(self.next_entropy, names),
        }
        floor = self.mutual_information_floor
        known = None if np.isnan(floor) else floor
        return answer | {"mutual_information_floor_bits": known, "skipped": self.skipped}


class Flow:
    """Pair counts of adjacent layers; memory 16 A E^2 bytes (58 layers of 256 experts: 60 MB).

    Parameters
    ----------
    about : About
        The data set.
    max_bytes : int
        Nothing is counted where the counts would take more than this (bytes).
    """

    def __init__(self, about: About, max_bytes: int = MAX_BYTES) -> None:
        meta = about.meta
        ids, experts = meta.moe_layer_ids, meta.num_experts
        self._top_k = meta.top_k
        first = [i for i, (a, b) in enumerate(pairwise(ids)) if b == a + 1]
        size = 2 * len(first) * experts * experts * 8
        self.skipped = "" if first else "no two recorded layers are adjacent in the model"
        if size > max_bytes:
            self.skipped = (
                f"pair counts of {len(first)} pairs of layers of {experts} experts take "
                f"{size / 2**20:.0f} MiB, at most {max_bytes / 2**20:.0f} MiB"
            )
        self._first = [] if self.skipped else first
        self._layers = tuple((ids[i], ids[i + 1]) for i in self._first)
        self.together: Ints = np.zeros((2, len(self._first), experts, experts), np.int64)
        """``[even or odd request, A, E, E]`` tokens that use e of the first layer and f of the
        second."""
        self.tokens: Ints = np.zeros(2, np.int64)
        """Of even and of odd requests."""

    def add(self, chunk: RoutingTrace) -> None:
        """Count the pairs of a chunk."""
        if not self._first:
            return
        for odd, rows in groups(chunk.request_id % 2):
            choices = np.ascontiguousarray(chunk.experts[rows].transpose(1, 2, 0))  # [L, K, T]
            self.tokens[odd] += choices.shape[2]
            for at, layer in enumerate(self._first):
                _count_pairs(choices[layer], choices[layer + 1], self.together[odd, at])

    def merge(self, other: Self) -> None:
        """Add the counts of another part."""
        self.together += other.together
        self.tokens += other.tokens

    def result(self) -> FlowResult:
        """Learn on the even requests, score on the odd ones."""
        learnt, most = self._scores()
        pairs = [_information(even + odd) for even, odd in zip(*self.together, strict=True)]
        information, entropy = np.array(pairs).reshape(-1, 2).T
        experts, tokens = self.together.shape[-1], int(self.tokens.sum())
        floor = (experts - self._top_k) ** 2 / (2 * self._top_k**2 * np.log(2))
        return FlowResult(
            layers=self._layers,
            predictability=learnt,
            unconditional=most,
            mutual_information=information,
            mutual_information_floor=floor / tokens if tokens else float("nan"),
            next_entropy=entropy,
            skipped=self.skipped,
        )

    def _scores(self) -> tuple[Floats, Floats]:
        """Return learnt and unconditional scores, ``[A]`` each."""
        even, odd = self.together
        if not self.tokens.all():  # a single request teaches or scores nothing
            return (np.full(len(even), np.nan),) * 2
        best = even.argmax(axis=2)
        hits = np.take_along_axis(odd, best[:, :, None], axis=2).sum(axis=(1, 2))
        # a token counts K times in the pairs of each expert of the second layer
        most_used = even.sum(axis=1).argmax(axis=1)
        guessed = odd.sum(axis=1)[np.arange(len(odd)), most_used]
        scored = self.tokens[1] * self._top_k
        return hits / scored, guessed / scored


def _count_pairs(here: NDArray[np.uint16], there: NDArray[np.uint16], counts: Ints) -> None:
    """Add to ``counts [E, E]`` the pairs of ``here`` and ``there``, ``[K, T]`` each."""
    experts = len(counts)
    kind = np.dtype(np.uint16 if experts**2 <= 2**16 else np.uint32)
    rows = max(_KEYS // len(here) ** 2, 1)
    for start in range(0, here.shape[1], rows):
        part = slice(start, start + rows)
        first = here[:, None, part].astype(kind) * kind.type(experts)
        keys = (first + there[None, :, part]).reshape(-1)
        counts += np.bincount(keys, minlength=experts**2).reshape(counts.shape)


def _information(pairs: Ints) -> tuple[float, float]:
    """Return mutual information and entropy of the second axis, bits, of ``[E, E]`` counts."""
    joint = pairs / max(pairs.sum(), 1)
    here, there = joint.sum(axis=1), joint.sum(axis=0)
    seen = joint > 0
    information = (joint[seen] * np.log2(joint[seen] / np.outer(here, there)[seen])).sum()
    used = there[there > 0]
    return float(information), float(-(used * np.log2(used)).sum())
