"""Fit the streaming kernel's cost model on one table and score it on the widths held out."""

from typing import Any

from hwmodels.fitting.fit import fit, interval, score
from hwmodels.kernels.base import Limits
from hwmodels.kernels.stream import StreamCost
from hwmodels.silicon.table import Table


def fit_stream(table: Table, limits: Limits) -> StreamCost:
    """Fit a table's cost model.

    Parameters
    ----------
    table : Table
        Of `hwmodels.silicon.small.stream_tables`.
    limits : Limits
        Peaks and cache of its device.

    Returns
    -------
    StreamCost
        With errors and the 10th to 90th percentile on held-out widths; evidence fitted.
    """
    values: dict[str, Any] = {p.name: p.start for p in StreamCost.PARAMETERS}
    start = StreamCost.model_construct(**values)
    features = table.features(start, limits)
    fitted, held_out = ~table.held_out, table.held_out
    seen = {name: array[fitted] for name, array in features.items()}
    numbers = fit(StreamCost.PARAMETERS, StreamCost.time, seen, table.seconds[fitted]).numbers
    predicted = StreamCost.time(numbers, features)[held_out]
    measured = table.seconds[held_out]
    low, high = interval(predicted, measured)
    return start.model_copy(
        update={
            **numbers, "low": low, "high": high, "held_out": score(predicted, measured),
            "evidence": "fitted", "kernel": table.kernel, "source": table.source.path,
        }
    )  # fmt: skip
