"""How unevenly single steps load experts and ranks, by batch size, and what chance alone does.

A step is a decode batch of B requests (`traces.batches.decode_batches`). A load counts the tokens
that use an expert, a rank's load those of its experts, in one layer. Imbalance is the busiest load
over the mean load: 1 is even, and a step's time grows with it. Figures are ratios or shares, means
over steps and layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from traces.batches import Phase, decode_batches, phase_rows
from traces.counts import step_counts
from traces.measures.base import Floats, Ints, plain, spread
from traces.routing_trace import RoutingTrace

BATCHES = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
RANKS = (2, 4, 8, 16)
FACTORS = (1.0, 1.25, 1.5, 2.0)
_TOKENS = 2**16  # of all steps of a batch size together
_STEPS = (32, 512)
_EVEN_STEPS = 256
_CHUNK_CELLS = 2**22


@dataclass(frozen=True, kw_only=True, eq=False)
class Imbalance:
    """Busiest over mean of the experts, or of the ranks of a contiguous placement.

    ``shuffled`` and ``even`` are what chance does. Shuffled: the same tokens, dealt to the steps at
    random, so with the same loads; what observed differs by comes from who runs together (a step
    has one token of each request, and the tokens of a request are alike, so it may be below). Even:
    independent tokens that choose K distinct experts with equal chances; the floor that remains
    when all loads are balanced.
    """

    groups: int
    """E experts, or so many ranks with E / ranks neighbouring experts each."""
    observed: float
    observed_by_layer: Floats
    """``[L]`` mean over steps."""
    observed_p95: float
    """Exceeded by one in twenty (step, layer)."""
    shuffled: float
    even: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return plain(self)


@dataclass(frozen=True, kw_only=True, eq=False)
class Capped:
    """Steps in which an expert takes at most ``C = ceil(gamma K B / E)`` tokens.

    "Capacity-aware inference: mitigating the straggler effect in mixture of experts" (2025); a step
    of a single token has no cap. What exceeds it is dropped.
    """

    factor: float
    """gamma."""
    dropped: float
    """Share of all (token, choice) pairs."""
    straggler: float
    """Tokens of the busiest expert after dropping, over the mean load before it, K B / E."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return plain(self)


