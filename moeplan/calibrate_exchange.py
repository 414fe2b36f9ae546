"""The link between ranks on this machine, from measured exchanges: a start-up and a rate.

``t = startup + bytes / (efficiency x bandwidth)`` for the bytes of the busiest port, each half of
the exchange by itself. Gloo on one machine sends through the kernel's loopback, so that sender and
receiver both pay with their cores; the link's bandwidth is the best rate one way, measured or
fitted (less the start-up), whichever is higher.
To the start-up comes what an exchange is held up on average beyond its median: now and then the
scheduler lets a message wait for milliseconds. A step adds up dozens of exchanges, and what adds up
is the mean.
Fitted on three quarters of the shapes, by their hash, up to `FITTED_BYTES` a port; the rest and
everything larger is scored. Bytes and seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from basis.units import BytesPerSecond
from hwmodels.figures import Figure, HeldOut, TransferCost
from hwmodels.fitting.fit import fit, interval, score
from hwmodels.fitting.write import plain
from hwmodels.kernels.base import Features, Numbers, Parameter
from hwmodels.kernels.collective import busiest_port
from hwmodels.ops import PHASES, Floats, Phase

if TYPE_CHECKING:
    from kernels_ref.exchange_sweep import ExchangeRow

FITTED_BYTES = 2 * 2**20
"""Bytes of a port up to which rows are fitted: 1,024 tokens of 2 KB. Beyond, every call's new
buffers are paid page by page and the rate falls."""
NOISY = 0.25
"""Floor of a row above which it is left out: another program ran in the middle of most samples."""
_LEAST = (6, 3)  # rows to fit on and to score on
_HELD_OUT = 4  # one shape in so many
_PARAMETERS = (
    Parameter(name="startup", low=1e-6, high=1e-1, start=1e-4),
    Parameter(name="rate", low=1e7, high=1e12, start=2e9),
)


@dataclass(frozen=True, kw_only=True)
class ExchangeFit:
    """What was found for one half of the exchange."""

    phase: Phase
    startup_s: float
    """Of an exchange that nothing holds up."""
    stall_s: float
    """Mean over the samples of the fitted rows of what they took beyond the median of their row."""
    rate: float
    """Bytes per second of the busiest port."""
    fitted: HeldOut
    """Errors on the rows fitted."""
    held_out: HeldOut
    """Errors on rows of sizes in the same range that the fit did not see."""
    beyond: HeldOut | None
    """Errors on rows with more bytes than any fitted; None: there are none."""
    low: float
    """10th percentile of measured / predicted on the held-out rows."""
    high: float
    """90th percentile."""
    left_out: int
    """Rows that were too noisy to use."""


@dataclass(frozen=True, kw_only=True)
class FittedLink:
    """The link between the ranks of this machine."""

    bandwidth: Figure[BytesPerSecond]
    """Best rate one way, bytes/s."""
    halves: tuple[ExchangeFit, ...]
    source: str
    """What was measured, for the file."""

    def to_dict(self) -> dict[str, Any]:
        """Return `node.interconnect` of a cluster file, as plain data for YAML."""
        return {
            "standard": "other",
            "direction": "one-way",
            "bandwidth": plain(self.bandwidth),
            "costs": {half.phase: plain(self._cost(half)) for half in self.halves},
        }

    def _cost(self, half: ExchangeFit) -> TransferCost:
        return TransferCost.model_construct(
            startup=half.startup_s + half.stall_s,
            efficiency=half.rate / self.bandwidth.value,
            low=half.low,
            high=half.high,
            evidence="fitted",
            source=self.source,
            held_out=half.held_out,
        )


def fit_exchange(rows: Sequence["ExchangeRow"], *, source: str = "not stated") -> FittedLink:
    """Fit the link on measured exchanges.

    Parameters
    ----------
    rows : sequence of ExchangeRow
        Of both phases, see `kernels_ref.sweep_exchange`.
    source : str
        Machine, versions and date of the measurement.

    Raises
    ------
    InputError
        When too few rows are quiet enough to fit on and to score on.
    """
    quiet = [row for row in rows if row.timing.floor <= NOISY]
    halves = tuple(_half(phase, rows, quiet) for phase in PHASES)
    one_way = [row for row in quiet if row.case.pattern == "one-sided"] or quiet
    rates = _port(one_way) / _seconds(one_way)
    best, fastest = int(rates.argmax()), max(halves, key=lambda half: half.rate)
    case, phase = one_way[best].case, one_way[best].phase
    said = f"{phase} of {case.tokens} rows of {case.row_bytes} bytes, {case.pattern}"
    bandwidth = Figure[BytesPerSecond].model_construct(
        value=float(rates[best]), evidence="measured", source=f"{said}; {source}"
    )
    if fastest.rate > bandwidth.value:
        bandwidth = Figure[BytesPerSecond].model_construct(
            value=fastest.rate, evidence="fitted", source=f"{fastest.phase}; {source}"
        )
    return FittedLink(
        bandwidth=bandwidth,
        halves=halves,
        source=f"{len(quiet)} exchanges, fitted up to {FITTED_BYTES} bytes a port; {source}",
    )


def _half(
    phase: Phase, rows: Sequence["ExchangeRow"], quiet: Sequence["ExchangeRow"]
) -> ExchangeFit:
    mine = [row for row in quiet if row.phase == phase]
    port, held = _port(mine), np.array([_is_held_out(row) for row in mine], dtype=np.bool_)
    beyond = port > FITTED_BYTES
    seen, unseen = ~held & ~beyond, held & ~beyond
    asked = sum(row.phase == phase for row in rows)
    if seen.sum() < _LEAST[0] or unseen.sum() < _LEAST[1]:
        raise InputError(
            f"{phase}: {len(mine)} of {asked} measured exchanges are quiet (repeats within "
            f"{NOISY:.0%}), {seen.sum()} to fit on and {unseen.sum()} to score on -- at least "
            f"{_LEAST[0]} and {_LEAST[1]} -- close other programs and measure again, with more "
            "sizes or rounds"
        )
    seconds = _seconds(mine)
    numbers = fit(_PARAMETERS, _time, {"port": port[seen]}, seconds[seen]).numbers
    predicted = _time(numbers, {"port": port})
    low, high = interval(predicted[unseen], seconds[unseen])
    return ExchangeFit(
        phase=phase,
        startup_s=numbers["startup"],
        stall_s=_stall([row for row, used in zip(mine, seen, strict=True) if used]),
        rate=numbers["rate"],
        fitted=score(predicted[seen], seconds[seen]),
        held_out=score(predicted[unseen], seconds[unseen]),
        beyond=score(predicted[beyond], seconds[beyond]) if beyond.any() else None,
        low=low,
        high=high,
        left_out=asked - len(mine),
    )


def _stall(rows: Sequence["ExchangeRow"]) -> float:
    """Seconds by which the mean of a sample lies above its row's median; a long tail, or zero."""
    return max(0.0, float(np.mean([row.timing.samples - row.timing.seconds for row in rows])))


def _time(numbers: Numbers, features: Features) -> Floats:
    return np.asarray(numbers["startup"] + features["port"] / numbers["rate"])


def _is_held_out(row: "ExchangeRow") -> bool:
    """Whether a shape is scored: both phases and patterns of it, and on every machine the same."""
    return crc32(f"{row.case.tokens} x {row.case.row_bytes}".encode()) % _HELD_OUT == 0


def _port(rows: Sequence["ExchangeRow"]) -> NDArray[np.float64]:
    """Bytes through the busiest port, [n]."""
    ports = [busiest_port(row.traffic[None], np.zeros(row.ranks, dtype=np.int64)) for row in rows]
    return np.array([inside[0] for inside, _ in ports], dtype=np.float64)


def _seconds(rows: Sequence["ExchangeRow"]) -> NDArray[np.float64]:
    return np.array([row.timing.seconds for row in rows], dtype=np.float64)
