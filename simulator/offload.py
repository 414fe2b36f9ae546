"""Which experts live in the fast memory, which are fetched when, and where each is computed.

Plain data, part of a Deployment. ``home`` is the memory that holds what is not kept fast;
residency, prefetch and compute site are named functions (`traces.caches`, `traces.predictors`,
`simulator.sites`). docs/background/offload.md says what a step with tiers is.
"""

from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from basis.errors import InputError
from basis.schema import Strict
from traces.model_spec import ModelSpec

SiteName = Literal[
    "home", "fetch", "list", "list_code", "split", "ops_per_byte", "one_unit", "planned"
]
SiteChoice = Literal["fast", "fetch", "side"]


class Cache(Strict):
    """Expert slots of the fast memory whose content changes while the model runs."""

    slots: int = Field(ge=1)
    """Experts that fit: in each MoE layer (scope ``layer``), or in all together (``global``)."""
    scope: Literal["layer", "global"] = "layer"
    """Whether layers have slots of their own or share one pool."""
    score: Literal["lru", "lfu", "belady", "weight_ema", "mrs"] = "lru"
    """Who is kept: the eviction score by name, see `traces.caches`."""
    decay: float = Field(default=0.5, gt=0, lt=1)
    """Share of the old value that a moving average keeps per step (weight_ema, mrs)."""


class Predictor(Strict):
    """What is copied before its layer has been routed."""

    name: Literal["none", "exact", "gate_reuse", "frequent", "all"] = "none"
    """Predictor by name, see `traces.predictors`; ``all`` streams whole layers."""
    depth: int = Field(default=1, ge=1)
    """MoE layers ahead at which the prediction is known."""
    accuracy: float = Field(default=1.0, ge=0, le=1)
    """Share of the predicted experts that are right (gate_reuse)."""
    count: int | None = Field(default=None, ge=1)
    """Most experts copied ahead per layer and step, those used most in the past first; frequent
    predicts so many. None: no limit."""

    @model_validator(mode="after")
    def _limit_fits(self) -> Self:
        if self.name == "all" and self.count is not None:
            raise ValueError("predictor all copies whole layers -- leave out count")
        return self


