"""The modes that need tables at hand: ``measured``, and ``auto`` that falls back where none covers.

All kernels that an engine has for a format are taken together, row by row the fastest that was
measured; collectives are few parameters and stay fitted.
"""

from functools import cache
from typing import Any, Literal

from pydantic import PrivateAttr

from basis import InputError
from hwmodels.cost_compute import price_by
from hwmodels.device import Kernel, Processor
from hwmodels.figures import CostModel
from hwmodels.kernels.base import Limits, OwnPrice
from hwmodels.prices import Price
from hwmodels.silicon.attention import attention_tables
from hwmodels.silicon.gemm import gemm_tables
from hwmodels.silicon.measured import Interpolated, price_measured
from hwmodels.silicon.mla import mla_tables
from hwmodels.silicon.moe import moe_tables
from hwmodels.silicon.table import limits_of
from hwmodels.silicon.wheel import GPUS

READERS = (gemm_tables, moe_tables, attention_tables, mla_tables)
"""Readers of all kernels that have an interpolation."""


class Measured(OwnPrice):
    """Tables of one kernel and format, and what prices the rows that they do not hold."""

    model: Literal["measured"] = "measured"
    _tables: list[Interpolated] = PrivateAttr()
    _otherwise: CostModel | None = PrivateAttr()

    @classmethod
    def of(cls, tables: list[Interpolated], otherwise: CostModel | None) -> "Measured":
        """Return the cost model; without ``otherwise`` rows that no table holds are refused."""
        made = cls(evidence="measured", source=tables[0].source)
        made._tables, made._otherwise = tables, otherwise
        return made

    def price(self, op: Any, limits: Limits) -> Price:
        """Price each row of a column.

        Raises
        ------
        InputError
            A row that no table holds, where nothing else may price it.
        """
        other = self._otherwise
        rest = None if other is None else price_by(op, other, other.evidence, limits)
        return price_measured(op, limits, self._tables, rest)


def measured_processor(on: Processor, device: str, engine: str, *, strict: bool) -> Processor:
    """Return the processor with an engine's tables in front of its cost models.

    Parameters
    ----------
    on : Processor
        Its cost models price what no table holds, unless ``strict``.
    device : str
        Catalog name of the device that was measured.
    engine : str
        Engine whose tables count.
    strict : bool
        Refuse rows of a measured kernel and format that no table holds.

    Raises
    ------
    InputError
        No tables of this device or engine.
    """
    known = _tables(device, engine)
    kernels: dict[Kernel, dict[str, Any]] = dict(on.kernels)
    for (name, dtype), tables in known.items():
        other = None if strict else on.kernel(name, dtype)[0]
        kernels[name] = kernels[name] | {dtype: Measured.of(tables, other)}
    return on.model_copy(update={"kernels": kernels})


@cache
def _tables(device: str, engine: str) -> dict[tuple[Kernel, str], list[Interpolated]]:
    if device not in GPUS:
        raise InputError(
            f"prices: measured -- no tables of device {device!r} -- there are some for "
            f"{', '.join(GPUS)} -- set prices: transfer"
        )
    found: dict[tuple[Kernel, str], list[Interpolated]] = {}
    for read in READERS:
        for table in read(device, (engine,)):
            priced = Interpolated.of(table, limits_of(table))
            found.setdefault((table.op, table.dtype), []).append(priced)  # type: ignore[arg-type]
    if not found:
        raise InputError(f"prices: measured -- no tables of engine {engine!r} on {device}")
    return found
