"""The layer axis of a source against the model: which layers are MoE, and what their ids are.

Some engines record every layer and leave zeros (or -1) in the dense ones, others number the MoE
layers alone; zeros cannot be told from "expert 0", so the model's configuration decides. Cells are
the expert ids ``[T, L, K]`` of T tokens, L MoE layers and K experts per token and layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from traces.importers.base import Asked
from traces.meta import TraceMeta
from traces.model_spec import ModelSpec

Axis = Literal["all", "moe", "either"]
"""Layers that a source records: all of the model, its MoE layers, or whichever fits."""
UNKNOWN_MODEL = "not stated"


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What an importer must know of the model."""

    name: str
    num_layers: int
    moe_layer_ids: tuple[int, ...]
    num_experts: int
    top_k: int
    zero_experts: int = 0
    """Choices of the router beyond the experts, at which a token does no work."""

    def meta(self, source: Path, recorder: str, asked: Asked) -> TraceMeta:
        """Return the description of a trace that was read from a source."""
        return TraceMeta(
            model=self.name,
            num_experts=self.num_experts,
            top_k=self.top_k,
            moe_layer_ids=self.moe_layer_ids,
            source=f"{recorder}, file {source.name}",
            licence=asked.licence,
        )


def routing_of(model: ModelSpec) -> Routing:
    """Return what an importer must know of a model."""
    return Routing(
        name=model.name,
        num_layers=model.num_layers,
        moe_layer_ids=model.moe_layer_ids,
        num_experts=model.num_experts,
        top_k=model.top_k,
        zero_experts=model.zero_experts,
    )


def asked_routing(asked: Asked, where: object) -> Routing:
    """Return the geometry that the user gave.

    Raises
    ------
    InputError
        If none was given.
    """
    if asked.model is None:
        raise InputError(
            f"{where}: it does not say which layers are MoE nor how many experts there are -- this "
            "format needs the model's geometry -- give the config.json of the model"
        )
    return routing_of(asked.model)


def moe_columns(found: int, routing: Routing, axis: Axis) -> NDArray[np.intp] | None:
    """Return ``[L]`` where each MoE layer lies on an axis of ``found`` layers; None = no fit."""
    if axis != "moe" and found == routing.num_layers:
        return np.array(routing.moe_layer_ids, np.intp)
    if axis != "all" and found == len(routing.moe_layer_ids):
        return np.arange(found)
    return None


def token_cells(
    ids: NDArray[Any], routing: Routing, axis: Axis, where: str, *, blank: int = 0
) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
    """Check the ids of a source and keep its MoE layers.

    Parameters
    ----------
    ids
        ``[T, layers, K]`` integers as the engine wrote them.
    blank
        What the engine leaves where nothing was recorded: in dense layers, and in all layers of a
        row that is no token.

    Returns
    -------
    cells
        ``[R, L, K]`` of the R rows that were recorded.
    recorded
        ``[T]`` which they are. Rows of blanks are not, except zeros with K = 1: those may be ids.

    Raises
    ------
    InputError
        If shape, ids or the ids in dense layers do not fit the model.
    """
    columns = _fitting_columns(ids, routing, axis, where)
    dense = np.ones(ids.shape[1], bool)
    dense[columns] = False
    strange = (ids[:, dense] != blank).any(axis=(0, 2))
    if strange.any():
        names = ", ".join(map(str, np.flatnonzero(dense)[strange][:8]))
        raise InputError(
            f"{where}: experts are recorded in layers {names}, which are dense in {routing.name} "
            "-- give the config.json of the model that was recorded"
        )
    cells = ids[:, columns]
    recorded = np.ones(len(ids), bool)
    if blank < 0 or routing.top_k > 1:
        recorded = (cells != blank).any(axis=(1, 2))
        cells = cells if recorded.all() else cells[recorded]
    _check_range(cells, routing, where)
    return cells.astype(np.uint16), recorded


def _fitting_columns(
    ids: NDArray[Any], routing: Routing, axis: Axis, where: str
) -> NDArray[np.intp]:
    if ids.ndim != 3 or ids.dtype.kind not in "iu":
        raise InputError(
            f"{where}: {ids.dtype}{list(ids.shape)} -- expert ids are integers [tokens, layers, "
            "top_k] -- save them again, unchanged"
        )
    columns = moe_columns(ids.shape[1], routing, axis)
    problems = []
    if columns is None:
        problems.append(
            f"{ids.shape[1]} layers recorded, {routing.name} has {_layers(routing, axis)}"
        )
    if ids.shape[2] != routing.top_k:
        problems.append(
            f"{ids.shape[2]} experts per token and layer, {routing.name} has top-{routing.top_k}"
        )
    if columns is None or problems:
        raise InputError(
            f"{where}: {'; '.join(problems)} -- give the config.json of the model that was recorded"
        )
    return columns


