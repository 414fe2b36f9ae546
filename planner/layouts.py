"""All parallel layouts of a model on a cluster, and the redundant experts that make slots divide.

Attention dp x tp x pp and experts edp x ep x etp are factorised over the same ranks, with either
exchange. What is left out is left out by a stated rule (`RULES`); a count of layouts, no speeds.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from basis.errors import InputError
from hwmodels.cluster import Cluster
from simulator.layout import Layout
from simulator.parallelism import AttentionLayout, ExpertLayout, Parallelism
from traces.model_spec import ModelSpec

MOST_REDUNDANT = 0.5
"""Redundant experts at most, as a share of the experts: more are replicas for their own sake."""
RULES = (
    "tensor parallelism (attention tp, experts tp) stays inside a node, unless a node holds no "
    "fitting layout",
    "all pipeline stages lie alike on the nodes",
    "factors divide the attention heads, the dense width, the expert width (whole blocks of its "
    "number format) and the KV heads, or are a multiple of these",
    "redundant experts fill the slots up to the next multiple of ep, at most half as many as there "
    "are experts",
    "all_gather only where an expert-parallel group has more than one rank",
)
"""What `enumerate_layouts` leaves out, in words for the report."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One layout with the slots that it needs."""

    parallelism: Parallelism
    layout: Layout
    redundant_experts: int
    """Slots beyond one for each expert; the smallest number from the wanted one on that lets the
    slots divide over the expert-parallel ranks."""

    @property
    def name(self) -> str:
        """The layout in a line, with the redundant experts that it needs."""
        extra = f", {self.redundant_experts} redundant" if self.redundant_experts else ""
        return f"{self.layout}{extra}"


def enumerate_layouts(
    model: ModelSpec, cluster: Cluster, *, redundant: int = 0, across_nodes: bool = False
) -> tuple[Candidate, ...]:
    """List the layouts that divide the ranks and the model.

    Parameters
    ----------
    model : ModelSpec
    cluster : Cluster
    redundant : int
        Redundant experts that are wanted anyway.
    across_nodes : bool
        Let tensor-parallel groups span nodes.

    Returns
    -------
    tuple of Candidate
        In order of pp, tp, ep, etp; empty where a rule leaves nothing.
    """
    most = cluster.num_ranks if across_nodes else cluster.ranks_per_node
    found = []
    for parallelism in _factorisations(cluster.num_ranks):
        layout = Layout.of(parallelism, cluster.num_ranks)
        if max(layout.tp, layout.etp) > most or not _lies_well(layout, cluster, across_nodes):
            continue
        extra = redundant_for(model.num_experts, layout.ep, redundant)
        if layout.ep > 1 and extra > max(redundant, MOST_REDUNDANT * model.num_experts):
            continue
        if _divides(layout, model, model.num_experts + extra):
            found.append(Candidate(parallelism=parallelism, layout=layout, redundant_experts=extra))
    return tuple(found)


def redundant_for(num_experts: int, ep: int, wanted: int = 0) -> int:
    """Return the fewest redundant experts, from ``wanted`` on, with which slots divide over ``ep``.

    With one expert-parallel rank a replica would stand beside its expert: none.
    """
    return 0 if ep == 1 else wanted + -(num_experts + wanted) % ep


def _factorisations(ranks: int) -> Iterator[Parallelism]:
    for pp in _divisors(ranks):
        lanes = ranks // pp
        for tp in _divisors(lanes):
            for ep in _divisors(lanes):
                for etp in _divisors(lanes // ep):
                    for exchange in ("all_to_all", "all_gather")[: 2 if ep > 1 else 1]:
                        yield Parallelism(
                            attention=AttentionLayout(dp=lanes // tp, tp=tp, pp=pp),
                            experts=ExpertLayout.model_validate(
                                {"ep": ep, "tp": etp, "exchange": exchange}
                            ),
                        )


def _lies_well(layout: Layout, cluster: Cluster, across_nodes: bool) -> bool:
    """Whether all stages lie alike on nodes, and no tensor-parallel group lies on two."""
    node = cluster.node_of.reshape(layout.pp, layout.lanes)
    if not (node - node[:, :1] == node[0]).all():
        return False
    return across_nodes or all(
        (node[:, layout.groups(size)] == node[:, layout.groups(size)[:, :1]]).all()
        for size in (layout.tp, layout.etp)
    )


def _divides(layout: Layout, model: ModelSpec, slots: int) -> bool:
    """Whether the model can be cut so; a slice of an expert must not be padded."""
    if layout.slice_width(model) * layout.etp != model.expert_width:
        return False
    try:
        layout.check(model, slots)
    except InputError:
        return False
    return True


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
