"""The header of a GGUF file: its keys and where its tensors lie.

Written for files of others: every length is compared with the bytes that are there before it is
used, texts and lists that nobody asked for are skipped, not kept. Layout (little endian, versions 2
and 3): ``docs/gguf.md`` of ggml. Sizes are bytes.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from basis.errors import InputError
from traces.importers.files import check_file

F32 = 0
"""Type of a tensor of 32-bit floats."""
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
_TEXT, _LIST = 8, 9
_MOST_TEXT = 2**16
_MOST_ENTRIES = 2**20


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """One tensor as the header declares it."""

    name: str
    shape: tuple[int, ...]
    """Fastest axis first, as in ggml."""
    kind: int
    start: int
    """Bytes from the beginning of the file."""

    @property
    def size(self) -> int:
        """Elements."""
        product = 1
        for axis in self.shape:
            product *= axis
        return product


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """Keys (scalars and short texts only) and tensors of a file."""

    keys: dict[str, Any]
    tensors: tuple[GgufTensor, ...]


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the header of a GGUF file.

    Raises
    ------
    InputError
        If it is no GGUF file of version 2 or 3, or declares more than it holds.
    """
    size = check_file(path)
    with path.open("rb") as file:
        return _Reader(path, file, size).header()


class _Reader:
    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path, self._file, self._size = path, file, size

    def header(self) -> GgufHeader:
        magic, version = self._take(4), self._number("<I")
        if magic != b"GGUF" or version not in (2, 3):
            raise InputError(
                f"{self._path}: begins with {magic!r}, version {version} -- GGUF of version 2 or "
                "3, little endian"
            )
        tensors, keys = self._count("tensors", 24), self._count("keys", 12)
        found: dict[str, Any] = {}
        for _ in range(keys):
            name = self._text()
            value = self._value(self._number("<I"))
            if value is not None:
                found[name] = value
        infos = [self._tensor() for _ in range(tensors)]
        align = found.get("general.alignment", 32)
        if type(align) is not int or not 1 <= align <= 2**20:
            raise self._bad(f"alignment {align!r}")
        start = -(-self._file.tell() // align) * align
        return GgufHeader(
            keys=found,
            tensors=tuple(
                GgufTensor(name=name, shape=shape, kind=kind, start=start + offset)
                for name, shape, kind, offset in infos
            ),
        )

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, axes = self._text(), self._number("<I")
        if axes > 8:
            raise self._bad(f"tensor {name!r} of {axes} axes")
        shape = tuple(self._number("<Q") for _ in range(axes))
        return name, shape, self._number("<I"), self._number("<Q")

    def _value(self, kind: int) -> Any:
        """Return a scalar or a text; skip a list."""
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _TEXT:
            return self._text()
        if kind != _LIST:
            raise self._bad(f"value of type {kind}")
        inner, length = self._number("<I"), self._number("<Q")
        if inner in _SCALARS:
            self._skip(length * struct.calcsize(_SCALARS[inner]))
        elif inner == _TEXT and length <= min(self._left() // 8, _MOST_ENTRIES):
            for _ in range(length):
                self._skip(self._number("<Q"))
        else:
            raise self._bad(f"list of {length} values of type {inner}")
        return None

    def _text(self) -> str:
        length = self._number("<Q")
        if length > _MOST_TEXT:
            self._skip(length)
            return ""
        return self._take(length).decode("utf-8", "replace")

    def _count(self, what: str, least_bytes: int) -> int:
        count = self._number("<Q")
        if count > min(self._left() // least_bytes, _MOST_ENTRIES):
            raise self._bad(f"{count} {what}")
        return int(count)

    def _number(self, kind: str) -> Any:
        return struct.unpack(kind, self._take(struct.calcsize(kind)))[0]

    def _take(self, length: int) -> bytes:
        if length > self._left():
            raise self._bad(f"{length} bytes")
        return self._file.read(length)

    def _skip(self, length: int) -> None:
        if length > self._left():
            raise self._bad(f"{length} bytes")
        self._file.seek(length, 1)

    def _left(self) -> int:
        return self._size - self._file.tell()

    def _bad(self, what: str) -> InputError:
        return InputError(
            f"{self._path}: declares {what} at byte {self._file.tell()}, {self._left()} are left "
            "-- truncated or damaged; write it again"
        )
