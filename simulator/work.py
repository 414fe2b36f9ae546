"""Work: one kernel of a step with its operation in columns, and the makers of common kinds.

A row is one (step, layer, rank), fewer where the same row serves several layers. Counts are in
tokens, elements and bytes; seconds come from `simulator.pricing`.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from basis.dtypes import bytes_of
from hwmodels.ops import Elementwise, Gemm, Op, Stage
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
    """(steps, layers, ranks); 1 where one row serves all."""
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
        self.tokens: NDArray[np.int64] = loads.tokens.ravel()
        """[steps * ranks]."""
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

    def gemm(self, name: str, stage: Stage, n: int, k: int, layers: tuple[int, ...]) -> Work:
        """Multiply every token of the rank: [tokens, k] x [k, n]."""
        op = Gemm(
            m=self.tokens,
            n=n,
            k=k,
            weight_dtype=self.model.weight_dtype,
            activation_dtype=self.dtype,
        )
        return self.work(name, stage, op, layers)

    def stream(self, name: str, stage: Stage, elements: float, layers: tuple[int, ...]) -> Work:
        """Elementwise work that reads or writes ``elements`` activations per token."""
        op = Elementwise(bytes=self.tokens * (elements * self.element))
        return self.work(name, stage, op, layers)

    def norm(self, name: str, layers: tuple[int, ...]) -> Work:
        """Residual add and norm in one pass: read both, write both."""
        return self.stream(name, Stage.OTHER, 4 * self.model.hidden_size, layers)

    def ffn(self, name: str, stage: Stage, width: int, layers: tuple[int, ...]) -> list[Work]:
        """Pass every token of the rank through a feed-forward network."""
        hidden, up = self.model.hidden_size, (2 if self.model.gated else 1) * width
        return [
            self.gemm(f"{name} up", stage, up, hidden, layers),
            self.stream(f"{name} activation", stage, up + width, layers),
            self.gemm(f"{name} down", stage, hidden, width, layers),
        ]
