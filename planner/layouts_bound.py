"""A lower bound on the step time of a layout, for any placement of the experts.

One path through a step is timed: a rank with the most tokens of its own in all parts of attention,
the mean rank of its block among the experts, and the collectives between them with their startup.
Perfect balance, no straggler, no wait; the experts' kernels at the mean rank's tiles and active
weights, the exchange at the fewest ranks that a token's experts can lie on. Ranks that meet in a
collective wait for the slowest, which is at least the mean; kernels and links cost
``launch + max(linear, linear)``, so that the mean over ranks and steps is at least the price of the
mean (Jensen). A pipeline is bounded by one microbatch's way through all stages, sends left out.
Seconds, mean over the very steps that the simulator will play.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from basis.dtypes import bytes_of
from hwmodels import AllToAll, Cluster, GroupedGemm, price
from hwmodels.ops import Phase
from planner.layouts_path import Path, PathFinder, path_key
from simulator.batches import Composition
from simulator.layout import Layout
from simulator.loads import StepLoads
from simulator.lowering import lower
from simulator.work import Work
from traces.model_spec import ModelSpec
from traces.routing_trace import RoutingTrace

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Thin:
    """One layer of each kind of a model: which kinds there are and how often."""

    model: ModelSpec
    """The model with one layer of each kind."""
    count: NDArray[np.int64]
    """Layers of each kind, in the order of the thin model's layers."""

    @classmethod
    def of(cls, model: ModelSpec) -> "Thin":
        """Group the layers by whether they are MoE and by their window."""
        moe = set(model.moe_layer_ids)
        kinds = Counter((i in moe, w) for i, w in enumerate(model.attention.windows))
        windows = tuple(window for _, window in kinds)
        ids = tuple(i for i, (is_moe, _) in enumerate(kinds) if is_moe)
        thin = model.model_copy(
            update={
                "num_layers": len(kinds),
                "moe_layer_ids": ids,
                "attention": model.attention.model_copy(update={"windows": windows}),
            }
        )
        return cls(model=thin, count=np.array(list(kinds.values())))

    def times(self, work: Work) -> NDArray[np.int64]:
        """How often a step has each layer of a work, [layers of the work]; 1 at its ends."""
        inside = range(self.model.num_layers)
        return np.array([self.count[n] if n in inside else 1 for n in work.layers])


