"""Collectives of hardware that nobody has measured: parameters learnt on devices with its link.

Parameters are shares of the link's rate and fixed times, so that rows of several devices fit one
model. Each device is left out in turn; those errors, and their interval, are what is stated.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from hwmodels.fitting.comm import Piece, search
from hwmodels.fitting.comm_engines import Costs, halves, reads_by
from hwmodels.fitting.fit import interval, score
from hwmodels.kernels.collective import CollectiveCost
from hwmodels.link import Standard, Transfer
from hwmodels.silicon.comm import CommTable

_MOST = 500  # rows of one table that take part in a fit, evenly drawn


def transfer_comm(engine: str, units: Mapping[str, float], link: Standard) -> Costs:
    """Fit what an engine uses inside a node on all given devices with one link.

    Parameters
    ----------
    engine : str
        trtllm, sglang or vllm.
    units : mapping
        Units (SMs) by catalog name of the devices to learn from.
    link : str
        Standard of the port into the node; devices with another are passed over.

    Returns
    -------
    dict
        Cost models by use, evidence ``transfer``; a kernel that fewer than two of the devices
        have is left out, because nothing says how well it transfers.
    """
    by_kernel: dict[tuple[Transfer, str], list[CommTable]] = {}
    for device in units:
        for table in reads_by(device, engine):
            if table.link == link and len(table.frame) >= 8:
                by_kernel.setdefault((table.op, table.kernel), []).append(table)
    known = {key: _learnt(tables, units) for key, tables in by_kernel.items() if len(tables) > 1}
    costs: Costs = {
        op: cost for (op, _), cost in known.items() if op not in ("dispatch", "combine")
    }
    return costs | halves(known, engine)


def _learnt(tables: Sequence[CommTable], units: Mapping[str, float]) -> CollectiveCost:
    pieces = [Piece(t, units[t.source.device], _drawn(len(t.frame))) for t in tables]
    told, took = [], []
    for left_out in pieces:
        found = search([piece for piece in pieces if piece is not left_out])
        told.append(found.predict(left_out.table, left_out.units))
        took.append(left_out.table.seconds)
    predicted, measured = np.concatenate(told), np.concatenate(took)
    low, high = interval(predicted, measured)
    return search(pieces).made(
        kernel=tables[0].kernel,
        low=low,
        high=high,
        evidence="transfer",
        source=f"tables of {', '.join(t.source.device for t in tables)}, each left out in turn",
        held_out=score(predicted, measured),
    )


def _drawn(rows: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    chosen = np.zeros(rows, dtype=np.bool_)
    chosen[:: max(1, rows // _MOST)] = True
    return chosen
