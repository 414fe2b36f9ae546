"""Expert counts of an importance matrix of llama.cpp (``imatrix``), GGUF.

``llama-imatrix -m model.gguf -f text.txt -o imatrix.gguf`` counts for each expert the (token,
choice) pairs that used it: f32 tensors ``blk.{L}.ffn_gate_exps.weight.counts`` (or
``ffn_gate_up_exps``) of E values. The sum of a layer is tokens times top-k; llama.cpp may leave
tokens out of the last layer when it needs no logits of them. Older ``.dat`` files hold one count
for all experts together and are refused.
"""

import re
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from traces.counts_trace import CountsTrace
from traces.importers.base import Asked, Format, Loads
from traces.importers.gguf_header import F32, GgufHeader, GgufTensor, read_gguf_header
from traces.importers.layers import UNKNOWN_MODEL, routing_of
from traces.importers.log_counts import sum_notes
from traces.importers.log_rows import model_layers

_COUNTS = re.compile(r"blk\.(\d{1,6})\.ffn_(gate|gate_up)_exps\.weight\.counts")
_TYPE = struct.pack("<Q", 12) + b"general.type" + struct.pack("<IQ", 8, 7) + b"imatrix"
_MOST_EXPERTS = 65534
_EXACT = 2**24
"""Whole numbers up to this are exact in 32-bit floats."""


class Imatrix:
    """The layout; see the module."""

    name = "imatrix"
    title = "importance matrix of llama.cpp, GGUF"

    def matches(self, source: Path, head: bytes) -> bool:
        """Whether it is a GGUF file that says it is an importance matrix."""
        return head.startswith(b"GGUF") and _TYPE in head

    def read(self, source: Path, asked: Asked) -> Loads:
        """Read it; see `traces.importers.base.Format`."""
        header = read_gguf_header(source)
        tensors = _tensors(header, source)
        layers = tuple(sorted(tensors))
        counts = np.stack([_counts(tensors[layer], source) for layer in layers])[None]
        if not counts.any():
            raise InputError(f"{source}: all counts are 0 -- run llama-imatrix on some text")
        notes: list[str] = []
        if int(counts.max()) >= _EXACT:
            notes.append(f"counts from {_EXACT} on were rounded by the file's 32-bit floats")
        name, top_k = UNKNOWN_MODEL, _told_top_k(header, counts)
        if asked.model is not None:
            model = routing_of(asked.model)
            if model.num_experts != counts.shape[2] or top_k not in (None, model.top_k):
                raise InputError(
                    f"{source}: {counts.shape[2]} experts, top-{top_k}; {model.name} has "
                    f"{model.num_experts}, top-{model.top_k} -- give the config.json of the model "
                    "that was measured"
                )
            name, top_k = model.name, model.top_k
            layers = model_layers(layers, model, str(source), notes)
        notes += sum_notes(counts, top_k)
        trace = CountsTrace(
            model=name,
            moe_layer_ids=layers,
            counts=counts,
            top_k=top_k,
            source=f"{self.title}; {source.name}",
            licence=asked.licence,
        )
        return Loads(counts=trace, notes=notes)


class LegacyImatrix:
    """Recognised to be refused."""

    name = "imatrix-dat"
    title = "older importance matrix of llama.cpp (refused: it has no counts of experts)"

    def matches(self, source: Path, head: bytes) -> bool:
        """Whether it begins with a number of entries, a length and a tensor's name."""
        if len(head) < 8:
            return False
        entries, length = struct.unpack("<ii", head[:8])
        return (
            0 < entries < 2**16 and 4 < length < 256 and head[8:].startswith((b"blk.", b"output"))
        )

    def read(self, source: Path, asked: Asked) -> Loads:
        """Refuse it."""
        raise InputError(
            f"{source}: the older format of llama-imatrix, which has one count for all experts "
            "together -- run a llama-imatrix that writes GGUF (-o imatrix.gguf)"
        )


FORMATS_IMATRIX: tuple[Format, ...] = (Imatrix(), LegacyImatrix())


def _tensors(header: GgufHeader, source: Path) -> dict[int, GgufTensor]:
    """Return the counts of each layer; of gate where gate and gate_up are both there."""
    found: dict[int, GgufTensor] = {}
    for tensor in header.tensors:
        said = _COUNTS.fullmatch(tensor.name)
        if said and (said[2] == "gate" or int(said[1]) not in found):
            found[int(said[1])] = tensor
    if not found:
        raise InputError(
            f"{source}: no tensor blk.*.ffn_gate_exps.weight.counts among {len(header.tensors)} -- "
            "an importance matrix of a model with experts has them"
        )
    sizes = {tensor.size for tensor in found.values()}
    kinds = {tensor.kind for tensor in found.values()}
    if len(sizes) > 1 or kinds != {F32} or not 1 < max(sizes) <= _MOST_EXPERTS:
        raise InputError(
            f"{source}: counts of {sorted(sizes)} values, types {sorted(kinds)} -- the same number "
            f"of experts in all layers, at most {_MOST_EXPERTS}, 32-bit floats (type {F32})"
        )
    return found


def _counts(tensor: GgufTensor, source: Path) -> NDArray[np.int64]:
    """Return ``[E]``."""
    bytes_ = 4 * tensor.size
    if tensor.start + bytes_ > source.stat().st_size:
        raise InputError(
            f"{source}: {tensor.name} lies at {tensor.start} to {tensor.start + bytes_}, the file "
            f"has {source.stat().st_size} bytes -- truncated; write it again"
        )
    with source.open("rb") as file:
        file.seek(tensor.start)
        values = np.frombuffer(file.read(bytes_), "<f4").astype(np.float64)
    if not ((values >= 0) & (values <= 2**53) & (values == np.rint(values))).all():
        raise InputError(f"{source}: {tensor.name} has no whole counts -- damaged; write it again")
    return values.astype(np.int64)


def _told_top_k(header: GgufHeader, counts: NDArray[np.int64]) -> int | None:
    """Return the top-k that the file's number of tokens gives for all layers but maybe the last."""
    chunks, size = (header.keys.get(f"imatrix.chunk_{name}") for name in ("count", "size"))
    if type(chunks) is not int or type(size) is not int or chunks * size <= 0:
        return None
    tokens, sums = chunks * size, counts[0].sum(axis=1)
    top_k = int(sums[0]) // tokens
    whole = sums[: max(len(sums) - 1, 1)]
    if int(counts.max()) < _EXACT and (whole == top_k * tokens).all():
        return top_k if 1 <= top_k <= counts.shape[2] else None
    return None
