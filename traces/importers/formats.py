"""All importers, recognition of a source's format, and the way from a source to a file.

A source that several formats claim, or none, is an error: a wrong guess would be a wrong trace.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from basis.errors import InputError
from traces.counts_trace import write_counts
from traces.importers.base import LFS_HEAD, Asked, Format, Loads, Tokens
from traces.importers.imatrix import FORMATS_IMATRIX
from traces.importers.log_counts import FORMATS_COUNTS
from traces.importers.log_dispatch import FORMATS_DISPATCH
from traces.importers.log_lines import FORMATS_LINES
from traces.importers.log_npz import FORMATS_NPZ
from traces.importers.log_prompt_csv import FORMATS_PROMPT_CSV
from traces.importers.log_router_json import FORMATS_ROUTER_JSON
from traces.importers.log_score_csv import FORMATS_SCORE_CSV
from traces.importers.megatron import FORMATS_MEGATRON
from traces.importers.moe_infinity import FORMATS_MOE_INFINITY
from traces.importers.sglang import FORMATS_SGLANG
from traces.importers.sglang_counts import FORMATS_SGLANG_COUNTS
from traces.importers.sglang_recorder import FORMATS_SGLANG_RECORDER
from traces.importers.tensorrt import FORMATS_TENSORRT
from traces.importers.vllm import FORMATS_VLLM
from traces.routing_trace import TraceWriter

FORMATS: tuple[Format, ...] = (
    *FORMATS_VLLM, *FORMATS_SGLANG, *FORMATS_SGLANG_RECORDER, *FORMATS_SGLANG_COUNTS,
    *FORMATS_TENSORRT, *FORMATS_MEGATRON, *FORMATS_MOE_INFINITY, *FORMATS_IMATRIX,
    *FORMATS_LINES, *FORMATS_DISPATCH, *FORMATS_ROUTER_JSON, *FORMATS_PROMPT_CSV,
    *FORMATS_SCORE_CSV, *FORMATS_NPZ, *FORMATS_COUNTS,
)  # fmt: skip
_HEAD = 2**16


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What an import wrote."""

    format: str
    kind: Literal["tokens", "counts"]
    rows: int
    """Tokens; of counts: steps."""
    dropped: dict[str, int]
    """Rows left out, by reason."""
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return vars(self) | {"notes": list(self.notes)}


def import_file(
    source: Path,
    target: Path,
    *,
    format: str | None = None,
    asked: Asked | None = None,
    formats: Sequence[Format] = FORMATS,
) -> Imported:
    """Read a source in a format (the one that recognises it, without) and write it as Parquet.

    Raises
    ------
    InputError
        If the source is missing, no format or several recognise it, or it is bad; nothing is
        written then.
    """
    asked = asked or Asked()
    chosen = _named(format, formats) if format else detect(source, formats)
    read_head(source)  # refuses what is no data at all
    found = chosen.read(source, asked)
    if isinstance(found, Loads):
        write_counts(found.counts, target)
        return Imported(
            format=chosen.name,
            kind="counts",
            rows=len(found.counts.counts),
            dropped=dict(found.dropped),
            notes=tuple(found.notes),
        )
    rows = _write(found, source, target)
    return Imported(
        format=chosen.name,
        kind="tokens",
        rows=rows,
        dropped=dict(found.dropped),
        notes=tuple(found.notes),
    )


def detect(source: Path, formats: Sequence[Format] = FORMATS) -> Format:
    """Return the one format that recognises a source.

    Raises
    ------
    InputError
        If none does, or several do.
    """
    head = read_head(source)
    found = [each for each in formats if each.matches(source, head)]
    if len(found) == 1:
        return found[0]
    said = "several formats" if found else "no format"
    names = ", ".join(each.name for each in found or formats if "(refused" not in each.title)
    raise InputError(
        f"{source}: {said} recognise{'' if found else 's'} it -- name one with --format: {names}"
    )


def read_head(source: Path) -> bytes:
    """Return the first bytes of a file; nothing for a folder.

    Raises
    ------
    InputError
        If there is nothing there, or only a pointer to data elsewhere.
    """
    if source.is_dir():
        return b""
    if not source.is_file():
        raise InputError(f"{source}: no such file or folder -- give the path of what was recorded")
    with source.open("rb") as file:
        head = file.read(_HEAD)
    if not head:
        raise InputError(f"{source}: empty -- record it again")
    if head.startswith(LFS_HEAD):
        raise InputError(f"{source}: a Git LFS pointer, not the data -- fetch it with git lfs pull")
    return head


def _named(name: str, formats: Sequence[Format]) -> Format:
    known = {each.name: each for each in formats}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "see the list"
        raise InputError(f"unknown format {name!r} -- one of {', '.join(known)} -- {hint}")
    return known[name]


def _write(found: Tokens, source: Path, target: Path) -> int:
    rows = 0
    with TraceWriter(target, found.meta, found.domains, weights=found.weights) as out:
        for chunk in found.chunks:
            out.write(chunk)
            rows += chunk.num_tokens
        if not rows:
            raise InputError(
                f"{source}: no token is left ({dict(found.dropped) or 'nothing was there'}) -- "
                "record more"
            )
    return rows
