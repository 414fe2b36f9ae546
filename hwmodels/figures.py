"""A figure with where it comes from, and the parameters of one cost model with how well they fit.

Quantities are SI (bytes, bytes per second, FLOP per second, seconds); efficiencies and error
ratios have no unit. A bare value in a file is taken as assumed, because it names no source.
"""

from typing import Annotated, Any, ClassVar, Generic, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, model_validator

from basis import Evidence, Seconds, Strict, parse_quantity

T = TypeVar("T")
_BytesOrNone = Annotated[float, BeforeValidator(lambda text: parse_quantity(text, "bytes"))]


class Figure(Strict, Generic[T]):
    """One number and what it rests on."""

    value: T
    """The number, in SI; written with its unit in a file."""
    evidence: Evidence = "assumed"
    """measured, fitted, transfer, datasheet or assumed."""
    source: str = "not stated"
    """Key of the file's ``sources``, or a citation."""

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, data: Any) -> Any:
        return data if isinstance(data, (dict, Figure)) else {"value": data}

    def times(self, factor: float) -> Self:
        """Return a copy with ``value`` times ``factor``."""
        return self.model_copy(update={"value": self.value * factor})  # type: ignore[operator]


class HeldOut(Strict):
    """Errors on rows that the fit did not see: |predicted / measured - 1|, no unit."""

    median: float = Field(ge=0)
    """Median absolute relative error."""
    mean: float = Field(ge=0)
    """Mean absolute relative error."""
    rows: int = Field(gt=0)
    """Rows scored."""


class CostModel(Strict):
    """What all cost models state about themselves."""

    FIXED: ClassVar[tuple[str, ...]] = ("launch",)
    """Fields that hold a fixed time, s."""
    low: float = Field(default=0.5, gt=0, le=1)
    """Lower end of the interval, as a ratio to the predicted time (10th percentile if fitted)."""
    high: float = Field(default=2.0, ge=1)
    """Upper end of the interval, as a ratio to the predicted time (90th percentile if fitted)."""
    evidence: Evidence = "assumed"
    """What the parameters of this model rest on."""
    source: str = "not stated"
    """Key of the file's ``sources``, or a citation."""
    held_out: HeldOut | None = None
    """Errors on held-out shapes, where the parameters were fitted."""

    def in_service(self) -> Self:
        """Return the model of calls in service, which find nothing of the last one in a cache.

        All other layers run in between; where one call is timed again and again, they do.
        """
        return self

    def with_fixed(self, factor: float) -> Self:
        """Return a copy with the fixed times multiplied."""
        return self.model_copy(update={n: getattr(self, n) * factor for n in self.FIXED})


class KernelCost(CostModel):
    """Parameters of one kernel's roofline on one processor, for one weight format."""

    model: Literal["roofline"] = "roofline"
    launch: Seconds
    """Fixed time of one call: launches, ramp-up, tail, s."""
    compute_efficiency: float = Field(gt=0, le=1)
    """Share of the dense peak FLOP/s that large calls reach."""
    memory_efficiency: float = Field(gt=0, le=1)
    """Share of the peak memory bandwidth that large calls reach."""
    tile_rows: int = Field(default=1, ge=1)
    """Rows of a tile: tokens of an expert (or of a GEMM) are padded to a multiple of it."""
    ramp_bytes: _BytesOrNone = Field(default=0.0, ge=0)
    """Bytes whose transfer time is lost on each separate weight block (an active expert's
    matrices): the block size at which half the bandwidth is reached, bytes."""


class TransferCost(CostModel):
    """Parameters of one way of using a link: t = startup + bytes / (efficiency x bandwidth)."""

    FIXED: ClassVar[tuple[str, ...]] = ("startup",)
    startup: Seconds
    """Fixed time of one call, s."""
    efficiency: float = Field(gt=0, le=1)
    """Share of the link's one-way bandwidth that large transfers reach."""
