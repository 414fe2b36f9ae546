"""The steps that are simulated: which tokens of the trace run together, and on which rank.

In decode every running request keeps its rank (attention data parallelism holds its KV cache
there) and gives one token to each step; in prefill a whole prompt goes to one rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulator.deployment import Workload
from simulator.dispatch import homes
from traces.batches import Phase, decode_batches, prefill_batches
from traces.routing_trace import RoutingTrace


@dataclass(frozen=True, kw_only=True, eq=False)
class StepBatch:
    """The B tokens of one step."""

    rows: NDArray[np.int64]
    """Row of the trace of each token, [B]."""
    context: NDArray[np.int64]
    """Keys that each token attends to, its own included, [B]."""
    home: NDArray[np.int64]
    """Attention rank of each token, [B]."""
    last: NDArray[np.bool_]
    """Tokens that are the last of their sequence so far, [B]: each yields a new token."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Composition:
    """The steps of a simulation and how they came about."""

    batches: tuple[StepBatch, ...]
    decode: bool
    """One token of each running request per step, or whole prompts."""
    statement: str
    """The composition in a sentence, for the report."""
    stand_in: bool
    """Whether rows that were recorded in the other phase stand in."""


def compose(
    trace: RoutingTrace, workload: Workload, num_ranks: int, *, steps: int, seed: int
) -> Composition:
    """Compose the steps of a workload from the requests of a trace.

    A trace without tokens of the wanted phase (a teacher-forced recording has only prefill) lends
    those of the other, and the statement says so.
    """
    decode = workload.decode_batch is not None
    stand_in = not (trace.decode == decode).any()
    phase: Phase = "any" if stand_in else workload.phase
    make = _decode_steps if decode else _prefill_steps
    batches = tuple(make(trace, workload.tokens, num_ranks, steps, seed, phase))
    return Composition(
        batches=batches,
        decode=decode,
        statement=_statement(trace, workload, batches, seed, stand_in),
        stand_in=stand_in,
    )


def _decode_steps(
    trace: RoutingTrace, tokens: int, num_ranks: int, steps: int, seed: int, phase: Phase
) -> Iterator[StepBatch]:
    decode = decode_batches(trace, batch=tokens, steps=steps, seed=seed, phase=phase)
    home = homes(tokens, num_ranks)
    for rows, context in zip(decode.rows, decode.context.astype(np.int64), strict=True):
        yield StepBatch(rows=rows, context=context, home=home, last=np.ones(tokens, dtype=np.bool_))


def _prefill_steps(
    trace: RoutingTrace, tokens: int, num_ranks: int, steps: int, seed: int, phase: Phase
) -> Iterator[StepBatch]:
    """Give each prompt, longest first, to the rank that has the fewest tokens so far."""
    for batch in prefill_batches(trace, tokens=tokens, steps=steps, seed=seed, phase=phase):
        lengths = np.diff(batch.starts)
        rank_of = np.zeros(len(lengths), dtype=np.int64)
        given = np.zeros(num_ranks, dtype=np.int64)
        for prompt in np.argsort(-lengths, kind="stable"):
            rank_of[prompt] = given.argmin()
            given[rank_of[prompt]] += lengths[prompt]
        last = np.zeros(len(batch.rows), dtype=np.bool_)
        last[batch.starts[1:] - 1] = True
        yield StepBatch(
            rows=batch.rows,
            context=batch.context.astype(np.int64),
            home=np.repeat(rank_of, lengths),
            last=last,
        )


def _statement(
    trace: RoutingTrace,
    workload: Workload,
    batches: tuple[StepBatch, ...],
    seed: int,
    stand_in: bool,
) -> str:
    decode = workload.decode_batch is not None
    context = np.concatenate([batch.context[batch.last] for batch in batches])
    tokens = round(float(np.mean([len(batch.rows) for batch in batches])))
    usable = np.ones_like(trace.decode) if stand_in else trace.decode == decode
    requests = len(np.unique(trace.request_id[usable]))
    crowded = decode and workload.tokens > requests
    drawn = "drawn with replacement at independent offsets" if crowded else "taking turns"
    lent = f"; the trace has no {workload.phase} tokens, the others stand in" if stand_in else ""
    size = f"{tokens} tokens" if decode else f"{tokens} tokens on average"
    return (
        f"{len(batches)} {workload.phase} steps of {size} from {requests} requests {drawn}, "
        f"context {context.mean():.0f} on average and at most {context.max()} tokens, "
        f"seed {seed}{lent}"
    )
