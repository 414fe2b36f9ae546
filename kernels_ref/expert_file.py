"""The SSD tier of offloaded experts: a file of equally large records, one expert's weights each.

Records are read one by one into one page-aligned buffer. Reads bypass the page cache (O_DIRECT)
where the file system lets them, and the file says of itself whether they do.
A file is one block of header (JSON), then the records, each padded to whole blocks of 4096 bytes.
"""

import contextlib
import ctypes
import errno
import json
import mmap
import os
from collections.abc import Iterable
from math import prod
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

_LARGE = 2**21  # bytes of a large page
_BLOCK = 4096  # bytes; a multiple of every logical sector size, which direct reads must keep to
_FORMAT = "moeplan experts 1"
_DTYPES = {
    str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)
}
_Path = str | os.PathLike[str]


class _Header(NamedTuple):
    """What the first block says."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    records: int

    @property
    def record_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def stride(self) -> int:
        """Bytes from one record to the next."""
        return -(-self.record_bytes // _BLOCK) * _BLOCK


def write_expert_file(path: _Path, tensors: Iterable[Tensor]) -> None:
    """Write one record per tensor; the tensors are taken one by one and not kept.

    Parameters
    ----------
    path
        File to write; an existing one is replaced.
    tensors
        At least one, all of one shape and dtype, at least one element each.

    Raises
    ------
    ValueError
        When there is none, they differ, or they are empty.

    Notes
    -----
    The header is written last: a file that was not finished is not taken for one.
    """
    kind, records = None, 0
    with open(path, "wb") as file:  # noqa: PTH123 (any path-like)
        file.write(bytes(_BLOCK))
        for tensor in tensors:
            kind = kind or (tensor.dtype, tuple(tensor.shape))
            if (tensor.dtype, tuple(tensor.shape)) != kind or not tensor.numel():
                raise ValueError(
                    f"record {records} is {tensor.dtype} {tuple(tensor.shape)} -- allowed is one "
                    f"shape and dtype ({kind[0]} {kind[1]}), not empty -- write other experts to "
                    "another file"
                )
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            file.write(data.data)
            file.write(bytes(-data.nbytes % _BLOCK))
            records += 1
        if kind is None:
            raise ValueError("no tensors -- allowed is one record or more -- give the experts")
        file.seek(0)
        file.write(_pack(_Header(*kind, records)))
        file.flush()
        os.fsync(file.fileno())


def _pack(header: _Header) -> bytes:
    text = json.dumps(
        {
            "format": _FORMAT,
            "dtype": str(header.dtype).removeprefix("torch."),
            "shape": header.shape,
            "records": header.records,
        }
    )
    return text.encode().ljust(_BLOCK)


def _unpack(block: bytes, size: int, path: str) -> _Header:
    """Header of a file of so many bytes; whatever the file holds, nothing but a header passes."""
    try:
        said: Any = json.loads(block)
        header = _Header(_DTYPES[said["dtype"]], tuple(said["shape"]), said["records"])
        counts = (*header.shape, header.records)
        good = said["format"] == _FORMAT and all(type(n) is int and n > 0 for n in counts)
    except (ValueError, LookupError, TypeError, RecursionError):
        good = False
    if not good:
        raise ValueError(
            f"{path}: not a finished expert file -- allowed is what write_expert_file writes -- "
            "write it again"
        )
    expected = _BLOCK + header.records * header.stride
    if size != expected:
        raise ValueError(f"{path}: {size} bytes -- its header says {expected} -- write it again")
    return header


class ExpertFile:
    """Experts' weights on the SSD tier, read record by record into one buffer of host memory.

    The buffer's pages are there from the start, so that reading is all that a read does. Use it
    as a context manager, or close it.

    Parameters
    ----------
    path
        A file of `write_expert_file`.

    Attributes
    ----------
    records : int
        Records in the file.
    shape, dtype
        Of every record.
    record_bytes : int
        Bytes of one record's weights.
    read_bytes : int
        Bytes that one read takes from the file, padding included.
    tier : "disk" or "page cache"
        Where reads come from: past the operating system's page cache, or through it. "disk" is
        said only if a read at opening was direct and left no page in the cache. Caches below the
        file system (a controller's, a hypervisor's, ZFS's own) cannot be seen from here.

    Raises
    ------
    ValueError
        When the file is not one of experts, or is cut off.
    OSError
        When the file cannot be opened or read.
    """

    records: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    record_bytes: int
    read_bytes: int
    tier: Literal["disk", "page cache"]

    def __init__(self, path: _Path) -> None:
        block = _pages(_BLOCK)
        self._path = os.fspath(path)
        self._fd, direct = _open(self._path, block)
        try:
            header = _unpack(bytes(block), os.fstat(self._fd).st_size, self._path)
            self.tier = "disk" if direct and _bypasses_cache(self._fd, block) else "page cache"
            self._buffer = _large_pages(header.stride)
        except BaseException:
            self.close()
            raise
        self.records, self.shape, self.dtype = header.records, header.shape, header.dtype
        self.record_bytes, self.read_bytes = header.record_bytes, header.stride
        flat = torch.frombuffer(self._buffer, dtype=self.dtype, count=prod(self.shape))
        self._weights = flat.view(self.shape)

    def read(self, record: int) -> Tensor:
        """Read one record into the buffer.

        Parameters
        ----------
        record
            ``0..records - 1``.

        Returns
        -------
        Tensor
            A view of the buffer, of the file's shape and dtype: the next read changes it.

        Raises
        ------
        ValueError
            When the record is out of range, the file is closed, or it was cut off meanwhile.
        """
        if not 0 <= record < self.records:
            raise ValueError(
                f"record {record} -- allowed is 0 to {self.records - 1} -- ask for one of these"
            )
        if self._fd < 0:
            raise ValueError(
                f"{self._path} is closed -- allowed is an open file -- read within its context"
            )
        _fill(self._fd, self._buffer, _BLOCK + record * self.read_bytes)
        return self._weights

    def close(self) -> None:
        """Close the file; the last record read stays as it is for as long as somebody holds it."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> Self:
        """Nothing more to open."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _pages(size: int) -> mmap.mmap:
    """Page-aligned private memory whose pages are there from the start."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0)
    return mmap.mmap(-1, size, flags=flags)


def _large_pages(size: int) -> memoryview:
    """Private memory in large pages, where the system has them.

    A direct read goes to the drive in pieces of contiguous memory. In pages of 4 KiB their number
    is chance, and with it how long a read takes, from one buffer to the next.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    found = mmap.mmap(-1, -(-size // _LARGE) * _LARGE + _LARGE, flags=flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            found.madvise(mmap.MADV_HUGEPAGE)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(found)) % _LARGE
    buffer = memoryview(found)[start : start + size]
    buffer[:] = bytes(size)  # its pages are there from the start
    return buffer


def _fill(fd: int, target: memoryview, offset: int) -> None:
    """Read until the target is full; the system may stop early, at a signal for example."""
    filled = 0
    while filled < len(target):
        got = os.preadv(fd, [target[filled:]], offset + filled)
        if not got:
            raise ValueError(
                f"the file ends at byte {offset + filled} -- allowed is a whole record -- write "
                "it again"
            )
        filled += got


def _open(path: str, block: mmap.mmap) -> tuple[int, bool]:
    """Descriptor with the first block read, and whether its reads are direct."""
    if hasattr(os, "O_DIRECT"):
        try:
            return _open_and_read(path, os.O_RDONLY | os.O_DIRECT, block), True
        except OSError as refused:  # a file system may do so on opening or on reading
            if refused.errno != errno.EINVAL:
                raise
    return _open_and_read(path, os.O_RDONLY, block), False


def _open_and_read(path: str, flags: int, block: mmap.mmap) -> int:
    fd = os.open(path, flags)
    try:
        os.preadv(fd, [block], 0)
    except OSError:
        os.close(fd)
        raise
    return fd


def _bypasses_cache(fd: int, block: mmap.mmap) -> bool:
    """Whether reading the first block leaves it out of the page cache.

    Some file systems accept O_DIRECT and read through memory all the same (tmpfs lives there).
    mincore(2) tells which pages of a mapping are cached; to a user who may not write the file it
    answers that all are, and this then says no.
    """
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # what others left there
    os.preadv(fd, [block], 0)
    with mmap.mmap(fd, _BLOCK, access=mmap.ACCESS_COPY) as mapping:
        first = ctypes.c_char.from_buffer(mapping)
        cached = ctypes.c_ubyte()
        failed = ctypes.CDLL(None).mincore(
            ctypes.c_void_p(ctypes.addressof(first)),
            ctypes.c_size_t(_BLOCK),
            ctypes.byref(cached),
        )
        del first  # the mapping cannot close while something points into it
    return not failed and not cached.value & 1
