"""What the user may ask of an offload plan: how much stays fast, where the rest lives, effort."""

from typing import Literal

from pydantic import Field

from basis.schema import Strict
from basis.units import Bytes, Seconds


class OffloadOptions(Strict):
    """The `plan.offload` section of a scenario."""

    fast_memory: Bytes | None = None
    """Bytes of the fast memory for experts: resident ones, cache slots, landing buffers; none:
    all that weights outside experts, KV cache and buffers leave."""
    home: str = "host"
    """Memory that holds what is not kept fast."""
    processor: str | None = "auto"
    """Processor that computes experts at home; ``auto``: the one that stands there, if any; null:
    every expert that is not kept is fetched."""
    planning_seeds: int | None = Field(default=None, ge=1, le=5000)
    """Independent compositions of the steps that the integer programme sees; none: as many as
    give 1024 tokens, between 32 and 192."""
    planning_steps: int = Field(default=2, ge=1, le=10_000)
    """Steps of each; at batch 1 these are consecutive tokens of one request."""
    steps: int = Field(default=64, ge=1, le=100_000)
    """Steps simulated for each seed of a score, after as many that fill a cache."""
    seeds: int = Field(default=12, ge=2, le=1000)
    """Compositions of a score; their spread is the noise."""
    seed: int = Field(default=0, ge=0)
    """First seed."""
    gap: float = Field(default=0.002, ge=0, lt=1)
    """Relative gap to the proved bound at which the search stops."""
    time_limit: Seconds = 30.0
    """Wall time aimed at for each of the two integer programmes, half of it for the bound of all
    rules; a layer that waits for its turn still gets 1.5 s, so many layers may take longer."""
    solver: Literal["highs", "cbc"] = "highs"
    """Solver of the integer programmes."""
    workers: int = Field(default=2, ge=1, le=64)
    """Processes for the layers' programmes."""
