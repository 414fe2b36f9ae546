"""What the user may ask of a plan: slots, dispatch, limits, effort."""

from typing import Literal

from pydantic import Field

from basis.schema import Strict
from basis.units import Seconds
from simulator.dispatch import Dispatch


class Limits(Strict):
    """Bounds that a plan must keep; a plan that breaks one is no answer (exit code 1)."""

    tpot_p99: Seconds | None = None
    """99th percentile of the time per output token, seconds; in decode, of the step time."""


class PlanOptions(Strict):
    """The `plan` section of a scenario."""

    redundant_experts: int = Field(default=0, ge=0)
    """Slots per MoE layer beyond one for each logical expert, over all ranks together."""
    objective: Literal["throughput"] = "throughput"
    """What the verdict compares."""
    dispatch: Dispatch = "even"
    """How the engine will spread an expert's tokens over its replicas."""
    limits: Limits = Limits()
    """What the plan must keep."""
    tolerance: float = Field(default=0.01, ge=0, le=1)
    """How much of the least busiest-rank load the second stage may give up, as a fraction."""
    gap: float = Field(default=0.002, ge=0, lt=1)
    """Relative gap to the proved bound at which the first stage stops."""
    steps: int = Field(default=16, ge=1, le=10_000)
    """Steps simulated for each seed."""
    seeds: int = Field(default=5, ge=2, le=100)
    """Independent compositions of batches; their spread is the noise that a gain must exceed."""
    seed: int = Field(default=0, ge=0)
    """First seed."""
    time_limit: Seconds = 60.0
    """Wall time for each of the planner's two stages."""
    solver: Literal["highs", "cbc"] = "highs"
    """Solver of the integer programmes."""
