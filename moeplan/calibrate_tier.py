"""The slow tier of this machine as part of a cluster file: what fetching an expert takes by size.

``t = startup + bytes / rate`` for pageable memory and for files, with the least squared relative
error over every other size; the sizes between are held out and give the error that is stated.
Sizes in bytes, times in seconds, rates in bytes per second.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from basis import BytesPerSecond, InputError, format_quantity
from hwmodels.cost_compute import price_compute
from hwmodels.device import Device
from hwmodels.figures import Figure, HeldOut
from hwmodels.fitting.write import plain
from hwmodels.kernels.copies import CopyCost
from hwmodels.ops import GroupedGemm
from moeplan.reference import import_kernels

if TYPE_CHECKING:
    from kernels_ref.tier_sweep import Fetch, NearUse

PAGES = "pages"
"""Name of the memory, in a cluster, that stands for pageable host memory as a slow tier."""
NAMES = {"pages": PAGES, "disk": "disk", "page cache": "page_cache"}
"""Name of each tier's memory, by what `kernels_ref.tier_sweep` calls the tier."""
_KINDS = {
    "pages": "host DRAM, pageable",
    "disk": "file, read past the page cache",
    "page cache": "file, read through the page cache",
}
SIZES = tuple(
    round(2 ** (16 + half / 2) / 4096) * 4096 for half in range(17)
)  # 64 KiB to 16 MiB, two an octave; whole blocks
"""Bytes of the experts that are fetched; the odd ones of them are held out."""
SHAPES = (
    (256, 384),
    (320, 448),
    (384, 640),
    (640, 448),
    (512, 704),
    (768, 576),
    (704, 832),
    (896, 768),
)
"""Hidden and inner width of the experts that are used right after a copy, 1 to 8 MB in float32;
the odd ones are held out."""


@dataclass(frozen=True, kw_only=True)
class FetchFit:
    """What fetches from one tier take."""

    tier: str
    startup: float
    """s"""
    rate: float
    """Bytes per second of a long fetch."""
    low: float
    """10th percentile of measured / predicted on held-out sizes, at most 1."""
    high: float
    """90th percentile, at least 1."""
    held_out: HeldOut
    floor: float
    """Median over the sizes of the measurement's own spread, see `Timing.floor`."""

    def seconds(self, size: float) -> float:
        """Predict one fetch."""
        return self.startup + size / self.rate


def calibrate_tier(
    folder: Path, host: str, *, sizes: Sequence[int] = SIZES, rounds: int = 15, seed: int = 0
) -> dict[str, Any]:
    """Measure and fit this machine's slow tiers; call it with the process pinned.

    Parameters
    ----------
    folder : Path
        Where experts would lie in files; needs about 1.2 GB while measuring.
    host : str
        Name of the device's memory, into which experts are fetched.
    sizes, rounds, seed
        Of the sweep.

    Returns
    -------
    dict
        ``memories`` and ``links`` for ``node`` of a cluster file, as plain data.

    Raises
    ------
    InputError
        Without torch, or if the folder cannot be written.
    """
    import_kernels()
    from kernels_ref.tier_sweep import sweep_fetches

    try:
        fetches = sweep_fetches(folder, sizes, rounds=rounds, seed=seed)
    except OSError as error:
        raise InputError(
            f"{folder}: {error.strerror or error} -- must be a folder that can be written, with "
            "about 1.2 GB free -- name another"
        ) from error
    return node_parts(fit_fetches(fetches), host, folder)


def fit_fetches(fetches: Sequence["Fetch"]) -> tuple[FetchFit, ...]:
    """Fit every tier on its sizes of even place (ascending), and score it on the others.

    Raises
    ------
    InputError
        If a tier has fewer than four sizes, or takes no longer for more bytes.
    """
    tiers = dict.fromkeys(fetch.tier for fetch in fetches)
    return tuple(_fit(tier, [f for f in fetches if f.tier == tier]) for tier in tiers)


