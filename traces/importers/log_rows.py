"""From rows of a routing log to a trace: what all raw logs have in common.

A log says which experts a token used, in layers that it numbers in its own way. Here the layers
find their place in the model, cells become rows, and rows that are no real tokens (a layer is
missing, an expert comes twice, as padding does) are dropped and counted.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from traces.importers.base import Asked, Tokens
from traces.importers.layers import Routing, asked_routing
from traces.meta import TraceMeta
from traces.routing_trace import RoutingTrace

Ints = NDArray[np.int64]
MISSING_LAYER = "tokens with a missing layer"
REPEATED = "tokens with the same expert twice (padding)"
_CHUNK_ROWS = 16384
_HEAD = 2**16
_TELLING_ROWS = 16  # fewer rows can agree by chance


def head_of(source: Path, head: bytes, files: Sequence[Path]) -> bytes:
    """Return the first bytes of a source: ``head``, or of a folder those of its first file.

    Empty for a folder without any of ``files``.
    """
    if not source.is_dir():
        return head
    if not files:
        return b""
    with files[0].open("rb") as file:
        return file.read(_HEAD)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Geometry of a log."""

    model: str
    num_experts: int
    top_k: int
    numbered: tuple[int, ...]
    """The log's own number of each layer, ascending."""
    moe_layer_ids: tuple[int, ...]
    """The model's layer index of each."""

    def place(self, layer: Ints, where: str) -> Ints:
        """Return the place of each layer among the recorded ones.

        Raises
        ------
        InputError
            If the log has not shown the layer before.
        """
        known = np.array(self.numbered)
        place = np.minimum(np.searchsorted(known, layer), len(known) - 1)
        strange = np.flatnonzero(known[place] != layer)
        if len(strange):
            raise InputError(
                f"{where}: layer {int(layer[strange[0]])} is none of the layers {some(known)} that "
                "were recorded before -- the files of one import are of one model"
            )
        return place


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """T tokens in the order in which they are to be written."""

    request: Ints
    """``[T]``, numbered from 0."""
    position: Ints
    """``[T]``, ascending within a request."""
    decode: NDArray[np.bool_]
    step: Ints
    domain: Ints
    """``[T]``, index into the trace's domains."""
    experts: NDArray[np.int32]
    """``[T, L, K]``; -1 where the log has none."""
    weights: NDArray[np.float32] | None = None
    """``[T, L, K]``."""

    def select(self, rows: Any) -> Self:
        """Return some of the rows."""
        picked = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v[rows] for k, v in picked.items() if v is not None})


def layout_of(
    numbered: Iterable[int], width: int, asked: Asked, where: str, notes: list[str]
) -> Layout:
    """Find a log's layers in the model.

    Parameters
    ----------
    numbered
        Layers as the log numbers them.
    width
        Experts of a token and layer in the log.
    notes
        Gets a line where the numbers had to be read as indices of MoE layers.

    Raises
    ------
    InputError
        If no model is named, its top-k differs, or the layers are none of its.
    """
    model, found = asked_routing(asked, where), tuple(sorted(set(numbered)))
    if width != model.top_k:
        raise InputError(
            f"{where}: {width} experts a token and layer, {model.name} takes top-{model.top_k} -- "
            "give the config.json of the model that was recorded"
        )
    return Layout(
        model=model.name,
        num_experts=model.num_experts,
        top_k=model.top_k,
        numbered=found,
        moe_layer_ids=model_layers(found, model, where, notes),
    )


def model_layers(
    found: tuple[int, ...], model: Routing, where: str, notes: list[str]
) -> tuple[int, ...]:
    """Return the model's indices of layers that a log numbers in its own way.

    They are layers of the model where all of them are MoE layers, else indices of its MoE layers
    (a note says so). Some of the layers are enough.

    Raises
    ------
    InputError
        If they can be neither.
    """
    moe = model.moe_layer_ids
    if set(found) <= set(moe):
        return found
    if found[0] < 0 or found[-1] >= len(moe):
        raise InputError(
            f"{where}: layers {some(found)}; {model.name} has {len(moe)} MoE layers, {some(moe)} "
            "-- give the config.json of the model that was recorded"
        )
    ids = tuple(moe[i] for i in found)
    notes.append(
        f"layers {some(found)} were read as indices of MoE layers: layers {some(ids)} of "
        f"{model.name}"
    )
    return ids


def fill(
    row: Ints, place: Ints, ids: NDArray[Any], shape: tuple[int, int, int], missing: float = -1
) -> NDArray[Any]:
    """Return ``[T, L, K]`` from N cells ``ids [N, K]`` at their rows and layer places."""
    filled = np.full(shape, missing, ids.dtype)
    filled[row, place] = ids
    return filled


