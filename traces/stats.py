"""What a trace says about its model: how skewed, how local, how predictable the routing is.

All figures are shares or ratios without a unit. Each comes with what chance alone would give:
the reuse of independent tokens with the same loads, the best unconditional guess.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from traces.counts import expert_counts
from traces.routing_trace import RoutingTrace, request_order

Floats = NDArray[np.float64]
_CHUNK_CELLS = 2**22


def load_skew(counts: NDArray[Any]) -> Floats:
    """Return the busiest expert's load over the mean load.

    Parameters
    ----------
    counts : array ``[..., E]``
        Tokens of each expert.

    Returns
    -------
    float64 array ``[...]``, between 1 and E.
    """
    skew: Floats = counts.max(axis=-1) / counts.mean(axis=-1)
    return skew


def reuse(trace: RoutingTrace) -> tuple[Floats, Floats]:
    """Return how many of a token's experts the previous token of its request used as well.

    Returns
    -------
    observed, independent : float64 arrays ``[L]``
        Mean share of the K experts, over consecutive tokens; and what independent tokens with
        the trace's loads would share: ``sum_e p_e^2 / K`` with p_e the share of tokens that use
        e. ``observed`` is NaN where no two consecutive tokens are in the trace.
    """
    top_k = trace.meta.top_k
    used = expert_counts(trace.experts, trace.meta.num_experts) / max(trace.num_tokens, 1)
    independent = (used**2).sum(axis=1) / top_k
    before, after = _consecutive(trace)
    common = np.zeros(trace.num_layers)
    for part in _row_chunks(len(before), trace.num_layers * top_k**2):
        common += _shared(trace.experts[before[part]], trace.experts[after[part]])
    with np.errstate(invalid="ignore"):
        return common / (len(before) * top_k), independent


def _consecutive(trace: RoutingTrace) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows of each token and of the next one in its request."""
    order = np.lexsort((trace.position, trace.request_id))
    same = np.diff(trace.request_id[order]) == 0
    linked = same & (np.diff(trace.position[order]) == 1)
    return order[:-1][linked], order[1:][linked]


def _shared(first: NDArray[np.uint16], second: NDArray[np.uint16]) -> Floats:
    """Count, per layer, the ids that ``[T, L, K]`` rows have in common: ``[L]``."""
    equal = first[..., :, None] == second[..., None, :]
    return equal.sum(axis=(0, 2, 3)).astype(np.float64)


def predictability(trace: RoutingTrace) -> tuple[Floats, Floats]:
    """Return how well an expert of one layer predicts an expert of the next.

    For every expert e of layer l, the best next expert f(e) is the one that tokens with e use
    most often in layer l + 1, learnt on the even requests. The score is P(f(e) among the
    token's experts of l + 1 | e among its experts of l), on the odd requests.

    Returns
    -------
    learnt, unconditional : float64 arrays ``[adjacent layer pairs]``
        The score; and that of the one expert that is most used in layer l + 1 on the even
        requests. Empty where no two recorded layers are adjacent in the model.

    Raises
    ------
    InputError
        If the trace has a single request.
    """
    even = request_order(trace) % 2 == 0
    if even.all():
        raise InputError(
            f"trace of {trace.meta.model}: one request -- predictability is learnt on some "
            "requests and scored on others; record more"
        )
    ids, cells = trace.meta.moe_layer_ids, trace.experts
    scores = [
        _next_layer_scores(cells[:, i], cells[:, i + 1], even, trace.meta.num_experts)
        for i in range(len(ids) - 1)
        if ids[i + 1] == ids[i] + 1
    ]
    learnt, unconditional = np.array(scores, np.float64).reshape(-1, 2).T
    return learnt, unconditional


