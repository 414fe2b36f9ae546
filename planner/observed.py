"""What the second stage learns from the part planned on: token sets, steps and blocks of requests.

The expert sets of tokens tell which experts belong together; decode steps, composed as an engine
would, tell how loads vary from step to step. Traffic drifts, so both the steps and the loads are
also taken from blocks of consecutive requests: a plan that is good in every block of the past
is less surprised by the next one. Loads are tokens.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from traces.batches import Phase, decode_batches
from traces.counts import expert_counts, step_counts
from traces.routing_trace import RoutingTrace, request_order

Floats = NDArray[np.float64]

_STRIDE = 8  # steps between two that are kept: neighbours share most of their requests
_CELLS = 2**27  # ids counted at most for the steps of a plan: seconds, not minutes
_LEAST_STEPS = 32
_REQUESTS_PER_BLOCK = 8
_MIXING_TOKENS = 2**16  # sampled before equal sets are merged


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenSets:
    """Distinct expert sets of one layer's tokens."""

    members: NDArray[np.int64]
    """Experts of each set, ascending, [sets, top_k]."""
    weight: Floats
    """Share of the tokens that have this set, [sets]; sums to 1."""

    def sample(self, most: int, rng: np.random.Generator) -> "TokenSets":
        """Draw ``most`` tokens if there are more sets than that."""
        if len(self.weight) <= most:
            return self
        drawn, counts = np.unique(
            rng.choice(len(self.weight), most, p=self.weight), return_counts=True
        )
        return TokenSets(members=self.members[drawn], weight=counts / most)


def token_sets(
    experts: NDArray[np.integer], rng: np.random.Generator, most: int = 2**13
) -> TokenSets:
    """Merge equal expert sets of tokens [tokens, top_k]; above ``most`` sets, of a sample."""
    if len(experts) > _MIXING_TOKENS:
        experts = experts[rng.choice(len(experts), _MIXING_TOKENS, replace=False)]
    # Equal sets have equal sums of random 64-bit labels; unequal ones do not, but for 1 in 2**64.
    label = rng.integers(2**63, size=int(experts.max()) + 1, dtype=np.uint64)
    keys = label[experts].sum(axis=1, dtype=np.uint64)
    _, first, counts = np.unique(keys, return_index=True, return_counts=True)
    members = np.sort(experts[first].astype(np.int64), axis=1)
    return TokenSets(members=members, weight=counts / counts.sum()).sample(most, rng)


def request_blocks(trace: RoutingTrace, blocks: int) -> tuple[RoutingTrace, ...]:
    """Cut a trace into blocks of consecutive requests; fewer blocks when requests are few."""
    request = request_order(trace)
    count = int(request.max(initial=-1)) + 1
    blocks = max(1, min(blocks, count // _REQUESTS_PER_BLOCK))
    if blocks == 1:
        return (trace,)
    block = request * blocks // count
    return tuple(trace.select(block == number) for number in range(blocks))


def block_loads(blocks: tuple[RoutingTrace, ...]) -> Floats:
    """Share of each expert in the tokens of each block, [blocks, layers, experts].

    Shares of a layer sum to 1 in every block, so that blocks count alike.
    """
    loads = np.stack([expert_counts(b.experts, b.meta.num_experts) for b in blocks])
    return np.asarray(loads / loads.sum(axis=-1, keepdims=True))


def observed_steps(
    trace: RoutingTrace,
    blocks: tuple[RoutingTrace, ...],
    *,
    batch: int,
    seed: int,
    most: int = 1600,
) -> NDArray[np.float32]:
    """Count experts in decode steps, half of them from all requests, half from single blocks.

    Parameters
    ----------
    trace : RoutingTrace
        The part planned on. Without decode rows its prefill rows stand in.
    blocks : tuple of RoutingTrace
        Of `request_blocks`.
    batch : int
        Tokens of a step.
    seed : int
    most : int
        Steps at most; fewer when a step has very many tokens (it then varies little).

    Returns
    -------
    float32 array [steps, layers, experts]
    """
    cells = batch * trace.num_layers * trace.meta.top_k
    steps = max(_LEAST_STEPS, min(most, _CELLS // cells))
    sources = (trace,) if len(blocks) == 1 else (trace,) * len(blocks) + blocks
    each = -(-steps // len(sources))
    phase: Phase = "decode" if trace.decode.any() else "any"
    counts = []
    for number, source in enumerate(sources):
        usable: Phase = phase if phase == "any" or source.decode.any() else "any"
        batches = decode_batches(
            source, batch=batch, steps=each * _STRIDE, seed=seed + number, phase=usable
        )
        counts.append(step_counts(source, batches.rows[::_STRIDE]))
    return np.concatenate(counts).astype(np.float32)
