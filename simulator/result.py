"""What a simulation answers: throughput, step time and its causes, stragglers, traffic, memory.

Every number is of the simulated steps under the stated batch composition and seed; definitions
are in docs/reference/metrics.md. Times in seconds, traffic and memory in bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmodels.ops import Stage
from simulator.evidence import EvidenceItem
from simulator.loads import StepLoads
from simulator.memory import MemoryNeed
from simulator.metrics import straggler
from simulator.playing import body
from simulator.program import Played
from simulator.timeline import timeline


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """The outcome of `simulator.simulate`. S steps, L MoE layers, G ranks."""

    step_times: NDArray[np.float64]
    """Seconds of each step, [S]."""
    step_times_low: NDArray[np.float64]
    """The same if every operation takes the low end of its interval, [S]."""
    step_times_high: NDArray[np.float64]
    """The same at the high end, [S]."""
    seconds_by_cause: dict[str, float]
    """Seconds per step, mean over ranks and steps, by `Stage` and ``wait``; sums to the mean."""
    loads: StepLoads
    memory: MemoryNeed
    sampling_floor: float
    """Straggler that perfectly equal shares would give at this batch size."""
    evidence: tuple[EvidenceItem, ...]
    composition: str
    """How the steps were composed, in a sentence."""
    seed: int
    first_step: Played
    """The first step in time, for the timeline."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all ranks per second of step time."""
        return float(self.loads.step_tokens.sum() / self.step_times.sum())

    @property
    def tokens_per_second_interval(self) -> tuple[float, float]:
        """The same with every operation at the high and at the low end of its interval."""
        tokens = self.loads.step_tokens.sum()
        return (
            float(tokens / self.step_times_high.sum()),
            float(tokens / self.step_times_low.sum()),
        )

    @property
    def step_time_s(self) -> dict[str, float]:
        """Mean, median and 99th percentile of the step time, seconds."""
        p50, p99 = np.percentile(self.step_times, [50, 99])
        return {"mean": float(self.step_times.mean()), "p50": float(p50), "p99": float(p99)}

    @cached_property
    def straggler(self) -> float:
        """Busiest over mean rank load in (token, expert) pairs, mean over steps and layers."""
        return float(straggler(self.loads.rank_load).mean())

    @cached_property
    def rank_load(self) -> NDArray[np.float64]:
        """Share of each layer's pairs that each rank works on, mean over steps, [L, R].

        R ranks of a pipeline stage; those that share the experts' widths show the same pairs.
        """
        load = self.loads.rank_load[self.loads.step_tokens > 0]
        share: NDArray[np.float64] = (load / load.sum(axis=-1, keepdims=True)).mean(axis=0)
        return share

    @cached_property
    def traffic(self) -> NDArray[np.float64]:
        """Bytes from rank to rank per step, all-to-all of all layers, there and back, [R, R]."""
        sent = self.loads.sent.sum(axis=(0, 1)) / len(self.step_times)
        return np.asarray(sent + sent.T)

    @property
    def cross_node_sends(self) -> float:
        """Distinct remote nodes that a token visits in a layer, mean."""
        return self._per_token(self.loads.cross_node)

    @property
    def cross_rank_sends(self) -> float:
        """Distinct ranks other than its own that a token visits in a layer, mean."""
        return self._per_token(self.loads.cross_rank)

    @property
    def timeline(self) -> dict[str, Any]:
        """The first step as a Perfetto timeline (Chrome JSON object)."""
        return timeline(self.first_step)

    def summary(self) -> dict[str, float | int | str]:
        """Return the headline as JSON scalars; units are in the keys (``_s`` is seconds)."""
        low, high = self.tokens_per_second_interval
        times = self.step_time_s
        fullest = int(self.memory.total.argmax())
        return {
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_second_low": low,
            "tokens_per_second_high": high,
            "step_time_s": times["mean"],
            "step_time_s_p50": times["p50"],
            "step_time_s_p99": times["p99"],
            "straggler": self.straggler,
            "sampling_floor": self.sampling_floor,
            "cross_node_sends": self.cross_node_sends,
            "cross_rank_sends": self.cross_rank_sends,
            "traffic_bytes_per_step": float(self.traffic.sum()),
            "memory_bytes_fullest_rank": float(self.memory.total[fullest]),
            "steps": len(self.step_times),
            "seed": self.seed,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the timeline as plain JSON data."""
        memory = self.memory
        return {
            "summary": self.summary(),
            "step_time_s": self.step_time_s,
            "seconds_by_cause": dict(self.seconds_by_cause),
            "rank_load": self.rank_load.tolist(),
            "traffic": self.traffic.tolist(),
            "memory": {
                "weights": memory.weights.tolist(),
                "experts": memory.experts.tolist(),
                "kv_cache": memory.kv_cache.tolist(),
                "activations": memory.activations.tolist(),
                "communication": memory.communication.tolist(),
                "total": memory.total.tolist(),
                "mean_context": memory.mean_context,
                "max_context": memory.max_context,
            },
            "evidence": [vars(item) for item in self.evidence],
            "composition": self.composition,
        }

    def _per_token(self, sends: NDArray[np.int64]) -> float:
        return float(sends.sum() / (self.loads.step_tokens.sum() * sends.shape[1]))


def by_cause(played: Played) -> dict[str, float]:
    """Split the step time by cause, seconds per step, mean over ranks and steps.

    Returns
    -------
    dict
        A value for every stage (of copies and of tensor-parallel collectives only where there are
        any), then ``wait``: time in which nothing runs on a rank, at collectives for slower ranks
        and at the end of the step; and, where streams overlap, ``overlapped``: minus the time that
        runs beside something else. Sums to the step time.
    """
    return causes_of((played,), played.step_times)


def causes_of(stages: Sequence[Played], step_times: NDArray[np.float64]) -> dict[str, float]:
    """Split the time of steps [S] whose microbatches [S * m] ran on the given pipeline stages.

    As `by_cause`; a rank also waits for its next microbatch, and sending one on counts as beside
    something else.
    """
    there = {item.stage for played in stages for item in played.items}
    sometimes = {Stage.FETCH, Stage.TRANSFER, Stage.TENSOR_PARALLEL}
    causes = {stage.value: 0.0 for stage in Stage if stage in there or stage not in sometimes}
    total, covered = float(step_times.mean()), 0.0
    for played in stages:
        share = len(played.end) / len(step_times) / len(stages)
        per_item = played.busy.mean(axis=(0, 2)) * share
        for item, seconds in zip(played.items, per_item.tolist(), strict=True):
            causes[item.stage.value] += seconds
        inside = body(played)
        covered += float((inside.step_times[:, None] - inside.idle).mean()) * share
    busy = sum(causes.values())
    overlapped = covered - busy
    if abs(overlapped) <= 1e-9 * total:
        return causes | {"wait": total - busy}
    return causes | {"wait": total - covered, "overlapped": overlapped}
