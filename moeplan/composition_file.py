"""What a composition file may hold: one published system as choices that the simulator knows.

Geometry, hardware and routing of the paper, the system and what it is compared with as variants of
one deployment, and the paper's claims. docs/guides/published-systems.md says how to write one.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from basis.schema import Strict, load
from simulator.deployment import Deployment, Overlap, Parallelism, Workload
from simulator.dispatch import Dispatch
from simulator.offload import Cache, Offload

Metric = Literal["tokens_per_second", "step_time_s", "memory_bytes_fullest_rank", "hit_rate", "mfu"]
"""``mfu``: model FLOPs utilisation, 2 x active parameters x tokens/s over the ranks' dense bf16
peak; attention over the context is not counted."""


class Routing(Strict):
    """Synthetic routing, where the paper's own was not published."""

    exponent: float = Field(default=0.0, ge=0)
    """Zipf exponent of each layer's loads; 0 is uniform."""
    reuse: float = Field(default=0.0, ge=0, lt=1)
    """Correlation of the scores of consecutive tokens of a request; 0 is independent."""
    candidates: int | None = Field(default=None, ge=1)
    """Candidates kept per token, for scores that need more than the chosen experts."""
    tokens: int = Field(default=8192, ge=2)
    """Tokens in all."""
    requests: int = Field(default=64, ge=2)
    """Requests that they belong to."""
    context: tuple[int, int] = (0, 0)
    """Tokens in the cache before a request's first one here, spread evenly between the two."""
    seed: int = 0
    """Of the draw."""

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        low, high = self.context
        if not 0 <= low <= high:
            raise ValueError(f"context [{low}, {high}] -- from 0, the smaller one first")
        return self


Trace = Annotated[
    Annotated[str, Tag("path")] | Annotated[Routing, Tag("synthetic")],
    Discriminator(lambda value: "path" if isinstance(value, str) else "synthetic"),
]
"""Either of the two, told apart by type, so that an error names one of them only."""


class Resident(Strict):
    """Experts that always stay in the fast memory, by a rule instead of by name."""

    by: Literal["frequent", "front", "uniform"]
    """frequent: the most used ones in the earlier requests; front: whole layers, those in front
    stay at home; uniform: the first ids of every layer (`planner.offload_baselines`)."""
    share: float = Field(ge=0, le=1)
    """Of all experts of all layers."""


class CacheShare(Strict):
    """A cache whose size follows the model; the other keys are those of `simulator.offload`."""

    share: float = Field(gt=0, le=1)
    """Slots over the experts of a layer, in every layer; one pool of as many with scope global."""
    scope: Literal["layer", "global"] = "layer"
    score: Literal["lru", "lfu", "belady", "weight_ema", "mrs"] = "lru"
    decay: float = Field(default=0.5, gt=0, lt=1)

    def for_model(self, num_layers: int, num_experts: int) -> Cache:
        """Return the cache with its slots counted; at least one."""
        layers = num_layers if self.scope == "global" else 1
        slots = max(1, round(self.share * num_experts * layers))
        return Cache(slots=slots, scope=self.scope, score=self.score, decay=self.decay)


class Variant(Strict):
    """The system, or something it is compared with: what differs from the defaults."""

    title: str = ""
    """For people."""
    parallelism: Parallelism | None = None
    """Layout; none: every rank has requests and experts of its own (attention DP = EP)."""
    placement: Literal["contiguous", "round_robin", "eplb", "plan"] = "contiguous"
    """Which slot holds which expert; eplb and plan see the earlier half of the requests."""
    redundant_experts: int = Field(default=0, ge=0)
    """Slots beyond one per expert."""
    dispatch: Dispatch = Deployment.model_fields["dispatch"].default
    """How tokens choose among replicas."""
    overlap: Overlap = "none"
    """What runs beside what."""
    offload: Offload | None = None
    """Tiers, residency and compute site."""
    resident: Resident | None = None
    """Fills ``offload.resident``."""
    cache: CacheShare | None = None
    """Fills ``offload.cache``."""
    cluster: str | None = None
    """Other hardware than the composition's."""

    @model_validator(mode="after")
    def _completes_offload(self) -> Self:
        for name in ("resident", "cache"):
            if getattr(self, name) is None:
                continue
            if self.offload is None:
                raise ValueError(f"{name} needs offload -- say where the other experts live")
            if getattr(self.offload, name) is not None:
                raise ValueError(f"{name} and offload.{name} -- give one of them")
        return self


class Ours(Strict):
    """Which of our figures answers a claim: the largest over the workloads, as "up to" means."""

    of: str
    """Variant that the claim is about."""
    over: str | None = None
    """Variant that it is divided by; none: the figure itself."""
    metric: Metric = "tokens_per_second"
    """Key of the summary."""
    phase: Literal["decode", "prefill"] | None = None
    """Only workloads of this phase."""


class Claim(Strict):
    """What the paper says, in its words."""

    text: str
    """The claim and its setup."""
    confidence: Literal["P", "C", "N", "A", "R", "own"]
    """P paper's text, C authors' code, N third-party notes, A abstract, R recollection, own: the
    paper's formula recomputed."""
    value: float | None = None
    """The claimed figure, where it is one."""
    ours: Ours | None = None
    """Our figure beside it; none where a simulation cannot say."""
    remark: str = ""
    """Why the two differ, or what ours leaves out."""


class Composition(Strict):
    """A published system with its baselines."""

    system: str
    """Name."""
    paper: str
    """Citation."""
    model: str
    """Path of a config.json, or of a YAML with the fields of a `traces.model_spec.ModelSpec`."""
    trace: Trace = Routing()
    """Path of a routing trace, or synthetic routing."""
    cluster: str
    """Catalog name, or path of a cluster YAML."""
    gpus: int | None = Field(default=None, ge=1)
    """Use the first N GPUs."""
    workloads: tuple[Workload, ...] = Field(min_length=1)
    """What a step carries; every variant runs each."""
    steps: int = Field(default=16, ge=1)
    """Steps simulated."""
    seed: int = Field(default=0, ge=0)
    """Of the batch composition."""
    variants: dict[str, Variant] = Field(min_length=1)
    """By name, the system and its baselines."""
    baseline: str
    """Variant that the table's ratio divides by."""
    claims: tuple[Claim, ...] = ()
    """What the paper says."""
    notes: tuple[str, ...] = ()
    """What the composition leaves out or assumes."""

    @model_validator(mode="after")
    def _names(self) -> Self:
        used = [self.baseline]
        for claim in self.claims:
            if claim.ours is not None:
                used += [n for n in (claim.ours.of, claim.ours.over) if n is not None]
        if strangers := sorted(set(used) - set(self.variants)):
            raise ValueError(
                f"{strangers[0]!r} is not a variant -- variants are {', '.join(self.variants)}"
            )
        return self


def is_composition(data: object) -> bool:
    """Whether a file's contents are a composition rather than a scenario."""
    return isinstance(data, dict) and "system" in data and "variants" in data


def read_composition(path: Path) -> Composition:
    """Read and validate a composition file."""
    return load(path, Composition)