def _layers(routing: Routing, axis: Axis) -> str:
    every, moe = f"{routing.num_layers} layers", f"{len(routing.moe_layer_ids)} MoE layers"
    return {"all": every, "moe": moe, "either": f"{every}, {moe}"}[axis]


def _check_range(cells: NDArray[Any], routing: Routing, where: str) -> None:
    if not cells.size or (cells.min() >= 0 and cells.max() < routing.num_experts):
        return
    bad = (cells < 0) | (cells >= routing.num_experts)
    row, layer, _ = np.unravel_index(int(np.argmax(bad)), bad.shape)
    remedy = "give the config.json of the model that was recorded; are they physical slots?"
    if cells.min() >= 0 and cells.max() < routing.num_experts + routing.zero_experts:
        remedy = "a trace cannot hold the model's zero-computation experts; nothing is imported"
    raise InputError(
        f"{where}: {int(bad.sum())} expert ids out of range (first: {int(cells[bad][0])}, row "
        f"{row}, layer {routing.moe_layer_ids[int(layer)]}) -- 0 to {routing.num_experts - 1} in "
        f"{routing.name} -- {remedy}"
    )


def count_layers(
    counts: NDArray[Any], asked: Asked, axis: Axis, where: object
) -> tuple[NDArray[np.int64], tuple[int, ...]]:
    """Keep the MoE layers of counts.

    Parameters
    ----------
    counts
        ``[S, layers, E]`` integers.

    Returns
    -------
    counts
        ``[S, L, E]``.
    moe_layer_ids
        ``[L]``; without a model: the layers that counted anything.

    Raises
    ------
    InputError
        If layers or experts do not fit the model, a dense layer counted something, or none did.
    """
    used = counts.any(axis=(0, 2))
    if not used.any():
        raise InputError(f"{where}: all counts are 0 -- nothing was recorded; record under load")
    if asked.model is None:
        return counts[:, used].astype(np.int64), tuple(np.flatnonzero(used).tolist())
    routing = routing_of(asked.model)
    columns = moe_columns(counts.shape[1], routing, axis)
    problems = []
    if columns is None:
        problems.append(
            f"{counts.shape[1]} layers recorded, {routing.name} has {_layers(routing, axis)}"
        )
    elif set(np.flatnonzero(used).tolist()) - set(columns.tolist()):
        names = sorted(set(np.flatnonzero(used).tolist()) - set(columns.tolist()))
        problems.append(f"layers {names} counted tokens, {routing.name} has no experts there")
    if counts.shape[2] != routing.num_experts:
        problems.append(f"{counts.shape[2]} experts, {routing.name} has {routing.num_experts}")
    if columns is None or problems:
        raise InputError(
            f"{where}: {'; '.join(problems)} -- give the config.json of the model that was recorded"
        )
    return counts[:, columns].astype(np.int64), routing.moe_layer_ids


def named_layers(
    found: Sequence[int], asked: Asked, where: object
) -> tuple[tuple[int, ...], list[str]]:
    """Return the model's layer ids of layers that a source names, ascending, and notes.

    Parameters
    ----------
    found
        ``[L]`` ids as the source has them, ascending: layers of the model, or MoE indices from 0.

    Raises
    ------
    InputError
        If they are neither.
    """
    ids = tuple(found)
    if asked.model is None:
        return ids, ["no model given: layer ids are kept as the source has them"]
    wanted = asked.model.moe_layer_ids
    if ids == wanted:
        return ids, []
    if ids == tuple(range(len(wanted))):
        return wanted, [f"layers 0 to {len(ids) - 1} were taken as MoE indices, not as layers"]
    raise InputError(
        f"{where}: layers {_some(ids)} recorded -- {asked.model.name} has MoE layers "
        f"{_some(wanted)} -- give the config.json of the model that was recorded, or record all "
        "layers"
    )


def _some(values: Sequence[int]) -> str:
    if len(values) > 8:
        return f"{', '.join(map(str, values[:4]))}, ... {values[-1]} ({len(values)})"
    return ", ".join(map(str, values))
