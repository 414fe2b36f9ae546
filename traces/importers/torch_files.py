"""Files that ``torch.save`` wrote, opened without trusting them.

Such a file is a zip of one pickle and one plain member per tensor. It is read by torch's restricted
loader (``weights_only``), which knows tensors, lists, dicts and numbers and refuses all else, with
the tensors as views of the file. Before that the sizes that the zip declares are compared with the
file. Needs the extra ``record``.
"""

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from traces.importers.files import ZIP_ERRORS, check_file

_MOST_PICKLE = 2**30
_PEEK = 2**26


def peek_pickle(source: Path, head: bytes) -> bytes:
    """Return the beginning (64 MiB) of the pickle in such a file; nothing of another file.

    Only for a look at the names in it: it is not unpickled.
    """
    if source.is_dir() or not head.startswith(b"PK"):
        return b""
    try:
        with zipfile.ZipFile(source) as archive:
            names = [name for name in archive.namelist() if _is_pickle(name)]
            if len(names) != 1:
                return b""
            with archive.open(names[0]) as stream:
                return stream.read(_PEEK)
    except ZIP_ERRORS:
        return b""


def _is_pickle(name: str) -> bool:
    return name == "data.pkl" or (name.endswith("/data.pkl") and name.count("/") == 1)


def load_torch(path: Path) -> Any:
    """Read a file of tensors, lists, dicts and numbers.

    Returns
    -------
    data
        Tensors are views of the file; `integers` checks them and makes arrays of them.

    Raises
    ------
    InputError
        If it is not such a file, cut off, declares more than it holds, or holds what is no data;
        if torch is not installed.
    """
    size = check_file(path)
    _check_members(path, size)
    torch = _torch()
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle may raise anything
        raise InputError(_why(path, error)) from None


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise InputError(
            "files of torch.save need torch, which is not installed -- pip install "
            "'moeplan[record]'"
        ) from None
    return torch


def _check_members(path: Path, size: int) -> None:
    """Compare what the zip declares with the file; torch stores every member as it is."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except ZIP_ERRORS as error:
        raise InputError(
            f"{path}: no file of torch.save ({error}) -- cut off, or another format? record "
            "it again"
        ) from None
    for member in members:
        packed = member.compress_type != zipfile.ZIP_STORED
        if packed or member.file_size != member.compress_size:
            raise InputError(
                f"{path}: {member.filename} declares {member.file_size} bytes, packed in "
                f"{member.compress_size} -- torch.save packs nothing; record it again"
            )
        if _is_pickle(member.filename) and member.file_size > _MOST_PICKLE:
            raise InputError(
                f"{path}: {member.file_size} bytes beside the tensors -- at most {_MOST_PICKLE} -- "
                "record in several files"
            )
    declared = sum(member.file_size for member in members)
    if declared > size:
        raise InputError(
            f"{path}: its members declare {declared} bytes, the file has {size} -- truncated or "
            "damaged; record it again"
        )
    if not any(_is_pickle(member.filename) for member in members):
        raise InputError(f"{path}: a zip without data.pkl -- files of torch.save have one")


def _why(path: Path, error: Exception) -> str:
    text = str(error)
    named = re.search(r"GLOBAL ([\w.]+)", text)
    if named:
        return (
            f"{path}: holds {named[1]}, which is no plain data, and was not loaded -- only "
            "tensors, lists, dicts and numbers are -- do not trust this file"
        )
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    return f"{path}: not readable by torch ({first}) -- truncated or damaged; record it again"


def integers(tensor: Any, dimensions: int, where: str) -> NDArray[Any]:
    """Return a tensor of whole numbers as an array, without a copy.

    Raises
    ------
    InputError
        If it is no tensor, of other numbers, of other dimensions, or larger than its data.
    """
    torch = _torch()
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
        raise InputError(f"{where}: a {type(tensor).__name__} -- a plain tensor of integers")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.ndim != dimensions:
        raise InputError(
            f"{where}: {tensor.dtype}{list(tensor.shape)} -- integers in {dimensions} dimensions"
        )
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise InputError(
            f"{where}: declares {list(tensor.shape)}, more than its data -- damaged; record it "
            "again"
        )
    array: NDArray[Any] = tensor.numpy()
    if array.dtype.kind not in "iu":
        raise InputError(f"{where}: {array.dtype} -- integers")
    return array


def whole_numbers(values: Any, where: str) -> NDArray[np.int64]:
    """Return a list of whole numbers as an array.

    Raises
    ------
    InputError
        If it is something else.
    """
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise InputError(f"{where}: a list of whole numbers is needed -- record it again")
    try:
        return np.array(values, np.int64)
    except OverflowError:
        raise InputError(f"{where}: numbers beyond 64 bits -- record it again") from None
