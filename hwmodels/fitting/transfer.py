"""Parameters for a device that nobody measured, and how far they are off.

Physical parameters are shares and times beside a data sheet's peaks, so one set can be fitted on
several devices' rows at once, each under its own limits. Leaving out each measured device in turn
says how wrong such a transfer is: the interval for one device is what the others showed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hwmodels.figures import HeldOut
from hwmodels.fitting.fit import fit, score
from hwmodels.kernels.attention_decode import AttentionDecodeCost
from hwmodels.kernels.attention_prefill import AttentionPrefillCost
from hwmodels.kernels.base import PhysicalCost
from hwmodels.kernels.gemm import GemmCost
from hwmodels.kernels.grouped_gemm import GroupedGemmCost
from hwmodels.kernels.stream import StreamCost
from hwmodels.ops import Floats
from hwmodels.silicon.table import Table, limits_of

ROWS = 500
"""Rows drawn from a device's table; all devices count alike."""
LEAST_DEVICES = 3
"""Devices without which there is nothing to learn from."""
LOW, HIGH = 0.1, 0.9
"""Ends of the interval, as shares of the rows."""


def _blank(kind: type[PhysicalCost], **choices: Any) -> PhysicalCost:
    starts: dict[str, Any] = {p.name: p.start for p in kind.PARAMETERS}
    return kind.model_construct(**choices, **starts)


_DECODE = _blank(AttentionDecodeCost, head_tile=64, row_step=8, split_keys=128)
_PREFILL = _blank(AttentionPrefillCost, tile=128, packed=True)
PROTOTYPES: dict[str, PhysicalCost] = {
    "gemm": _blank(GemmCost, tiles="fastest", split_k=True),
    "grouped_gemm": _blank(GroupedGemmCost),
    "attention_decode": _DECODE,
    "attention_prefill": _PREFILL,
    "mla_decode": _DECODE,
    "mla_prefill": _PREFILL,
    "stream": _blank(StreamCost),
}
"""Structure of each kernel where nothing is known of an engine's own."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawn:
    """Drawn rows of one device's table."""

    features: dict[str, Floats]
    """Of the prototype: arrays [n] (or [m, n]) by name."""
    seconds: Floats
    """Measured [n], s."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LeftOut:
    """One device predicted from the others."""

    device: str
    ratio: Floats
    """[n] measured / predicted."""

    @property
    def errors(self) -> HeldOut:
        """|predicted / measured - 1|."""
        return score(1 / self.ratio, np.ones_like(self.ratio))


@dataclass(frozen=True, kw_only=True, eq=False)
class Transfer:
    """One kernel and format of an engine, for any device."""

    cost: PhysicalCost
    """Fitted on all devices; evidence transfer, the interval of all that were left out."""
    left_out: list[LeftOut]

    @property
    def coverage(self) -> dict[str, float]:
        """Share of each device's rows inside the interval that the other devices give."""
        inside = {}
        for one in self.left_out:
            low, high = interval([s for s in self.left_out if s is not one])
            inside[one.device] = float(((one.ratio >= low) & (one.ratio <= high)).mean())
        return inside


def draw(table: Table, seed: int = 0) -> Drawn:
    """Draw rows of a table and compute the prototype's features of them."""
    features, seconds = table.features(PROTOTYPES[table.op], limits_of(table)), table.seconds
    rows = np.random.default_rng(seed).permutation(len(seconds))[:ROWS]
    rows.sort()
    return Drawn(features={n: f[..., rows] for n, f in features.items()}, seconds=seconds[rows])


def transfer(op: str, devices: Mapping[str, Drawn], source: str) -> Transfer | None:
    """Fit one set of parameters on all devices, and each device from the others.

    Parameters
    ----------
    op : str
        Kernel, a key of `PROTOTYPES`.
    devices : mapping of str to Drawn
        Rows by device; fewer than `LEAST_DEVICES` give None.
    source : str
        Citation of the rows.
    """
    if len(devices) < LEAST_DEVICES:
        return None
    cost = PROTOTYPES[op]
    shown = []
    for name, rows in devices.items():
        others = [r for other, r in devices.items() if other != name]
        predicted = cost.time(_pooled(cost, others), rows.features)
        shown.append(LeftOut(device=name, ratio=rows.seconds / predicted))
    low, high = interval(shown)
    ratios = np.concatenate([s.ratio for s in shown])
    update = {
        **_pooled(cost, list(devices.values())), "low": min(low, 1.0), "high": max(high, 1.0),
        "evidence": "transfer", "source": source,
        "held_out": score(1 / ratios, np.ones_like(ratios)),
    }  # fmt: skip
    return Transfer(cost=cost.model_copy(update=update), left_out=shown)


def _pooled(cost: PhysicalCost, devices: Sequence[Drawn]) -> dict[str, float]:
    """Fit one set of parameters; every device weighs the same."""
    names = devices[0].features
    features = {n: np.concatenate([d.features[n] for d in devices], axis=-1) for n in names}
    seconds = np.concatenate([d.seconds for d in devices])
    weights = np.concatenate([np.full(len(d.seconds), 1 / len(d.seconds)) for d in devices])
    return fit(
        cost.PARAMETERS, cost.time, features, seconds,
        weights=weights, starts=1, evaluations=60,
    ).numbers  # fmt: skip


def interval(shown: Sequence[LeftOut]) -> tuple[float, float]:
    """Return the 10th and 90th percentile of measured / predicted, devices weighing the same."""
    ratios = np.concatenate([s.ratio for s in shown])
    weights = np.concatenate([np.full(len(s.ratio), 1 / len(s.ratio)) for s in shown])
    order = np.argsort(ratios)
    reached = np.cumsum(weights[order]) / weights.sum()
    low, high = (ratios[order][np.searchsorted(reached, q)] for q in (LOW, HIGH))
    return float(low), float(high)


def save(path: Path, drawn: Mapping[str, Drawn]) -> None:
    """Write drawn rows by name as an npz file."""
    arrays: Any = {f"{key}|seconds": d.seconds for key, d in drawn.items()}
    for key, d in drawn.items():
        arrays |= {f"{key}|{name}": values for name, values in d.features.items()}
    np.savez_compressed(path, **arrays)


def load(path: Path) -> dict[str, Drawn]:
    """Read what `save` wrote."""
    with np.load(path, allow_pickle=False) as file:
        found: dict[str, dict[str, Floats]] = {}
        for name in file.files:
            key, feature = name.rsplit("|", 1)
            found.setdefault(key, {})[feature] = file[name]
    return {
        key: Drawn(seconds=features.pop("seconds"), features=features)
        for key, features in found.items()
    }
