"""Work that another kernel's parameters hold already, such as the permutation of a fused one."""

from typing import Any, ClassVar, Literal

import numpy as np

from hwmodels.kernels.base import Features, Limits, Numbers, Parameter, PhysicalCost
from hwmodels.ops import Floats


class Included(PhysicalCost):
    """No time of its own."""

    model: Literal["included"] = "included"
    within: str
    """The kernel that holds it, as a key of ``kernels``."""
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = ()
    FIXED: ClassVar[tuple[str, ...]] = ()

    def features(self, op: Any, limits: Limits) -> Features:
        """Return zeros: nothing runs."""
        return {"work": np.zeros(len(op))}

    @staticmethod
    def time(numbers: Numbers, features: Features) -> Floats:
        """Return zeros."""
        return np.zeros_like(features["work"])
