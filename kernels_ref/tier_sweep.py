"""What an expert costs that has to come from a slower memory: fetches by size, and the lookup.

A fetch is what `MemoryHome` and `FileHome` do: one copy out of pageable memory, or one read of a
file and the copy out of its buffer. Each lands in another slot and comes from another record, and
both pools exceed the processor's caches, as they do in a decoder. The lookup is what a cache does
in a layer before anything moves. Sizes in bytes, times in seconds.
Shape suffixes: R records, P slots, N elements of one expert.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hwmodels.ops import Stage
from kernels_ref.copies import copy_host
from kernels_ref.decoder_experts import CachedExperts
from kernels_ref.expert_cache import ExpertCache
from kernels_ref.expert_file import ExpertFile, write_expert_file
from kernels_ref.experts import gated_ffn
from kernels_ref.machine import last_level_cache
from kernels_ref.measure import Timing, measure_interleaved
from kernels_ref.stage_clock import StageClock
from traces.model_spec import ModelSpec

Tier = Literal["pages", "disk", "page cache"]
"""Pageable memory; a file read past the operating system's page cache, or through it."""
_ITEM = 4  # bytes of the numbers that are copied
_LEAST_POOL = 2**27  # bytes of a pool, if the caches are small
_FILE = 2**26  # bytes of the records of one file
_LEAST_RECORDS = 4
_BETWEEN = 2**23  # bytes read between lookups, if the caches are small
_ORDER = 1024  # random choices after which they repeat


@dataclass(frozen=True, kw_only=True, eq=False)
class Fetch:
    """How long one expert of a size takes from a tier into a slot."""

    tier: Tier
    bytes: int
    timing: Timing