def as_tokens(
    rows: Iterable[Rows],
    layout: Layout,
    *,
    where: str,
    source: str,
    asked: Asked,
    domains: Sequence[str] = (),
    weights: bool,
    dropped: Counter[str],
    notes: list[str],
) -> Tokens:
    """Return a trace on its way.

    Parameters
    ----------
    rows
        Read only once the trace is written.
    where
        Name of the source in messages.
    source
        How it was recorded, for the trace's metadata.
    domains
        Names that the rows' domains index; the asked one without.
    dropped, notes
        Filled while the rows are read.
    """
    meta = TraceMeta(
        model=layout.model,
        num_experts=layout.num_experts,
        top_k=layout.top_k,
        moe_layer_ids=layout.moe_layer_ids,
        source=source,
        licence=asked.licence,
    )
    names = tuple(domains) or (asked.domain,)
    chunks = _chunks(rows, meta, names, where, weights, dropped, notes)
    return Tokens(
        meta=meta, domains=names, weights=weights, chunks=chunks, dropped=dropped, notes=notes
    )


def _chunks(
    rows: Iterable[Rows],
    meta: TraceMeta,
    domains: tuple[str, ...],
    where: str,
    weights: bool,
    dropped: Counter[str],
    notes: list[str],
) -> Iterator[RoutingTrace]:
    digests = [hashlib.blake2b() for _ in meta.moe_layer_ids]
    kept = 0
    for part in _pieces(rows):
        usable = _usable(part, meta, where, dropped)
        if not usable.any():
            continue
        good = part.select(usable)
        for layer, digest in enumerate(digests):
            digest.update(np.sort(good.experts[:, layer], axis=-1).tobytes())
        kept += len(good.request)
        yield _trace(good, meta, domains, weights)
    _refuse_broken(kept, dropped, where)
    if kept >= _TELLING_ROWS:
        notes += _copied([digest.digest() for digest in digests], meta)


def _pieces(rows: Iterable[Rows]) -> Iterator[Rows]:
    for whole in rows:
        for start in range(0, len(whole.request), _CHUNK_ROWS):
            yield whole.select(slice(start, start + _CHUNK_ROWS))


def _usable(rows: Rows, meta: TraceMeta, where: str, dropped: Counter[str]) -> NDArray[np.bool_]:
    high = np.argwhere(rows.experts >= meta.num_experts)
    if len(high):
        token, layer, slot = high[0]
        raise InputError(
            f"{where}: expert {int(rows.experts[token, layer, slot])} in layer "
            f"{meta.moe_layer_ids[layer]} -- {meta.model} has {meta.num_experts} experts; is it "
            "another model, or are these physical slots?"
        )
    missing = (rows.experts < 0).any(axis=(1, 2))
    ordered = np.sort(rows.experts, axis=-1)
    repeated = (ordered[..., 1:] == ordered[..., :-1]).any(axis=(1, 2)) & ~missing
    for mask, reason in ((missing, MISSING_LAYER), (repeated, REPEATED)):
        if mask.any():
            dropped[reason] += int(mask.sum())
    return ~(missing | repeated)


def _refuse_broken(kept: int, dropped: Counter[str], where: str) -> None:
    for reason in (MISSING_LAYER, REPEATED):
        if dropped[reason] > kept:
            raise InputError(
                f"{where}: {dropped[reason]} {reason}, only {kept} whole ones -- what is left "
                "would not be the model's routing; record again, one token in all layers"
            )


def _copied(digests: list[bytes], meta: TraceMeta) -> Iterator[str]:
    first: dict[bytes, int] = {}
    for layer, digest in zip(meta.moe_layer_ids, digests, strict=True):
        original = first.setdefault(digest, layer)
        if original != layer:
            yield f"layer {layer} has the same experts as layer {original} in all rows: a copy?"


def _trace(rows: Rows, meta: TraceMeta, domains: tuple[str, ...], weights: bool) -> RoutingTrace:
    gates = None
    if weights and rows.weights is not None:
        with np.errstate(over="ignore"):  # what becomes infinite is refused as a bad weight
            gates = rows.weights.astype(np.float16)
    return RoutingTrace(
        meta=meta,
        request_id=rows.request.astype(np.int32),
        position=rows.position.astype(np.int32),
        decode=rows.decode,
        step=rows.step.astype(np.int32),
        domain=rows.domain.astype(np.int16),
        domains=domains,
        experts=rows.experts.astype(np.uint16),
        weights=gates,
    )


def some(values: Sequence[int] | Ints) -> str:
    """Return the first values as text."""
    shown = [int(value) for value in values]
    return ", ".join(map(str, shown[:6])) + (", ..." if len(shown) > 6 else "")
