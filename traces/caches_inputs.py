"""Access sequences out of a trace: which experts each step uses, and how much they weigh.

A step is a set of rows of the trace (one token, a decode batch, a prefill batch); an access is
the set of distinct experts that its tokens use in one layer.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traces.batches import Phase, phase_rows
from traces.caches_scores import NEEDS, Bools, mrs_candidates, needs
from traces.counts import step_counts
from traces.routing_trace import RoutingTrace

Rows = NDArray[np.int64] | Sequence[NDArray[np.int64]]
"""``[S, B]`` rows of a trace, or S arrays of any length."""
_CHUNK_CELLS = 2**22  # scores summed at a time


def token_steps(trace: RoutingTrace, phase: Phase = "decode") -> NDArray[np.int64]:
    """Return ``[S, 1]`` rows: every token of a phase is a step, request after request.

    This is what a workstation that serves one request at a time sees.

    Raises
    ------
    InputError
        If the trace has no row of the phase.
    """
    return phase_rows(trace, phase)[:, None]


def active_experts(trace: RoutingTrace, rows: Rows) -> Bools:
    """Return ``[S, L, E]`` whether a token of the step uses the expert.

    Parameters
    ----------
    trace : RoutingTrace
    rows : int array ``[S, B]``, or S int arrays
        Rows of the trace that make up each step: `token_steps`, `decode_batches`.
    """
    return step_counts(trace, rows) > 0


def expert_scores(trace: RoutingTrace, rows: Rows, score: str) -> NDArray[np.float32] | None:
    """Return ``[S, L, E]`` what an eviction score takes besides the accesses; None for most.

    For ``weight_ema`` the router weights of the chosen experts, for ``mrs`` the scores of the 2k
    best candidates; both summed over the tokens of the step.

    Raises
    ------
    InputError
        If the trace does not have it (`needs`).
    """
    needs(score, trace)
    if NEEDS.get(score) == "weights":
        return _summed(trace, rows, trace.experts, trace.weights, trace.meta.top_k)
    if NEEDS.get(score) == "candidates":
        best = mrs_candidates(trace)
        return _summed(trace, rows, trace.candidates, trace.candidate_scores, best)
    return None


def _summed(
    trace: RoutingTrace, rows: Rows, ids: NDArray[Any] | None, values: NDArray[Any] | None,
    best: int,
) -> NDArray[np.float32]:  # fmt: skip
    """Sum the first ``best`` ``values [T, L, M]`` of experts ``ids`` over the rows of a step."""
    assert ids is not None  # needs() has checked
    assert values is not None
    layers, experts = trace.num_layers, trace.meta.num_experts
    sizes = np.array([len(step) for step in rows])
    sums = np.empty((len(rows), layers, experts), np.float32)
    per_step = max(int(sizes.max(initial=1)) * layers * best, layers * experts)
    count = max(_CHUNK_CELLS // per_step, 1)
    for first in range(0, len(rows), count):
        part = rows[first : first + count]
        picked = np.concatenate(list(part))
        step = np.repeat(np.arange(len(part)), sizes[first : first + count])
        group = step[:, None] * layers + np.arange(layers)
        cells = group[..., None] * experts + ids[picked, :, :best]
        total = np.bincount(
            cells.reshape(-1),
            weights=values[picked, :, :best].reshape(-1),
            minlength=len(part) * layers * experts,
        )
        sums[first : first + count] = total.reshape(len(part), layers, experts)
    return sums
