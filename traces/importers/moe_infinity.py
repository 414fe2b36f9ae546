"""Activation counts of MoE-Infinity's expert tracer, format moe-infinity.

A source is one npy of floats ``[capacity, layers, E]``: how often each sequence used each expert.
Layers are those of the model or its MoE layers, so that the model is needed. Places that no
sequence filled are zeros and are dropped. A step of the result is a sequence; counts are (token,
choice) pairs.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from traces.counts_trace import CountsTrace
from traces.importers.base import MOST_BYTES, Asked, Format, Loads
from traces.importers.files import npy_kind, open_npy
from traces.importers.layers import asked_routing, count_layers

EMPTY = "places that no sequence filled"


class MoeInfinity:
    """Counts of each sequence."""

    name = "moe-infinity"
    title = "MoE-Infinity expert tracer: npy of floats [sequences, layers, experts]"

    def matches(self, source: Path, head: bytes) -> bool:
        """Whether it is an npy of floats in three dimensions."""
        return npy_kind(head) == (3, "f")

    def read(self, source: Path, asked: Asked) -> Loads:
        """Read the counts."""
        routing = asked_routing(asked, source)
        counts, places = _counts(open_npy(source), source)
        kept, layers = count_layers(counts, asked, "either", source)
        notes = ["a step is a sequence"]
        if (kept.sum(axis=2) % routing.top_k).any():
            notes.append(f"counts of some sequences are no multiples of top-{routing.top_k}")
        empty = places - len(counts)
        return Loads(
            counts=CountsTrace(
                model=routing.name,
                moe_layer_ids=layers,
                counts=kept,
                top_k=routing.top_k,
                source=f"{self.name}, file {source.name}",
                licence=asked.licence,
                note="a step is a sequence",
            ),
            dropped=Counter({EMPTY: empty} if empty else {}),
            notes=notes,
        )


FORMATS_MOE_INFINITY: tuple[Format, ...] = (MoeInfinity(),)


def _counts(stored: NDArray[Any], source: Path) -> tuple[NDArray[np.int64], int]:
    """Return the counts of filled places as whole numbers, and how many places there are."""
    if stored.ndim != 3 or stored.dtype.kind != "f":
        raise InputError(
            f"{source}: {stored.dtype}{list(stored.shape)} -- floats [sequences, layers, experts]"
        )
    if stored.size * 8 > MOST_BYTES:
        raise InputError(f"{source}: {stored.size} counts -- at most {MOST_BYTES // 8}")
    filled = stored.any(axis=(1, 2))
    values = np.asarray(stored[filled])
    whole = np.isfinite(values) & (values >= 0) & (values == np.round(values)) & (values < 2**53)
    if not whole.all():
        raise InputError(
            f"{source}: {int((~whole).sum())} counts such as {values[~whole][0]} -- whole numbers "
            "from 0 on -- damaged, or shares instead of counts? record it again"
        )
    if not filled.any():
        raise InputError(f"{source}: all counts are 0 -- nothing was recorded")
    return values.astype(np.int64), len(stored)