def _fit(tier: str, fetches: Sequence["Fetch"]) -> FetchFit:
    fetches = sorted(fetches, key=lambda fetch: fetch.bytes)
    if len(fetches) < 4:
        raise InputError(
            f"fetches from {tier}: {len(fetches)} sizes -- at least 4, half of them to hold out -- "
            "measure more"
        )
    size = np.array([fetch.bytes for fetch in fetches], dtype=np.float64)
    took = np.array([fetch.timing.seconds for fetch in fetches])
    scale = size[-1]  # both unknowns are then of the order of seconds
    terms = np.stack([np.ones_like(size), size / scale], axis=1) / took[:, None]
    (startup, per_scale), _ = nnls(terms[::2], np.ones(len(terms[::2])))
    if per_scale == 0:
        raise InputError(
            f"fetches from {tier} take no longer for more bytes -- this machine is too noisy to "
            "measure -- close other programs and try again"
        )
    ratio = 1 / (terms[1::2] @ np.array([startup, per_scale]))
    error = np.abs(1 / ratio - 1)
    return FetchFit(
        tier=tier,
        startup=float(startup),
        rate=float(scale / per_scale),
        low=min(1.0, float(np.quantile(ratio, 0.1))),
        high=max(1.0, float(np.quantile(ratio, 0.9))),
        held_out=HeldOut(median=float(np.median(error)), mean=float(error.mean()), rows=len(error)),
        floor=float(np.median([fetch.timing.floor for fetch in fetches])),
    )


def calibrate_cache(device: Device, *, rounds: int = 15, seed: int = 0) -> dict[str, Any]:
    """Measure and fit the rate at which an expert is read that was fetched just before.

    Parameters
    ----------
    device : Device
        This machine with its fitted ``grouped_gemm``; call it with the process pinned.

    Returns
    -------
    dict
        ``cache_bandwidth`` of the processor, as plain data.
    """
    import_kernels()
    from kernels_ref.tier_sweep import sweep_near_uses

    uses = sweep_near_uses(SHAPES, rounds=rounds, seed=seed)
    rate, held_out = fit_cache(device, uses)
    floor = float(np.median([use.floor for use in uses]))
    return {
        "value": format_quantity(rate, "B/s", 4),
        "evidence": "fitted",
        "source": "moeplan calibrate: experts right after their copy; median error on "
        f"{held_out.rows} held-out shapes {held_out.median:.1%}, spread of repeats {floor:.1%}",
    }


def fit_cache(device: Device, uses: Sequence["NearUse"]) -> tuple[float, HeldOut]:
    """Find the rate with the least absolute log error on uses of even place; score the others."""
    own = device.processor
    memory = own.bandwidth or device.memory.bandwidth

    def errors(rate: float, some: Sequence["NearUse"]) -> NDArray[np.float64]:
        figure = Figure[BytesPerSecond](value=format_quantity(rate, "B/s", 9))
        on = own.model_copy(update={"cache_bandwidth": figure})
        return np.array(
            [float(price_compute(_near(u), on, memory).seconds[0]) / u.seconds for u in some]
        )

    rates = memory.value * np.geomspace(0.25, 64, 321)
    size = [float(np.abs(np.log(errors(rate, uses[::2]))).sum()) for rate in rates]
    best = float(rates[int(np.argmin(size))])
    held = np.abs(errors(best, uses[1::2]) - 1)
    return best, HeldOut(median=float(np.median(held)), mean=float(held.mean()), rows=len(held))


def _near(use: "NearUse") -> GroupedGemm:
    return GroupedGemm(
        tokens_per_expert=np.ones((1, 1), dtype=np.int64),
        hidden=use.hidden,
        width=use.width,
        gated=True,
        weight_dtype="fp32",
        activation_dtype="fp32",
        cached=True,
    )


def node_parts(fits: Sequence[FetchFit], host: str, folder: Path) -> dict[str, Any]:
    """Write fits as the ``memories`` and ``links`` of a node.

    A fetch out of pageable memory reads there and writes beside it, so that the memory moves twice
    the rate; a drive is read only.
    """
    whole = {"pages": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")}
    memories, links = {}, {}
    for fit in fits:
        name = NAMES[fit.tier]
        fitted = {
            "evidence": "fitted",
            "source": f"moeplan calibrate: median spread of repeats {fit.floor:.1%}",
        }
        capacity = float(whole.get(fit.tier, shutil.disk_usage(folder).free))
        moved = fit.rate * (2 if fit.tier == "pages" else 1)
        memories[name] = {
            "kind": _KINDS[fit.tier],
            "capacity": {
                "value": format_quantity(capacity, "B", 4),
                "evidence": "measured",
                "source": "the operating system: memory, or room on the drive",
            },
            "bandwidth": {"value": format_quantity(moved, "B/s", 4), **fitted},
        }
        cost = CopyCost.model_validate(
            {
                "startup": format_quantity(fit.startup, "s", 4),
                "efficiency": 1.0,
                "low": fit.low,
                "high": fit.high,
                "held_out": fit.held_out,
                **fitted,
            }
        )
        links[f"{name}-{host}"] = {
            "standard": "other",
            "direction": "one-way",
            "bandwidth": {"value": format_quantity(fit.rate, "B/s", 4), **fitted},
            "ends": [name, host],
            "costs": {"copy": plain(cost)},
        }
    return {"memories": memories, "links": links}
