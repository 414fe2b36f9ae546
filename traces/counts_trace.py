"""Expert loads without tokens: how often each expert was used, in all or per step.

Many engines record only this (statistics of load balancers, importance matrices). It is enough for
loads and placements by load; nothing can be said of co-activation, reuse, caches or batches, and
what needs tokens refuses such a file. Counts are (token, choice) pairs.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from basis.errors import InputError
from basis.files import replacing

SCHEMA = "moeplan.counts/1"
COUNTS_KEY = b"moeplan.counts"
_MAX_CELLS = 2**30 // 8


@dataclass(frozen=True, kw_only=True, eq=False)
class CountsTrace:
    """Loads of S steps, L recorded MoE layers and E experts.

    Raises
    ------
    InputError
        If the counts are not whole numbers of at least 0 in that shape, or a description is
        impossible.
    """

    model: str
    moe_layer_ids: tuple[int, ...]
    """The model's layer index of each recorded layer, ascending."""
    counts: NDArray[np.int64]
    """``[S, L, E]``; S = 1 where the source gives one total."""
    top_k: int | None = None
    """Experts of a token and layer, where the source tells."""
    source: str = ""
    licence: str = "not stated"
    note: str = ""
    relative: bool = False
    """True where only shares mean anything: a source that counts the same token several times."""

    def __post_init__(self) -> None:
        shape, ids = self.counts.shape, self.moe_layer_ids
        if self.counts.dtype != np.int64 or self.counts.ndim != 3 or not self.counts.size:
            raise InputError(
                f"counts: {self.counts.dtype}{list(shape)} -- int64 [steps, layers, E]"
            )
        if (self.counts < 0).any():
            raise InputError(f"counts: {int(self.counts.min())} -- at least 0")
        if len(ids) != shape[1] or list(ids) != sorted(set(ids)) or ids[0] < 0:
            raise InputError(
                f"counts: moe_layer_ids {list(ids)} for {shape[1]} layers -- one index from 0 for "
                "each, ascending"
            )
        if self.top_k is not None and not 1 <= self.top_k <= shape[2]:
            raise InputError(f"counts: top_k {self.top_k} -- 1 to the {shape[2]} experts")

    @property
    def num_experts(self) -> int:
        """Logical experts of a layer."""
        return self.counts.shape[2]

    @property
    def loads(self) -> NDArray[np.int64]:
        """``[L, E]`` over all steps."""
        return self.counts.sum(axis=0)


def write_counts(counts: CountsTrace, path: Path) -> None:
    """Write loads as Parquet, a row per step and layer.

    Raises
    ------
    InputError
        If it cannot be written there.
    """
    steps, layers, experts = counts.counts.shape
    about = {name: value for name, value in vars(counts).items() if name != "counts"}
    flat = pa.array(counts.counts.reshape(-1))
    table = pa.table(
        {
            "step": np.repeat(np.arange(steps, dtype=np.int32), layers),
            "layer": np.tile(np.array(counts.moe_layer_ids, np.int32), steps),
            "counts": pa.FixedSizeListArray.from_arrays(flat, experts),
        },
        metadata={COUNTS_KEY: json.dumps({"schema": SCHEMA} | about).encode()},
    )
    with replacing(path) as file:
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)


def is_counts(path: Path) -> bool:
    """Whether a file is a Parquet file of loads."""
    try:
        return COUNTS_KEY in (pq.read_schema(path).metadata or {})
    except (pa.ArrowException, OSError):
        return False


def read_counts(path: Path) -> CountsTrace:
    """Read loads that `write_counts` wrote.

    Raises
    ------
    InputError
        If the file is missing, damaged, too large, or something else.
    """
    path = Path(path)
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            about = _about(path, file)
            experts = _experts(path, file)
            if file.metadata.num_rows * experts > _MAX_CELLS:
                raise InputError(
                    f"{path}: {file.metadata.num_rows} rows of {experts} experts -- at most "
                    f"{_MAX_CELLS} counts"
                )
            table = file.read(["step", "layer", "counts"])
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{path}: not a readable Parquet file of loads ({str(error).splitlines()[0]}) -- is it "
            "truncated, a Git LFS pointer, or another format? import it again"
        ) from error
    layers = tuple(about.pop("moe_layer_ids"))
    if not layers or not table.num_rows or table.num_rows % len(layers):
        raise InputError(f"{path}: {table.num_rows} rows for {len(layers)} layers -- import again")
    steps = table.num_rows // len(layers)
    wanted = np.repeat(np.arange(steps), len(layers)), np.tile(layers, steps)
    for name, values in zip(("step", "layer"), wanted, strict=True):
        if not np.array_equal(np.asarray(table[name]), values):
            raise InputError(
                f"{path}: column {name} is not step after step, layer after layer -- was it sorted "
                "by another tool? import it again"
            )
    flat = table["counts"].combine_chunks().flatten()
    if flat.null_count or len(flat) != table.num_rows * experts:
        raise InputError(f"{path}: nulls in column counts -- import it again")
    shaped = np.asarray(flat).reshape(-1, len(layers), experts)
    try:
        return CountsTrace(moe_layer_ids=layers, counts=shaped, **about)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _about(path: Path, file: Any) -> dict[str, Any]:
    stored = (file.schema_arrow.metadata or {}).get(COUNTS_KEY)
    wanted = {f for f in CountsTrace.__dataclass_fields__ if f != "counts"}
    try:
        about: Any = json.loads(stored) if stored else None
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict) or about.pop("schema", None) != SCHEMA or set(about) != wanted:
        raise InputError(f"{path}: no loads of {SCHEMA} -- moeplan trace import writes such files")
    layers, texts = about["moe_layer_ids"], ("model", "source", "licence", "note")
    good = isinstance(layers, list) and all(type(layer) is int for layer in layers)
    good &= type(about["top_k"]) in (int, type(None)) and type(about["relative"]) is bool
    if not good or not all(isinstance(about[name], str) for name in texts):
        raise InputError(f"{path}: a field of the description has the wrong type -- import again")
    return about


def _experts(path: Path, file: Any) -> int:
    schema = file.schema_arrow
    for name in ("step", "layer"):
        if name not in schema.names or schema.field(name).type != pa.int32():
            raise InputError(f"{path}: column {name} is missing or not int32 -- import it again")
    kind = schema.field("counts").type if "counts" in schema.names else None
    if kind is None or not pa.types.is_fixed_size_list(kind) or kind.value_type != pa.int64():
        raise InputError(f"{path}: column counts is {kind}, must be fixed_size_list<int64>")
    return int(kind.list_size)
