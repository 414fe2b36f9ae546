"""Arrays in the files of others: npy, npz and safetensors, opened without trusting them.

What a header declares is compared with the bytes that are there before anything is allocated;
arrays of a plain file are views of the file on disk, so that only what is looked at is read.
Nothing is unpickled. Sizes are bytes.
"""

import io
import json
import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from traces.importers.base import LFS_HEAD, MOST_BYTES

Array = NDArray[Any]
_SAFETENSORS = {
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1",
}  # fmt: skip
_MOST_HEADER = 2**26
ZIP_ERRORS = (OSError, ValueError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile)
"""What reading a damaged zip raises; RuntimeError where members seem encrypted or unknown."""


def check_file(path: Path) -> int:
    """Return the size of a file.

    Raises
    ------
    InputError
        If it is missing, empty, or a pointer to data elsewhere.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file -- give the path of what was recorded")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(len(LFS_HEAD))
    if not head:
        raise InputError(f"{path}: empty -- record it again")
    if head == LFS_HEAD:
        raise InputError(f"{path}: a Git LFS pointer, not the data -- fetch it with git lfs pull")
    return size


def npy_kind(head: bytes) -> tuple[int, str] | None:
    """Return dimensions and kind of number (numpy's letter) of an npy file; None of another."""
    try:
        shape, _, dtype = _header(io.BytesIO(head))
    except ValueError:
        return None
    return len(shape), dtype.kind


def parse_npy(data: bytes, where: str) -> Array:
    """Return the array of an npy document that is in memory, without a copy.

    Raises
    ------
    InputError
        If it is none, holds objects, or not the bytes that it declares.
    """
    shape, fortran, dtype, start = _checked_header(io.BytesIO(data), len(data), where)
    flat: Array = np.frombuffer(data, dtype, offset=start)
    return flat.reshape(shape, order="F" if fortran else "C")


def open_npy(path: Path) -> Array:
    """Return the array of an npy file as a view of the file.

    Raises
    ------
    InputError
        As `check_file` and `parse_npy`; if it is empty.
    """
    size = check_file(path)
    with path.open("rb") as file:
        shape, fortran, dtype, start = _checked_header(file, size, str(path))
    if not math.prod(shape):
        raise InputError(f"{path}: an array of shape {list(shape)} holds nothing -- record again")
    order: Literal["F", "C"] = "F" if fortran else "C"
    return np.memmap(path, dtype, mode="r", offset=start, shape=shape, order=order)


def npz_names(path: Path) -> set[str]:
    """Return the names of the arrays in an npz; nothing where it is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except ZIP_ERRORS:
        return set()


def read_npz(path: Path, names: set[str], most: int = MOST_BYTES) -> dict[str, Array]:
    """Read those of ``names`` that an npz has.

    Parameters
    ----------
    most
        Bytes that they may take together.

    Raises
    ------
    InputError
        If it is no zip, truncated, declares more than it holds or may, or holds objects.
    """
    check_file(path)
    found: dict[str, Array] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            wanted = {name: f"{name}.npy" for name in names if f"{name}.npy" in archive.namelist()}
            declared = sum(archive.getinfo(member).file_size for member in wanted.values())
            if declared > most:
                raise InputError(
                    f"{path}: declares {declared} bytes -- at most {most} -- is it what was "
                    "recorded? save it in several files"
                )
            for name, member in wanted.items():
                found[name] = _member(archive, member, path)
    except ZIP_ERRORS as error:
        raise InputError(
            f"{path}: not a readable npz ({error}) -- truncated? save it again"
        ) from error
    return found


def _member(archive: zipfile.ZipFile, member: str, path: Path) -> Array:
    where, size = f"{path}: {member}", archive.getinfo(member).file_size
    with archive.open(member) as stream:  # the header first: what it promises is read only then
        _checked_header(stream, size, where)
    return parse_npy(archive.read(member), where)


def _checked_header(
    stream: IO[bytes], size: int, where: str
) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    try:
        shape, fortran, dtype = _header(stream)
    except ValueError as error:
        raise InputError(
            f"{where}: no npy array ({error}) -- truncated, or another format? save it again"
        ) from None
    if dtype.hasobject:
        raise InputError(
            f"{where}: holds pickled objects, which are not read -- save a plain array of numbers"
        )
    start = stream.tell()
    declared = math.prod(shape) * dtype.itemsize
    if declared != size - start:
        raise InputError(
            f"{where}: its header declares {declared} bytes, {size - start} are there -- "
            "truncated or damaged; save it again"
        )
    return shape, fortran, dtype, start


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"npy version {version}")
    try:
        return readers[version](stream)
    except Exception as error:  # a damaged header is Python's to parse, and may raise anything
        raise ValueError(str(error).splitlines()[0] if str(error) else "damaged header") from None


def open_safetensors(path: Path) -> dict[str, Array]:
    """Return the integer tensors of a safetensors file as views of the file.

    The layout: 8 bytes with the length of a JSON header (little endian), the header with each
    tensor's type, shape and place, then the data.

    Raises
    ------
    InputError
        As `check_file`; if it is not such a file, declares more than it holds, or has other
        numbers than integers.
    """
    size = check_file(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MOST_HEADER):
            raise InputError(
                f"{path}: its header declares {length} bytes, {max(size - 8, 0)} are there -- no "
                "safetensors file, or truncated; record it again"
            )
        header = _safetensors_header(file.read(length), path)
    start = 8 + length
    if not header:
        return {}
    data = np.memmap(path, np.uint8, mode="r")[start:]
    return {name: _tensor(name, about, data, path) for name, about in header.items()}


def _safetensors_header(text: bytes, path: Path) -> dict[str, Mapping[str, Any]]:
    try:
        header: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: its header is no JSON ({error}) -- record it again") from None
    if not isinstance(header, dict):
        raise InputError(f"{path}: its header is a {type(header).__name__} -- a mapping")
    header.pop("__metadata__", None)
    return header


def _tensor(name: str, about: Any, data: NDArray[np.uint8], path: Path) -> Array:
    try:
        kind, shape = about["dtype"], [int(n) for n in about["shape"]]
        first, stop = (int(n) for n in about["data_offsets"])
    except (TypeError, KeyError, ValueError):
        raise InputError(
            f"{path}: tensor {name!r} lacks a type, shape or place -- record it again"
        ) from None
    if kind not in _SAFETENSORS:
        raise InputError(
            f"{path}: tensor {name!r} is {kind} -- integers are recorded, one of "
            f"{', '.join(_SAFETENSORS)}"
        )
    dtype = np.dtype(_SAFETENSORS[kind])
    declared = math.prod(shape) * dtype.itemsize
    if min(shape, default=1) < 0 or declared != stop - first or not 0 <= first <= stop <= len(data):
        raise InputError(
            f"{path}: tensor {name!r} declares {declared} bytes at {first} to {stop}, {len(data)} "
            "are there -- truncated or damaged; record it again"
        )
    return data[first:stop].view(dtype).reshape(shape)
