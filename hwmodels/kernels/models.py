"""The cost models that a device file may name, and the fastest of several.

An engine that has several kernels for one format measures them on the machine (autotuning) or
knows a rule; taking the one predicted fastest is the former, with predictions in place of times.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag

from hwmodels.figures import CostModel, KernelCost
from hwmodels.kernels.attention import AttentionKernels
from hwmodels.kernels.attention_decode import AttentionDecodeCost
from hwmodels.kernels.attention_prefill import AttentionPrefillCost
from hwmodels.kernels.gemm import GemmCost
from hwmodels.kernels.grouped_gemm import GroupedGemmCost
from hwmodels.kernels.included import Included
from hwmodels.kernels.library import (
    LibraryGemmCost,
    LibraryRouteCost,
    LibraryRowsCost,
    LoopedAttentionCost,
    LoopedExpertsCost,
)
from hwmodels.kernels.route import RouteCost
from hwmodels.kernels.stream import StreamCost


def _model(data: Any) -> str | None:
    """Name the class of an entry: a roofline where none is stated."""
    if isinstance(data, dict):
        return str(data.get("model", "roofline"))
    return getattr(data, "model", None)


_Roofline = Annotated[KernelCost, Tag("roofline")]
_Included = Annotated[Included, Tag("included")]
_Gemm = Annotated[GemmCost, Tag("gemm")]
_Grouped = Annotated[GroupedGemmCost, Tag("grouped_gemm")]
_Decode = Annotated[AttentionDecodeCost, Tag("attention_decode")]
_Prefill = Annotated[AttentionPrefillCost, Tag("attention_prefill")]
_Stream = Annotated[StreamCost, Tag("stream")]
_Route = Annotated[RouteCost, Tag("route")]
_Attention = Annotated[AttentionKernels, Tag("attention_kernels")]
_Library = (
    Annotated[LibraryGemmCost, Tag("library_gemm")]
    | Annotated[LibraryRouteCost, Tag("library_route")]
    | Annotated[LibraryRowsCost, Tag("library_rows")]
    | Annotated[LoopedExpertsCost, Tag("looped_experts")]
    | Annotated[LoopedAttentionCost, Tag("looped_attention")]
)


class Fastest(CostModel):
    """Of several kernels the one that is predicted fastest, row by row."""

    model: Literal["fastest"] = "fastest"
    of: list[
        Annotated[_Gemm | _Grouped | _Decode | _Prefill | _Attention, Discriminator(_model)]
    ] = Field(min_length=1)
    """The kernels."""

    def in_service(self) -> Self:
        """Return a copy of kernels in service."""
        return self.model_copy(update={"of": [cost.in_service() for cost in self.of]})

    def with_fixed(self, factor: float) -> Self:
        """Return a copy with the fixed times of each multiplied."""
        return self.model_copy(update={"of": [cost.with_fixed(factor) for cost in self.of]})


KernelModel = Annotated[
    _Roofline
    | _Included
    | _Gemm
    | _Grouped
    | _Decode
    | _Prefill
    | _Attention
    | _Stream
    | _Route
    | _Library
    | Annotated[Fastest, Tag("fastest")],
    Discriminator(_model),
]
"""An entry of a processor's ``kernels``, told apart by ``model``."""
