"""Which logical expert sits in which slot of which rank, layer by layer.

A rank offers the same number of slots in every layer, like shelves of equal length; slot
``s`` belongs to rank ``s // slots_per_rank``. An expert in several slots has replicas.
This is the `physical_to_logical_map` that SGLang, vLLM and TensorRT-LLM use.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError


@dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """A map of physical to logical experts.

    Raises
    ------
    InputError
        If the slots do not divide over the ranks, an id is out of range, or a logical
        expert has no slot in some layer.
    """

    slots: NDArray[np.int32]
    """Logical expert of each slot, [layers, slots]."""
    num_experts: int
    """Logical experts per layer."""
    num_ranks: int
    """Expert-parallel ranks."""

    def __post_init__(self) -> None:
        slots = np.ascontiguousarray(self.slots, dtype=np.int32)
        object.__setattr__(self, "slots", slots)
        if slots.ndim != 2:
            raise InputError(
                f"placement has {slots.ndim} axes -- expected [layers][slots] of expert ids"
            )
        check_slots(slots.shape[1], self.num_experts, self.num_ranks)
        if slots.size and (slots.min() < 0 or slots.max() >= self.num_experts):
            bad = int(slots[(slots < 0) | (slots >= self.num_experts)][0])
            raise InputError(
                f"placement names expert {bad} -- ids go from 0 to {self.num_experts - 1}"
            )
        missing = np.argwhere(self.replicas == 0)
        if len(missing):
            layer, expert = (int(i) for i in missing[0])
            raise InputError(
                f"expert {expert} of MoE layer row {layer} has no slot ({len(missing)} such) -- "
                "every logical expert needs at least one slot per layer"
            )

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return int(self.slots.shape[0])

    @property
    def num_slots(self) -> int:
        """Slots per layer over all ranks."""
        return int(self.slots.shape[1])

    @property
    def slots_per_rank(self) -> int:
        """Slots per layer on one rank."""
        return self.num_slots // self.num_ranks

    @cached_property
    def rank_of_slot(self) -> NDArray[np.int32]:
        """Rank of each slot, [slots]."""
        return (np.arange(self.num_slots) // self.slots_per_rank).astype(np.int32)

    @cached_property
    def replicas(self) -> NDArray[np.int64]:
        """Slots that hold each expert, [layers, experts]."""
        layers = np.arange(self.num_layers)[:, None]
        flat = np.bincount(
            (layers * self.num_experts + self.slots).ravel(),
            minlength=self.num_layers * self.num_experts,
        )
        return flat.reshape(self.num_layers, self.num_experts)

    @cached_property
    def hosts(self) -> NDArray[np.int64]:
        """Replicas of each expert on each rank, [layers, experts, ranks]."""
        shape = (self.num_layers, self.num_experts, self.num_ranks)
        hosts = np.zeros(shape, dtype=np.int64)
        layers = np.arange(self.num_layers)[:, None]
        np.add.at(hosts, (layers, self.slots, self.rank_of_slot[None, :]), 1)
        return hosts

    @cached_property
    def replica_slots(self) -> NDArray[np.int32]:
        """Slots of each expert in ascending order, [layers, experts, most replicas], -1 padded."""
        order = np.argsort(self.slots, axis=1, kind="stable")
        ordered = np.take_along_axis(self.slots, order, axis=1)
        first = np.cumsum(self.replicas, axis=1) - self.replicas
        nth = np.arange(self.num_slots) - np.take_along_axis(first, ordered, axis=1)
        shape = (self.num_layers, self.num_experts, int(self.replicas.max(initial=1)))
        table = np.full(shape, -1, dtype=np.int32)
        table[np.arange(self.num_layers)[:, None], ordered, nth] = order
        return table


def check_slots(num_slots: int, num_experts: int, num_ranks: int) -> None:
    """Check that ``num_slots`` can hold the experts and divide over the ranks.

    Raises
    ------
    InputError
        With the nearest numbers of redundant experts that are allowed.
    """
    if num_slots < num_experts:
        raise InputError(
            f"{num_slots} slots for {num_experts} experts -- every expert needs one; "
            "raise redundant_experts"
        )
    if num_slots % num_ranks:
        redundant = num_slots - num_experts
        up = -num_slots % num_ranks
        down = redundant - num_slots % num_ranks
        choices = [str(r) for r in (down, redundant + up) if r >= 0]
        raise InputError(
            f"{num_experts} experts + {redundant} redundant = {num_slots} slots do not divide over "
            f"{num_ranks} ranks -- set redundant_experts to {' or '.join(choices)}"
        )
