"""How alike the experts of consecutive tokens are: segment routing and chunk sparsity.

A segment is m tokens of a request at consecutive positions; all such windows are looked at, one
starting at every token. The measure counts, for each layer and expert, the windows in which the
expert is used 0, 1, ... m times; every figure here follows from these counts. Figures are shares or
ratios.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from traces.measures.base import About, Floats, Ints, plain, spread
from traces.measures.sample import SAMPLE_TOKENS, chosen_requests
from traces.routing_trace import RoutingTrace

ROUTING_LENGTHS = (4, 16, 64, 256)
"""Of the segments of the published study, tokens."""
CHUNK_LENGTHS = (1, 2, 4, 8, 16, 32)
"""Tokens of a chunk; 1 is the sparsity of a token."""
MAX_BYTES = 2**30


@dataclass(frozen=True, kw_only=True, eq=False)
class SegmentRouting:
    """How well one set of experts for a whole segment of m tokens would serve it (SRP).

    J. Liang et al., "Not all models suit expert offloading: on local routing consistency of
    mixture-of-expert models", ICLR 2026 (arXiv 2505.16056), section 2.2 and its appendix C. A
    segment router says "used by all m tokens" or "by none" for each expert and segment. With f
    uses in a segment, "all" has f true positives and m - f false ones, "none" f false negatives.
    F1 is largest where "all" is said from some number of uses on; that F1 is the figure. NaN where
    there is no segment of that length, or the expert was never used.
    """

    length: int
    """m, tokens."""
    segments: int
    moe_layer_ids: tuple[int, ...]
    of_layer: Floats
    """``[L]`` best F1, one threshold for all experts of a layer."""
    of_expert: Floats
    """``[L, E]`` best F1, a threshold for each expert."""
    of_model: float
    """Best F1, one threshold for all layers."""
    size_ratio: Floats
    """``[L]`` rho-hat: experts that the best segment router of a layer uses, over K."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; of the experts of a layer only the mean."""
        ids = self.moe_layer_ids
        known = ~np.isnan(self.of_expert)
        total = np.where(known, self.of_expert, 0).sum(axis=1)
        mean = np.divide(
            total, known.sum(axis=1), out=np.full(len(total), np.nan), where=known.any(axis=1)
        )  # fmt: skip
        return {
            "length": self.length,
            "segments": self.segments,
            "f1_of_layer": spread(self.of_layer, ids),
            "f1_of_expert_mean": spread(mean, ids),
            "f1_of_model": plain(self.of_model),
            "size_ratio": spread(self.size_ratio, ids),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class ChunkSparsity:
    """Share of a layer's experts that m consecutive tokens leave unused, all together (CLS).

    C. Song et al., "BlockFFN: towards end-side acceleration-friendly mixture-of-experts with
    chunk-level activation sparsity", 2025: ``1 - |union over m tokens| / E``. For m = 1 it is the
    token-level sparsity TLS, ``1 - K / E``. NaN where there is no chunk of that length.
    """

    length: int
    """m, tokens."""
    chunks: int
    moe_layer_ids: tuple[int, ...]
    observed: Floats
    """``[L]`` mean over chunks."""
    independent: Floats
    """``[L]`` of m independent tokens with the same loads: mean over experts of ``(1 - p_e)^m``,
    with p_e the share of tokens that use e."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        ids = self.moe_layer_ids
        return {
            "length": self.length,
            "chunks": self.chunks,
            "observed": spread(self.observed, ids),
            "independent": spread(self.independent, ids),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Locality:
    """Segments and chunks of several lengths."""

    tokens: int
    """Looked at: whole requests."""
    tokens_share: float
    """Of the data set's tokens."""
    routing: tuple[SegmentRouting, ...]
    sparsity: tuple[ChunkSparsity, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return plain(self)


class Segments:
    """Counts uses in windows of consecutive tokens; a `Measure` whose result is a `Locality`.

    Parameters
    ----------
    about : About
    tokens : int, optional
        Look at a sample of whole requests of at most so many tokens (`chosen_requests`); None
        takes all.
    routing, chunks : sequence of int
        Lengths of segments and of chunks, tokens.

    Raises
    ------
    InputError
        If a length is below 1, or the counts would take more than a GiB.
    """

    def __init__(
        self,
        about: About,
        tokens: int | None = SAMPLE_TOKENS,
        routing: Sequence[int] = ROUTING_LENGTHS,
        chunks: Sequence[int] = CHUNK_LENGTHS,
    ) -> None:
        self._about, self._chosen = about, chosen_requests(about, tokens)
        self._routing, self._chunks = tuple(routing), tuple(chunks)
        lengths = sorted({1, *routing, *chunks})
        layers, experts = about.meta.num_layers, about.meta.num_experts
        size = 8 * layers * experts * sum(length + 1 for length in lengths)
        if lengths[0] < 1 or size > MAX_BYTES:
            raise InputError(
                f"segments of {lengths} tokens ({size / 2**30:.2f} GiB of counts) -- from 1, and "
                f"at most {MAX_BYTES / 2**30:.0f} GiB; ask for fewer or shorter ones"
            )
        self._counts = {m: np.zeros((layers, experts, m + 1), np.int64) for m in lengths}
        self._last: _Rows | None = None

    def add(self, chunk: RoutingTrace) -> None:
        """Count the windows that end in a chunk."""
        rows = np.flatnonzero(self._chosen[chunk.request_id])
        if not len(rows):
            return
        new = _Rows.of(chunk, rows)
        old, self._last = self._last, None
        seen = 0 if old is None else len(old.run)
        joined = new if old is None else old.then(new)
        for layer in range(joined.experts.shape[1]):
            self._count(layer, joined, seen)
        self._last = joined.tail(max(self._counts) - 1)

    def _count(self, layer: int, rows: "_Rows", seen: int) -> None:
        experts = self._about.meta.num_experts
        used = np.zeros((len(rows.run) + 1, experts), np.int32)
        used[np.arange(1, len(used))[:, None], rows.experts[:, layer]] = 1
        before = np.cumsum(used, axis=0, out=used)
        for length, counts in self._counts.items():
            start = _windows(rows.run, length, seen)
            uses = before[start + length] - before[start]
            key = uses + np.arange(experts) * (length + 1)
            found = np.bincount(key.reshape(-1), minlength=counts[layer].size)
            counts[layer] += found.reshape(experts, length + 1)

    def merge(self, other: Self) -> None:
        """Take in the counts of another part."""
        for length, counts in self._counts.items():
            counts += other._counts[length]

    def result(self) -> Locality:
        """Return all figures."""
        ids = self._about.meta.moe_layer_ids
        tokens = self._segments(1)
        with np.errstate(invalid="ignore"):
            loads = self._counts[1][:, :, 1] / np.float64(tokens)
        return Locality(
            tokens=tokens,
            tokens_share=tokens / max(self._about.num_tokens, 1),
            routing=tuple(segment_routing(self._counts[length], ids) for length in self._routing),
            sparsity=tuple(
                ChunkSparsity(
                    length=length,
                    chunks=self._segments(length),
                    moe_layer_ids=ids,
                    observed=_share(self._counts[length][:, :, 0], self._segments(length)),
                    independent=((1 - loads) ** length).mean(axis=1),
                )
                for length in self._chunks
            ),
        )

    def _segments(self, length: int) -> int:
        return int(self._counts[length][0, 0].sum())


@dataclass(frozen=True, kw_only=True, eq=False)
class _Rows:
    """Consecutive rows; a run is tokens of one request at consecutive positions."""

    experts: NDArray[np.uint16]
    request: NDArray[np.int32]
    position: NDArray[np.int32]
    run: Ints
    """``[T]`` number of each row's run."""

    @classmethod
    def of(cls, chunk: RoutingTrace, rows: Ints) -> Self:
        """Take rows of a chunk."""
        return cls._numbered(
            chunk.experts[rows], chunk.request_id[rows], chunk.position[rows]
        )  # fmt: skip

    @classmethod
    def _numbered(
        cls, experts: NDArray[np.uint16], request: NDArray[np.int32], position: NDArray[np.int32]
    ) -> Self:
        same = (np.diff(request) == 0) & (np.diff(position) == 1)
        run = np.concatenate([[0], np.cumsum(~same)])
        return cls(experts=experts, request=request, position=position, run=run)

    def then(self, later: Self) -> Self:
        """Return these rows and later ones."""
        return self._numbered(
            np.concatenate([self.experts, later.experts]),
            np.concatenate([self.request, later.request]),
            np.concatenate([self.position, later.position]),
        )

    def tail(self, count: int) -> Self | None:
        """Return the last rows, as far as they are of the last run."""
        kept = slice(max(len(self.run) - count, int(np.searchsorted(self.run, self.run[-1]))), None)
        if not len(self.run[kept]):
            return None
        return self._numbered(self.experts[kept], self.request[kept], self.position[kept])


def _windows(run: Ints, length: int, seen: int) -> Ints:
    """Return the first rows of the windows inside a run that end at row ``seen`` or later."""
    if len(run) < length:
        return np.empty(0, np.int64)
    first = max(seen - length + 1, 0)
    inside = run[first : len(run) - length + 1] == run[first + length - 1 :]
    return np.flatnonzero(inside) + first


def segment_routing(counts: Ints, moe_layer_ids: Sequence[int]) -> SegmentRouting:
    """Find the best segment router from counts of segments.

    Parameters
    ----------
    counts : int64 array ``[L, E, m + 1]``
        Segments in which the expert is used 0, 1, ... m times; the same sum for all.
    moe_layer_ids : sequence of int
        The model's layer index of each layer.
    """
    of_layer, ratio = _best(counts.sum(axis=1))
    return SegmentRouting(
        length=counts.shape[2] - 1,
        segments=int(counts[0, 0].sum()),
        moe_layer_ids=tuple(moe_layer_ids),
        of_layer=of_layer,
        of_expert=_best(counts)[0],
        of_model=float(_best(counts.sum(axis=(0, 1)))[0]),
        size_ratio=ratio,
    )


def _best(counts: Ints) -> tuple[Floats, Floats]:
    """Return the best F1 over thresholds, and said over actual uses there, of ``[..., m + 1]``."""
    length = counts.shape[-1] - 1
    from_here = np.cumsum(counts[..., ::-1], axis=-1)[..., ::-1]
    said = length * from_here
    right = np.cumsum((counts * np.arange(length + 1))[..., ::-1], axis=-1)[..., ::-1]
    actual = right[..., :1]
    f1 = 2 * right / np.maximum(said + actual, 1)
    at = f1.argmax(axis=-1)[..., None]
    known = actual[..., 0] > 0
    chosen = np.take_along_axis(said, at, axis=-1)[..., 0] / np.maximum(actual[..., 0], 1)
    best = np.take_along_axis(f1, at, axis=-1)[..., 0]
    return np.where(known, best, np.nan), np.where(known, chosen, np.nan)


def _share(empty: Ints, chunks: int) -> Floats:
    """Return the mean over experts of the share of chunks that leave an expert unused."""
    return empty.mean(axis=1) / chunks if chunks else np.full(len(empty), np.nan)
