"""Serving requests over time: arrivals, scheduler, steps and their seconds, token times.

The event loop has one kind of event, the end of a step: then new tokens are there, requests that
came meanwhile join the queue, and the scheduler composes the next step. Between two arrivals the
scheduler's plans do not depend on time, so several steps are planned and priced at once and those
that an arrival overtakes are dropped: the outcome is that of one step at a time. Times in seconds.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from basis.errors import InputError
from basis.schema import Strict
from basis.units import Bytes, Seconds, format_quantity
from hwmodels.cluster import Cluster
from simulator.deployment import Deployment
from simulator.serving_memory import kv_room, sequence_bytes
from simulator.serving_metrics import RequestTimes, ServingResult, StepLog
from simulator.serving_scheduler import Admission, Scheduler, SchedulerState, ServingStep
from simulator.step_cost import ClusterStepCost, StepCost
from traces.arrivals import Arrivals, Lengths
from traces.model_spec import ModelSpec
from traces.request_source import draw_requests
from traces.routing_trace import RoutingTrace, check_against_model

_WINDOW = 64  # steps planned ahead, at most
_SAMPLE = 32  # steps, at most, that the breakdown by cause is made of


class Slo(Strict):
    """Limits that a request must keep to count as good."""

    ttft: Seconds | None = None
    """Time to first token, at most."""
    tpot: Seconds | None = None
    """Mean time per output token after the first, at most."""


class ServingOptions(Strict):
    """How the server schedules and what is measured."""

    max_batch_tokens: int = Field(default=2048, ge=1)
    """Tokens of a step on one attention data-parallel rank, at most; decodes first, the rest for
    chunks of prompts."""
    max_running: int = Field(default=256, ge=1)
    """Requests that run on one rank at once, at most."""
    admission: Admission = "preempt"
    """``reserve`` room for input and whole output, or for the input only and ``preempt``."""
    kv_capacity: Bytes | None = None
    """Cache of a rank; default: what weights, experts and buffers leave of its memory."""
    warm_up: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the requests, the first to come, whose latencies are not counted."""
    slo: Slo = Slo()
    """Limits for goodput."""


