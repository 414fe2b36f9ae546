"""CSV per prompt (``prompt-csv``): a file, or a folder of files.

Header ``Layer ID,Batch Number,Token,Activated Expert IDs``, rows like
``1,0,<|begin|>,"[8, 26, 56, 57, 60, 43]"``, layer after layer. Nothing numbers the tokens: the n-th
row of a layer and batch is the same token in every layer, and its text must be the same there. A
prompt whose layers do not line up is left out and counted. Batches of one token each after the
first are decode steps of one request; else every batch is a request. The order of a token's
experts has no meaning. A file is read whole and must be smaller than 1 GiB.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from numpy.typing import NDArray

from basis.errors import InputError
from traces.importers.base import Asked, Format, Tokens
from traces.importers.files import check_file
from traces.importers.layers import asked_routing
from traces.importers.log_rows import Ints, Layout, Rows, as_tokens, fill, head_of, layout_of
from traces.json_lines import rows_of_lists

_COLUMNS = ("Layer ID", "Batch Number", "Token", "Activated Expert IDs")
_HEADER = ",".join(_COLUMNS).encode()
_MOST_BYTES = 2**30
UNALIGNED = "tokens of prompts whose layers do not line up"


class PromptCsv:
    """The layout; see the module."""

    name = "prompt-csv"
    title = "CSV of activated expert ids, one file per prompt"

    def matches(self, source: Path, head: bytes) -> bool:
        """Whether the file, or the first CSV file of the folder, has this header."""
        head = head_of(source, head, _files(source))
        return head.removeprefix(b"\xef\xbb\xbf").startswith(_HEADER)

    def read(self, source: Path, asked: Asked) -> Tokens:
        """Read it; see `traces.importers.base.Format`."""
        asked_routing(asked, source)
        files = _files(source) if source.is_dir() else [source]
        if not files:
            raise InputError(f"{source}: no .csv files -- give the folder of the prompts")
        notes: list[str] = []
        first = _read(files[0])
        layout = layout_of(
            np.unique(first.layer).tolist(), first.ids.shape[1], asked, str(source), notes
        )
        notes.append(
            "a first batch of several tokens is prefill, batches of one token after it are decode"
        )
        dropped: Counter[str] = Counter()
        return as_tokens(
            _rows(files, layout, dropped),
            layout,
            where=str(source),
            source=f"{self.title}; {source.name}",
            asked=asked,
            weights=False,
            dropped=dropped,
            notes=notes,
        )


FORMATS_PROMPT_CSV: tuple[Format, ...] = (PromptCsv(),)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Cells:
    layer: Ints
    batch: Ints
    text: Ints
    """``[N]``, a number for each token text."""
    ids: NDArray[np.int32]
    """``[N, K]``."""


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.csv") if path.is_file())


def _read(path: Path) -> _Cells:
    size = check_file(path)
    if size > _MOST_BYTES:
        raise InputError(f"{path}: {size} bytes -- at most {_MOST_BYTES}; save a file per prompt")
    kinds = dict(zip(_COLUMNS, (pa.int32(), pa.int32(), pa.binary(), pa.string()), strict=True))
    try:
        table = pa.csv.read_csv(
            path,
            read_options=pa.csv.ReadOptions(use_threads=False, block_size=size + 1),
            parse_options=pa.csv.ParseOptions(newlines_in_values=True),
            convert_options=pa.csv.ConvertOptions(
                column_types=kinds, include_columns=list(_COLUMNS), null_values=[]
            ),
        )
        lists = pc.split_pattern(_inner(table[_COLUMNS[3]]), ",")
        ids = lists.cast(pa.list_(pa.int32()))
    except (pa.ArrowException, KeyError) as error:
        raise InputError(
            f"{path}: not readable as CSV with {', '.join(_COLUMNS)} "
            f"({str(error).splitlines()[0]}) -- was it cut off, or a token not quoted?"
        ) from None
    if not table.num_rows:
        raise InputError(f"{path}: a header and no rows -- record again")
    width = len(ids.chunk(0)[0])
    encoded = table["Token"].combine_chunks().dictionary_encode()
    return _Cells(
        layer=np.asarray(table["Layer ID"]).astype(np.int64),
        batch=np.asarray(table["Batch Number"]).astype(np.int64),
        text=np.asarray(encoded.indices).astype(np.int64),
        ids=rows_of_lists(ids, width, f"{path}: Activated Expert IDs of a row"),
    )


def _inner(texts: Any) -> Any:
    """Return the texts without brackets and blanks; refuse what is not in brackets."""
    bad = pc.invert(pc.match_substring_regex(texts, r"^\s*\[[-0-9,\s]*\]\s*$"))
    if pc.any(bad).as_py():
        raise pa.ArrowInvalid(f"expert ids {texts.filter(bad)[0].as_py()[:40]!r} are no list")
    return pc.replace_substring_regex(texts, r"[\[\]\s]", "")


def _rows(files: list[Path], layout: Layout, dropped: Counter[str]) -> Iterator[Rows]:
    requests = kept = 0
    for path in files:
        cells = _read(path)
        if cells.ids.shape[1] != layout.top_k:
            raise InputError(
                f"{path}: {cells.ids.shape[1]} experts a row, {layout.top_k} in the other files -- "
                "the files of one import are of one model"
            )
        place = layout.place(cells.layer, str(path))
        token, batches = _tokens(place, cells.batch)
        shape = (len(batches), len(layout.numbered), layout.top_k)
        if not _aligned(token, cells.text, len(batches)):
            dropped[UNALIGNED] += len(batches)
            continue
        rows = _numbered(batches, fill(token, place, cells.ids, shape), requests)
        requests, kept = int(rows.request[-1]) + 1, kept + len(batches)
        yield rows
    if dropped[UNALIGNED] > kept:
        raise InputError(
            f"{files[0].parent}: {dropped[UNALIGNED]} {UNALIGNED}, only {kept} others -- every "
            "layer must list the same tokens; record again"
        )


def _tokens(place: Ints, batch: Ints) -> tuple[Ints, Ints]:
    """Return ``[N]`` the token of each cell, and ``[T]`` the batch number of each token.

    The token is the how-manieth row of its layer and batch it is.
    """
    order = np.lexsort((np.arange(len(place)), place, batch))
    sorted_batch, sorted_place = batch[order], place[order]
    begins = (np.diff(sorted_batch, prepend=sorted_batch[0] - 1) != 0) | (
        np.diff(sorted_place, prepend=-1) != 0
    )
    starts = np.flatnonzero(begins)
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    key = sorted_batch << 32 | rank
    distinct, of_row = np.unique(key, return_inverse=True)
    token = np.empty(len(order), np.int64)
    token[order] = of_row
    return token, distinct >> 32


def _aligned(token: Ints, text: Ints, tokens: int) -> bool:
    """Whether a token has the same text in all layers."""
    lowest = np.full(tokens, np.iinfo(np.int64).max)
    highest = np.full(tokens, -1)
    np.minimum.at(lowest, token, text)
    np.maximum.at(highest, token, text)
    return bool((lowest == highest).all())


def _numbered(batches: Ints, experts: NDArray[np.int32], first: int) -> Rows:
    """Return rows; ``batches`` is ascending."""
    distinct, of_row, sizes = np.unique(batches, return_inverse=True, return_counts=True)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    several = len(distinct) > 1 and (sizes[1:] > 1).any()
    tokens = np.arange(len(batches))
    return Rows(
        request=first + (of_row if several else np.zeros(len(tokens), np.int64)),
        position=tokens - starts[of_row] if several else tokens,
        decode=np.full(len(tokens), False) if several else (of_row > 0) & (sizes[of_row] == 1),
        step=np.zeros(len(tokens), np.int64) if several else of_row,
        domain=np.zeros(len(tokens), np.int64),
        experts=experts,
    )
