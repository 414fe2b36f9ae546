"""What must hold for the rows of a routing trace, and where it first does not.

A cell is one (token, layer): the ``top_k`` distinct expert ids that the router chose. The
checks run chunk by chunk in bounded memory; a message counts cells or rows and names the first.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from traces.meta import MISSING, TraceMeta

_CHUNK_CELLS = 2**22  # expert ids checked at a time
_BLOCK_CELLS = 2**13  # cells compared at a time: their ids stay in the cache of a core
_FEW = 64  # top-k up to which comparing all pairs is faster than sorting
_REMEDY = {
    "bad rows": "request, position and step must be at least 0, the domain one of those listed",
    "cells missing": "a token needs an expert in every layer; record again or drop such tokens",
    "cells out of range": "ids must be below num_experts; are they physical slots?",
    "cells with a repeated expert": "a token's top-k must be distinct; was padding recorded?",
    "cells with bad weights": "weights must be finite and not negative",
    "cells with bad candidates": "ids must be distinct and below num_experts",
    "cells with bad candidate scores": "scores must be finite, not negative and descending",
}


def check_cells(
    columns: Mapping[str, NDArray[Any]],
    meta: TraceMeta,
    num_domains: int,
    where: str,
    first_row: int = 0,
) -> None:
    """Check every row and cell; a request id of -1 (unknown) is let through.

    Parameters
    ----------
    columns : mapping
        ``request_id position step domain`` ``[T]``, ``experts`` and maybe ``weights``
        ``[T, L, K]``, maybe ``candidates`` and ``candidate_scores`` ``[T, L, M]``.
    num_domains : int
        Domains that the file lists.
    where : str
        Name of the file, for the message.
    first_row : int
        Row number in the file (from 0) of the first token.

    Raises
    ------
    InputError
        One message that counts each kind of finding and names its first place.
    """
    found: dict[str, tuple[int, str]] = {}
    rows = max(_CHUNK_CELLS // (meta.num_layers * max(meta.top_k, meta.num_candidates)), 1)
    for start in range(0, len(columns["request_id"]), rows):
        chunk = {name: column[start : start + rows] for name, column in columns.items()}
        for kind, bad in _findings(chunk, meta, num_domains):
            row, *layer = np.unravel_index(int(np.argmax(bad)), bad.shape)
            at = "".join(f", layer {meta.moe_layer_ids[int(i)]}" for i in layer)
            count, first = found.get(kind, (0, f"row {first_row + start + int(row)}{at}"))
            found[kind] = (count + int(np.count_nonzero(bad)), first)
    if found:
        parts = [
            f"{count} {kind} (first: {first}) -- {_REMEDY[kind]}"
            for kind, (count, first) in found.items()
        ]
        raise InputError(f"{where}: " + "; ".join(parts))


def _findings(
    columns: Mapping[str, NDArray[Any]], meta: TraceMeta, num_domains: int
) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Yield kind and mask (``[T]`` rows or ``[T, L]`` cells) of what is wrong."""
    request, domain, experts = columns["request_id"], columns["domain"], columns["experts"]
    negative = (request >= 0) & ((columns["position"] < 0) | (columns["step"] < 0))
    masks = {"bad rows": (request < -1) | negative | (domain < 0) | (domain >= num_domains)}
    if not _are_distinct_below(experts, meta.num_experts):
        masks |= _bad_cells(experts, meta.num_experts)
    if "weights" in columns:
        weights = columns["weights"]
        missing = (experts == MISSING).any(axis=-1)
        good = np.isfinite(weights) & (weights >= 0)
        masks["cells with bad weights"] = ~good.all(axis=-1) & ~missing
    if "candidates" in columns:
        best, scores = columns["candidates"], columns["candidate_scores"]
        if not _are_distinct_below(best, meta.num_experts):
            masks["cells with bad candidates"] = _are_repeated(best) | (
                best.max(axis=-1) >= meta.num_experts
            )
        fine = (np.isfinite(scores) & (scores >= 0)).all(axis=-1)
        fine &= (scores[..., 1:] <= scores[..., :-1]).all(axis=-1)
        masks["cells with bad candidate scores"] = ~fine
    yield from ((kind, mask) for kind, mask in masks.items() if mask.any())


def _are_distinct_below(ids: NDArray[np.uint16], limit: int) -> bool:
    """Whether all ids ``[T, L, K]`` are below ``limit`` and distinct along K; exact.

    Every pair of the K is compared, over many cells at once: much faster than sorting each cell.
    """
    top_k = ids.shape[-1]
    if ids.size and int(ids.max()) >= limit:
        return False
    if top_k > _FEW:
        return not _are_repeated(ids).any()
    cells = ids.reshape(-1, top_k)
    for start in range(0, len(cells), _BLOCK_CELLS):
        columns = np.ascontiguousarray(cells[start : start + _BLOCK_CELLS].T)
        if any((columns[k] == columns[k + 1 :]).any() for k in range(top_k - 1)):
            return False
    return True


def _are_repeated(ids: NDArray[np.uint16]) -> NDArray[np.bool_]:
    """Return ``[T, L]`` whether a cell of ``[T, L, K]`` has an id twice."""
    ordered = np.sort(ids, axis=-1)
    return (ordered[..., 1:] == ordered[..., :-1]).any(axis=-1)


def _bad_cells(experts: NDArray[np.uint16], num_experts: int) -> dict[str, NDArray[np.bool_]]:
    missing = (experts == MISSING).any(axis=-1)
    return {
        "cells missing": missing,
        "cells out of range": (experts.max(axis=-1) >= num_experts) & ~missing,
        "cells with a repeated expert": _are_repeated(experts) & ~missing,
    }


def check_positions(request_id: NDArray[np.int32], position: NDArray[np.int32], where: str) -> None:
    """Check that no (request, position) comes twice.

    Raises
    ------
    InputError
        If one does.
    """
    key = request_id.astype(np.int64) << 32 | position.astype(np.int64)
    order = np.argsort(key, kind="stable")
    again = order[1:][np.diff(key[order]) == 0]
    if len(again):
        first = int(again.min())
        raise InputError(
            f"{where}: {len(again)} rows repeat a position of their request (first: request "
            f"{request_id[first]}, position {position[first]}) -- each token is one row; were two "
            "requests recorded under one id?"
        )