@dataclass(frozen=True, kw_only=True)
class ClosedLoop:
    """So many users, each of whom sends a request as soon as the last one is answered."""

    concurrency: int
    """Requests in the system."""
    requests: int
    """Requests in all."""
    lengths: Lengths
    """Pairs of input and output tokens, drawn with replacement."""

    def arrivals(self, seed: int) -> Arrivals:
        """Draw the lengths; the times follow from the simulation and are zero here."""
        drawn = self.lengths.draw(self.requests, seed)
        return Arrivals(
            seconds=np.zeros(self.requests),
            inputs=drawn.inputs,
            outputs=drawn.outputs,
            source=f"closed loop of {self.concurrency}, {self.requests} requests with lengths "
            f"drawn from {self.lengths.statement}, seed {seed}",
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Served:
    """What the event loop records."""

    requests: RequestTimes
    steps: StepLog
    sample: tuple[ServingStep, ...]
    """Some of the steps, evenly spread over the run."""


def serve(
    model: ModelSpec,
    trace: RoutingTrace,
    cluster: Cluster,
    deployment: Deployment,
    workload: Arrivals | ClosedLoop,
    options: ServingOptions | None = None,
    *,
    seed: int = 0,
    interval: bool = False,
) -> ServingResult:
    """Predict how a deployment serves requests that come over time.

    Parameters
    ----------
    model, trace, cluster, deployment : ModelSpec, RoutingTrace, Cluster, Deployment
        As for `simulator.simulate`.
    workload : Arrivals or ClosedLoop
        When requests come and how long they are.
    options : ServingOptions, optional
        How they are scheduled.
    seed : int
        Of the draw of requests from the trace, of drawn lengths, and of the replica rotation.
    interval : bool
        Also simulate with all prices at the low and at the high end (three times the work).

    Raises
    ------
    InputError
        If trace, model, deployment and cluster disagree, or a limit is impossible.
    InfeasibleError
        If weights leave no room for a cache, or a request is larger than the cache of a rank.
    """
    options = options or ServingOptions()
    check_against_model(trace, model)
    arrivals = workload if isinstance(workload, Arrivals) else workload.arrivals(seed)
    concurrency = workload.concurrency if isinstance(workload, ClosedLoop) else None
    scheduler = _scheduler(model, cluster, deployment, arrivals, options, concurrency)
    source = draw_requests(trace, len(arrivals), seed, arrivals.lengths)
    cost = ClusterStepCost(model, trace, cluster, deployment, source, arrivals.inputs, seed=seed)
    served = run(arrivals, scheduler, cost)
    statements = (arrivals.source, source.statement, _statement(scheduler))
    causes, evidence = cost.explain(served.sample, source.statement)
    shared: dict[str, Any] = {
        "measured": measured(len(arrivals), options.warm_up),
        "kv_capacity": scheduler.kv_capacity,
        "slo": {k: v for k, v in options.slo.model_dump().items() if v is not None},
        "statements": statements,
        "evidence": evidence,
        "seconds_by_cause": causes,
    }
    per_step = cost.kernels_per_step
    ends = (
        {end: _result(run(arrivals, scheduler, cost.at(end)), per_step, shared, {})
         for end in ("low", "high")}
        if interval
        else {}
    )  # fmt: skip
    return _result(served, per_step, shared, ends)


def _scheduler(
    model: ModelSpec,
    cluster: Cluster,
    deployment: Deployment,
    arrivals: Arrivals,
    options: ServingOptions,
    concurrency: int | None,
) -> Scheduler:
    layout = deployment.layout_for(model, cluster)
    return Scheduler(
        inputs=arrivals.inputs,
        outputs=arrivals.outputs,
        num_ranks=layout.dp,
        max_batch_tokens=options.max_batch_tokens,
        max_running=options.max_running,
        admission=options.admission,
        kv_bytes=sequence_bytes(model, layout),
        kv_capacity=options.kv_capacity or kv_room(model, cluster, deployment, options),
        concurrency=concurrency,
    )


def run(arrivals: Arrivals, scheduler: Scheduler, cost: StepCost) -> Served:
    """Play requests through a scheduler until the last one has all its tokens.

    Parameters
    ----------
    arrivals : Arrivals
        In closed loop only the lengths count.
    scheduler : Scheduler
        Of the same requests.
    cost : StepCost
        What steps take.
    """
    loop = _Loop(arrivals, scheduler, cost)
    while loop.left:
        loop.advance()
    return loop.served()


def measured(count: int, warm_up: float) -> NDArray[np.bool_]:
    """Return which of ``count`` requests count: all but the first share, at least one."""
    return np.asarray(np.arange(count) >= min(math.floor(count * warm_up), count - 1))


class _Loop:
    """The state of the event loop and what it has recorded so far."""

    def __init__(self, arrivals: Arrivals, scheduler: Scheduler, cost: StepCost) -> None:
        if len(arrivals) != len(scheduler.inputs):
            raise InputError(
                f"{len(arrivals)} arrivals for a scheduler of {len(scheduler.inputs)} requests -- "
                "give both the same"
            )
        self.scheduler, self.cost = scheduler, cost
        self.inputs, self.outputs = arrivals.inputs, arrivals.outputs
        self.closed = scheduler.concurrency is not None
        self.arrival = arrivals.seconds.copy()
        self.admitted = np.zeros(len(arrivals))
        self.token = np.zeros(int(arrivals.outputs.sum()))
        self.first_of = np.cumsum(arrivals.outputs) - arrivals.outputs
        self.left = len(arrivals)
        self.now = 0.0
        self.mean = 0.0  # seconds of a step, lately
        self.state = scheduler.start
        self.log: list[tuple[float, ...]] = []
        self.sample: list[ServingStep] = []
        self.stride = 1

    def advance(self) -> None:
        """Take in who has come, then play steps until somebody comes."""
        if not self.closed:
            self._take_in()
        next_arrival = math.inf
        if not self.closed and self.state.tail < len(self.arrival):
            next_arrival = float(self.arrival[self.state.tail])
        steps, states = self._plan(next_arrival)
        seconds = self.cost.seconds(steps)
        times = np.cumsum([self.now, *seconds.tolist()])
        kept = int(np.searchsorted(times[:-1], next_arrival, side="left"))
        self.mean = float(times[kept] - self.now) / kept
        starts, took, ends = (c.tolist() for c in (times[:kept], seconds[:kept], times[1:]))
        for step, start, lasted, end in zip(steps, starts, took, ends, strict=False):
            self._record(step, start, lasted, end)
        self.state = states[kept - 1]
        self.now = float(times[kept])

    def _take_in(self) -> None:
        state = self.state
        idle = state.head == state.tail and not len(state.running) and not state.preempted
        if idle:
            self.now = max(self.now, float(self.arrival[state.tail]))
        come = int(np.searchsorted(self.arrival, self.now, side="right"))
        if come > state.tail:
            self.state = self.scheduler.submit(state, come)

    def _plan(self, until: float) -> tuple[list[ServingStep], list[SchedulerState]]:
        """Plan about as many steps as will end before somebody comes."""
        ahead = _WINDOW
        if until < math.inf:
            ahead = min(_WINDOW, 1 + int((until - self.now) / self.mean)) if self.mean else 1
        steps: list[ServingStep] = []
        states = [self.state]
        while len(steps) < ahead:
            planned = self.scheduler.plan(states[-1])
            if planned is None:
                break
            steps.append(planned[0])
            states.append(planned[1])
        return steps, states[1:]

    def _record(self, step: ServingStep, start: float, took: float, end: float) -> None:
        decodes, tokens, fullest = len(step.decode), step.tokens, float(step.kv_bytes.max())
        self.log.append(
            (
                *(start, took, fullest),
                *(decodes, tokens - decodes, step.running, step.waiting, len(step.preempted)),
            )
        )
        if step.number % self.stride == 0:
            self.sample.append(step)
            if len(self.sample) > _SAMPLE:
                self.sample, self.stride = self.sample[::2], 2 * self.stride
        self.token[self.first_of[step.emitting] + step.nth] = end
        if len(step.admitted):
            self.admitted[step.admitted] = start
        gone = len(step.finished)
        if gone:
            if self.closed:  # whoever is answered sends the next request
                begin = len(self.arrival) - self.left + (self.scheduler.concurrency or 0)
                self.arrival[begin : begin + gone] = end
            self.left -= gone

    def served(self) -> Served:
        """Put the records into columns."""
        start, took, fullest, *counts = np.array(self.log).T
        decodes, prefills, running, waiting, preempted = (c.astype(np.int64) for c in counts)
        return Served(
            requests=RequestTimes(
                inputs=self.inputs,
                outputs=self.outputs,
                arrival=self.arrival,
                admitted=self.admitted,
                token=self.token,
            ),
            steps=StepLog(
                start=start,
                seconds=took,
                decodes=decodes,
                prefills=prefills,
                running=running,
                waiting=waiting,
                preempted=preempted,
                kv_bytes=fullest,
            ),
            sample=tuple(self.sample),
        )


def _result(
    served: Served, per_step: int, shared: dict[str, Any], ends: dict[str, ServingResult]
) -> ServingResult:
    kernels = per_step * len(served.steps)
    events = kernels + len(served.requests.inputs) + len(served.requests.token)
    return ServingResult(
        requests=served.requests, steps=served.steps, events=events, ends=ends, **shared
    )


def _statement(rules: Scheduler) -> str:
    room = format_quantity(rules.kv_capacity, "B")
    return (
        f"continuous batching on {rules.num_ranks} attention rank(s): at most "
        f"{rules.max_batch_tokens} tokens and {rules.max_running} requests per rank and step, "
        f"decodes first, prompts in chunks; admission {rules.admission!r} into {room} of KV cache "
        "per rank"
    )
