"""An expert cache that really moves weights: slots in fast memory before a slower home.

The rule is that of `traces.caches.replay`, access by access, an access being the distinct experts
that one MoE layer of one step uses: all of them come in; while more are held than there are slots,
the expert with the smallest worth goes, of equals the smaller id (layer first, where layers share
one pool), those in use last. What an access larger than the cache pushes out again is used from a
buffer, and not kept. What an expert is worth says a policy that is handed in; `recorded_policy`
makes it of the very scores that the replay uses.
Shape suffixes: L MoE layers, E experts, P slots, N elements of one expert.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from heapq import nsmallest
from typing import Literal, Self

import torch
from torch import Tensor

from kernels_ref.decoder_weights import SlotWeights
from traces.caches_scores import Keys
from traces.model_spec import ModelSpec

Load = Callable[[int, int, Tensor], None]
"""Copies an expert (MoE layer, logical id) from its home into a slot ``[N]``, and waits for it."""
Scope = Literal["layer", "global"]
Policy = Callable[[int, int, Sequence[int]], tuple[Sequence[int], Sequence[float]]]
"""From step, MoE layer and the experts in use (ascending) to the experts of this layer whose worth
changes, and what they are worth from now on; the smallest goes first."""
Expert = tuple[int, int]
"""MoE layer and logical id."""
_BUFFERS = 2  # slots for what does not stay: one in use, one on its way


@dataclass(frozen=True, kw_only=True)
class Access:
    """What one access did to the cache."""

    step: int
    layer: int
    """MoE layer, from 0."""
    hits: tuple[int, ...]
    """Used and there, ascending."""
    misses: tuple[int, ...]
    """Used and fetched, ascending."""
    evicted: tuple[Expert, ...]
    """Not there afterwards: pushed out, or fetched and not kept."""


def recorded_policy(keys: Keys, num_layers: int) -> Policy:
    """Return the worths of `traces.caches_scores.score_keys` for the recorded sequence.

    Parameters
    ----------
    keys
        Of the sequence of accesses that will be run, from its first step on.
    num_layers
        MoE layers.
    """
    experts = len(keys.initial) // num_layers

    def policy(step: int, layer: int, used: Sequence[int]) -> tuple[list[int], list[float]]:
        access = step * num_layers + layer
        if access + 1 >= len(keys.bounds):
            steps = (len(keys.bounds) - 1) // num_layers
            raise ValueError(
                f"step {step} of a cache whose policy was recorded for {steps} steps -- run at "
                "most these -- make the policy for the whole sequence"
            )
        touched = slice(int(keys.bounds[access]), int(keys.bounds[access + 1]))
        cells = (keys.cells[touched] - layer * experts).tolist()
        if stray := sorted(set(used) - set(cells)):
            raise ValueError(
                f"step {step}, MoE layer {layer} uses expert {stray[0]}, which the policy's record "
                "does not -- force the recorded experts, or make the policy for this sequence"
            )
        return cells, keys.values[touched].tolist()

    return policy


class ExpertCache:
    """Slots of the fast memory, what is in them, and the copies into them.

    Every MoE layer is accessed once a step, in order. Within an access, `release` each expert when
    it has run, and begin a `fetch` when all but one of those before have been released.

    Parameters
    ----------
    model
        Geometry.
    slots
        Experts that fit: in each MoE layer, or (scope ``global``) in all together; two buffers
        more are reserved beside each pool.
    policy
        Who stays.
    load
        Brings an expert from its home (`MemoryHome`, `FileHome`).
    dtype, device
        Of the slots.
    scope
        As `traces.caches.replay`.
    beside
        Copy in a thread of its own, so that a copy runs beside the experts before it (torch and
        file reads let go of the interpreter). False: copies and kernels take turns.

    Raises
    ------
    ValueError
        If there is no slot.
    """

    def __init__(
        self,
        model: ModelSpec,
        *,
        slots: int,
        policy: Policy,
        load: Load,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        scope: Scope = "layer",
        beside: bool = False,
    ) -> None:
        if slots < 1:
            raise ValueError(f"expert cache of {slots} slots -- at least 1 -- give it more")
        self._layers, self._slots = model.num_moe_layers, slots
        self._policy, self._load = policy, load
        step = slots + _BUFFERS
        reserved = step * (self._layers if scope == "layer" else 1)
        size = model.expert_matrix_params
        # written once, so that no first touch of a page falls into a measured copy
        self._slots_PN = torch.zeros(reserved, size, dtype=dtype, device=device)
        self._weights = SlotWeights.of(model, self._slots_PN)
        self._pools = [_Pool(range(first, first + step)) for first in range(0, reserved, step)]
        self._worth: dict[Expert, float] = {}
        self._accesses = 0
        self._log: list[Access] = []
        self._staying: set[Expert] = set()
        self._thread = ThreadPoolExecutor(1) if beside else None

    def __enter__(self) -> Self:
        """Nothing to open."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the copying thread, if there is one."""
        if self._thread is not None:
            self._thread.shutdown()

    def residents(self, layer: int) -> list[int]:
        """Return the experts of a layer that are there, ascending."""
        return sorted(expert for at, expert in self._pool(layer).slot_of if at == layer)

    def take_log(self) -> list[Access]:
        """Return what happened since this was called last, and forget it; one entry per access."""
        log, self._log = self._log, []
        return log

    def access(self, layer: int, used: Sequence[int]) -> Access:
        """Decide what a layer's experts do to the cache; unused ones that have to go are gone.

        Parameters
        ----------
        layer
            MoE layer; they come in order, step after step.
        used
            Distinct logical experts, ascending.

        Raises
        ------
        ValueError
            If it is another layer's turn, or the policy has no such step.
        """
        step, due = divmod(self._accesses, self._layers)
        if layer != due:
            raise ValueError(
                f"expert cache: access of MoE layer {layer} -- layer {due} is due -- run all "
                "layers of a step in order"
            )
        self._accesses += 1
        for expert, worth in zip(*self._policy(step, layer, used), strict=True):
            self._worth[layer, expert] = worth
        pool = self._pool(layer)
        wanted = {(layer, expert) for expert in used}
        access = Access(
            step=step,
            layer=layer,
            hits=tuple(e for e in used if (layer, e) in pool.slot_of),
            misses=tuple(e for e in used if (layer, e) not in pool.slot_of),
            evicted=self._excess(pool.slot_of.keys() | wanted, wanted),
        )
        self._staying = wanted.difference(access.evicted)
        for cell in set(access.evicted) - wanted:
            pool.leave(cell)
        self._log.append(access)
        return access

    def weights(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        """Return the matrices ``[2F, D]`` and ``[D, F]`` of an expert that is there."""
        slot = self._pool(layer).slot_of[layer, expert]
        return self._weights.w13_PGD[slot], self._weights.w2_PDF[slot]

    def fetch(self, layer: int, expert: int) -> Callable[[], None]:
        """Begin to copy an expert into a free slot; the result waits until it is there."""
        slot = self._pool(layer).enter((layer, expert))
        if self._thread is None:
            self._load(layer, expert, self._slots_PN[slot])
            return lambda: None
        return self._thread.submit(self._load_beside, layer, expert, slot).result

    def release(self, layer: int, experts: Sequence[int]) -> None:
        """Free the slots of experts that have run and do not stay."""
        for expert in experts:
            if (layer, expert) not in self._staying:
                self._pool(layer).leave((layer, expert))

    def pass_by(self, layer: int, used: Sequence[int]) -> None:
        """Access, fetch and release without running an expert: fills a cache ahead of steps.

        Parameters and errors as `access`.
        """
        access = self.access(layer, used)
        self.release(layer, access.hits)
        for expert in access.misses:
            self.fetch(layer, expert)()
            self.release(layer, [expert])

    @torch.inference_mode()  # of the thread: it is not inherited
    def _load_beside(self, layer: int, expert: int, slot: int) -> None:
        self._load(layer, expert, self._slots_PN[slot])

    def _pool(self, layer: int) -> "_Pool":
        return self._pools[layer % len(self._pools)]

    def _excess(self, held: set[Expert], wanted: set[Expert]) -> tuple[Expert, ...]:
        """Return who of the held has to go, those in use last."""
        most = len(held) - self._slots
        return tuple(nsmallest(most, held, lambda c: (c in wanted, self._worth[c], c)))


class _Pool:
    """Slots that may hold any of some experts."""

    def __init__(self, slots: Iterable[int]) -> None:
        self.slot_of: dict[Expert, int] = {}
        self._free = list(slots)

    def enter(self, cell: Expert) -> int:
        self.slot_of[cell] = self._free.pop()
        return self.slot_of[cell]

    def leave(self, cell: Expert) -> None:
        self._free.append(self.slot_of.pop(cell))
