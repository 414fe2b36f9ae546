"""Which requests run in the next step: continuous batching with chunked prefill, as pure logic.

A step gives every running request its next token first, then fills a budget of tokens with chunks
of prompts, first come first served, as far as the KV cache has room. Nothing here knows seconds;
counts are in tokens, the cache in bytes. docs/background/request-level.md has the rules in full.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from basis.errors import InfeasibleError, InputError
from basis.units import format_quantity

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Admission = Literal["reserve", "preempt"]
"""``reserve``: a request is admitted when its input and whole output have room, and never leaves.
``preempt``: when its input has room; where the cache overflows the newest gives way and is computed
anew."""


def _none() -> Ints:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class ServingStep:
    """One step: D requests decode, C chunks of prompts are prefilled. Requests by number."""

    number: int
    """Steps before this one."""
    decode: Ints
    """Requests that get one more token, [D]."""
    decode_rank: Ints
    """[D]."""
    decode_context: Ints
    """Keys that each attends to, its own token included, [D]."""
    chunk: Ints
    """Requests that are prefilled, [C]."""
    chunk_rank: Ints
    """[C]."""
    chunk_start: Ints
    """First token of each chunk, counted from the request's start, [C]."""
    chunk_stop: Ints
    """Token after the last, [C]."""
    chunk_ends: NDArray[np.bool_]
    """Whether the chunk completes the prefill and so yields a token, [C]."""
    emitting: Ints
    """Requests that have a new token at the end of the step."""
    nth: Ints
    """Which of its tokens that is, from 0; as ``emitting``."""
    admitted: Ints
    """Requests that run for the first time."""
    preempted: Ints
    """Requests that gave way before this step."""
    finished: Ints
    """Requests that have all their tokens at the end of the step."""
    kv_tokens: Ints
    """Tokens in the cache at the end of the step, the finished included, [ranks]."""
    kv_bytes: Floats
    """The same in bytes, windows respected, [ranks]."""
    waiting: int
    """Requests that have come but do not run."""

    @property
    def tokens(self) -> int:
        """Tokens that the step computes, over all ranks."""
        return len(self.decode) + int((self.chunk_stop - self.chunk_start).sum())

    @property
    def running(self) -> int:
        """Requests that take part."""
        return len(self.decode) + len(self.chunk)