class BoundMaker:
    """Bounds of layouts at several batch sizes, from the compositions that will be simulated.

    Parameters
    ----------
    model, trace, cluster : ModelSpec, RoutingTrace, Cluster
    compositions : sequence of sequences of Composition
        For each batch size one for each seed; which rows run together does not depend on the
        layout.
    """

    def __init__(
        self,
        model: ModelSpec,
        trace: RoutingTrace,
        cluster: Cluster,
        compositions: Sequence[Sequence[Composition]],
    ) -> None:
        self.model, self.cluster = model, cluster
        self.decode = compositions[0][0].decode
        self.thin = Thin.of(model)
        self.paths = PathFinder(trace, compositions, self.thin.model.attention.windows)
        self._no_fixed = cluster.scaled(fixed=0.0)
        self._experts: dict[tuple[int, ...], tuple[float, float]] = {}

    def seconds(self, layout: Layout, redundant: int, sizes: Sequence[int]) -> Floats:
        """Return the bounds of a layout's mean step time.

        Parameters
        ----------
        layout : Layout
        redundant : int
            Redundant experts.
        sizes : sequence of int
            Indices of batch sizes.

        Returns
        -------
        float64 array [len(sizes)]
            Seconds.
        """
        paths = [self.paths.path(layout, size) for size in sizes]
        stage = replace(layout, pp=1)
        slots = self.model.num_experts + redundant
        total = np.zeros(len(paths))
        for work in lower(self.thin.model, self._loads(paths, stage, slots)):
            times = self.thin.times(work)
            if work.name == "experts":
                each = [
                    self._expert_seconds(*pair, layout) for pair in zip(sizes, paths, strict=True)
                ]
                total += np.array(each) * times.sum()
                continue
            op = work.op
            if isinstance(op, AllToAll):  # its bytes alone come below; they may hide what it counts
                op = replace(op, tokens=0, experts=0)
            took = price(op, self.cluster, on=work.on).seconds.reshape(work.shape)
            rank = took.min(axis=2) if work.groups is not None else took.max(axis=2)
            total += (rank * times).sum(axis=1)
            if isinstance(op, AllToAll):
                each = [self._exchange_seconds(path, stage, slots, op.phase) for path in paths]
                total += np.array(each) * times.sum()
        return total

    def _loads(self, paths: Sequence[Path], layout: Layout, slots: int) -> StepLoads:
        """Even loads of the thin model: every rank as the path's, a step for each batch size."""
        shape = (len(paths), self.thin.model.num_moe_layers, layout.lanes)
        visits = 1.0 if layout.exchanged == 1 else self._least_ranks(layout, slots)
        block = np.array([path.block_tokens for path in paths])[:, None, None]
        tokens = np.repeat([[path.tokens] for path in paths], layout.lanes, axis=1)
        context = np.stack([path.context for path in paths])[..., None]
        arrived: NDArray[Any] = np.broadcast_to(block * (visits / layout.block), shape)
        per_slot: NDArray[Any] = np.broadcast_to(
            block * (self.model.top_k / slots), (*shape[:2], layout.edp * slots)
        )
        nothing = np.zeros(shape[:2], dtype=np.int64)
        return StepLoads(
            decode=self.decode,
            tokens=tokens,
            sequences=tokens,
            context=np.broadcast_to(context, (*context.shape[:2], layout.lanes)),
            per_slot=per_slot,
            sent=np.zeros((*shape, layout.lanes)),
            cross_node=nothing,
            cross_rank=nothing,
            arrived=arrived if layout.gathered > 1 and not layout.fused else None,
            of_layout=layout,
        )

    def _expert_seconds(self, size: int, path: Path, layout: Layout) -> float:
        """Mean over steps and layers of the mean rank's expert kernel, its launch included."""
        key = (size, *path_key(layout), layout.etp)
        if key not in self._experts:
            least = path.counts.sum(axis=1) / self.model.top_k  # tokens that pairs can belong to
            kernel = GroupedGemm(
                tokens_per_expert=path.counts,
                hidden=self.model.comm_size,
                width=layout.slice_width(self.model),
                gated=self.model.gated,
                weight_dtype=self.model.expert_dtype,
                activation_dtype=self.model.activation_dtype,
                tokens=least,
            )
            work = price(kernel, self._no_fixed).seconds.mean()
            own = path.counts.shape[1] // layout.ep  # the busiest rank has a token at least
            one = replace(kernel, tokens_per_expert=np.eye(1, own, dtype=np.int64), tokens=0)
            launch = price(one, self.cluster).seconds[0] - price(one, self._no_fixed).seconds[0]
            self._experts[key] = float(launch), float(work)
        launch_time, work_time = self._experts[key]
        return launch_time + work_time / layout.ep

    def _least_ranks(self, layout: Layout, slots: int) -> int:
        """Fewest ranks that can hold a token's experts."""
        return -(-self.model.top_k * layout.ep // slots)

    def _exchange_seconds(
        self, path: Path, layout: Layout, slots: int, phase: Phase | None
    ) -> float:
        """Seconds of the bytes of one all-to-all, startup left out.

        A token is sent at least to the fewest ranks that its experts can lie on, but its own;
        the ports into the node and into the network share that as suits them best.
        """
        away = self._least_ranks(layout, slots) - 1
        if away == 0:
            return 0.0
        size = bytes_of(self.model.activation_dtype, self.model.comm_size)
        tokens = path.lane_tokens.reshape(layout.ep, layout.etp).sum(axis=0).min() / layout.ep
        most = max(tokens * away * size, 1.0)
        return min(self._sent_seconds(most, group, phase) for group in layout.exchange_groups)

    def _sent_seconds(self, size: float, group: NDArray[np.int64], phase: Phase | None) -> float:
        """Seconds in which one rank of a group sends so many bytes, over both ports at once."""
        node_of = np.asarray(self.cluster.node_of)[group]
        near = np.flatnonzero(node_of[1:] == node_of[0])[:1] + 1
        far = np.flatnonzero(node_of != node_of[0])[:1]
        traffic = np.zeros((len(near) + len(far), len(group), len(group)))
        traffic[np.arange(len(traffic)), 0, [*near, *far]] = size
        op = AllToAll(traffic=traffic, ranks=tuple(group.tolist()), phase=phase)
        alone = price(op, self._no_fixed)
        return float(1 / (1 / alone.seconds).sum())
