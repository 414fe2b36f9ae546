"""Work: one kernel of a step with its operation in columns, and the makers of common kinds.

A row is one (step, layer, rank), fewer where the same row serves several layers. Counts are in
tokens, elements and bytes; seconds come from `simulator.pricing`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from basis.dtypes import bytes_of
from hwmodels.ops import (
    AllGather,
    AllReduce,
    AllToAll,
    Elementwise,
    Gemm,
    Op,
    Part,
    Phase,
    ReduceScatter,
    Stage,
)
from simulator.loads import StepLoads
from simulator.program import Stream
from traces.model_spec import ModelSpec


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """One kernel of a step, in every layer that has it."""

    name: str
    stage: Stage
    op: Op
    """Rows in C order of ``shape``."""
    shape: tuple[int, int, int]
    """(steps, layers, ranks); 1 where one row serves all. Of a collective (steps, layers,
    groups)."""
    layers: tuple[int, ...]
    """Layers of the model that have it; -1 is before the first, ``num_layers`` after the last."""
    stream: Stream = Stream.COMPUTE
    after: tuple[tuple[str, int], ...] | None = None
    """What must have ended on the same rank, as (name of the work, back): the last item of that
    name before this one, or ``back`` items earlier; what does not exist is not waited for.
    None = the item before this one."""
    groups: tuple[int, ...] | None = None
    """Of a collective, the group of each rank, [ranks]; None = each rank by itself."""
    resource: str | None = None
    """What ranks share and use one at a time; None = nothing."""
    on: str | None = None
    """Processor that runs it; None = the device's first."""