def _next_layer_scores(
    here: NDArray[np.uint16], there: NDArray[np.uint16], even: NDArray[np.bool_], experts: int
) -> tuple[float, float]:
    """Learn on even rows and score on the others; ``here`` and ``there`` are ``[T, K]``."""
    together = np.zeros(experts * experts, np.int64)
    learn = np.flatnonzero(even)
    for part in _row_chunks(len(learn), here.shape[1] ** 2):
        rows = learn[part]
        key = here[rows, :, None].astype(np.int64) * experts + there[rows, None, :]
        together += np.bincount(key.reshape(-1), minlength=len(together))
    best = together.reshape(experts, experts).argmax(axis=1).astype(np.uint16)
    most_used = np.bincount(there[even].reshape(-1), minlength=experts).argmax()
    hits, score = 0, np.flatnonzero(~even)
    for part in _row_chunks(len(score), here.shape[1] ** 2):
        rows = score[part]
        guess = best[here[rows]]
        hits += int((guess[:, :, None] == there[rows, None, :]).any(axis=-1).sum())
    baseline = (there[~even] == most_used).any(axis=-1).mean()
    return hits / (len(score) * here.shape[1]), float(baseline)


def _row_chunks(rows: int, cells_per_row: int) -> list[slice]:
    size = max(_CHUNK_CELLS // cells_per_row, 1)
    return [slice(start, start + size) for start in range(0, rows, size)]


@dataclass(frozen=True, kw_only=True, eq=False)
class TraceStatistics:
    """Figures of one trace; arrays are per layer, NaN where the trace cannot say."""

    model: str
    synthetic: bool
    num_tokens: int
    num_requests: int
    num_experts: int
    top_k: int
    moe_layer_ids: tuple[int, ...]
    decode_share: float
    """Share of the tokens that were recorded in the decode phase."""
    tokens_per_domain: dict[str, int]
    load_max_over_mean: Floats
    """``[L]``, see `load_skew`."""
    load_standard_error: float
    """Standard error of an average expert's load over that load, were tokens independent:
    ``sqrt((1 - K/E) / (T K/E))``. A load max/mean within a few of these of 1 is no skew."""
    reuse: Floats
    """``[L]``, see `reuse`."""
    reuse_independent: Floats
    predictability: Floats
    """``[adjacent layer pairs]``, see `predictability`."""
    predictability_unconditional: Floats

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; every per-layer list has its mean beside it."""
        values = asdict(self) | {
            "load_max_over_mean_worst": float(np.max(self.load_max_over_mean)),
        }
        for name, value in list(values.items()):
            if isinstance(value, np.ndarray):
                values[name] = [None if np.isnan(v) else float(v) for v in value]
                known = value[~np.isnan(value)]
                values[f"{name}_mean"] = float(known.mean()) if len(known) else None
        return values | {"moe_layer_ids": list(self.moe_layer_ids)}


def trace_statistics(trace: RoutingTrace) -> TraceStatistics:
    """Compute all figures of `TraceStatistics`.

    Raises
    ------
    InputError
        If the trace has no tokens.
    """
    if not trace.num_tokens:
        raise InputError(f"trace of {trace.meta.model}: no tokens -- nothing to measure")
    meta = trace.meta
    observed, independent = reuse(trace)
    nothing = np.empty(0)
    learnt, guess = predictability(trace) if trace.num_requests > 1 else (nothing, nothing)
    per_domain = np.bincount(trace.domain, minlength=len(trace.domains))
    share = meta.top_k / meta.num_experts
    return TraceStatistics(
        model=meta.model,
        synthetic=meta.synthetic,
        num_tokens=trace.num_tokens,
        num_requests=trace.num_requests,
        num_experts=meta.num_experts,
        top_k=meta.top_k,
        moe_layer_ids=meta.moe_layer_ids,
        decode_share=float(trace.decode.mean()),
        tokens_per_domain=dict(zip(trace.domains, per_domain.tolist(), strict=True)),
        load_max_over_mean=load_skew(expert_counts(trace.experts, meta.num_experts)),
        load_standard_error=float(np.sqrt((1 - share) / (trace.num_tokens * share))),
        reuse=observed,
        reuse_independent=independent,
        predictability=learnt,
        predictability_unconditional=guess,
    )
