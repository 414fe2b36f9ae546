"""What is chosen for a deployment, as plain data: parallel layout, expert placement, dispatch.

A Deployment says which rank works on what; it knows nothing of a model or a cluster until
`Deployment.placement_for` checks it against both. A Workload says what one step carries.
"""

from collections.abc import Sequence
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from basis.errors import InputError
from basis.schema import Strict
from hwmodels.cluster import Cluster
from simulator.dispatch import Dispatch, Dispatcher
from simulator.layout import Layout
from simulator.offload import Offload
from simulator.parallelism import Parallelism
from simulator.placement import Placement
from traces.model_spec import ModelSpec

__all__ = ["Deployment", "Overlap", "Parallelism", "Workload"]

Overlap = Literal["none", "two_batch"]
"""``two_batch``: the tokens of a step are halved, and the communication of each half runs beside
the compute of the other."""


class Deployment(Strict):
    """Everything that can be chosen; round-trips through JSON and YAML."""

    parallelism: Parallelism
    physical_to_logical_map: tuple[tuple[int, ...], ...]
    """Logical expert of each slot, [MoE layers][slots]; slot s is on rank s // (slots / ep)."""
    dispatch: Dispatch = "even"
    """How tokens choose among replicas."""
    slot_share: tuple[tuple[float, ...], ...] | None = None
    """Share of its expert's tokens that each slot takes, [MoE layers][slots]; for ``shares``."""
    overlap: Overlap = "none"
    """What runs beside what."""
    offload: Offload | None = None
    """Experts in more than one memory; none: all in the device's own."""

    @classmethod
    def of(
        cls,
        placement: Placement,
        dispatch: Dispatch = "even",
        slot_share: NDArray[np.float64] | None = None,
        parallelism: Parallelism | None = None,
    ) -> Self:
        """Describe a placement; without a layout under attention DP = EP = its ranks."""
        return cls(
            parallelism=parallelism or Parallelism.dp_ep(placement.num_ranks),
            physical_to_logical_map=tuple(map(tuple, placement.slots.tolist())),
            dispatch=dispatch,
            slot_share=None if slot_share is None else tuple(map(tuple, slot_share.tolist())),
        )

    def layout_for(self, model: ModelSpec, cluster: Cluster) -> Layout:
        """Return the layout on the cluster's ranks, checked against the model.

        Raises
        ------
        InputError
            If it does not divide the ranks or the model; see `Layout.check`.
        """
        layout = Layout.of(self.parallelism, cluster.num_ranks)
        layout.check(model)
        return layout

    def placement_for(self, model: ModelSpec, cluster: Cluster) -> Placement:
        """Return the placement over the expert-parallel ranks, checked against both.

        Raises
        ------
        InputError
            If the layout does not divide the ranks, the model or the slots, or the map's rows or
            ids do not fit the model.
        """
        layout = self.layout_for(model, cluster)
        rows = self.physical_to_logical_map
        _check_rectangular(rows, "physical_to_logical_map")
        if len(rows) != model.num_moe_layers:
            raise InputError(
                f"physical_to_logical_map has {len(rows)} rows, {model.name} has "
                f"{model.num_moe_layers} MoE layers -- give one row per MoE layer, dense layers "
                "left out"
            )
        return Placement(
            slots=np.array(rows, dtype=np.int32),
            num_experts=model.num_experts,
            num_ranks=layout.ep,
        )

    def dispatcher_for(self, model: ModelSpec, cluster: Cluster) -> Dispatcher:
        """Return what assigns tokens to slots inside the first block of ranks.

        The errors are those of `placement_for`.
        """
        share = self.slot_share
        if share is not None:
            _check_rectangular(share, "slot_share")
        layout = self.layout_for(model, cluster)
        return Dispatcher(
            placement=self.placement_for(model, cluster),
            dispatch=self.dispatch,
            node_of=np.asarray(cluster.node_of, dtype=np.int64)[layout.exchange_groups[0]],
            slot_share=None if share is None else np.array(share, dtype=np.float64),
        )


class Workload(Strict):
    """What one step carries, over all ranks together; exactly one of the two."""

    decode_batch: int | None = Field(default=None, ge=1)
    """Tokens of a decode step: one for each running request."""
    prefill_tokens: int | None = Field(default=None, ge=1)
    """Budget of prompt tokens of a prefill step; whole prompts, so a step usually holds fewer."""

    @model_validator(mode="after")
    def _one_phase(self) -> Self:
        if (self.decode_batch is None) == (self.prefill_tokens is None):
            raise ValueError("give exactly one of decode_batch and prefill_tokens")
        return self

    @property
    def phase(self) -> Literal["decode", "prefill"]:
        """Which of the two phases the steps are of."""
        return "decode" if self.prefill_tokens is None else "prefill"

    @property
    def tokens(self) -> int:
        """Tokens of a decode step, or the budget of a prefill step, over all ranks."""
        return self.decode_batch or self.prefill_tokens or 0


def _check_rectangular(rows: Sequence[Sequence[float]], name: str) -> None:
    widths = sorted({len(row) for row in rows})
    if len(widths) != 1:
        raise InputError(
            f"{name}: rows have {widths or 'no'} entries -- all must have the same number"
        )