class Rows:
    """Numbers that the parts of a step share, and the makers of their work."""

    def __init__(self, model: ModelSpec, loads: StepLoads) -> None:
        self.model = model
        self.loads = loads
        self.layout = loads.layout
        self.attention = loads.layout.attention(model)
        """Heads of one rank."""
        self.tokens: NDArray[np.int64] = loads.tokens.ravel()
        """Tokens whose attention runs on the rank, [steps * ranks]."""
        self.routed = self.tokens if self.layout.fused else loads.slices.ravel()
        """Tokens that the rank routes, [steps * ranks]."""
        self.all_layers = tuple(range(model.num_layers))
        self.moe_layers = model.moe_layer_ids
        self.dense_layers = tuple(sorted(set(self.all_layers) - set(self.moe_layers)))
        self.dtype = model.activation_dtype
        self.element = bytes_of(model.activation_dtype, 1)
        """Bytes of one activation."""

    def work(self, name: str, stage: Stage, op: Op, layers: tuple[int, ...]) -> Work:
        """Work with a row per (step, rank), the same in all its layers."""
        shape = (self.loads.num_steps, 1, self.loads.num_ranks)
        return Work(name=name, stage=stage, op=op, shape=shape, layers=layers)

    def gemm(
        self,
        name: str,
        stage: Stage,
        n: int,
        k: int,
        layers: tuple[int, ...],
        tokens: NDArray[np.int64] | None = None,
    ) -> Work:
        """Multiply every token of the rank (or the given): [tokens, k] x [k, n]."""
        op = Gemm(
            m=self.tokens if tokens is None else tokens,
            n=n,
            k=k,
            weight_dtype=self.model.weight_dtype,
            activation_dtype=self.dtype,
        )
        return self.work(name, stage, op, layers)

    def stream(
        self,
        name: str,
        stage: Stage,
        elements: float,
        layers: tuple[int, ...],
        tokens: NDArray[np.int64] | None = None,
        *,
        part: Part,
    ) -> Work:
        """Elementwise work that reads or writes ``elements`` activations per token."""
        count = self.tokens if tokens is None else tokens
        op = Elementwise(bytes=count * (elements * self.element), part=part, tokens=count)
        return self.work(name, stage, op, layers)

    def norm(
        self, name: str, layers: tuple[int, ...], tokens: NDArray[np.int64] | None = None
    ) -> Work:
        """Residual add and norm in one pass: read both, write both."""
        width = 4 * self.model.hidden_size
        return self.stream(name, Stage.OTHER, width, layers, tokens, part="norm")

    def ffn(
        self,
        name: str,
        stage: Stage,
        width: int,
        layers: tuple[int, ...],
        tokens: NDArray[np.int64] | None = None,
    ) -> list[Work]:
        """Pass every token of the rank (or the given) through a feed-forward network."""
        hidden, up = self.model.hidden_size, (2 if self.model.gated else 1) * width
        return [
            self.gemm(f"{name} up", stage, up, hidden, layers, tokens),
            self.stream(f"{name} activation", stage, up + width, layers, tokens, part="activation"),
            self.gemm(f"{name} down", stage, hidden, width, layers, tokens),
        ]

    def ring(
        self,
        kind: type[AllReduce] | type[AllGather] | type[ReduceScatter],
        name: str,
        stage: Stage,
        size: int,
        tensor: NDArray[np.float64],
        layers: tuple[int, ...],
    ) -> list[Work]:
        """Write a collective over runs of ``size`` ranks, for each pipeline stage; none over one.

        ``tensor`` [steps, layers or 1, R / size] is the bytes of each group's whole tensor.
        """
        if size == 1:
            return []
        lanes = self.layout.groups(size)
        works = []
        for first, own, at in self._stages(layers, tensor.shape[1]):
            part = tensor[:, at]
            ranks = tuple(tuple(group) for group in (first + lanes).tolist())
            op = kind(bytes=part.ravel(), ranks=ranks)
            groups = tuple((np.arange(self.layout.lanes) // size).tolist())
            works.append(self._collective(name, stage, op, part.shape, own, groups))
        return works

    def over_tp(
        self,
        kind: type[AllReduce] | type[AllGather] | type[ReduceScatter],
        name: str,
        layers: tuple[int, ...],
        elements: int | None = None,
        tokens: NDArray[np.int64] | None = None,
    ) -> list[Work]:
        """Write a collective of the tp groups on ``elements`` (hidden state) per token [S, R]."""
        count = self.loads.tokens if tokens is None else tokens
        width = self.element * (self.model.hidden_size if elements is None else elements)
        tensor = count[:, None, :: self.layout.tp] * np.float64(width)
        return self.ring(kind, name, Stage.TENSOR_PARALLEL, self.layout.tp, tensor, layers)

    def exchange(
        self, phase: Phase, stage: Stage, sent: NDArray[np.float64], layers: tuple[int, ...]
    ) -> list[Work]:
        """All-to-all of bytes [steps, layers, R, R] among ranks of one block and etp index."""
        if self.layout.exchanged == 1:
            return []
        loads, members = self.loads, self.layout.exchanged
        pairs = loads.per_slot.sum(axis=-1) * (members - 1) / members  # sent away, if evenly
        copies = np.maximum(pairs / np.maximum(loads.cross_rank, 1), 1.0)
        lanes = self.layout.exchange_groups
        of_lane = np.empty(self.layout.lanes, dtype=np.int64)
        of_lane[lanes] = np.arange(len(lanes))[:, None]
        works = []
        for first, own, at in self._stages(layers, sent.shape[1]):
            part = sent[:, at]
            if len(lanes) > 1:
                part = part[:, :, lanes[:, :, None], lanes[:, None, :]]
            ranks = tuple(tuple(group) for group in (first + lanes).tolist())
            shape = (*part.shape[:2], len(lanes))
            most = loads.slices[:, None, lanes].max(axis=-1)
            op = AllToAll(
                traffic=part.reshape(-1, *part.shape[-2:]),
                ranks=ranks,
                phase=phase,
                tokens=np.broadcast_to(most, shape).ravel(),
                experts=self.model.num_experts,
                row_bytes=self.model.comm_size * self.element,
                copies=np.broadcast_to(copies[:, at, None], shape).ravel(),
            )
            works.append(self._collective(phase, stage, op, shape, own, tuple(of_lane.tolist())))
        return works

    def hand_over(
        self, name: str, tensor: NDArray[np.float64], layer: int, source: int, target: int
    ) -> Work:
        """Bytes [steps, R] from each rank of a pipeline stage to its peer of another."""
        lanes, shape = self.layout.lanes, (len(tensor), 1, self.layout.lanes)
        traffic = np.zeros((tensor.size, 2, 2))
        traffic[:, 0, 1] = tensor.ravel()
        pairs = tuple((source * lanes + lane, target * lanes + lane) for lane in range(lanes))
        op = AllToAll(traffic=traffic, ranks=pairs)
        return Work(
            name=name,
            stage=Stage.TRANSFER,
            op=op,
            shape=shape,
            layers=(layer,),
            stream=Stream.ACTIVATIONS,
        )

    def _stages(
        self, layers: tuple[int, ...], columns: int
    ) -> Iterator[tuple[int, tuple[int, ...], slice]]:
        """Yield, for each stage that has some of the layers, its first rank, those and where."""
        at = 0
        for number, own in enumerate(self.layout.stage_layers(self.model.num_layers)):
            ends = (*own, *((-1,) if number == 0 else ()))
            ends = (*ends, *((self.model.num_layers,) if number == self.layout.pp - 1 else ()))
            mine = tuple(layer for layer in layers if layer in ends)
            if mine:
                part = slice(at, at + len(mine)) if columns > 1 else slice(None)
                yield number * self.layout.lanes, mine, part
            at += len(mine)

    def _collective(
        self,
        name: str,
        stage: Stage,
        op: Op,
        shape: tuple[int, ...],
        layers: tuple[int, ...],
        groups: tuple[int, ...],
    ) -> Work:
        steps, count, number = shape
        return Work(
            name=name,
            stage=stage,
            op=op,
            shape=(steps, count, number),
            layers=layers,
            stream=Stream.COMMUNICATION,
            groups=groups,
        )
