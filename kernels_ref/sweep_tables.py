"""Measured operations as tables: what the cost models are fitted on, and what is kept on disk."""

from collections.abc import Sequence

import pandas as pd

from hwmodels.fitting.library import FORMATS
from hwmodels.silicon.table import Table
from hwmodels.silicon.wheel import Source
from kernels_ref.machine import Machine
from kernels_ref.sweep import Sample


def tables_of(samples: Sequence[Sample], machine: Machine, dtype: str) -> list[Table]:
    """Return one table for each kernel.

    Parameters
    ----------
    samples : sequence of Sample
    machine : Machine
        That they were measured on; it names the source.
    dtype : str
        Of the products.
    """
    found = []
    for kernel in dict.fromkeys(s.case.kernel for s in samples):
        mine = [s for s in samples if s.case.kernel == kernel]
        frame = pd.DataFrame([s.case.shape for s in mine])
        frame["seconds"] = [s.seconds for s in mine]
        frame["floor"] = [s.floor for s in mine]
        source = Source(
            device=machine.processor,
            engine="torch",
            version=machine.torch,
            path=f"tables/{kernel}-{dtype}.parquet",
            sha256="",
            package="moeplan calibrate",
        )
        found.append(
            Table(
                source=source,
                op=kernel,
                dtype=dtype if kernel in FORMATS else "bf16",
                kernel="kernels_ref",
                parts=[s.case.op for s in mine],
                frame=frame,
                shape=tuple(mine[0].case.shape),
                swept=(),
            )
        )
    return found
