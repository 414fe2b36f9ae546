"""A closed loop of users played without a clock: which tokens each step holds, and whose.

In a closed loop the next request comes when one is answered, so the scheduler's plan does not
depend on how long steps take. It is played once, in runs of equal decode steps, and any step
times give the times of all requests at once. The rules are those of `simulator.serving_scheduler`
(admission ``reserve``), with two more policies of engines; a test holds one to the other.
"""

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moeplan.served_models import Policy
from moeplan.served_steps import Steps

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Schedule:
    """What a closed loop does: N runs of equal steps, and the runs that matter to each request."""

    steps: Steps
    """One step of each run; of decode steps the middle one."""
    repeats: Floats
    """Steps in each run, [N]."""
    arrival: Ints
    """Runs that have ended when a request comes, [requests]."""
    first: Ints
    """Runs that have ended when it has its first token."""
    last: Ints
    """Runs that have ended when it has its last token."""
    outputs: Ints
    """Tokens generated for it."""

    def times(self, seconds: Floats) -> tuple[Floats, Floats]:
        """Return TTFT and TPOT of each request, s, from the seconds of each run's step [N].

        TPOT is nan for requests of one token.
        """
        clock = np.concatenate([[0.0], np.cumsum(self.repeats * seconds)])
        ttft = clock[self.first] - clock[self.arrival]
        gaps = self.outputs - 1
        span = clock[self.last] - clock[self.first]
        tpot = np.divide(span, gaps, out=np.full(len(gaps), np.nan), where=gaps > 0)
        return ttft, tpot


@dataclass
class _Rank:
    """One attention data-parallel rank."""

    steps: int = 0
    """Decode steps so far."""
    decodes: int = 0
    context: float = 0.0
    """Keys that the next decode step attends to."""
    used: float = 0.0
    """Cache bytes reserved."""
    load: float = 0.0
    """Tokens in the cache, or still to be prefilled."""
    ending: list[tuple[int, int]] = field(default_factory=list)
    """Heap of (decode steps at which it ends, request)."""
    prompts: deque[list[int]] = field(default_factory=deque)
    """[request, tokens done] of the prompts that are partly computed."""


def play(
    inputs: Ints,
    outputs: Ints,
    concurrency: int,
    policy: Policy,
    *,
    ranks: int,
    reserve: Callable[[int], float] = float,
    capacity: float = np.inf,
    per_step: float = 1.0,
) -> Schedule:
    """Play a closed loop until every request is answered.

    Parameters
    ----------
    inputs, outputs : int64 array [requests]
        Lengths, in the order in which they come.
    concurrency : int
        Requests in the system.
    policy : Policy
        How steps are composed.
    ranks : int
        Attention data-parallel ranks.
    reserve : callable
        Cache bytes of a sequence of so many tokens.
    capacity : float
        Cache bytes of a rank; a request that is larger runs alone.
    per_step : float
        Tokens that a decoding request gets in a step: more than one with accepted drafts.
    """
    sizes = [reserve(a + b) for a, b in zip(inputs.tolist(), outputs.tolist(), strict=True)]
    loop = _Loop(inputs, outputs, concurrency, policy, [_Rank() for _ in range(ranks)])
    return loop.play(sizes, capacity, per_step)


