"""What is asked of the layouts: one batch size, or a sweep of them at given request lengths.

Batch sizes are running requests over all ranks (a decode step makes one token for each). In a
sweep the trace gives the routing and the request lengths give the contexts, in tokens.
"""

from dataclasses import dataclass, replace

import numpy as np
from pydantic import Field

from basis.errors import InputError
from basis.schema import Strict
from planner.options import PlanOptions
from planner.scoring import Facts
from simulator.deployment import Workload
from simulator.parallelism import Parallelism
from traces.model_spec import ModelSpec
from traces.routing_trace import RoutingTrace, request_order

LARGEST = 2**15
"""Running requests at most in a sweep without given concurrencies."""
_CHOICES = 2**23  # (token, layer, expert) choices routed for one score of a layout
_HALF_STEPS = range(4, 12)  # 48, 96, ... requests per rank: the KV capacity decides there
_PAIRS = 2**22  # (layer, rank, rank) entries of traffic for one simulation
_SEEDS, _STEPS = 3, 4  # compositions, and steps of each, for a point of a sweep


class Sweep(Strict):
    """Requests of one length, as many at a time as are given or fit."""

    input_tokens: int = Field(ge=1)
    """Tokens of a prompt; they are in the cache when decoding begins."""
    output_tokens: int = Field(ge=1)
    """Tokens generated for each request."""
    concurrency: int | tuple[int, ...] | None = None
    """Running requests over all ranks; none: powers of two up to the KV capacity of the layouts
    (per rank from one request on each on; from 32 on with the steps halfway between)."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """Batch sizes, and the context of a request."""

    sizes: tuple[int, ...]
    """Running requests, ascending."""
    mean_context: float
    """Tokens in the cache of a request, mean."""
    statement: str
    """The question in a sentence."""


def ask(facts: Facts, trace: RoutingTrace, sweep: Sweep | None) -> Question:
    """Say which batch sizes are compared.

    Raises
    ------
    InputError
        For a prefill workload, or a concurrency below 1.
    """
    if sweep is None:
        if facts.workload.decode_batch is None:
            raise InputError(
                "plan.layouts all with a prefill workload -- layouts are compared in decode: give "
                "decode_batch, or input_tokens and output_tokens"
            )
        return Question(
            sizes=(facts.workload.tokens,),
            mean_context=float(trace.position.mean()) + 1,
            statement=f"decode steps of {facts.workload.tokens} tokens at the trace's contexts",
        )
    given = sweep.concurrency
    sizes = _powers(facts.cluster.num_ranks) if given is None else np.atleast_1d(given).tolist()
    if min(sizes, default=0) < 1:
        raise InputError(f"concurrency {given} -- every value is at least 1")
    return Question(
        sizes=tuple(sorted(set(sizes))),
        mean_context=sweep.input_tokens + (sweep.output_tokens + 1) / 2,
        statement=(
            f"requests of {sweep.input_tokens} input and {sweep.output_tokens} output tokens, "
            "decode steps only (prompts are prefilled elsewhere), batch sizes "
            + (
                "up to the KV capacity"
                if given is None
                else ", ".join(map(str, sorted(set(sizes))))
            )
        ),
    )


def _powers(ranks: int) -> list[int]:
    """Powers of two below one request per rank, then ranks times powers of two and halfway."""
    few = [2**i for i in range(ranks.bit_length()) if 2**i < ranks]
    many = [2**i for i in range(LARGEST.bit_length())] + [3 * 2**i for i in _HALF_STEPS]
    return few + [ranks * each for each in many if ranks * each <= LARGEST]


def at_lengths(trace: RoutingTrace, sweep: Sweep) -> RoutingTrace:
    """Give every recorded request the lengths of a sweep; its routing stays.

    The recorded rows of a request (of each phase by itself) are spread evenly over its
    ``output_tokens``, after a prompt of ``input_tokens``.
    """
    request = request_order(trace) * 2 + trace.decode
    order = np.lexsort((trace.position, request))
    _, starts, lengths = np.unique(request[order], return_index=True, return_counts=True)
    nth = np.arange(len(order)) - np.repeat(starts, lengths)
    position = np.empty(len(order), dtype=np.int32)
    spread = nth * sweep.output_tokens // np.repeat(lengths, lengths)
    position[order] = sweep.input_tokens + spread
    return replace(trace, position=position)


def effort(options: PlanOptions, model: ModelSpec, ranks: int, tokens: int) -> PlanOptions:
    """Return the options with fewer steps and seeds where a step is large.

    A step of many tokens varies little, and a sweep scores many points.
    """
    seeds = min(options.seeds, _SEEDS)
    choices = tokens * model.num_moe_layers * model.top_k
    seeds = max(1, min(seeds, _CHOICES // choices))
    most = min(_CHOICES // (seeds * choices), _PAIRS // (model.num_moe_layers * ranks**2))
    steps = max(1, min(options.steps, _STEPS, most))
    return options.model_copy(update={"seeds": seeds, "steps": steps})


def final_seeds(options: PlanOptions, model: ModelSpec, tokens: int) -> int:
    """Compositions for the choice and its runner-up: as many as asked, fewer for large steps."""
    choices = tokens * model.num_moe_layers * model.top_k
    return max(2, min(options.seeds, 4 * _CHOICES // choices))


def at_size(
    facts: Facts, size: int, *, redundant: int = 0, parallelism: Parallelism | None = None
) -> Facts:
    """Return the question of one layout at one batch size."""
    options = effort(facts.options, facts.model, facts.cluster.num_ranks, size)
    return replace(
        facts,
        workload=Workload(decode_batch=size),
        options=options.model_copy(update={"redundant_experts": redundant}),
        parallelism=parallelism,
    )
