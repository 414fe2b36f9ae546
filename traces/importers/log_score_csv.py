"""Dense CSV of router scores, a file per layer (``score-csv``): a file, or a folder of them.

Header ``layer_id,token_id,expert_0,...,expert_63``; a row has the scores of the chosen experts and
0 elsewhere. The layer is the one in the path (``.../Layer_7/...``, since ``layer_id`` is often 0 in
all), else ``layer_id``. Files whose paths differ in the layer only are the layers of one request;
requests are numbered in the order of paths. The number of experts is that of the columns; top-k is
the model's, or what most rows have.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import NDArray

from basis.errors import InputError
from traces.importers.base import MOST_BYTES, Asked, Format, Tokens
from traces.importers.files import check_file
from traces.importers.layers import UNKNOWN_MODEL, routing_of
from traces.importers.log_rows import Ints, Layout, Rows, as_tokens, head_of, model_layers

_HEADER = b"layer_id,token_id,expert_0"
_LAYER = re.compile(r"layer[_\- ]?(\d{1,6})", re.IGNORECASE)
WRONG_COUNT = "tokens with more or fewer than top-k scores in a layer"


class ScoreCsv:
    """The layout; see the module."""

    name = "score-csv"
    title = "dense CSV of router scores, one file per layer"

    def matches(self, source: Path, head: bytes) -> bool:
        """Whether the file, or the first CSV file under the folder, has this header."""
        head = head_of(source, head, _files(source))
        return head.startswith(_HEADER)

    def read(self, source: Path, asked: Asked) -> Tokens:
        """Read it; see `traces.importers.base.Format`."""
        requests = _requests(source)
        notes: list[str] = []
        layout = _layout(requests[0], source, asked, notes)
        notes.append(
            "requests and phases are not in the file: the tokens of a set of layer files are one "
            "request, in their order, marked prefill"
        )
        dropped: Counter[str] = Counter()
        return as_tokens(
            _rows(requests, layout, source, dropped),
            layout,
            where=str(source),
            source=f"{self.title}; {source.name}",
            asked=asked,
            weights=True,
            dropped=dropped,
            notes=notes,
        )


FORMATS_SCORE_CSV: tuple[Format, ...] = (ScoreCsv(),)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Layer:
    """One file: T tokens, K experts."""

    token: Ints
    ids: NDArray[np.int32]
    """``[T, K]``; -1 in rows that have not K scores."""
    weights: NDArray[np.float32]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.csv") if path.is_file())


def _requests(source: Path) -> list[dict[int, Path]]:
    """Return each request's files by layer."""
    files = _files(source) if source.is_dir() else [source]
    folder = source.resolve() if source.is_dir() else source.resolve().parent
    if not files:
        raise InputError(f"{source}: no .csv files under it -- give the folder of the layers")
    found: dict[str, dict[int, Path]] = {}
    for path in files:
        name = f"{folder.name}/{path.relative_to(source if source.is_dir() else source.parent)}"
        said = _LAYER.findall(name)
        layer = int(said[-1]) if said else _first_layer(path)
        rest = _LAYER.sub("layer", name)
        others = found.setdefault(rest if said else str(path.parent), {})
        if layer in others:
            raise InputError(
                f"{path}: layer {layer} again, as in {others[layer]} -- one file per layer"
            )
        others[layer] = path
    return list(found.values())


def _first_layer(path: Path) -> int:
    with path.open("rb") as file:
        lines = file.read(2**16).split(b"\n", 2)
    text = lines[1].split(b",", 1)[0] if len(lines) > 1 else b""
    if not text.isdigit():
        raise InputError(f"{path}: layer_id {text[:20].decode('utf-8', 'replace')!r} -- a number")
    return int(text)


def _layout(files: dict[int, Path], source: Path, asked: Asked, notes: list[str]) -> Layout:
    numbered = tuple(sorted(files))
    path = files[numbered[0]]
    experts = _experts(path)
    if asked.model is None:
        top_k = _usual_count(path, experts)
        notes.append(f"top-{top_k} is what most rows of {path.name} have; no model was named")
        return Layout(
            model=UNKNOWN_MODEL,
            num_experts=experts,
            top_k=top_k,
            numbered=numbered,
            moe_layer_ids=numbered,
        )
    model = routing_of(asked.model)
    if model.num_experts != experts:
        raise InputError(
            f"{source}: columns of {experts} experts, {model.name} has {model.num_experts} -- give "
            "the config.json of the model that was recorded"
        )
    return Layout(
        model=model.name,
        num_experts=experts,
        top_k=model.top_k,
        numbered=numbered,
        moe_layer_ids=model_layers(numbered, model, str(source), notes),
    )


def _experts(path: Path) -> int:
    check_file(path)
    with path.open("rb") as file:
        names = file.readline(2**20).decode("utf-8", "replace").strip().split(",")
    experts = len(names) - 2
    if names[:2] != ["layer_id", "token_id"] or names[2:] != [
        f"expert_{i}" for i in range(experts)
    ]:
        raise InputError(
            f"{path}: columns {', '.join(names[:5])}, ... -- layer_id, token_id, expert_0, "
            "expert_1, ...; is it another format?"
        )
    return experts