class Site(Strict):
    """Which processor computes an expert of a step."""

    name: SiteName = "fetch"
    """Policy by name, see `simulator.sites`."""
    processor: str | None = None
    """The other processor by its name in the cluster (``cpu``, ``pim``, ``ndp``)."""
    threshold: int = Field(default=8, ge=1)
    """ops_per_byte: tokens of a step from which an expert runs on the fast processor."""
    table: tuple[tuple[SiteChoice, ...], ...] | None = None
    """planned: for each MoE layer and logical expert, where it runs when it is not resident."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.name == "planned" and self.table is None:
            raise ValueError("site planned needs a table -- give a choice per layer and expert")
        if self.name != "planned" and self.table is not None:
            raise ValueError(f"site {self.name} takes no table -- only planned does")
        if self.processor is None and self.needs_processor:
            raise ValueError(
                f"site {self.name} needs a processor -- name one that is attached to a memory of "
                "the cluster (cpu, pim, ndp), or use site fetch"
            )
        return self

    @property
    def needs_processor(self) -> bool:
        """Whether experts may run beside the fast processor."""
        if self.name == "planned":
            return any("side" in row for row in self.table or ())
        return self.name != "fetch"

    @property
    def fetches(self) -> bool:
        """Whether an expert that is not resident may be copied on demand."""
        if self.table is not None:
            return any(choice != "side" for row in self.table for choice in row)
        return self.name != "home"


class Offload(Strict):
    """Residency, prefetch and compute site of the routed experts of one rank."""

    home: str = "host"
    """Memory that holds every expert that is not kept fast (``host``, ``nvme``, ``cxl``)."""
    resident: tuple[tuple[int, ...], ...] | None = None
    """Logical experts of each MoE layer that always stay in the fast memory; none: no expert."""
    warm: tuple[tuple[int, ...], ...] | None = None
    """Logical experts of each MoE layer that stay in the memory before the last link, where the
    home lies behind it (in the host, with ``nvme`` as home); none: no expert."""
    cache: Cache | None = None
    """Slots besides the static ones; only what is copied, on demand or ahead, enters them."""
    predictor: Predictor = Predictor()
    """What is prefetched."""
    site: Site = Site()
    """Where experts run."""
    attention: str | None = None
    """Processor of decode attention, with the KV cache in its memory; none: the fast one."""
    copy_engine: Literal["own", "shared", "none"] = "own"
    """Whether weights and activations on their way into the fast memory each have a copy engine,
    or queue for one, first come first served (played by the event engine; one rank); ``none``:
    the processor copies weights itself, so that copies and kernels take turns (a CPU)."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for what in ("resident", "warm"):
            for layer, experts in enumerate(getattr(self, what) or ()):
                if len(set(experts)) != len(experts):
                    raise ValueError(f"{what}[{layer}]: an expert is named twice -- name each once")
        if self.predictor.name == "all" and self.cache is not None:
            raise ValueError(
                "predictor all streams every layer through a double buffer -- leave out the cache"
            )
        if self.cache is not None and self.predictor.name == "none" and not self.site.fetches:
            raise ValueError(
                f"cache with site {self.site.name}: nothing is ever copied, so it stays empty -- "
                "name the experts in resident, add a predictor, or choose a site that copies"
            )
        return self

    @property
    def learns(self) -> bool:
        """Whether residency depends on earlier steps."""
        return self.cache is not None or self.predictor.name == "frequent"

    def resident_mask(self, model: ModelSpec) -> NDArray[np.bool_]:
        """Return which experts always stay in the fast memory, bool [L, E].

        Raises
        ------
        InputError
            If the rows are not the model's MoE layers, or an id is not below its experts.
        """
        return _mask(self.resident, "resident", model)

    def warm_mask(self, model: ModelSpec) -> NDArray[np.bool_]:
        """Return which experts stay before the last link, bool [L, E]; errors as above."""
        return _mask(self.warm, "warm", model)

    def site_table(self, model: ModelSpec) -> NDArray[np.bool_] | None:
        """Return where the table sends an expert aside (True) instead of fetching it, [L, E].

        Raises
        ------
        InputError
            If the table's shape is not the model's, or it calls an expert fast that is not.
        """
        table = self.site.table
        if table is None:
            return None
        _check_rows(len(table), "site.table", model)
        widths = sorted({len(row) for row in table})
        if widths != [model.num_experts]:
            raise InputError(
                f"offload.site.table: rows of {widths} entries -- {model.name} has "
                f"{model.num_experts} experts, give one choice for each"
            )
        names = np.array(table)
        stray = np.argwhere((names == "fast") & ~self.resident_mask(model))
        if len(stray) and self.cache is None:
            layer, expert = stray[0]
            raise InputError(
                f"offload.site.table[{layer}][{expert}]: fast, but the expert is not resident -- "
                "name it in resident, or choose fetch or side"
            )
        return np.asarray(names == "side")


def _mask(
    rows: tuple[tuple[int, ...], ...] | None, what: str, model: ModelSpec
) -> NDArray[np.bool_]:
    mask = np.zeros((model.num_moe_layers, model.num_experts), dtype=np.bool_)
    if rows is None:
        return mask
    _check_rows(len(rows), what, model)
    for layer, experts in enumerate(rows):
        if stray := [e for e in experts if not 0 <= e < model.num_experts]:
            raise InputError(
                f"offload.{what}[{layer}]: expert {stray[0]} -- {model.name} has experts 0 to "
                f"{model.num_experts - 1}"
            )
        mask[layer, list(experts)] = True
    return mask


def _check_rows(rows: int, what: str, model: ModelSpec) -> None:
    if rows != model.num_moe_layers:
        raise InputError(
            f"offload.{what} has {rows} rows, {model.name} has {model.num_moe_layers} MoE layers "
            "-- give one row per MoE layer, dense layers left out"
        )