def sweep_fetches(
    folder: Path | str, sizes: Sequence[int], *, rounds: int = 15, seed: int = 0
) -> tuple[Fetch, ...]:
    """Time fetches of several sizes from pageable memory and from files, all of them interleaved.

    Between two fetches the processor works on other data, as it does in a step: what serves a drive
    has then gone to sleep, and the caches are full of something else.

    Parameters
    ----------
    folder
        Where files are written, one per size, and removed at the end; its drive is the tier.
    sizes
        Bytes of an expert; multiples of 4.
    rounds
        Samples of each, at least 5.
    seed
        Of the records that are asked for, and of the order.

    Raises
    ------
    ValueError
        If a size is no positive multiple of 4, or there are fewer than 5 rounds.
    OSError
        If the folder cannot be written.
    """
    for size in sizes:
        if size < _ITEM or size % _ITEM:
            raise ValueError(
                f"fetch of {size} bytes -- a positive multiple of {_ITEM}: whole float32 -- "
                "round it"
            )
    pool = max(2 * last_level_cache(), _LEAST_POOL, _LEAST_RECORDS * max(sizes)) // _ITEM
    home, slots = (torch.ones(pool) for _ in range(2))
    with tempfile.TemporaryDirectory(dir=folder) as files, ExitStack() as opened:
        tiers: list[Tier] = []
        calls: list[Callable[[], None]] = []
        for place, size in enumerate(sizes):
            random = np.random.default_rng([seed, place])
            path = Path(files) / str(place)
            write_expert_file(path, _records(size))
            file = opened.enter_context(ExpertFile(path))
            slots_PN, home_RN = (_cut(each, size) for each in (slots, home))
            tiers += ["pages", file.tier]
            calls += [
                _fetch(home_RN.__getitem__, len(home_RN), slots_PN, random),
                _fetch(file.read, file.records, slots_PN, random),
            ]
        others = np.ones(max(2 * last_level_cache(), _BETWEEN) // _ITEM, dtype=np.float32)
        timings = measure_interleaved(calls, rounds=rounds, before=others.max, seed=seed)
    both = np.repeat(sizes, 2).tolist()
    return tuple(
        Fetch(tier=tier, bytes=size, timing=timing)
        for tier, size, timing in zip(tiers, both, timings, strict=True)
    )


@dataclass(frozen=True, kw_only=True)
class NearUse:
    """How long one token takes through an expert that was copied into its slot just before."""

    hidden: int
    width: int
    seconds: float
    """Copy and expert together, less the copy alone."""
    floor: float
    """Spread of both, relative to ``seconds``."""


def sweep_near_uses(
    shapes: Sequence[tuple[int, int]], *, rounds: int = 15, seed: int = 0
) -> tuple[NearUse, ...]:
    """Time float32 experts whose weights a copy has just left in the processor's cache.

    Parameters
    ----------
    shapes
        Width of the model and of the expert, gated.
    rounds, seed
        As `sweep_fetches`.
    """
    largest = max(3 * hidden * width * _ITEM for hidden, width in shapes)
    pool = max(2 * last_level_cache(), _LEAST_POOL, _LEAST_RECORDS * largest) // _ITEM
    home, slots = (torch.rand(pool) - 0.5 for _ in range(2))
    calls: list[Callable[[], object]] = []
    for place, (hidden, width) in enumerate(shapes):
        size = 3 * hidden * width * _ITEM
        home_RN, slots_PN = _cut(home, size), _cut(slots, size)
        for used in (False, True):
            random = np.random.default_rng([seed, place])  # the same experts with and without
            calls.append(_copy_and_use(home_RN, slots_PN, hidden, width, random, used=used))
    timings = measure_interleaved(calls, rounds=rounds, seed=seed)
    found = []
    for (hidden, width), alone, both in zip(shapes, timings[::2], timings[1::2], strict=True):
        seconds = both.seconds - alone.seconds
        spread = both.floor * both.seconds + alone.floor * alone.seconds
        use = NearUse(hidden=hidden, width=width, seconds=seconds, floor=spread / abs(seconds))
        found.append(use)
    return tuple(found)


def _copy_and_use(
    home_RN: Tensor,
    slots_PN: Tensor,
    hidden: int,
    width: int,
    random: np.random.Generator,
    *,
    used: bool,
) -> Callable[[], object]:
    sources = cycle(random.integers(len(home_RN), size=_ORDER).tolist())
    targets = cycle(random.integers(len(slots_PN), size=_ORDER + 1).tolist())
    x_ND, up = torch.ones(1, hidden), 2 * width * hidden

    def call() -> object:
        slot_N = slots_PN[next(targets)]
        copy_host(slot_N, home_RN[next(sources)])
        if not used:
            return slot_N
        return gated_ffn(x_ND, slot_N[:up].view(-1, hidden), slot_N[up:].view(hidden, -1))

    return call


def _records(size: int) -> Iterator[Tensor]:
    record_N = torch.ones(size // _ITEM)
    for _ in range(max(_FILE // size, _LEAST_RECORDS)):
        yield record_N


def _cut(pool: Tensor, size: int) -> Tensor:
    """Cut a pool into as many experts as it holds."""
    count = pool.numel() * _ITEM // size
    return pool[: count * size // _ITEM].view(count, -1)


def _fetch(
    read: Callable[[int], Tensor], records: int, slots_PN: Tensor, random: np.random.Generator
) -> Callable[[], None]:
    """Return a call that fetches another record into another slot each time."""
    sources = cycle(random.integers(records, size=_ORDER).tolist())
    targets = cycle(random.integers(len(slots_PN), size=_ORDER + 1).tolist())

    def call() -> None:
        copy_host(slots_PN[next(targets)], read(next(sources)))

    return call


def time_lookup(
    model: ModelSpec, *, slots: int, batch: int = 1, steps: int = 24, seed: int = 0
) -> Timing:
    """Time the "cache lookup" of `CachedExperts` in one layer, on random choices.

    The model's widths are made tiny; in place of experts, numbers are read between two layers that
    push the lookup's own data out of the processor's caches, as weights do.

    Parameters
    ----------
    model
        Layers, experts and choices per token.
    slots
        Of a layer.
    batch
        Tokens of a step.
    steps
        Samples, each the mean of a step's layers.
    seed
        Of the choices.
    """
    tiny = model.model_copy(update={"hidden_size": 2, "comm_size": 2, "expert_width": 1})
    random = np.random.default_rng(seed)
    shape = (tiny.num_moe_layers, batch, tiny.num_experts)
    clock, x_TD = StageClock(), torch.ones(batch, 2)
    others = torch.ones(max(2 * last_level_cache(), _BETWEEN) // _ITEM)
    weights_TK = torch.ones(batch, tiny.top_k)
    samples = np.empty(steps)

    def recent(step: int, layer: int, used: Sequence[int]) -> tuple[Sequence[int], list[float]]:
        return used, [float(step * shape[0] + layer)] * len(used)

    def none(layer: int, expert: int, slot_N: Tensor) -> None:
        """Leave the slot as it is."""

    cache = ExpertCache(tiny, slots=slots, policy=recent, load=none, dtype=torch.float32)
    experts = CachedExperts(tiny, cache)
    with torch.inference_mode():
        for step in range(steps):
            ids_LTK = random.random(shape).argsort(axis=2)[..., : tiny.top_k]
            chosen = [torch.from_numpy(ids_TK) for ids_TK in ids_LTK]
            clock.start()
            for layer, ids_TK in enumerate(chosen):
                others.sum()
                clock.lap(Stage.OTHER, "other layers")
                experts.run(layer, x_TD, ids_TK, weights_TK, clock)
            clock.stop()
            samples[step] = clock.seconds().kernel_s["cache lookup"] / shape[0]
    return Timing(samples=samples, calls=shape[0])
