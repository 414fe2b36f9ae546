"""What users of a server feel and what the server achieves: TTFT, TPOT, latency, throughput.

Every number is defined in docs/reference/metrics.md. Times in seconds from the start of the
simulation, tokens counted; N requests, S steps, T output tokens of all requests.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.evidence import EvidenceItem

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, kw_only=True, eq=False)
class RequestTimes:
    """When things happened to each request."""

    inputs: Ints
    """Prompt tokens, [N]."""
    outputs: Ints
    """Generated tokens, [N]."""
    arrival: Floats
    """When it came, [N]."""
    admitted: Floats
    """Start of the first step that worked on it, [N]."""
    token: Floats
    """End of the step that yielded each token, request after request, [T]."""

    @cached_property
    def first_of(self) -> Ints:
        """Index of each request's first token in ``token``, [N]."""
        return np.cumsum(self.outputs) - self.outputs

    @property
    def first_token(self) -> Floats:
        """When the first token was there, [N]."""
        return self.token[self.first_of]

    @property
    def last_token(self) -> Floats:
        """When the last token was there, [N]."""
        return self.token[self.first_of + self.outputs - 1]

    @property
    def ttft(self) -> Floats:
        """Arrival to first token, [N]."""
        return self.first_token - self.arrival

    @property
    def tpot(self) -> Floats:
        """(last - first token) / (output - 1), [N]; nan for requests of one token."""
        gaps = self.outputs - 1
        span = self.last_token - self.first_token
        return np.divide(span, gaps, out=np.full(len(gaps), np.nan), where=gaps > 0)

    @property
    def latency(self) -> Floats:
        """Arrival to last token, [N]."""
        return self.last_token - self.arrival

    @property
    def queue_wait(self) -> Floats:
        """Arrival to the start of the first step that worked on the request, [N]."""
        return self.admitted - self.arrival

    def gaps(self, chosen: NDArray[np.bool_]) -> Floats:
        """Return the times between successive tokens of the requests that are chosen."""
        owner = np.repeat(np.arange(len(self.outputs)), self.outputs)
        inside = owner[1:] == owner[:-1]
        return np.asarray(np.diff(self.token)[inside & chosen[owner[1:]]])


@dataclass(frozen=True, kw_only=True, eq=False)
class StepLog:
    """What each step did."""

    start: Floats
    """[S]."""
    seconds: Floats
    """[S]."""
    decodes: Ints
    """Decode tokens, [S]."""
    prefills: Ints
    """Prompt tokens, computed anew ones included, [S]."""
    running: Ints
    """Requests that took part, [S]."""
    waiting: Ints
    """Requests that had come but did not run, [S]."""
    preempted: Ints
    """Requests that gave way, [S]."""
    kv_bytes: Floats
    """Cache of the fullest rank, [S]."""

    def __len__(self) -> int:
        return len(self.start)