class _Loop:
    def __init__(
        self, inputs: Ints, outputs: Ints, concurrency: int, policy: Policy, ranks: list[_Rank]
    ) -> None:
        self.inputs, self.outputs = inputs.tolist(), outputs.tolist()
        self.policy, self.ranks = policy, ranks
        count = len(self.inputs)
        self.head, self.tail = 0, min(concurrency, count)
        self.arrival, self.first, self.last = ([0] * count for _ in range(3))
        self.left = count
        self.held = 0  # steps that prompts have waited for each other
        self.coming = 0  # sent, but seen by the scheduler after the next step only
        self.rows: list[list[tuple[float, ...]]] = []
        self.repeats: list[int] = []

    def play(self, sizes: list[float], capacity: float, per_step: float) -> Schedule:
        """Play until the last request is answered."""
        self.sizes, self.capacity, self.per_step = sizes, capacity, per_step
        while self.left:
            self._advance()
        table = np.array(self.rows, dtype=np.float64)
        names = ("decodes", "context", "prompts", "pairs", "ends")
        return Schedule(
            steps=Steps(**{name: table[:, :, at] for at, name in enumerate(names)}),
            repeats=np.array(self.repeats, dtype=np.float64),
            arrival=np.array(self.arrival),
            first=np.array(self.first),
            last=np.array(self.last),
            outputs=np.array(self.outputs),
        )

    def _advance(self) -> None:
        """Play one step with prompts in it, or decode until somebody is done."""
        mixed, late = self.policy.mixed, self.coming
        if not any(rank.decodes or rank.prompts for rank in self.ranks):
            self.tail, self.coming, late = self.tail + late, 0, 0  # nobody else is there
        patience = self._patience()
        busy = [r.decodes if mixed else 0 for r in self.ranks]
        budget = [0 if patience else max(self.policy.budget - b, 0) for b in busy]
        prompts = self._prompts(budget)
        some = any(p[0] for p in prompts)
        decode = mixed or not some
        soonest = min((r.ending[0][0] - r.steps for r in self.ranks if r.ending), default=1)
        repeats = 1 if some or late else min(soonest, patience or soonest)
        self.held = self.held + repeats if patience else 0
        row: list[tuple[float, ...]] = []
        for rank, (tokens, pairs, ends) in zip(self.ranks, prompts, strict=True):
            count = rank.decodes if decode else 0
            grown = count * self.per_step * (repeats - 1)
            middle = rank.context + grown / 2 if count else 0.0
            row.append((count, middle, tokens, pairs, len(ends)))
        self.rows.append(row)
        self.repeats.append(repeats)
        now = len(self.rows)
        for rank, (_, _, ends) in zip(self.ranks, prompts, strict=True):
            if decode:
                self._decode(rank, repeats, now)
            for request in ends:
                self._start(rank, request, now)
        self.tail, self.coming = self.tail + late, self.coming - late

    def _patience(self) -> int:
        """Return for how many steps prompts go on waiting until there is one for each rank."""
        waiting = self.tail - self.head
        balanced = waiting >= len(self.ranks) or not all(rank.decodes for rank in self.ranks)
        return 0 if balanced or not waiting else self.policy.patience - self.held

    def _prompts(self, budget: list[int]) -> list[tuple[int, int, list[int]]]:
        """Fill what is left of the step: partly computed prompts, then the queue, in order."""
        tokens, pairs = [0] * len(self.ranks), [0] * len(self.ranks)
        ends: list[list[int]] = [[] for _ in self.ranks]

        def take(at: int) -> None:
            prompt = self.ranks[at].prompts[0]
            request, done = prompt
            chunk = min(budget[at], self.inputs[request] - done)
            budget[at] -= chunk
            prompt[1] = stop = done + chunk
            tokens[at] += chunk
            pairs[at] += (stop * (stop + 1) - done * (done + 1)) // 2
            if stop == self.inputs[request]:
                ends[at].append(request)
                self.ranks[at].prompts.popleft()

        for at, rank in enumerate(self.ranks):
            if rank.prompts and budget[at]:
                take(at)
        while self.head < self.tail:
            able = [at for at in range(len(self.ranks)) if self._fits(at, budget[at], tokens[at])]
            if not able:
                break
            at = min(able, key=lambda r: self.ranks[r].load)
            rank = self.ranks[at]
            rank.used += self.sizes[self.head]
            rank.load += self.inputs[self.head]
            rank.prompts.append([self.head, 0])
            self.head += 1
            if not self.policy.chunked:
                budget[at] = max(budget[at], self.inputs[self.head - 1])
            take(at)
        return list(zip(tokens, pairs, ends, strict=True))

    def _fits(self, at: int, budget: int, taken: int) -> bool:
        rank, size = self.ranks[at], self.inputs[self.head]
        room = rank.used + self.sizes[self.head] <= self.capacity or not rank.used
        if rank.prompts or budget <= 0 or not room:
            return False
        alone = not taken and size > self.policy.budget
        return self.policy.chunked or size <= budget or alone

    def _start(self, rank: _Rank, request: int, now: int) -> None:
        """Give a request its first token."""
        self.first[request] = now
        if self.outputs[request] == 1:
            rank.load -= self.inputs[request]
            self._finish(rank, request, now)
            return
        rank.decodes += 1
        rank.context += self.inputs[request] + 1
        heapq.heappush(rank.ending, (rank.steps + self._decode_steps(request), request))

    def _decode_steps(self, request: int) -> int:
        return math.ceil((self.outputs[request] - 1) / self.per_step)

    def _decode(self, rank: _Rank, repeats: int, now: int) -> None:
        rank.steps += repeats
        grown = rank.decodes * self.per_step * repeats
        rank.context += grown
        rank.load += grown
        while rank.ending and rank.ending[0][0] == rank.steps:
            _, request = heapq.heappop(rank.ending)
            rank.decodes -= 1
            had = self.inputs[request] + self.per_step * self._decode_steps(request)
            rank.context -= had + 1
            rank.load -= had
            self._finish(rank, request, now)

    def _finish(self, rank: _Rank, request: int, now: int) -> None:
        """Answer a request; its user sends the next."""
        self.last[request] = now
        rank.used -= self.sizes[request]
        self.left -= 1
        comes = self.tail + self.coming
        if comes < len(self.arrival):
            self.arrival[comes] = now
            self.coming += self.policy.overlapped
            self.tail += not self.policy.overlapped