@dataclass(frozen=True, kw_only=True, eq=False)
class SchedulerState:
    """Who waits and who runs between two steps; a value, never changed in place."""

    number: int = 0
    """Steps so far."""
    head: int = 0
    """First request that never ran; requests come and are admitted in the order of numbers."""
    tail: int = 0
    """Requests that have come."""
    running: Ints = field(default_factory=_none)
    """Requests that run, in order of admission; on one rank that is the order of arrival, [R]."""
    rank: Ints = field(default_factory=_none)
    """[R]."""
    computed: Ints = field(default_factory=_none)
    """Tokens in the cache, [R]."""
    target: Ints = field(default_factory=_none)
    """Tokens to be in the cache before the next token comes out of the prefill, [R]."""
    emitted: Ints = field(default_factory=_none)
    """Tokens generated, [R]."""
    preempted: tuple[tuple[int, int, int], ...] = ()
    """(request, rank, tokens generated) of those that gave way, in order of arrival."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scheduler:
    """The rules. Every rank has its budget and its cache; all share one queue of arrivals.

    Raises
    ------
    InputError
        If a limit is below 1 or ``max_running`` is above ``max_batch_tokens``.
    InfeasibleError
        If some request alone is larger than the cache of a rank.
    """

    inputs: Ints
    """Prompt tokens of each request, [N]."""
    outputs: Ints
    """Tokens that each request generates, [N]."""
    num_ranks: int
    """Attention data-parallel ranks."""
    max_batch_tokens: int
    """Tokens that a rank computes in a step, at most."""
    max_running: int
    """Requests that run on a rank, at most."""
    admission: Admission
    kv_bytes: Callable[[Ints], Floats]
    """Cache bytes of sequences of so many tokens each; never falls."""
    kv_capacity: float
    """Cache bytes of a rank."""
    concurrency: int | None = None
    """Closed loop: so many requests are in the system, and one comes when one ends. None: requests
    come when `submit` says so."""

    def __post_init__(self) -> None:
        limits = {
            "max_batch_tokens": self.max_batch_tokens,
            "max_running": self.max_running,
            "concurrency": 1 if self.concurrency is None else self.concurrency,
        }
        for name, value in limits.items():
            if value < 1:
                raise InputError(f"{name} {value} -- must be at least 1")
        if self.max_running > self.max_batch_tokens:
            raise InputError(
                f"max_running {self.max_running} is above max_batch_tokens "
                f"{self.max_batch_tokens} -- every running request decodes one token per step; "
                "lower the one or raise the other"
            )
        whole = self.whole
        worst = int(whole.argmax())
        if whole[worst] > self.kv_capacity:
            raise InfeasibleError(
                f"request {worst} of {self.inputs[worst]} input and {self.outputs[worst]} output "
                f"tokens needs {format_quantity(float(whole[worst]), 'B')} of KV cache -- a rank "
                f"has room for {format_quantity(max(self.kv_capacity, 0.0), 'B')}",
                levers=(
                    "more ranks or a device with more memory",
                    "a smaller max_batch_tokens, whose buffers take part of the memory",
                    "shorter requests",
                ),
            )

    @cached_property
    def whole(self) -> Floats:
        """Cache bytes of each request with all its tokens, [N]."""
        return self.kv_bytes(self.inputs + self.outputs)

    @property
    def start(self) -> SchedulerState:
        """The empty system; in closed loop, with its first requests in the queue."""
        return SchedulerState(tail=min(self.concurrency or 0, len(self.inputs)))

    def submit(self, state: SchedulerState, tail: int) -> SchedulerState:
        """Let requests come, up to number ``tail`` (exclusive)."""
        return replace(state, tail=tail)

    def plan(self, state: SchedulerState) -> tuple[ServingStep, SchedulerState] | None:
        """Return the next step and the state after it; None when nobody is in the system."""
        if not len(state.running) and state.head == state.tail and not state.preempted:
            return None
        draft = _Draft(self, state)
        if self.admission == "preempt":
            draft.preempt()
        draft.go_on()
        if draft.state.preempted:
            draft.resume()
        if draft.head < draft.state.tail:
            draft.admit()
        return draft.close()

    def held(self, state: SchedulerState) -> Floats:
        """Cache bytes that each running request is counted for, [R]."""
        if self.admission == "reserve":
            return self.whole[state.running]
        decoding = state.computed >= state.target
        return self.kv_bytes(np.where(decoding, state.computed + 1, state.target))


class _Draft:
    """A step while it is put together."""

    def __init__(self, rules: Scheduler, state: SchedulerState) -> None:
        self.rules, self.state = rules, state
        self.head = state.head
        self.gave_way = _none()
        self.take = _none()  # tokens of each of the running requests
        self.joined: list[tuple[int, ...]] = []  # request, rank, target, take, emitted
        # what each rank has left: tokens of the step, places, cache bytes; and what it works on
        self.budget: list[int] = []
        self.room: list[int] = []
        self.free: list[float] = []
        self.load: list[float] = []

    def preempt(self) -> None:
        """Let the newest requests of each rank go until what the others need has room."""
        state, rules = self.state, self.rules
        held = rules.held(state)
        need = self._per_rank(held)
        over = np.flatnonzero(need > rules.kv_capacity)
        if not len(over):
            return
        stays = np.ones(len(state.running), dtype=np.bool_)
        for rank in over.tolist():
            for i in np.flatnonzero(state.rank == rank)[::-1].tolist():
                if need[rank] <= rules.kv_capacity:
                    break
                stays[i] = False
                need[rank] -= held[i]
        leaving = zip(
            state.running[~stays].tolist(),
            state.rank[~stays].tolist(),
            state.emitted[~stays].tolist(),
            strict=True,
        )
        self.gave_way = state.running[~stays]
        self.state = replace(
            state,
            preempted=tuple(sorted((*state.preempted, *leaving))),
            **{name: getattr(state, name)[stays] for name in _COLUMNS},
        )

    def go_on(self) -> None:
        """Give running requests their tokens: one to each that decodes, then chunks in order."""
        state, rules = self.state, self.rules
        left = state.target - state.computed
        decoding = left <= 0
        self.take = decoding.astype(np.int64)
        prefilling = np.flatnonzero(~decoding).tolist()
        if not prefilling and self.head == state.tail and not state.preempted:
            return  # nobody asks for what is left of the budget
        self.budget = (rules.max_batch_tokens - self._per_rank(decoding)).astype(int).tolist()
        for i in prefilling:
            rank = int(state.rank[i])
            self.take[i] = min(self.budget[rank], int(left[i]))
            self.budget[rank] -= int(self.take[i])
        self._count()

    def _count(self) -> None:
        """Note what each rank has left: places, cache bytes, and tokens that it works on."""
        state, rules = self.state, self.rules
        self.room = (rules.max_running - self._per_rank()).tolist()
        self.free = (rules.kv_capacity - self._per_rank(rules.held(state))).tolist()
        self.load = self._per_rank(np.maximum(state.computed, state.target)).tolist()

    def resume(self) -> None:
        """Take back requests that gave way, each on its rank, in order of arrival."""
        rules, gave_way = self.rules, set(self.gave_way.tolist())
        closed = {rank for request, rank, _ in self.state.preempted if request in gave_way}
        still = []
        for request, rank, emitted in self.state.preempted:
            target = int(rules.inputs[request]) + emitted
            size = float(rules.kv_bytes(np.array([target]))[0])
            if rank in closed or not self._fits(rank, size):
                closed.add(rank)
                still.append((request, rank, emitted))
                self.load[rank] += target
            else:
                self._join(request, rank, target, size, emitted)
        self.state = replace(self.state, preempted=tuple(still))

    def admit(self) -> None:
        """Admit waiting requests in order, each to the rank that has the fewest tokens."""
        rules, state = self.rules, self.state
        closed = {rank for _, rank, _ in state.preempted}
        while self.head < state.tail:
            request = self.head
            inputs = int(rules.inputs[request])
            if rules.admission == "reserve":
                size = float(rules.whole[request])
            else:
                size = float(rules.kv_bytes(np.array([inputs]))[0])
            able = [r for r in range(rules.num_ranks) if r not in closed and self._fits(r, size)]
            if not able:
                return  # nobody overtakes the head of the queue
            rank = min(able, key=lambda r: self.load[r])
            self._join(request, rank, inputs, size, 0)
            self.head += 1

    def _per_rank(self, values: NDArray[Any] | None = None) -> NDArray[Any]:
        """Sum over the requests that run (count them), [ranks]."""
        return np.bincount(self.state.rank, weights=values, minlength=self.rules.num_ranks)

    def _fits(self, rank: int, size: float) -> bool:
        return self.budget[rank] > 0 and self.room[rank] > 0 and self.free[rank] >= size

    def _join(self, request: int, rank: int, target: int, size: float, emitted: int) -> None:
        take = min(self.budget[rank], target)
        self.joined.append((request, rank, target, take, emitted))
        self.budget[rank] -= take
        self.room[rank] -= 1
        self.free[rank] -= size
        self.load[rank] += target

    def close(self) -> tuple[ServingStep, SchedulerState]:
        """Write the step down and move everyone on."""
        self.state = state = self._with_joined()
        rules = self.rules
        take, before = self.take, state.computed
        computed = before + take
        decoding = before >= state.target
        yields = (take > 0) & (computed >= state.target)
        emitted = state.emitted + yields
        done = emitted >= rules.outputs[state.running]
        chunks = (take > 0) & ~decoding
        tail = state.tail
        if rules.concurrency is not None:
            tail = min(tail + int(np.count_nonzero(done)), len(rules.inputs))
        step = ServingStep(
            number=state.number,
            decode=state.running[decoding],
            decode_rank=state.rank[decoding],
            decode_context=computed[decoding],
            chunk=state.running[chunks],
            chunk_rank=state.rank[chunks],
            chunk_start=before[chunks],
            chunk_stop=computed[chunks],
            chunk_ends=yields[chunks],
            emitting=state.running[yields],
            nth=state.emitted[yields],
            admitted=np.arange(state.head, self.head),
            preempted=self.gave_way,
            finished=state.running[done],
            kv_tokens=self._per_rank(computed).astype(np.int64),
            kv_bytes=self._per_rank(rules.kv_bytes(computed)),
            waiting=state.tail - self.head + len(state.preempted),
        )
        stays = ~done
        after = SchedulerState(
            number=state.number + 1,
            head=self.head,
            tail=tail,
            running=state.running[stays],
            rank=state.rank[stays],
            computed=computed[stays],
            target=state.target[stays],
            emitted=emitted[stays],
            preempted=state.preempted,
        )
        return step, after

    def _with_joined(self) -> SchedulerState:
        """Append those that joined to those that run, and their tokens to the step's."""
        if not self.joined:
            return self.state
        request, rank, target, take, emitted = np.array(self.joined, dtype=np.int64).T
        self.take = np.concatenate([self.take, take])
        state = self.state
        return replace(
            state,
            running=np.concatenate([state.running, request]),
            rank=np.concatenate([state.rank, rank]),
            computed=np.concatenate([state.computed, np.zeros_like(request)]),
            target=np.concatenate([state.target, target]),
            emitted=np.concatenate([state.emitted, emitted]),
        )


_COLUMNS = ("running", "rank", "computed", "target", "emitted")
