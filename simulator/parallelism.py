"""A parallel layout as plain data: how many ways attention and experts are split.

The two halves factorise the same ranks independently; `simulator.layout.Layout` resolves them.
"""

from typing import Literal, Self

from pydantic import Field

from basis.schema import Strict


class AttentionLayout(Strict):
    """How attention, dense layers and the head are spread over the ranks."""

    dp: int = Field(ge=1)
    """Data-parallel degree: groups of ranks that work on requests of their own."""
    tp: int = Field(default=1, ge=1)
    """Tensor-parallel degree: ranks that share the heads of one group."""
    pp: int = Field(default=1, ge=1)
    """Pipeline stages, each of contiguous layers; ``dp x tp x pp`` is the number of ranks."""


class ExpertLayout(Strict):
    """How the routed experts are spread over the ranks of a stage."""

    ep: int = Field(ge=1)
    """Expert-parallel degree: ranks over which the slots of a layer are divided."""
    tp: int = Field(default=1, ge=1)
    """Tensor-parallel degree inside one expert. Where ``ep x tp`` is less than the ranks of a
    stage, blocks of so many ranks hold all experts each."""
    exchange: Literal["all_to_all", "all_gather"] = "all_to_all"
    """How tokens come to their experts' ranks: each to its own, or all tokens to every rank."""


class Parallelism(Strict):
    """The two independent halves of a parallel layout."""

    attention: AttentionLayout
    experts: ExpertLayout

    @classmethod
    def dp_ep(cls, ranks: int) -> Self:
        """Every rank has requests of its own and its part of the slots: attention DP = EP."""
        return cls(attention=AttentionLayout(dp=ranks), experts=ExpertLayout(ep=ranks))
