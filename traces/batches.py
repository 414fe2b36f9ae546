"""Batches of concurrent requests, as a serving engine would compose them from a trace.

In a decode step every running request contributes its next token; a slot whose request has
ended takes another one. A prefill step takes whole prompts up to a budget of tokens. Entries
are rows of the trace; contexts are in tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from traces.routing_trace import RoutingTrace, request_order

Phase = Literal["decode", "prefill", "any"]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Batches:
    """Decode steps; S steps of B slots."""

    rows: Ints
    """``[S, B]`` row of the trace that each slot processes."""
    context: NDArray[np.int32]
    """``[S, B]`` tokens that each token attends to, itself included."""
    decode: bool
    """Whether every row was recorded in the decode phase."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PrefillBatch:
    """One prefill step: n whole prompts, B tokens in all."""

    rows: Ints
    """``[B]`` rows of the trace, prompt after prompt, each in order of position."""
    context: NDArray[np.int32]
    """``[B]`` tokens that each token attends to, itself included."""
    starts: Ints
    """``[n + 1]`` prompt i is ``rows[starts[i]:starts[i + 1]]``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Requests:
    """The rows of one phase, request after request in order of position."""

    rows: Ints
    starts: Ints
    lengths: Ints

    @property
    def count(self) -> int:
        return len(self.lengths)


def decode_batches(
    trace: RoutingTrace, *, batch: int, steps: int, seed: int, phase: Phase = "decode"
) -> Batches:
    """Compose decode steps from concurrent requests.

    Slots start as a server that is always full is found: in request i with probability
    proportional to its length, at a uniform offset; a request that follows starts at its first
    token. With more slots than requests, requests are drawn with replacement, at independent
    offsets, and every token of the trace is equally likely in every step. Otherwise no request
    runs twice at once and all of them take turns; tokens of long requests are then somewhat
    rarer than in the trace (with as many slots as requests, each request is always running).

    Parameters
    ----------
    trace : RoutingTrace
        Its rows of ``phase`` are used; a request's next token is its next recorded row.
    batch, steps : int
        B slots, S steps.
    seed : int
        Of ``numpy.random.default_rng``; the same seed gives the same batches.
    phase : {"decode", "prefill", "any"}
        Rows to walk through. "prefill" and "any" treat teacher-forced prompt rows as if they
        had been generated.

    Raises
    ------
    InputError
        If ``batch`` or ``steps`` is below 1, or the trace has no row of the phase.
    """
    _check_positive(batch=batch, steps=steps)
    requests = _requests_of(trace, phase)
    rng = np.random.default_rng(seed)
    if batch <= requests.count:
        running, follow = _taking_turns(requests, batch, rng)
    else:
        share = requests.lengths / requests.lengths.sum()
        running = rng.choice(requests.count, batch, p=share)

        def follow(ended: Ints) -> Ints:
            return rng.integers(requests.count, size=len(ended))

    offset = rng.integers(requests.lengths[running])
    places = np.empty((steps, batch), np.int64)
    for step in range(steps):
        places[step] = requests.starts[running] + offset
        offset += 1
        done = np.flatnonzero(offset >= requests.lengths[running])
        if len(done):
            running[done] = follow(running[done])
            offset[done] = 0
    rows = requests.rows[places]
    decode = bool(trace.decode[rows].all())
    return Batches(rows=rows, context=trace.position[rows] + 1, decode=decode)


def _taking_turns(
    requests: _Requests, batch: int, rng: np.random.Generator
) -> tuple[Ints, Callable[[Ints], Ints]]:
    """Return distinct running requests, and the queue that hands out the next ones."""
    # Smallest exponential clocks first = drawn without replacement, proportional to length.
    clocks = rng.exponential(size=requests.count) / requests.lengths
    running = np.argsort(clocks, kind="stable")[:batch]
    idle = np.setdiff1d(np.arange(requests.count), running)
    queue = rng.permutation(idle)

    def follow(ended: Ints) -> Ints:
        nonlocal queue
        queue = np.concatenate([queue, rng.permutation(ended)])
        taken, queue = queue[: len(ended)], queue[len(ended) :]
        return taken

    return running, follow


def phase_rows(trace: RoutingTrace, phase: Phase = "decode") -> Ints:
    """Return the rows of a phase, request after request, each in order of position.

    Raises
    ------
    InputError
        If the trace has no row of the phase.
    """
    return _requests_of(trace, phase).rows


def prefill_batches(
    trace: RoutingTrace, *, tokens: int, steps: int, seed: int, phase: Phase = "prefill"
) -> tuple[PrefillBatch, ...]:
    """Compose prefill steps from whole prompts.

    Prompts come in random order, all of them before any comes again. A step takes prompts while
    they fit into the budget; a prompt longer than the budget is a step of its own.

    Parameters
    ----------
    trace : RoutingTrace
        Its rows of ``phase`` are used; the rows of one request are one prompt.
    tokens, steps : int
        Budget of tokens of a step, and number of steps.
    seed : int
        Of ``numpy.random.default_rng``.
    phase : {"prefill", "decode", "any"}
        Rows that make up a prompt. "decode" and "any" treat generated tokens as prompt.

    Raises
    ------
    InputError
        If ``tokens`` or ``steps`` is below 1, or the trace has no row of the phase.
    """
    _check_positive(tokens=tokens, steps=steps)
    requests = _requests_of(trace, phase)
    rng = np.random.default_rng(seed)
    queue: list[int] = []
    batches = []
    for _ in range(steps):
        taken: list[int] = []
        room = tokens
        while True:
            queue = queue or rng.permutation(requests.count).tolist()
            length = int(requests.lengths[queue[0]])
            if taken and length > room:
                break
            taken.append(queue.pop(0))
            room -= length
        batches.append(_prompts(trace, requests, np.array(taken)))
    return tuple(batches)


def _prompts(trace: RoutingTrace, requests: _Requests, taken: Ints) -> PrefillBatch:
    lengths = requests.lengths[taken]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    within = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
    rows = requests.rows[np.repeat(requests.starts[taken], lengths) + within]
    return PrefillBatch(rows=rows, context=trace.position[rows] + 1, starts=starts)


def _requests_of(trace: RoutingTrace, phase: Phase) -> _Requests:
    wanted = {"decode": trace.decode, "prefill": ~trace.decode, "any": np.ones_like(trace.decode)}
    if phase not in wanted:
        raise InputError(f"unknown phase {phase!r} -- one of {', '.join(wanted)}")
    rows = np.flatnonzero(wanted[phase])
    if not len(rows):
        other = "prefill" if phase == "decode" else "decode"
        raise InputError(
            f"trace of {trace.meta.model} has no {phase} rows ({trace.num_tokens} {other} rows) -- "
            f"ask for {other} batches, or take its rows as they are with phase='any'"
        )
    request = request_order(trace)[rows]
    order = np.lexsort((trace.position[rows], request))
    _, starts, lengths = np.unique(request[order], return_index=True, return_counts=True)
    return _Requests(rows=rows[order], starts=starts, lengths=lengths)


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise InputError(f"{name} {value} -- must be at least 1")
