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
from simulator.placement import Placement
from traces.model_spec import ModelSpec


class AttentionLayout(Strict):
    """How attention, dense layers and the head are spread over the ranks."""

    dp: int = Field(ge=1)
    """Data-parallel degree: each rank works on requests of its own."""
    tp: int = Field(default=1, ge=1)
    """Tensor-parallel degree."""
    pp: int = Field(default=1, ge=1)
    """Pipeline stages."""


class ExpertLayout(Strict):
    """How the routed experts are spread over the ranks."""

    ep: int = Field(ge=1)
    """Expert-parallel degree: ranks over which the slots of a layer are divided."""
    tp: int = Field(default=1, ge=1)
    """Tensor-parallel degree inside one expert."""


class Parallelism(Strict):
    """The two independent halves of a parallel layout."""

    attention: AttentionLayout
    experts: ExpertLayout


class Deployment(Strict):
    """Everything that can be chosen; round-trips through JSON and YAML."""

    parallelism: Parallelism
    physical_to_logical_map: tuple[tuple[int, ...], ...]
    """Logical expert of each slot, [MoE layers][slots]; slot s is on rank s // (slots / ep)."""
    dispatch: Dispatch = "even"
    """How tokens choose among replicas."""
    slot_share: tuple[tuple[float, ...], ...] | None = None
    """Share of its expert's tokens that each slot takes, [MoE layers][slots]; for ``shares``."""

    @classmethod
    def of(
        cls,
        placement: Placement,
        dispatch: Dispatch = "even",
        slot_share: NDArray[np.float64] | None = None,
    ) -> Self:
        """Describe a placement under attention DP = EP = its number of ranks."""
        ranks = placement.num_ranks
        return cls(
            parallelism=Parallelism(
                attention=AttentionLayout(dp=ranks), experts=ExpertLayout(ep=ranks)
            ),
            physical_to_logical_map=tuple(map(tuple, placement.slots.tolist())),
            dispatch=dispatch,
            slot_share=None if slot_share is None else tuple(map(tuple, slot_share.tolist())),
        )

    def placement_for(self, model: ModelSpec, cluster: Cluster) -> Placement:
        """Return the placement, checked against the model and the cluster.

        Raises
        ------
        InputError
            If the layout is one that is not simulated, the map's rows or ids do not fit the
            model, or the slots do not divide over the ranks.
        """
        _check_layout(self.parallelism, cluster)
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
            num_ranks=self.parallelism.experts.ep,
        )

    def dispatcher_for(self, model: ModelSpec, cluster: Cluster) -> Dispatcher:
        """Return what assigns tokens to slots; the errors are those of `placement_for`."""
        share = self.slot_share
        if share is not None:
            _check_rectangular(share, "slot_share")
        return Dispatcher(
            placement=self.placement_for(model, cluster),
            dispatch=self.dispatch,
            node_of=np.asarray(cluster.node_of, dtype=np.int64),
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


def _check_layout(layout: Parallelism, cluster: Cluster) -> None:
    attention, experts, ranks = layout.attention, layout.experts, cluster.num_ranks
    if (attention.tp, attention.pp, experts.tp) != (1, 1, 1):
        raise InputError(
            f"attention tp {attention.tp}, pp {attention.pp}, experts tp {experts.tp} -- only "
            "attention data parallelism with expert parallelism is simulated: set tp and pp to 1"
        )
    if (attention.dp, experts.ep) != (ranks, ranks):
        raise InputError(
            f"attention dp {attention.dp} and experts ep {experts.ep} on {ranks} ranks of "
            f"{cluster.name} -- both must be {ranks}, the number of ranks of the cluster"
        )


def _check_rectangular(rows: Sequence[Sequence[float]], name: str) -> None:
    widths = sorted({len(row) for row in rows})
    if len(widths) != 1:
        raise InputError(
            f"{name}: rows have {widths or 'no'} entries -- all must have the same number"
        )
