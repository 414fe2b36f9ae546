"""A step cut into parts that run one after another: pipeline microbatches, halves of two batches.

A request keeps its part from step to step, and every rank's tokens are divided as evenly as they
can be: single tokens in decode, whole prompts in prefill.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from simulator.batches import Composition, StepBatch


def split(composition: Composition, parts: int) -> Composition:
    """Cut every step into ``parts`` batches, in order: step 0's parts, then step 1's.

    Parts may be empty where a rank has fewer tokens (or prompts) than parts.
    """
    if parts == 1:
        return composition
    batches = tuple(
        cut for batch in composition.batches for cut in _cut(batch, parts, composition.decode)
    )
    return replace(composition, batches=batches)


def _cut(batch: StepBatch, parts: int, decode: bool) -> Iterator[StepBatch]:
    part = np.zeros(len(batch.rows), dtype=np.int64)
    for home in np.unique(batch.home):
        mine = np.flatnonzero(batch.home == home)
        if decode:
            part[mine] = np.arange(len(mine)) * parts // len(mine)
        else:
            part[mine] = _prompts(batch.last[mine], parts)
    for number in range(parts):
        at = part == number
        yield StepBatch(
            rows=batch.rows[at],
            context=batch.context[at],
            home=batch.home[at],
            last=batch.last[at],
        )


def _prompts(last: NDArray[np.bool_], parts: int) -> NDArray[np.int64]:
    """Give each prompt, longest first, to the part that has the fewest tokens, [tokens]."""
    lengths = np.diff(np.flatnonzero(last), prepend=-1)
    given, part = np.zeros(parts, dtype=np.int64), np.zeros(len(lengths), dtype=np.int64)
    for prompt in np.argsort(-lengths, kind="stable"):
        part[prompt] = given.argmin()
        given[part[prompt]] += lengths[prompt]
    return np.repeat(part, lengths)
