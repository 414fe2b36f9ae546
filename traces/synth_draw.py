"""Draws routing traces from a fitted generator (`traces.synth_model`), request after request.

Each request has its own random stream, so the trace depends on the seed alone, not on how it is cut
into chunks; memory does not grow with the number of tokens.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter
from scipy.special import ndtri

from basis.errors import InputError
from traces.routing_trace import RoutingTrace, TraceWriter
from traces.synth_model import Process, SynthFit

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
CHUNK_ROWS = 16384
_PIECE_CELLS = 2**22  # scores drawn at a time: 16 MiB
_TOPICS = 16  # requests whose topics are drawn together, even and odd ones apart
_DOMAINS = ("synthetic",)


def request_lengths(fit: SynthFit, *, tokens: int, requests: int | None, seed: int) -> Ints:
    """Draw the tokens of each request: the fitted distribution, scaled to the sum asked for.

    Parameters
    ----------
    tokens : int
        Sum of the lengths.
    requests : int, optional
        R; as many as fit by the mean length where it is not given.

    Returns
    -------
    int64 array ``[R]``, each at least 1.

    Raises
    ------
    InputError
        If there are fewer tokens than requests, or none of either.
    """
    places = np.linspace(0, 1, len(fit.lengths))
    if requests is None:
        mean = np.interp(np.linspace(0, 1, 1001), places, fit.lengths).mean()
        requests = max(round(tokens / mean), 1)
    if not 1 <= requests <= tokens:
        raise InputError(f"requests {requests} -- must be between 1 and tokens ({tokens})")
    wanted = np.interp(np.random.default_rng(seed).random(requests), places, fit.lengths)
    edges = np.concatenate([[0], np.cumsum(wanted)])
    spare = tokens - requests  # every request has one token, the rest is shared out
    return 1 + np.diff(np.round(edges / edges[-1] * spare).astype(np.int64))


def draw_trace(fit: SynthFit, lengths: Ints, *, seed: int) -> RoutingTrace:
    """Draw a whole trace in memory; as `draw_chunks`."""
    return _joined(list(draw_chunks(fit, lengths, seed=seed)))


def draw_chunks(
    fit: SynthFit, lengths: Ints, *, seed: int, rows: int = CHUNK_ROWS
) -> Iterator[RoutingTrace]:
    """Draw a trace in chunks.

    Parameters
    ----------
    fit : SynthFit
    lengths : int array ``[R]``
        Tokens of each request; the first ones are its prompt, by the fitted share.
    seed : int
        From 0; the same seed gives the same trace.
    rows : int
        Tokens of a chunk, about.
    """
    sampler = Sampler(fit)
    pieces: list[RoutingTrace] = []
    held = 0
    for request, length in enumerate(lengths.tolist()):
        position = 0
        prompt = round(fit.prompt_share * length)
        for experts in sampler.request(request, length, seed):
            pieces.append(_rows(fit, experts, request, position, prompt))
            position += len(experts)
            held += len(experts)
            if held >= rows:
                yield _joined(pieces)
                pieces, held = [], 0
    if pieces:
        yield _joined(pieces)


def write_drawn(fit: SynthFit, lengths: Ints, path: Path, *, seed: int) -> None:
    """Draw a trace into a Parquet file, in bounded memory."""
    with TraceWriter(path, fit.meta, _DOMAINS, weights=False) as out:
        for chunk in draw_chunks(fit, lengths, seed=seed):
            out.write(chunk)


class Sampler:
    """Draws the experts of tokens."""

    def __init__(self, fit: SynthFit) -> None:
        self._fit = fit
        self._shape = (fit.meta.num_layers, fit.meta.num_experts)
        self._means = fit.means.astype(np.float32)
        self._loadings = np.concatenate([p.loadings for p in fit.processes], axis=1).T.copy()
        self._piece = max(_PIECE_CELLS // fit.means.shape[1], 1)
        self._drawn: list[tuple[tuple[int, int] | None, list[Floats]]] = [(None, [])] * 2

    def request(self, request: int, length: int, seed: int) -> Iterator[NDArray[np.uint16]]:
        """Draw a request's experts, ``[n, L, K]`` at a time."""
        rng = np.random.default_rng([seed, request])
        *lasting, preference = self._topics(request, seed)
        paths = [_Path(process, rng) for process in self._fit.processes]
        for path in paths:
            if path.constant:
                path.states = [lasting.pop(0).astype(np.float32) for _ in range(2)]
        kinds = self._kinds(length, preference, rng)
        for start in range(0, length, self._piece):
            count = min(self._piece, length - start)
            parts = [path.step(count) for path in paths]
            factors = np.concatenate([factor for factor, _ in parts], axis=1)
            scores = factors @ self._loadings
            for _, own_part in parts:
                scores += own_part
            yield self._best(scores, kinds[start : start + count])

    def _kinds(self, length: int, preference: Floats, rng: np.random.Generator) -> Ints:
        """Return rows of the means ``[length]``: the first tokens' own ones, then a walk."""
        kinds = self._fit.kinds
        first = np.arange(len(kinds.share), len(self._means))[:length]
        return np.concatenate([first, kinds.walk(length - len(first), preference, rng)])

    def _topics(self, request: int, seed: int) -> list[Floats]:
        """Return what a request keeps to its end: normals of its scores, preference of kinds.

        `_TOPICS` requests, even and odd ones apart, are drawn together: stratified (a Latin
        hypercube) and balanced, so that traces scatter less around the generator.
        """
        block, place = divmod(request, 2 * _TOPICS)
        row, half = divmod(place, 2)
        if self._drawn[half][0] != (seed, block):
            rng = np.random.default_rng([seed, block, half, 1])
            self._drawn[half] = (seed, block), self._draw_topics(rng)
        return [each[row] for each in self._drawn[half][1]]

    def _draw_topics(self, rng: np.random.Generator) -> list[Floats]:
        kinds = self._fit.kinds
        lasting = [process for process in self._fit.processes if process.decay == 1]
        shapes = [kinds.loadings.shape, *(process.loadings.shape for process in lasting)]
        sizes = [size for own, common in shapes for size in (common, own)]
        strata = np.tile(np.arange(_TOPICS)[:, None], sum(sizes))
        uniform = (rng.permuted(strata, axis=0) + rng.random(strata.shape)) / _TOPICS
        common, own, *states = np.split(ndtri(uniform), np.cumsum(sizes)[:-1], axis=1)
        return [*states, kinds.balanced(kinds.preferences(common, own))]

    def independent(self, kinds: Ints, rng: np.random.Generator) -> NDArray[np.uint16]:
        """Draw tokens of these kinds ``[n]`` that have nothing else in common: ``[n, L, K]``.

        Their loads are those of long traces, with less noise.
        """
        factors = rng.standard_normal((len(kinds), len(self._loadings)), dtype=np.float32)
        spread = np.sqrt(sum(process.own for process in self._fit.processes))
        scores = rng.standard_normal((len(kinds), len(spread)), dtype=np.float32) * spread
        scores += factors @ self._loadings
        return self._best(scores, kinds)

    def _best(self, scores: Singles, kinds: Ints) -> NDArray[np.uint16]:
        scores += self._means[kinds]
        by_layer = scores.reshape(-1, *self._shape)
        rest = self._shape[1] - self._fit.meta.top_k
        if not rest:
            everyone = np.arange(self._shape[1], dtype=np.uint16)
            return np.broadcast_to(everyone, by_layer.shape).copy()
        return np.argpartition(by_layer, rest - 1, axis=-1)[..., rest:].astype(np.uint16)