def _usual_count(path: Path, experts: int) -> int:
    for scores, _ in _blocks(path, experts):
        counts = np.bincount((scores > 0).sum(axis=1))
        if counts[1:].any():
            return 1 + int(np.argmax(counts[1:]))
    raise InputError(f"{path}: no score above 0 -- record again")


def _blocks(path: Path, experts: int) -> Iterator[tuple[NDArray[np.float32], Ints]]:
    """Read scores ``[n, E]`` and token ids ``[n]``, some megabytes at a time."""
    names = [f"expert_{i}" for i in range(experts)]
    kinds: dict[str, Any] = {"layer_id": pa.int32(), "token_id": pa.int32()}
    kinds |= dict.fromkeys(names, pa.float32())
    try:
        with pa.csv.open_csv(
            path,
            read_options=pa.csv.ReadOptions(use_threads=False, block_size=2**22),
            convert_options=pa.csv.ConvertOptions(column_types=kinds, null_values=[]),
        ) as reader:
            for batch in reader:
                scores = np.stack([np.asarray(batch.column(name)) for name in names], axis=1)
                yield scores, np.asarray(batch.column("token_id")).astype(np.int64)
    except (pa.ArrowException, KeyError) as error:
        raise InputError(
            f"{path}: not readable as CSV of {experts} scores a row "
            f"({str(error).splitlines()[0]}) -- was it cut off?"
        ) from None


def _layer(path: Path, layout: Layout) -> _Layer:
    if _experts(path) != layout.num_experts:
        raise InputError(
            f"{path}: {_experts(path)} experts, {layout.num_experts} in the other files -- the "
            "files of one import are of one model"
        )
    ids, weights, tokens = [], [], []
    for scores, token in _blocks(path, layout.num_experts):
        if not np.isfinite(scores).all() or (scores < 0).any():
            raise InputError(f"{path}: a score is negative or not finite -- record scores above 0")
        some_ids, some_weights = _chosen(scores, layout.top_k)
        ids.append(some_ids)
        weights.append(some_weights)
        tokens.append(token)
    if not tokens:
        raise InputError(f"{path}: a header and no rows -- record again")
    return _Layer(
        token=np.concatenate(tokens), ids=np.concatenate(ids), weights=np.concatenate(weights)
    )


def _chosen(scores: NDArray[np.float32], top_k: int) -> tuple[NDArray[np.int32], Any]:
    """Return ids and scores ``[n, K]`` of the scores above 0, best first."""
    whole = (scores > 0).sum(axis=1) == top_k
    best = np.argsort(-scores, axis=1, kind="stable")[:, :top_k].astype(np.int32)
    weights = np.take_along_axis(scores, best, axis=1)
    best[~whole] = -1
    return best, weights


def _rows(
    requests: list[dict[int, Path]], layout: Layout, source: Path, dropped: Counter[str]
) -> Iterator[Rows]:
    kept = 0
    for number, files in enumerate(requests):
        if tuple(sorted(files)) != layout.numbered:
            raise InputError(
                f"{next(iter(files.values()))}: layers {sorted(files)} of a request, the first has "
                f"{list(layout.numbered)} -- a file for each layer"
            )
        layers = [_layer(files[layer], layout) for layer in layout.numbered]
        tokens = layers[0].token
        _check_lined_up(files, layers, layout)
        cells = len(tokens) * len(layers) * layout.top_k
        if cells * 8 > MOST_BYTES:
            raise InputError(f"{source}: {cells} choices in a request -- at most {MOST_BYTES // 8}")
        experts = np.stack([layer.ids for layer in layers], axis=1)
        whole = (experts >= 0).all(axis=(1, 2))
        if not whole.all():
            dropped[WRONG_COUNT] += int((~whole).sum())
        kept += int(whole.sum())
        yield Rows(
            request=np.full(len(tokens), number, np.int64),
            position=np.arange(len(tokens)),
            decode=np.zeros(len(tokens), np.bool_),
            step=np.zeros(len(tokens), np.int64),
            domain=np.zeros(len(tokens), np.int64),
            experts=experts,
            weights=np.stack([layer.weights for layer in layers], axis=1),
        ).select(whole)
    if dropped[WRONG_COUNT] > kept:
        raise InputError(
            f"{source}: {dropped[WRONG_COUNT]} {WRONG_COUNT}, only {kept} with exactly "
            f"{layout.top_k} -- give the config.json of the model that was recorded"
        )


def _check_lined_up(files: dict[int, Path], layers: list[_Layer], layout: Layout) -> None:
    for number, layer in zip(layout.numbered, layers, strict=True):
        if not np.array_equal(layer.token, layers[0].token):
            raise InputError(
                f"{files[number]}: {len(layer.token)} tokens that are not those of "
                f"{files[layout.numbered[0]]} ({len(layers[0].token)}) -- was it cut off?"
            )
