"""What a router takes: its scores are a dense product, its selection a fixed time.

No table times a router by itself. The product's model is fitted on products of the same format
and shapes; the tables of expert layers hold the top-k, so that beside a fit of those it is free.
"""

from typing import ClassVar, Literal, Self

import numpy as np

from basis import Seconds
from hwmodels.kernels.base import Features, Limits, Numbers, Parameter, PhysicalCost
from hwmodels.kernels.gemm import GemmCost
from hwmodels.ops import Floats, Gemm, Route


class RouteCost(PhysicalCost):
    """A dense product and a selection."""

    model: Literal["route"] = "route"
    scores: GemmCost
    """The product of tokens and expert vectors."""
    selection: Seconds
    """Softmax and top-k: a launch; zero where the expert kernel's fit holds it, s."""

    FIXED: ClassVar[tuple[str, ...]] = ("selection",)
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = ()

    def features(self, op: Route, limits: Limits) -> Features:
        """Return the product's features."""
        return self.scores.features(_product(op), limits)

    @staticmethod
    def time(numbers: Numbers, features: Features) -> Floats:
        """Return seconds [n]."""
        return GemmCost.time(numbers, features) + numbers["selection"]

    def numbers(self) -> dict[str, float]:
        """Return the product's parameters and the selection's time."""
        return {**self.scores.numbers(), "selection": self.selection}

    def with_fixed(self, factor: float) -> Self:
        """Return a copy with the fixed times of both parts multiplied."""
        scores = self.scores.with_fixed(factor)
        return self.model_copy(update={"scores": scores, "selection": self.selection * factor})


def _product(op: Route) -> Gemm:
    return Gemm(
        m=op.tokens,
        n=np.full(len(op), op.experts),
        k=np.full(len(op), op.hidden),
        weight_dtype=op.activation_dtype,
        activation_dtype=op.activation_dtype,
    )