class _Path:
    """One process along one request."""

    def __init__(self, process: Process, rng: np.random.Generator) -> None:
        self._decay, self._rng = np.float32(process.decay), rng
        self._noise = np.sqrt(1 - self._decay**2)
        self._spread = np.sqrt(process.own)
        self.constant = process.decay == 1
        self.states = [
            rng.standard_normal(size, dtype=np.float32)
            for size in (process.loadings.shape[1], len(process.own))
        ]

    def step(self, count: int) -> tuple[Singles, Singles]:
        """Return the factors ``[count, r]`` and the cells' own parts ``[count, D]``."""
        factors, own = (self._walk(place, count) for place in range(2))
        return factors, own * self._spread

    def _walk(self, place: int, count: int) -> Singles:
        """Go on from a state: x(t) = decay x(t-1) + noise, of variance 1 at every token."""
        state = self.states[place]
        if self._decay == 1:
            return np.broadcast_to(state, (count, len(state)))
        new = self._rng.standard_normal((count, len(state)), dtype=np.float32)
        if self._decay == 0:
            return new
        taps = np.array([self._noise], np.float32), np.array([1, -self._decay], np.float32)
        path, _ = lfilter(*taps, new, axis=0, zi=(self._decay * state)[None])
        self.states[place] = path[-1]
        return path


def _rows(
    fit: SynthFit, experts: NDArray[np.uint16], request: int, first: int, prompt: int
) -> RoutingTrace:
    position = np.arange(first, first + len(experts), dtype=np.int32)
    return RoutingTrace(
        meta=fit.meta,
        request_id=np.full(len(experts), request, np.int32),
        position=position,
        decode=position >= prompt,
        step=np.maximum(position - prompt + 1, 0).astype(np.int32),
        domain=np.zeros(len(experts), np.int16),
        domains=_DOMAINS,
        experts=experts,
    )


def _joined(pieces: list[RoutingTrace]) -> RoutingTrace:
    first = pieces[0]
    columns = {
        name: np.concatenate([piece.columns[name] for piece in pieces]) for name in first.columns
    }
    return RoutingTrace(meta=first.meta, domains=first.domains, **columns)
