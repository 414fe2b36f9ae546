"""The proof that comes with a plan: its objective, a lower bound of the same problem, the gap.

The problem: the busiest rank's expected load (tokens on the part planned on, under the stated
dispatch), summed over layers. No placement with these slots can be below the bound.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from planner.balance import BalanceResult
from planner.scoring import Facts
from simulator.deployment import Deployment

Status = Literal["optimal", "gap", "time_limit"]
_PROVEN = 1e-6  # a gap below this is rounding


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """Objective and bound in tokens, by layer and in sum."""

    problem: str
    objective_by_layer: NDArray[np.float64]
    """Busiest rank's expected tokens, [layers]."""
    bound_by_layer: NDArray[np.float64]
    """Proved lower bound, [layers]."""
    mean_by_layer: NDArray[np.float64]
    """Mean rank's tokens, [layers]: the bound that needs no proof."""
    status: Status
    seconds: float
    """Wall time of the first stage."""

    @property
    def objective(self) -> float:
        """Sum over layers, tokens."""
        return float(self.objective_by_layer.sum())

    @property
    def bound(self) -> float:
        """Sum over layers, tokens."""
        return float(self.bound_by_layer.sum())

    @property
    def gap(self) -> float:
        """``(objective - bound) / objective``."""
        return (self.objective - self.bound) / self.objective if self.objective else 0.0


def certify(
    facts: Facts,
    deployment: Deployment,
    stage_one: BalanceResult,
    loads: NDArray[np.float64],
) -> Certificate:
    """Measure the chosen placement against the first stage's bound.

    Under ``nearest`` dispatch the split over replicas follows the tokens' homes, which the first
    stage does not decide; its bound for a free split is then the mean load.

    Parameters
    ----------
    loads : array [layers, experts]
        Tokens per expert on the part planned on.
    """
    dispatcher = deployment.dispatcher_for(facts.model, facts.cluster)
    objective = dispatcher.expected_rank_load(loads).max(axis=-1)
    mean = loads.sum(axis=-1) / facts.layout.ep
    bound = mean if deployment.dispatch == "nearest" else stage_one.bound
    proven = objective.sum() - bound.sum() <= _PROVEN * objective.sum()
    timed_out = stage_one.status == "time_limit"
    slots = len(deployment.physical_to_logical_map[0])
    return Certificate(
        problem=(
            "busiest rank's expected load, summed over MoE layers, on the requests planned on, "
            f"under {deployment.dispatch} dispatch, with {slots} slots per layer and no two "
            "replicas of an expert on one rank"
        ),
        objective_by_layer=objective,
        bound_by_layer=bound,
        mean_by_layer=mean,
        status="optimal" if proven else "time_limit" if timed_out else "gap",
        seconds=stage_one.seconds,
    )
