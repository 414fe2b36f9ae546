"""Writing files so that nothing is lost: no output over an input, no half of a file."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from basis.errors import InputError


def refuse_same(outputs: Iterable[Path | None], inputs: Iterable[Path | None]) -> None:
    """Refuse outputs that would be written over an input, into a folder of input, or twice.

    Parameters
    ----------
    outputs, inputs
        Files, or folders that are read as a whole; None stands for an option that was not given.

    Raises
    ------
    InputError
        If an output is one of the inputs by whatever name, lies in one, or is named twice.
    """
    seen: list[Path] = []
    read = [path for path in inputs if path]
    for out in filter(None, outputs):
        for path in read:
            if _same(out, path):
                raise InputError(
                    f"{out}: source and target are the same file -- name another target"
                )
            if path.is_dir() and path.resolve() in out.resolve().parents:
                raise InputError(
                    f"{out}: the target lies in {path}, which is read -- name a target elsewhere"
                )
        if any(_same(out, other) for other in seen):
            raise InputError(f"{out}: named twice as a target -- give each its own name")
        seen.append(out)


def _same(one: Path, other: Path) -> bool:
    if one.exists() and other.exists():
        return one.samefile(other)
    return one.resolve() == other.resolve()


def check_file(path: Path, wanted: str) -> None:
    """Refuse what is no file to read.

    Raises
    ------
    InputError
        If it is missing or a folder; ``wanted`` says what to give instead.
    """
    if path.is_dir():
        raise InputError(f"{path}: a folder -- give {wanted}")
    if not path.is_file():
        raise InputError(f"{path}: no such file -- give {wanted}")


def check_target(path: Path) -> None:
    """Refuse a file to write that is a folder, or lies in none, before any work is done.

    Raises
    ------
    InputError
        In these cases.
    """
    if path.is_dir():
        raise InputError(f"{path}: a folder -- name a file to write")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such folder -- make it first")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name to write to, which becomes ``path`` when the block ends without an error.

    Otherwise what is at ``path`` stays as it was, and nothing is left beside it. A device or a pipe
    is written to directly.

    Raises
    ------
    InputError
        If ``path`` cannot be written; names it.
    """
    check_target(path)
    target = path.resolve()  # a link stays one
    device = target.exists() and not target.is_file()
    partial = target if device else target.with_name(target.name + ".partial")
    try:
        yield partial
        if not device:
            partial.replace(target)
    except OSError as error:
        if not error.errno or str(error.filename or partial) != str(partial):
            raise  # of another file
        raise InputError(
            f"{path}: not written ({os.strerror(error.errno)}) -- make room, or name another target"
        ) from error
    finally:
        if not device:
            partial.unlink(missing_ok=True)