@dataclass(frozen=True, kw_only=True, eq=False)
class StepBalance:
    """Figures of one batch size."""

    batch: int
    """B, tokens of a step."""
    steps: int
    moe_layer_ids: tuple[int, ...]
    experts: Imbalance
    ranks: tuple[Imbalance, ...]
    capped: tuple[Capped, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        by_layer = spread(self.experts.observed_by_layer, self.moe_layer_ids)
        experts = self.experts.to_dict() | {"observed_by_layer": by_layer}
        return plain(self, ("moe_layer_ids",)) | {"experts": experts}


@dataclass(frozen=True, kw_only=True, eq=False)
class Balance:
    """Imbalance of steps by batch size."""

    phase: str
    """Rows that make up the steps."""
    rows: int
    """Of that phase."""
    requests: int
    """In the trace; a larger batch takes some of them more than once."""
    by_batch: tuple[StepBalance, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return plain(self)


def balance(
    trace: RoutingTrace,
    *,
    batches: Sequence[int] = BATCHES,
    ranks: Sequence[int] = RANKS,
    factors: Sequence[float] = FACTORS,
    phase: Phase = "decode",
    seed: int = 0,
) -> Balance:
    """Compose steps of several sizes and measure how uneven they are.

    Parameters
    ----------
    trace : RoutingTrace
        In memory, for example the trace of a `Sampled`.
    batches : sequence of int
        B. Each size gets as many steps as make 65,536 tokens, but 32 to 512.
    ranks : sequence of int
        Numbers of ranks; those that do not divide E, or are E or more, are left out.
    factors : sequence of float
        gamma, above 0.
    phase : {"decode", "prefill", "any"}
    seed : int
        Of the batches and of both floors.

    Raises
    ------
    InputError
        If a batch is below 1, a factor not above 0, or the trace has no row of the phase.
    """
    if not all(factor > 0 for factor in factors):
        raise InputError(f"capacity factors {list(factors)} -- must be above 0")
    whole = [g for g in ranks if 1 < g < trace.meta.num_experts and trace.meta.num_experts % g == 0]
    return Balance(
        phase=phase,
        rows=len(phase_rows(trace, phase)),
        requests=trace.num_requests,
        by_batch=tuple(_of_size(trace, batch, phase, whole, factors, seed) for batch in batches),
    )


def _of_size(
    trace: RoutingTrace, batch: int, phase: Phase, ranks: Sequence[int],
    factors: Sequence[float], seed: int,
) -> StepBalance:  # fmt: skip
    steps = int(np.clip(_TOKENS // max(batch, 1), *_STEPS))
    together = decode_batches(trace, batch=batch, steps=steps, seed=seed, phase=phase).rows
    rng = np.random.default_rng([seed, batch])
    alone = rng.permutation(together.reshape(-1)).reshape(together.shape)
    meta = trace.meta
    observed, shuffled = step_counts(trace, together), step_counts(trace, alone)
    even = _even_counts(_EVEN_STEPS, batch, meta.num_experts, meta.top_k, rng)
    mean = batch * meta.top_k / meta.num_experts

    def imbalance(groups: int) -> Imbalance:
        of_steps = _busiest(observed, groups)
        return Imbalance(
            groups=groups,
            observed=float(of_steps.mean()),
            observed_by_layer=of_steps.mean(axis=0),
            observed_p95=float(np.quantile(of_steps, 0.95)),
            shuffled=float(_busiest(shuffled, groups).mean()),
            even=float(_busiest(even, groups).mean()),
        )

    return StepBalance(
        batch=batch,
        steps=steps,
        moe_layer_ids=meta.moe_layer_ids,
        experts=imbalance(meta.num_experts),
        ranks=tuple(imbalance(groups) for groups in ranks),
        capped=tuple(_capped(observed, batch, mean, factor) for factor in factors),
    )


def _busiest(counts: NDArray[np.int32], groups: int) -> Floats:
    """Return the busiest of ``groups`` runs of experts over their mean, of ``[..., E]``."""
    load = counts.reshape(*counts.shape[:-1], groups, -1).sum(axis=-1)
    over: Floats = load.max(axis=-1) / load.mean(axis=-1)
    return over


def _capped(counts: NDArray[np.int32], batch: int, mean: float, factor: float) -> Capped:
    if batch == 1:
        return Capped(
            factor=factor, dropped=0.0, straggler=float(counts.max(axis=-1).mean() / mean)
        )
    room = int(np.ceil(factor * mean - 1e-9))  # 1e-9: rounding must not add a token
    kept = np.minimum(counts, room)
    return Capped(
        factor=factor,
        dropped=float(1 - kept.sum() / counts.sum()),
        straggler=float(kept.max(axis=-1).mean() / mean),
    )


def _even_counts(
    steps: int, tokens: int, experts: int, top_k: int, rng: np.random.Generator
) -> NDArray[np.int32]:
    """Draw loads ``[steps, E]`` of tokens that choose ``top_k`` distinct experts at random."""
    counts = np.empty((steps, experts), np.int32)
    rows = max(_CHUNK_CELLS // (tokens * experts), 1)
    for first in range(0, steps, rows):
        count = min(rows, steps - first)
        chosen = _distinct(count * tokens, experts, top_k, rng)
        step = np.repeat(np.arange(count), tokens)[:, None] * experts
        drawn = np.bincount((chosen + step).reshape(-1), minlength=count * experts)
        counts[first : first + count] = drawn.reshape(count, experts)
    return counts


def _distinct(tokens: int, experts: int, top_k: int, rng: np.random.Generator) -> Ints:
    """Draw ``[tokens, K]`` distinct experts."""
    if top_k == experts:
        return np.broadcast_to(np.arange(experts), (tokens, experts))
    clocks = rng.random((tokens, experts), dtype=np.float32)
    return np.argpartition(clocks, top_k, axis=1)[:, :top_k]
