"""What the user may ask of a plan: slots, dispatch, limits, effort."""

from typing import Literal, Self

from pydantic import Field, model_validator

from basis.schema import Strict
from basis.units import Seconds
from planner.offload_options import OffloadOptions
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
    layouts: Literal["dp_ep", "all"] = "dp_ep"
    """Parallel layouts to choose from: attention DP = EP on all ranks, or all that fit."""
    layouts_time_limit: Seconds = 50.0
    """Wall time for the search over layouts; the bound says what it has not reached."""
    offload: OffloadOptions | None = None
    """Plan which experts stay in the fast memory of one GPU, instead of a placement over ranks."""
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

    @model_validator(mode="after")
    def _one_question(self) -> Self:
        if self.offload is None:
            return self
        if self.layouts == "all":
            raise ValueError(
                "layouts: all together with offload -- an offload plan is for one GPU, which has "
                "one layout: leave out one of the two"
            )
        if self.redundant_experts:
            raise ValueError(
                f"redundant_experts {self.redundant_experts} together with offload -- on one GPU "
                "every expert has one slot: leave out one of the two"
            )
        return self