@dataclass(frozen=True, kw_only=True, eq=False)
class ServingResult:
    """The outcome of `simulator.serve`."""

    requests: RequestTimes
    steps: StepLog
    measured: NDArray[np.bool_]
    """Requests whose latencies count: those after the warm-up, [N]."""
    kv_capacity: float
    """Cache bytes of a rank."""
    slo: dict[str, float]
    """Limits in seconds on ``ttft`` and ``tpot``; may be empty."""
    events: int
    """Kernels and collectives of a plain step on all ranks times the steps, arrivals, and output
    tokens."""
    statements: tuple[str, ...]
    """Where arrivals and routing come from, and how requests are scheduled."""
    seconds_by_cause: dict[str, float]
    """Seconds per step by cause, over a sample of steps; empty without a cluster."""
    evidence: tuple[EvidenceItem, ...]
    """What step times rest on, over the same sample; empty without a cluster."""
    ends: dict[str, "ServingResult"]
    """The same with every operation at the ``low`` and at the ``high`` end of its interval; empty
    unless asked for."""

    @property
    def makespan(self) -> float:
        """Seconds from the first arrival to the last token."""
        return float(self.requests.token.max() - self.requests.arrival.min())

    @property
    def steady(self) -> tuple[float, float] | None:
        """From the first measured arrival to the last arrival; None if no time lies between."""
        begin = float(self.requests.arrival[self.measured].min())
        end = float(self.requests.arrival.max())
        return (begin, end) if end > begin else None

    @property
    def steady_output_tokens_per_second(self) -> float | None:
        """Output tokens per second without warm-up and drain."""
        if self.steady is None:
            return None
        begin, end = self.steady
        inside = (self.requests.token > begin) & (self.requests.token <= end)
        return float(np.count_nonzero(inside) / (end - begin))

    @property
    def good(self) -> NDArray[np.bool_]:
        """Requests that keep every limit, [N]; TPOT holds for requests of one token."""
        kept = np.ones(len(self.requests.inputs), dtype=np.bool_)
        for name, limit in self.slo.items():
            kept &= ~(getattr(self.requests, name) > limit)
        return kept

    def summary(self) -> dict[str, float | int | str | None]:
        """Return the headline as JSON scalars; units are in the keys (``_s`` is seconds)."""
        r, span = self.requests, self.makespan
        result: dict[str, float | int | str | None] = {
            "requests": len(r.inputs),
            "requests_measured": int(np.count_nonzero(self.measured)),
            "makespan_s": span,
            "requests_per_second": len(r.inputs) / span,
            "output_tokens_per_second": float(r.outputs.sum() / span),
            "total_tokens_per_second": float((r.inputs + r.outputs).sum() / span),
            "steady_output_tokens_per_second": self.steady_output_tokens_per_second,
        }
        for name, values in self.distributions().items():
            result |= _percentiles(name, values)
        if self.slo:
            result["goodput_requests_per_second"] = float(np.count_nonzero(self.good) / span)
            result["slo_share"] = float(self.good[self.measured].mean())
        result |= self._of_steps()
        for end, other in self.ends.items():
            for name in ("output_tokens_per_second", "ttft_s_p50", "tpot_s_p50"):
                result[f"{name}_at_{end}_prices"] = other.summary()[name]
        return result

    def distributions(self) -> dict[str, Floats]:
        """Return the latencies of the measured requests, by name."""
        r, chosen = self.requests, self.measured
        tpot = r.tpot[chosen]
        return {
            "ttft_s": r.ttft[chosen],
            "tpot_s": tpot[~np.isnan(tpot)],
            "itl_s": r.gaps(chosen),
            "latency_s": r.latency[chosen],
            "queue_wait_s": r.queue_wait[chosen],
        }

    def _of_steps(self) -> dict[str, float | int | str | None]:
        log = self.steps
        busy = float(log.seconds.sum())
        return {
            "steps": len(log),
            "step_time_s": busy / len(log),
            "busy_share": busy / self.makespan,
            "tokens_per_step": float((log.decodes + log.prefills).mean()),
            "decodes_per_step": float(log.decodes.mean()),
            "running": float(log.running @ log.seconds / busy),
            "waiting": float(log.waiting @ log.seconds / busy),
            "preemptions": int(log.preempted.sum()),
            "recomputed_tokens": int(log.prefills.sum() - self.requests.inputs.sum()),
            "kv_peak_bytes_fullest_rank": float(log.kv_bytes.max()),
            "kv_capacity_bytes_per_rank": self.kv_capacity,
            "events": self.events,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON data, one row per request."""
        r = self.requests
        columns = {
            "input_tokens": r.inputs,
            "output_tokens": r.outputs,
            "arrival_s": r.arrival,
            "ttft_s": r.ttft,
            "tpot_s": r.tpot,
            "latency_s": r.latency,
            "queue_wait_s": r.queue_wait,
        }
        return {
            "summary": self.summary(),
            "requests": {name: _plain(column) for name, column in columns.items()},
            "seconds_by_cause": dict(self.seconds_by_cause),
            "evidence": [vars(item) for item in self.evidence],
            "statements": list(self.statements),
            "slo": dict(self.slo),
        }


def _percentiles(name: str, values: Floats) -> dict[str, float | int | str | None]:
    """Mean and percentiles (linear interpolation), None where there is no value."""
    stem = name.removesuffix("_s")
    if not len(values):
        return dict.fromkeys((f"{stem}_s", *(f"{stem}_s_p{p}" for p in PERCENTILES)))
    at = np.percentile(values, PERCENTILES).tolist()
    named = {f"{stem}_s_p{p}": float(v) for p, v in zip(PERCENTILES, at, strict=True)}
    return {f"{stem}_s": float(values.mean()), **named}


def _plain(column: NDArray[np.number]) -> list[float | None]:
    return [None if value != value else value for value in column.tolist()]
